"""The loss of a language model from its last hidden states: output head and cross entropy in one operation."""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lynx_kernels.backends import dispatch
from lynx_kernels.backends import triton as triton_backend
from lynx_kernels.backends.registration import define
from lynx_kernels.layout import require
from lynx_kernels.ops.head_common import plain
from lynx_kernels.ops.head_common.chunked import summed_dtype
from lynx_kernels.ops.head_common.operator import (
    autocast,
    backward_fake,
    check,
    check_entries,
    needs_of,
    triton_score,
    triton_unsupported_reason,
)
from lynx_kernels.ops.linear_cross_entropy import chunked, reference
from lynx_kernels.ops.linear_cross_entropy.call import (
    LinearCrossEntropyBackwardCall,
    LinearCrossEntropyCall,
    head_call,
)

_REDUCTIONS = ("mean", "sum", "none")

OPERATION = dispatch.Operation(
    "linear_cross_entropy",
    LinearCrossEntropyCall,
    LinearCrossEntropyBackwardCall,
    dispatch.Implementation(
        "triton",
        partial(chunked.forward, triton_score),
        partial(chunked.backward, triton_score),
        architectures=triton_backend.ARCHITECTURES,
        unsupported_reason=triton_unsupported_reason,
        not_preferred_reason=triton_backend.not_preferred_reason,
    ),
    dispatch.Implementation("chunked", partial(chunked.forward, plain.score), partial(chunked.backward, plain.score)),
    dispatch.Implementation("reference", reference.forward, reference.backward),
)


def _call(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    predictors: Tensor | None,
    weights: Tensor | None,
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    label_smoothing: float,
    ignore_index: int,
    reduction: str,
    num_items: int | float | Tensor | None,
    max_supervised: int | None,
) -> LinearCrossEntropyCall:
    call = LinearCrossEntropyCall(
        hidden, weight, labels, predictors, weights, bias, softcap, logit_scale, label_smoothing, ignore_index,
        max_supervised, sums=False, needs=[False] * 3,
    )  # fmt: skip
    check(head_call(call))
    counts = {"num_items": num_items} if isinstance(num_items, Tensor) else {}
    dispatch.refuse_dtensors("linear_cross_entropy", weights=weights, **counts)
    if weights is not None:
        dispatch.require_floating("linear_cross_entropy", weights=weights)
        dispatch.require_same_device("linear_cross_entropy", hidden.device, weights=weights)
        check_entries("linear_cross_entropy", labels, weights=weights)
        if torch.is_grad_enabled() and weights.requires_grad:
            raise ValueError("linear_cross_entropy: weights requires a gradient, but gets none; pass weights.detach()")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"linear_cross_entropy: label_smoothing={label_smoothing}, expected 0 to 1")
    if reduction not in _REDUCTIONS:
        raise ValueError(f"linear_cross_entropy: reduction={reduction!r}, expected one of {_REDUCTIONS}")
    if num_items is not None and reduction != "mean":
        raise ValueError(
            f"linear_cross_entropy: num_items needs reduction='mean', got {reduction!r}; omit it or use 'mean'"
        )
    if num_items is not None and not isinstance(num_items, Tensor):
        dispatch.require_finite("linear_cross_entropy", least=0, num_items=num_items)
    if isinstance(num_items, Tensor) and num_items.dim() != 0:
        raise ValueError(f"linear_cross_entropy: num_items has shape {tuple(num_items.shape)}, expected () or a number")
    if max_supervised is not None and max_supervised < 0:
        raise ValueError(f"linear_cross_entropy: max_supervised={max_supervised}, expected at least 0")
    return call


