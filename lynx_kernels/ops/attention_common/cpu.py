"""CPU code that prefix_attention and cross_attention share: checks, allocations, calls into csrc/attention_common.

Computes in fp32, or in bf16 with fp32 accumulation. Mixed inputs use the dtype they promote to. The kernels need unit
stride only along the head dimension, so slices and transposed views are not copied.
"""

from typing import Any

import torch
from torch import Tensor

from lynx_kernels.backends import cpu as cpu_backend

_DTYPES = (torch.float32, torch.bfloat16)


def unsupported_reason(call: Any) -> str | None:
    """Why this implementation cannot run the call, or None."""
    if cpu_backend.MISSING is not None:
        return cpu_backend.MISSING
    dtype = common_dtype(*call.floats)
    if torch.is_autocast_enabled("cpu") and dtype != torch.float64:
        dtype = torch.get_autocast_dtype("cpu")
    if dtype not in _DTYPES:
        return f"it computes in fp32 and bf16, and this call would be in {dtype}"
    return None


def common_dtype(first: Tensor, *others: Tensor) -> torch.dtype:
    """The dtype in which a call with these tensors is computed."""
    dtype = first.dtype
    for each in others:
        if each.dtype != dtype:  # this check saves 0.3 us
            dtype = torch.promote_types(dtype, each.dtype)
    return dtype


def prepare(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in ``dtype`` with unit stride along the last dimension, as the compiled module needs it."""
    tensor = tensor if tensor.dtype == dtype else tensor.to(dtype)  # this check saves 1 us
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _view(tensor: Tensor) -> tuple[int, int, int]:
    """Address and strides of a (rows, heads, head dimension) tensor, as the compiled module takes them."""
    return tensor.data_ptr(), tensor.stride(0), tensor.stride(1)


def _sizes(call: Any) -> tuple[int, int, int, int]:
    """Query heads, key heads, the head dimension, and that of the values."""
    return call.q.shape[1], call.k.shape[1], call.q.shape[2], call.v.shape[2]


def forward(layout: Any, call: Any, softcap: float | None = None, sinks: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the output (Q, H, Dv) and the LSE (Q, H). ``layout`` is the compiled module's object for the layout."""
    q, k, v = call.floats
    dtype = common_dtype(q, k, v)
    out = q.new_empty(*q.shape[:2], v.shape[2], dtype=dtype)
    lse = q.new_empty(q.shape[:2], dtype=torch.float32)
    queries, keys, values = (prepare(each, dtype) for each in (q, k, v))
    sinks = None if sinks is None else sinks.to(torch.float32).contiguous()
    cpu_backend.module.attention_forward(
        layout, _sizes(call), (call.scale, softcap or 0.0, 0 if sinks is None else sinks.data_ptr()),
        dtype == torch.bfloat16, _view(queries), _view(keys), _view(values), _view(out), lse.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return out.to(q.dtype), lse


def backward(layout: Any, call: Any, gradients: tuple[Tensor, ...], softcap: float | None = None) -> tuple[Tensor, ...]:
    """Return the gradients of q, k and v. Computes in the dtype of ``gradients`` and writes the results there first."""
    q, k, v, dtype = call.q, call.k, call.v, gradients[0].dtype
    grad = torch.zeros_like(call.out, dtype=dtype) if call.grad is None else call.grad
    grad, out, queries, keys, values = (prepare(each, dtype) for each in (grad, call.out, q, k, v))
    lse = call.lse.contiguous()
    grad_lse = None if call.grad_lse is None else call.grad_lse.to(torch.float32).contiguous()
    cpu_backend.module.attention_backward(
        layout, _sizes(call), (call.scale, softcap or 0.0, 0), dtype == torch.bfloat16,
        _view(grad), 0 if grad_lse is None else grad_lse.data_ptr(), _view(out), lse.data_ptr(),
        _view(queries), _view(keys), _view(values), *map(_view, gradients), torch.get_num_threads(),
    )  # fmt: skip
    return tuple(gradient.to(each.dtype) for gradient, each in zip(gradients, (q, k, v), strict=True))
