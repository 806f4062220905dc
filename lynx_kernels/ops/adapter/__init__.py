"""The bottleneck adapter of Lynx: LayerNorm, down-projection, activation, up-projection, learned scale, residual."""

import torch
from torch import Tensor

from lynx_kernels.backends import dispatch
from lynx_kernels.backends import triton as triton_backend
from lynx_kernels.backends.dtypes import acc_dtype
from lynx_kernels.backends.registration import autocast_to, define
from lynx_kernels.ops.adapter import cpu, cuda, reference
from lynx_kernels.ops.adapter.activations import ACTIVATIONS

OPERATION = dispatch.Operation(
    "adapter",
    dispatch.Implementation(
        "cuda", cuda.forward, unsupported_reason=cuda.unsupported_reason, not_preferred_reason=cuda.not_preferred_reason
    ),
    dispatch.Implementation(
        "triton",
        triton_backend.lazy("lynx_kernels.ops.adapter.triton", "forward"),
        triton_backend.lazy("lynx_kernels.ops.adapter.triton", "backward"),
        unsupported_reason=triton_backend.unsupported_reason,
        not_preferred_reason=triton_backend.not_preferred_reason,
    ),
    dispatch.Implementation("cpu", cpu.forward, cpu.backward, cpu.unsupported_reason),
    dispatch.Implementation("reference", reference.forward, reference.backward),
)


def adapter(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    down_weight: Tensor,
    down_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    scale: Tensor,
    *,
    eps: float = 1e-5,
    activation: str = "silu",
    impl: str | None = None,
) -> Tensor:
    """``x + scale * (act(LayerNorm(x) Wd^T + bd) Wu^T + bu)``, the adapter of Lynx (arXiv 2307.02469, section 2.2).

    Args:
        x: (..., d), fp64, fp32, fp16 or bf16.
        norm_weight, norm_bias: (d,) of the LayerNorm; no weight means no LayerNorm, no bias none.
        down_weight, down_bias: (r, d) and (r,) of the projection into the bottleneck; the bias may be None.
        up_weight, up_bias: (d, r) and (d,) of the projection out of it; the bias may be None.
        scale: one element, the learned weight of the branch.
        eps: added to the LayerNorm's variance.
        activation: ``"silu"``, ``"relu"``, ``"gelu"`` (exact) or ``"gelu_tanh"``.
        impl: an implementation by name; None takes the best that can run.

    Both products run in the dtype of the weights (under autocast, in the autocast dtype), LayerNorm's statistics and
    the residual sum in at least fp32. Saved for backward: x, two statistics a token and the pre-activation.

    Returns:
        (..., d) in the dtype of x.

    Raises:
        ValueError: shapes, devices or the activation do not fit; the message names the argument.
        TypeError: an argument is not floating point, the two weights differ in dtype, or one is a DTensor.
    """
    _check(x, norm_weight, norm_bias, down_weight, down_bias, up_weight, up_bias, scale, activation)
    impl = OPERATION.choose(impl, x, norm_weight, norm_bias, down_weight, down_bias, up_weight, up_bias, scale)
    out, _, _, _ = _FORWARD(
        x.reshape(-1, x.shape[-1]), norm_weight, norm_bias, down_weight, down_bias, up_weight, up_bias, scale,
        eps, activation, impl,
    )  # fmt: skip
    return out.view(x.shape)