@OPERATION.explained_by(_call)
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    predictors: Tensor | None = None,
    weights: Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    num_items: int | float | Tensor | None = None,
    max_supervised: int | None = None,
    impl: str | None = None,
) -> Tensor:
    """The cross entropy of labels with the logits of the rows that predict them, without the (T, V) logits.

    Entry i of the N entries scores ``labels[i]`` with the logits of row ``predictors[i]``:
    ``softcap * tanh(logit_scale * (hidden @ weight.T + bias) / softcap)``. Its loss is
    ``weights[i] * cross_entropy(logits[predictors[i]], labels[i])``, as ``torch.nn.functional.cross_entropy`` defines
    it. It is 0, and the entry is not counted, where its label is ignore_index or its predictor -1.

    Args:
        hidden: (T, d), fp64, fp32, fp16 or bf16. Rows that predict nothing that is counted may hold anything, even NaN;
            their gradient is 0.
        weight: (V, d), fp64, fp32, fp16 or bf16, the weight of the output head.
        labels: (N,) int64, each in [0, V) or ignore_index.
        predictors: (N,) int64 or int32, each a row of hidden or -1. A row may predict several labels. None: N = T, and
            row i predicts ``labels[i]``; labels are already shifted.
        weights: (N,) floating point, used in the dtype of the result. Finite, and if ``"mean"`` divides by their sum
            not negative; where an entry is not counted, anything. They get no gradient.
        bias: (V,) floating point, added to the products in at least fp32.
        softcap: above 0; None for logits without a cap.
        logit_scale: the factor of the logits, before the cap.
        label_smoothing: in [0, 1], as in ``torch.nn.functional.cross_entropy``.
        ignore_index: the label of entries that are not counted.
        reduction: ``"mean"`` divides the sum of the losses by the sum of the weights of counted entries, or without
            weights by their number. ``"sum"`` does not divide, ``"none"`` returns the loss of each entry.
        num_items: a finite number of at least 0, or a tensor of shape () with one. ``"mean"`` divides by it instead
            (transformers' ``num_items_in_batch``).
        max_supervised: an upper bound of the number of counted entries, if the host knows one when it builds the batch.
            The host does not read labels on a GPU. There only so many rows reach the projection; without the bound
            min(N, T) rows do. On CPUs the counted entries are counted, and the bound is only checked.
        impl: the name of an implementation; None takes the best that can run.

    A mean over 0 items divides by 1, so that without counted entries the loss and its gradients are 0, not NaN. Logits
    and loss are in fp32, or fp64 if hidden, weight or bias is fp64 (``"chunked"`` on CPUs rounds bf16 products to
    bf16). Under autocast hidden and weight are first cast to its dtype.

    The gradient of a row that predicts several labels is their sum, always added in the same order. The gradient of a
    frozen weight or bias is not computed. For ``"mean"`` and ``"sum"``, ``"triton"`` and ``"chunked"`` compute the
    needed gradients in forward and save them for backward: hidden's (T, d) in its dtype; if they train, the weight's
    (V, d) and the bias's (V,) in their dtypes (fp32 for fp16). For ``"none"``, and by ``"reference"``, only the
    arguments are saved, and backward computes the logits again. ``"triton"`` uses the same products as ``"chunked"``
    and one kernel for what lies between them.

    Returns:
        () or, with ``"none"``, (N,), in fp32, or fp64 if hidden, weight or bias is fp64.

    Raises:
        ValueError: a shape, a device or an option is invalid, weights require a gradient, or a counted weight is not
            finite, or negative where that is not allowed; the message names the argument.
        TypeError: an argument has the wrong dtype or is a DTensor.
        IndexError: a label or a predictor is out of range. On a GPU this is a device-side assertion, and so are invalid
            weights, an invalid num_items in a tensor and a violated max_supervised.
    """
    call = _call(
        hidden, weight, labels, predictors, weights, bias, softcap, logit_scale, label_smoothing, ignore_index,
        reduction, num_items, max_supervised,
    )  # fmt: skip
    impl = OPERATION.choose(impl, call)
    is_counted = labels != ignore_index
    if predictors is not None:
        is_counted = is_counted & (predictors != -1)
    is_mean_of_counted = reduction == "mean" and num_items is None
    unit = None
    if weights is not None:
        weights, unit = _in_units(
            weights, is_counted, head_call(call).acc_dtype, may_be_negative=not is_mean_of_counted
        )
    sums = reduction != "none" and impl != "reference"
    call = call._replace(weights=weights, sums=sums, needs=needs_of(call) if sums else [False] * 3)
    losses, *_ = _FORWARD(*call, impl)
    if reduction != "none" and not sums:
        losses = losses.sum()
    if isinstance(num_items, Tensor):
        is_right = (num_items >= 0) & num_items.isfinite()
        require(is_right, "linear_cross_entropy: num_items has a value that is not finite, or below 0")
    if is_mean_of_counted:
        num_items = is_counted.sum() if weights is None else weights.sum()  # in the same units
    elif unit is not None:
        losses = losses * unit
    if num_items is None:
        return losses
    return losses / (torch.where(num_items == 0, 1, num_items) if isinstance(num_items, Tensor) else num_items or 1)


