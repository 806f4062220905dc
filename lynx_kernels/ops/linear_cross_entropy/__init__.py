"""The loss of a language model from its last hidden states: output head and cross entropy in one operation."""

from typing import Any

import torch
from torch import Tensor

from lynx_kernels.backends import dispatch
from lynx_kernels.backends.dtypes import acc_dtype
from lynx_kernels.backends.registration import autocast_to, define
from lynx_kernels.ops.linear_cross_entropy import chunked, reference
from lynx_kernels.ops.linear_cross_entropy.call import LossCall, LossesBackwardCall, LossesCall, LossSumCall
from lynx_kernels.ops.linear_cross_entropy.rows import compute_dtype

_REDUCTIONS = ("mean", "sum", "none")


def _check(call: LossCall) -> None:
    hidden, weight, shift_labels, label_smoothing, _, reduction, num_items, max_supervised = call
    tensors = {"hidden": hidden, "weight": weight, "shift_labels": shift_labels}
    counts = {"num_items": num_items} if isinstance(num_items, Tensor) else {}
    dispatch.refuse_dtensors("linear_cross_entropy", **tensors, **counts)
    dispatch.require_floating("linear_cross_entropy", hidden=hidden, weight=weight)
    dispatch.require_same_device("linear_cross_entropy", hidden.device, **tensors)
    if shift_labels.dtype != torch.int64:
        raise TypeError(f"linear_cross_entropy: shift_labels is {shift_labels.dtype}, expected torch.int64")
    if hidden.dim() != 2:
        raise ValueError(f"linear_cross_entropy: hidden has shape {tuple(hidden.shape)}, expected (T, d)")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[1]:
        raise ValueError(
            f"linear_cross_entropy: weight has shape {tuple(weight.shape)}, expected (V, {hidden.shape[1]}), as "
            "wide as hidden"
        )
    if shift_labels.dim() != 1 or shift_labels.shape[0] != hidden.shape[0]:
        raise ValueError(
            f"linear_cross_entropy: shift_labels has shape {tuple(shift_labels.shape)}, expected "
            f"({hidden.shape[0]},), one label per row of hidden"
        )
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"linear_cross_entropy: label_smoothing={label_smoothing}, expected 0 to 1")
    if reduction not in _REDUCTIONS:
        raise ValueError(f"linear_cross_entropy: reduction={reduction!r}, expected one of {_REDUCTIONS}")
    if num_items is not None and reduction != "mean":
        raise ValueError(
            f"linear_cross_entropy: num_items needs reduction='mean', got {reduction!r}; omit it or use 'mean'"
        )
    if isinstance(num_items, int | float) and num_items < 0:
        raise ValueError(f"linear_cross_entropy: num_items={num_items}, expected at least 0")
    if isinstance(num_items, Tensor) and num_items.dim() != 0:
        raise ValueError(f"linear_cross_entropy: num_items has shape {tuple(num_items.shape)}, expected () or a number")
    if max_supervised is not None and max_supervised < 0:
        raise ValueError(f"linear_cross_entropy: max_supervised={max_supervised}, expected at least 0")


def _sum(call: LossCall) -> Tensor:
    """The sum of the losses, from the operator that computes the gradients in forward."""
    needs = [torch.is_grad_enabled() and each.requires_grad for each in (call.hidden, call.weight)]
    max_supervised = call.shift_labels.shape[0] if call.max_supervised is None else call.max_supervised
    return _SUM(*LossSumCall(*call[:5], max_supervised, needs), "chunked")[0]


def _losses(call: LossCall) -> Tensor:
    """The loss of each row, or the sum of all."""
    losses = _LOSSES(*call[:5], "reference")
    return losses if call.reduction == "none" else losses.sum()


OPERATION = dispatch.Operation(
    "linear_cross_entropy",
    LossCall,
    None,
    dispatch.Implementation("chunked", _sum, unsupported_reason=chunked.unsupported_reason),
    dispatch.Implementation("reference", _losses),
    check=_check,
)