def _check(x, norm_weight, norm_bias, down_weight, down_bias, up_weight, up_bias, scale, activation) -> None:
    tensors = {
        "x": x, "norm_weight": norm_weight, "norm_bias": norm_bias, "down_weight": down_weight,
        "down_bias": down_bias, "up_weight": up_weight, "up_bias": up_bias, "scale": scale,
    }  # fmt: skip
    dispatch.refuse_dtensors("adapter", **tensors)
    dispatch.require_floating("adapter", **tensors)
    dispatch.require_same_device("adapter", x.device, **tensors)
    if x.dim() == 0 or down_weight.dim() != 2:
        raise ValueError(
            f"adapter: x must be (..., d) and down_weight (r, d), got {tuple(x.shape)} and {tuple(down_weight.shape)}"
        )
    d, r = x.shape[-1], down_weight.shape[0]
    expected = {
        "norm_weight": (d,), "norm_bias": (d,), "down_weight": (r, d), "down_bias": (r,),
        "up_weight": (d, r), "up_bias": (d,),
    }  # fmt: skip
    for name, shape in expected.items():
        if tensors[name] is not None and tensors[name].shape != shape:
            raise ValueError(
                f"adapter: {name} has shape {tuple(tensors[name].shape)}, expected {shape} (d={d} from x, r={r} "
                "from down_weight)"
            )
    if scale.numel() != 1:
        raise ValueError(f"adapter: scale must have one element, got shape {tuple(scale.shape)}")
    if norm_weight is None and norm_bias is not None:
        raise ValueError("adapter: norm_bias without norm_weight; pass both, the weight alone, or neither")
    if up_weight.dtype != down_weight.dtype:
        raise TypeError(f"adapter: up_weight is {up_weight.dtype}, down_weight {down_weight.dtype}; use one dtype")
    if activation not in ACTIVATIONS:
        raise ValueError(f"adapter: activation={activation!r}, expected one of {sorted(ACTIVATIONS)}")


def _forward_fake(x, norm_weight, norm_bias, down_weight, *rest):
    statistics = (x.shape[0] if norm_weight is not None else 0,)
    statistics_dtype = acc_dtype(x.dtype)
    return (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        x.new_empty(statistics, dtype=statistics_dtype),
        x.new_empty(statistics, dtype=statistics_dtype),
        down_weight.new_empty((x.shape[0], down_weight.shape[0])),
    )


def _backward_fake(grad, x, norm_weight, norm_bias, down_weight, down_bias, up_weight, up_bias, scale, *rest):
    _, _, _, _, needs, _ = rest
    inputs = (x, norm_weight, norm_bias, down_weight, down_bias, up_weight, up_bias, scale)
    return [
        torch.empty_like(tensor, memory_format=torch.contiguous_format)
        for tensor, needed in zip(inputs, needs, strict=True)
        if needed
    ]


def _setup_context(ctx, inputs, output) -> None:
    *tensors, _eps, activation, impl = inputs
    _, mean, rstd, preactivation = output
    ctx.save_for_backward(*tensors, mean, rstd, preactivation)
    ctx.activation, ctx.impl = activation, impl
    ctx.set_materialize_grads(False)


def _autograd(ctx, grad, *unused):
    if grad is None:
        return (None,) * 11
    *tensors, mean, rstd, preactivation = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:8])
    gradients = iter(_BACKWARD(grad, *tensors, mean, rstd, preactivation, ctx.activation, needs, ctx.impl))
    return (*(next(gradients) if needed else None for needed in needs), None, None, None)


def _autocast(dtype, x, norm_weight, norm_bias, down_weight, down_bias, up_weight, *rest):
    return (x, norm_weight, norm_bias, autocast_to(down_weight, dtype), down_bias, autocast_to(up_weight, dtype), *rest)


_ARGUMENTS = (
    "Tensor x, Tensor? norm_weight, Tensor? norm_bias, Tensor down_weight, Tensor? down_bias, Tensor up_weight, "
    "Tensor? up_bias, Tensor scale"
)
_BACKWARD = define(
    f"adapter_backward(Tensor grad, {_ARGUMENTS}, Tensor mean, Tensor rstd, Tensor preactivation, str activation, "
    "bool[] needs, str impl) -> Tensor[]",
    OPERATION.backward,
    fake=_backward_fake,
)
_FORWARD = define(
    f"adapter({_ARGUMENTS}, float eps, str activation, str impl) -> (Tensor, Tensor, Tensor, Tensor)",
    OPERATION.forward,
    fake=_forward_fake,
    autograd=(_setup_context, _autograd),
    autocast=_autocast,
)