def _in_units(
    weights: Tensor, is_counted: Tensor, dtype: torch.dtype, *, may_be_negative: bool
) -> tuple[Tensor, Tensor]:
    """The weights of counted entries in units of the largest, others 0; and the unit. Gradients in fp16 would underflow
    under small weights, which the unit multiplies later."""
    weights = torch.where(is_counted, weights.to(dtype), 0)
    require(
        weights.isfinite().all(), f"linear_cross_entropy: weights has a counted value that is not finite in {dtype}"
    )
    if not may_be_negative:
        require(
            (weights >= 0).all(),
            "linear_cross_entropy: weights has a negative value, and 'mean' divides by their sum; pass num_items, or "
            "use reduction='sum'",
        )
    unit = F.pad(weights.abs(), (0, 1)).amax()
    unit = torch.where(unit == 0, 1, unit)
    return weights / unit, unit


def _forward_fake(call: LinearCrossEntropyCall) -> tuple[Tensor, ...]:
    losses = call.hidden.new_empty(() if call.sums else call.labels.shape, dtype=head_call(call).acc_dtype)
    summed = [
        None if each is None else each.new_empty(each.shape, dtype=summed_dtype(each))
        for each in (call.weight, call.bias)
    ]
    gradients = zip((call.hidden.new_empty(call.hidden.shape), *summed), call.needs, strict=True)
    return losses, *(each if needed and each is not None else call.hidden.new_empty(0) for each, needed in gradients)


def _setup_context(ctx: Any, call: LinearCrossEntropyCall, impl: str, output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.sums, ctx.impl = call.sums, impl
    if call.sums:
        ctx.dtypes = [None if each is None else each.dtype for each in (call.hidden, call.weight, call.bias)]
        ctx.save_for_backward(*output[1:])
    else:
        ctx.options = call[6:-2]  # all between the tensors and sums
        ctx.save_for_backward(*call[:6])


def _autograd(ctx: Any, grad: Tensor | None, *grads_of_gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    if any(each is not None and each.numel() for each in grads_of_gradients):
        raise NotImplementedError("lynx_kernels::linear_cross_entropy has no second derivatives")
    hidden = weight = bias = None
    needs = [ctx.needs_input_grad[each] for each in (0, 1, 5)]
    if grad is not None and ctx.sums:
        found = zip(needs, ctx.saved_tensors, ctx.dtypes, strict=True)
        hidden, weight, bias = ((each * grad).to(dtype) if needed else None for needed, each, dtype in found)
    elif grad is not None:
        gradients = iter(_BACKWARD(grad, *ctx.saved_tensors, *ctx.options, needs, ctx.impl))
        hidden, weight, bias = (next(gradients) if needed else None for needed in needs)
    return hidden, weight, None, None, None, bias, *[None] * 7


_BACKWARD = define(
    "linear_cross_entropy_backward",
    LinearCrossEntropyBackwardCall,
    "Tensor[]",
    OPERATION.backward,
    fake=backward_fake,
)
_FORWARD = define(
    "linear_cross_entropy",
    LinearCrossEntropyCall,
    "(Tensor, Tensor, Tensor, Tensor)",
    OPERATION.forward,
    fake=_forward_fake,
    autograd=(_setup_context, _autograd),
    autocast=autocast,
)
