"""Attention on CPUs, in the C++ of csrc/attention: this file checks, allocates, and hands over addresses.

fp32, and bf16 with fp32 sums; mixed inputs are computed in the dtype they promote to. The kernels take any strides but
of the head dimension, so slices and transposed views are not copied.
"""

import torch
from torch import Tensor

from lynx_kernels.backends import cpu as cpu_backend

_DTYPES = (torch.float32, torch.bfloat16)


def unsupported_reason(q: Tensor, *keys_and_values: Tensor) -> str | None:
    """Why this implementation cannot run the call, or None."""
    if q.device.type != "cpu":
        return f"runs on CPUs, q is on {q.device}"
    if cpu_backend.MISSING is not None:
        return cpu_backend.MISSING
    dtype = common_dtype(q, *keys_and_values)
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


def _forward(layout, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    dtype = common_dtype(q, k, v)
    out, lse = q.new_empty(q.shape, dtype=dtype), q.new_empty(q.shape[:2], dtype=torch.float32)
    queries, keys, values = (prepare(each, dtype) for each in (q, k, v))
    cpu_backend.module.attention_forward(
        layout, (q.shape[1], k.shape[1], q.shape[2]), scale, dtype == torch.bfloat16,
        _view(queries), _view(keys), _view(values), _view(out), lse.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return out.to(q.dtype), lse


def _backward(
    layout,
    gradients: tuple[Tensor, Tensor, Tensor],  # to be written, in the common dtype
    grad: Tensor | None,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
) -> tuple[Tensor, ...]:
    dtype = gradients[0].dtype
    grad = torch.zeros_like(out, dtype=dtype) if grad is None else grad
    grad, out, queries, keys, values = (prepare(each, dtype) for each in (grad, out, q, k, v))
    lse = lse.contiguous()
    grad_lse = None if grad_lse is None else grad_lse.to(torch.float32).contiguous()
    cpu_backend.module.attention_backward(
        layout, (q.shape[1], k.shape[1], q.shape[2]), scale, dtype == torch.bfloat16,
        _view(grad), 0 if grad_lse is None else grad_lse.data_ptr(), _view(out), lse.data_ptr(),
        _view(queries), _view(keys), _view(values), *map(_view, gradients), torch.get_num_threads(),
    )  # fmt: skip
    return tuple(gradient.to(each.dtype) for gradient, each in zip(gradients, (q, k, v), strict=True))


def _packed_layout(segments: Tensor, num_tokens: int, root_is_causal: bool):
    segments = segments.contiguous()
    return cpu_backend.module.packed_layout(segments.data_ptr(), segments.shape[0], num_tokens, root_is_causal)


def _span_layout(segments: Tensor, num_queries: int, num_keys: int):
    segments = segments.contiguous()
    return cpu_backend.module.span_layout(segments.data_ptr(), segments.shape[0], num_queries, num_keys)


def prefix_attention(
    q: Tensor,  # (T, H, D)
    k: Tensor,  # (T, Hkv, D)
    v: Tensor,  # (T, Hkv, D)
    segments: Tensor,  # PackedLayout.segments
    root_is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Return the output (T, H, D) and the LSE (T, H)."""
    return _forward(_packed_layout(segments, q.shape[0], root_is_causal), q, k, v, scale)


def prefix_attention_backward(
    grad: Tensor | None,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Tensor,
    root_is_causal: bool,
    scale: float,
) -> tuple[Tensor, ...]:
    """Return the gradients of q, k and v."""
    dtype = common_dtype(q, k, v)
    gradients = q.new_empty(q.shape, dtype=dtype), k.new_empty(k.shape, dtype=dtype), v.new_empty(v.shape, dtype=dtype)
    layout = _packed_layout(segments, q.shape[0], root_is_causal)
    return _backward(layout, gradients, grad, grad_lse, out, lse, q, k, v, scale)


def cross_attention(
    q: Tensor,  # (Q, H, D)
    k: Tensor,  # (K, Hkv, D)
    v: Tensor,  # (K, Hkv, D)
    segments: Tensor,  # SpanLayout.segments
    tile_offsets: Tensor,  # the inverse for GPUs: here the host cuts keys itself
    tile_segments: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Return the output (Q, H, D) and the LSE (Q, H)."""
    return _forward(_span_layout(segments, q.shape[0], k.shape[0]), q, k, v, scale)


def cross_attention_backward(
    grad: Tensor | None,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Tensor,
    tile_offsets: Tensor,
    tile_segments: Tensor,
    scale: float,
) -> tuple[Tensor, ...]:
    """Return the gradients of q, k and v; of what sees nothing, or nothing sees, they are 0."""
    dtype = common_dtype(q, k, v)
    gradients = q.new_zeros(q.shape, dtype=dtype), k.new_zeros(k.shape, dtype=dtype), v.new_zeros(v.shape, dtype=dtype)
    layout = _span_layout(segments, q.shape[0], k.shape[0])
    return _backward(layout, gradients, grad, grad_lse, out, lse, q, k, v, scale)
