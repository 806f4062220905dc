"""What prefix_attention and cross_attention share on CPUs: checks, allocations, the calls of csrc/attention_common.

fp32, and bf16 with fp32 sums; mixed inputs are computed in the dtype they promote to. The kernels take any strides but
of the head dimension, so slices and transposed views are not copied.
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
        return f"computes in fp32 and bf16, this call would be in {dtype}"
    return None


def common_dtype(first: Tensor, *others: Tensor) -> torch.dtype:
    """The dtype that a call of mixed dtypes is computed in."""
    dtype = first.dtype
    for each in others:
        if each.dtype != dtype:  # asking first spares 0.3 us
            dtype = torch.promote_types(dtype, each.dtype)
    return dtype


def prepare(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """As the compiled module can read it."""
    tensor = tensor if tensor.dtype == dtype else tensor.to(dtype)  # asking first spares 1 us
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _view(tensor: Tensor) -> tuple[int, int, int]:
    """(rows, heads, head dimension) as the compiled module takes it."""
    return tensor.data_ptr(), tensor.stride(0), tensor.stride(1)


def forward(layout: Any, call: Any) -> tuple[Tensor, Tensor]:
    """Return the output (Q, H, D) and the LSE (Q, H) of a call whose layout the compiled module knows as ``layout``."""
    q, k, v = call.floats
    dtype = common_dtype(q, k, v)
    out, lse = q.new_empty(q.shape, dtype=dtype), q.new_empty(q.shape[:2], dtype=torch.float32)
    queries, keys, values = (prepare(each, dtype) for each in (q, k, v))
    cpu_backend.module.attention_forward(
        layout, (q.shape[1], k.shape[1], q.shape[2]), call.scale, dtype == torch.bfloat16,
        _view(queries), _view(keys), _view(values), _view(out), lse.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return out.to(q.dtype), lse


def backward(layout: Any, call: Any, gradients: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return the gradients of q, k and v. They are written to ``gradients``, of the dtype that is computed in."""
    q, k, v, dtype = call.q, call.k, call.v, gradients[0].dtype
    grad = torch.zeros_like(call.out, dtype=dtype) if call.grad is None else call.grad
    grad, out, queries, keys, values = (prepare(each, dtype) for each in (grad, call.out, q, k, v))
    lse = call.lse.contiguous()
    grad_lse = None if call.grad_lse is None else call.grad_lse.to(torch.float32).contiguous()
    cpu_backend.module.attention_backward(
        layout, (q.shape[1], k.shape[1], q.shape[2]), call.scale, dtype == torch.bfloat16,
        _view(grad), 0 if grad_lse is None else grad_lse.data_ptr(), _view(out), lse.data_ptr(),
        _view(queries), _view(keys), _view(values), *map(_view, gradients), torch.get_num_threads(),
    )  # fmt: skip
    return tuple(gradient.to(each.dtype) for gradient, each in zip(gradients, (q, k, v), strict=True))
