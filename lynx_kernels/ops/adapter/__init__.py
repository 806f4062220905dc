"""The bottleneck adapter of Lynx: LayerNorm, down-projection, activation, up-projection, learned scale, residual."""

from typing import Any

import torch
from torch import Tensor

from lynx_kernels.backends import dispatch
from lynx_kernels.backends import triton as triton_backend
from lynx_kernels.backends.dtypes import acc_dtype
from lynx_kernels.backends.registration import autocast_to, define
from lynx_kernels.ops.adapter import cpu, cuda, reference
from lynx_kernels.ops.adapter.activations import ACTIVATIONS
from lynx_kernels.ops.adapter.call import AdapterBackwardCall, AdapterCall


def _check(call: AdapterCall) -> None:
    tensors = dict(zip(call._fields[:8], call.tensors, strict=True))
    dispatch.refuse_dtensors("adapter", **tensors)
    dispatch.require_floating("adapter", **tensors)
    dispatch.require_same_device("adapter", call.x.device, **tensors)
    if call.x.dim() == 0 or call.down_weight.dim() != 2:
        raise ValueError(
            f"adapter: x must be (..., d) and down_weight (r, d), got {tuple(call.x.shape)} and "
            f"{tuple(call.down_weight.shape)}"
        )
    d, r = call.x.shape[-1], call.down_weight.shape[0]
    expected = {
        "norm_weight": (d,), "norm_bias": (d,), "down_weight": (r, d), "down_bias": (r,),
        "up_weight": (d, r), "up_bias": (d,),
    }  # fmt: skip
    for name, shape in expected.items():
        if (tensor := tensors[name]) is not None and tensor.shape != shape:
            raise ValueError(
                f"adapter: {name} has shape {tuple(tensor.shape)}, expected {shape} (d={d} from x, r={r} from "
                "down_weight)"
            )
    if call.scale.numel() != 1:
        raise ValueError(f"adapter: scale must have one element, got shape {tuple(call.scale.shape)}")
    if call.norm_weight is None and call.norm_bias is not None:
        raise ValueError("adapter: norm_bias is given without norm_weight; pass both, only norm_weight, or neither")
    if call.up_weight.dtype != call.down_weight.dtype:
        raise TypeError(
            f"adapter: up_weight is {call.up_weight.dtype}, down_weight {call.down_weight.dtype}; use one dtype"
        )
    dispatch.require_finite("adapter", least=0, eps=call.eps)
    if call.activation not in ACTIVATIONS:
        raise ValueError(f"adapter: activation={call.activation!r}, expected one of {sorted(ACTIVATIONS)}")


OPERATION = dispatch.Operation(
    "adapter",
    AdapterCall,
    AdapterBackwardCall,
    dispatch.Implementation(
        "cuda",
        cuda.forward,
        architectures=dispatch.NVIDIA,
        unsupported_reason=cuda.unsupported_reason,
        not_preferred_reason=cuda.not_preferred_reason,
    ),
    dispatch.Implementation(
        "triton",
        triton_backend.lazy("lynx_kernels.ops.adapter.triton", "forward"),
        triton_backend.lazy("lynx_kernels.ops.adapter.triton", "backward"),
        architectures=triton_backend.ARCHITECTURES,
        unsupported_reason=lambda call: triton_backend.unsupported_reason(*call.tensors),
        not_preferred_reason=triton_backend.not_preferred_reason,
    ),
    dispatch.Implementation(
        "cpu", cpu.forward, cpu.backward, architectures=("cpu",), unsupported_reason=cpu.unsupported_reason
    ),
    dispatch.Implementation("reference", reference.forward, reference.backward),
    check=_check,
)


@OPERATION.explained_by(AdapterCall)
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
        norm_weight, norm_bias: (d,), weight and bias of the LayerNorm. Without a weight there is no LayerNorm.
        down_weight, down_bias: (r, d) and (r,) of the projection into the bottleneck; the bias may be None.
        up_weight, up_bias: (d, r) and (d,) of the projection out of it; the bias may be None.
        scale: one element, the learned weight of the branch.
        eps: added to the LayerNorm's variance, at least 0.
        activation: ``"silu"``, ``"relu"``, ``"gelu"`` (exact) or ``"gelu_tanh"``.
        impl: the name of an implementation; None takes the best that can run.

    Both products run in the dtype of the weights (under autocast, in the autocast dtype). LayerNorm's statistics and
    the residual sum are in at least fp32. Saved for backward: x, two statistics per token, and the pre-activation.

    Returns:
        (..., d) in the dtype of x.

    Raises:
        ValueError: a shape, a device, eps or the activation is invalid; the message names the argument.
        TypeError: an argument is not floating point or is a DTensor, or the two weights differ in dtype.
    """
    call = AdapterCall(x, norm_weight, norm_bias, down_weight, down_bias, up_weight, up_bias, scale, eps, activation)
    impl = OPERATION.choose(impl, call)
    out, _, _, _ = _FORWARD(*call._replace(x=x.reshape(-1, x.shape[-1])), impl)
    return out.view(x.shape)


def _forward_fake(call: AdapterCall) -> tuple[Tensor, ...]:
    tokens = call.x.shape[0]
    statistics = (tokens if call.norm_weight is not None else 0,)
    statistics_dtype = acc_dtype(call.x.dtype)
    return (
        torch.empty_like(call.x, memory_format=torch.contiguous_format),
        call.x.new_empty(statistics, dtype=statistics_dtype),
        call.x.new_empty(statistics, dtype=statistics_dtype),
        call.down_weight.new_empty((tokens, call.down_weight.shape[0])),
    )


def _backward_fake(call: AdapterBackwardCall) -> list[Tensor]:
    return [
        torch.empty_like(tensor, memory_format=torch.contiguous_format)
        for tensor, needed in zip(call.inputs, call.needs, strict=True)
        if needed and tensor is not None
    ]


def _setup_context(ctx: Any, call: AdapterCall, impl: str, output: tuple[Tensor, ...]) -> None:
    _, mean, rstd, preactivation = output
    ctx.save_for_backward(*call.tensors, mean, rstd, preactivation)
    ctx.activation, ctx.impl = call.activation, impl
    ctx.set_materialize_grads(False)


def _autograd(ctx: Any, grad: Tensor | None, *unused: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 10
    needs = list(ctx.needs_input_grad[:8])
    gradients = iter(_BACKWARD(grad, *ctx.saved_tensors, ctx.activation, needs, ctx.impl))
    return (*(next(gradients) if needed else None for needed in needs), None, None)


def _autocast(dtype: torch.dtype, call: AdapterCall) -> AdapterCall:
    return call._replace(down_weight=autocast_to(call.down_weight, dtype), up_weight=autocast_to(call.up_weight, dtype))


_BACKWARD = define("adapter_backward", AdapterBackwardCall, "Tensor[]", OPERATION.backward, fake=_backward_fake)
_FORWARD = define(
    "adapter",
    AdapterCall,
    "(Tensor, Tensor, Tensor, Tensor)",
    OPERATION.forward,
    fake=_forward_fake,
    autograd=(_setup_context, _autograd),
    autocast=_autocast,
)