@OPERATION.explained_by(LossCall)
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    shift_labels: Tensor,
    *,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    num_items: int | Tensor | None = None,
    max_supervised: int | None = None,
    impl: str | None = None,
) -> Tensor:
    """``cross_entropy(hidden @ weight.T, shift_labels)`` at the supervised rows, without the (T, V) logits.

    A head with a bias, a soft cap or a logit scale is not supported. Compute its logits and their loss directly.

    Args:
        hidden: (T, d), fp64, fp32, fp16 or bf16.
        weight: (V, d), fp64, fp32, fp16 or bf16, the weight of the output head.
        shift_labels: (T,) int64, the target of each row, already shifted: in [0, V), or ignore_index.
        label_smoothing: in [0, 1], as in ``torch.nn.functional.cross_entropy``.
        ignore_index: the label of unsupervised rows. Their loss and gradient are 0, even if hidden holds NaN there.
        reduction: ``"mean"`` divides the sum by the number of supervised rows, ``"sum"`` does not, ``"none"`` returns
            the loss of each row.
        num_items: a number or a tensor of shape (). ``"mean"`` divides by it instead (transformers'
            ``num_items_in_batch``).
        max_supervised: an upper bound of the number of supervised rows, if the host knows one when it builds the
            batch. The host does not read labels on a GPU. There only this many rows reach the projection; without the
            bound all rows do. On CPUs the supervised rows are counted, and the bound is only checked.
        impl: the name of an implementation; None takes the best that can run.

    A mean over 0 items divides by 1, so that without supervised rows the loss and its gradients are 0, not NaN. Logits
    and loss are in fp32, or fp64 if an input is fp64 (``"chunked"`` on CPUs rounds bf16 logits to bf16). Under autocast
    hidden and weight are first cast to its dtype. The gradient of a frozen weight is not computed. ``"chunked"``, for
    ``"mean"`` and ``"sum"``, computes the needed gradients in forward and saves them for backward: (T, d) in hidden's
    dtype and, if the weight trains, (V, d) in the weight's dtype (fp32 for fp16). ``"reference"`` saves only the
    arguments.

    Returns:
        () or, with ``"none"``, (T,), in fp32, or fp64 if an input is fp64.

    Raises:
        ValueError: a shape, a device or an option is invalid; the message names the argument.
        TypeError: an argument has the wrong dtype or is a DTensor.
        IndexError: a label is out of range. On a GPU this is a device-side assertion, and so is a violated
            max_supervised.
    """
    call = LossCall(
        hidden, weight, shift_labels, label_smoothing, ignore_index, reduction, num_items, max_supervised
    )  # fmt: skip
    total = OPERATION.forward(*call, OPERATION.choose(impl, call))
    if reduction != "mean":
        return total
    if num_items is None:
        num_items = (shift_labels != ignore_index).sum()
    count = torch.where(num_items == 0, 1, num_items) if isinstance(num_items, Tensor) else num_items or 1
    return total / count


def _losses_fake(call: LossesCall) -> Tensor:
    return call.hidden.new_empty((call.hidden.shape[0],), dtype=acc_dtype(compute_dtype(call.hidden, call.weight)))


def _losses_backward_fake(call: LossesBackwardCall) -> list[Tensor]:
    return [
        torch.empty_like(tensor, memory_format=torch.contiguous_format)
        for tensor, needed in zip((call.hidden, call.weight), call.needs, strict=True)
        if needed
    ]


def _losses_setup_context(ctx: Any, call: LossesCall, impl: str, output: Tensor) -> None:
    hidden, weight, shift_labels, *ctx.options = call
    ctx.impl = impl
    ctx.save_for_backward(hidden, weight, shift_labels)


def _losses_autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[:2])
    gradients = iter(_LOSSES_BACKWARD(grad, *ctx.saved_tensors, *ctx.options, needs, ctx.impl))
    return (*(next(gradients) if needed else None for needed in needs), None, None, None)


def _sum_fake(call: LossSumCall) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight, needs = call.hidden, call.weight, call.needs
    return (
        hidden.new_empty((), dtype=acc_dtype(compute_dtype(hidden, weight))),
        hidden.new_empty(hidden.shape if needs[0] else 0),
        weight.new_empty(weight.shape if needs[1] else 0, dtype=chunked.summed_dtype(weight)),
    )


def _sum_setup_context(ctx: Any, call: LossSumCall, impl: str, output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.weight_dtype = call.weight.dtype
    ctx.save_for_backward(*output[1:])


def _sum_autograd(ctx: Any, grad: Tensor | None, *grads_of_gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    if any(each is not None for each in grads_of_gradients):
        raise RuntimeError("lynx_kernels::linear_cross_entropy_sum has no second derivatives")
    gradients: list[Tensor | None] = [None] * 7
    if grad is not None:
        grad_hidden, grad_weight = ctx.saved_tensors
        if ctx.needs_input_grad[0]:
            gradients[0] = grad_hidden * grad
        if ctx.needs_input_grad[1]:
            gradients[1] = (grad_weight * grad).to(ctx.weight_dtype)
    return tuple(gradients)


def _autocast(dtype: torch.dtype, call: Any) -> Any:
    return call._replace(hidden=autocast_to(call.hidden, dtype), weight=autocast_to(call.weight, dtype))


_LOSSES_BACKWARD = define(
    "linear_cross_entropy_backward",
    LossesBackwardCall,
    "Tensor[]",
    lambda *args: reference.backward(LossesBackwardCall(*args[:-1])),
    fake=_losses_backward_fake,
)
_LOSSES = define(
    "linear_cross_entropy",
    LossesCall,
    "Tensor",
    lambda *args: reference.forward(LossesCall(*args[:-1])),
    fake=_losses_fake,
    autograd=(_losses_setup_context, _losses_autograd),
    autocast=_autocast,
)
_SUM = define(
    "linear_cross_entropy_sum",
    LossSumCall,
    "(Tensor, Tensor, Tensor)",
    lambda *args: chunked.forward(LossSumCall(*args[:-1])),
    fake=_sum_fake,
    autograd=(_sum_setup_context, _sum_autograd),
    autocast=_autocast,
)
