"""Cross attention in Triton: a launch forward, and a second that merges where few queries split their keys.

Backward launches three times, and adds up gradients of queries where their keys are split. Grids follow from shapes
alone, as in prefix attention, so calls capture into CUDA graphs.
"""

import torch
import triton
from torch import Tensor

from lynx_kernels.attention import triton_backward, triton_forward
from lynx_kernels.attention.triton import (
    _STATISTICS_ROWS,
    KEY_GRADIENT,
    Launch,
    _compute_dtype,
    _cut,
    _exponent,
    _head,
    _readable,
    _strides,
)
from lynx_kernels.attention.triton import choose_launches as choose_prefix_launches
from lynx_kernels.attention.triton_parts import count_parts, merge
from lynx_kernels.layout import KEY_TILE

# For segments of at most 32 queries, as the latents of a resampler. Not measured: no GPU yet. 64 keys spill on sm_100
# at a head_dim of 88, 124 bytes forward and 244 backward; 32 do not.
FEW_FORWARD = Launch(32, 32, num_warps=4, num_stages=3)
FEW_QUERY_GRADIENT = Launch(32, 32, num_warps=4, num_stages=2)


def choose_launches(
    head_dim: int, compute: torch.dtype, queries: int, n_segments: int
) -> tuple[Launch, Launch, Launch]:
    """The launches of the forward, of the gradient of queries and of that of keys."""
    if compute != torch.float32 and head_dim <= 128 and queries <= FEW_FORWARD.block_queries * n_segments:
        return FEW_FORWARD, FEW_QUERY_GRADIENT, KEY_GRADIENT
    return choose_prefix_launches(head_dim, compute, queries, n_segments)


def _grid(q: Tensor, k: Tensor, segments: Tensor, launch: Launch) -> tuple[int, int, int]:
    """Tiles of queries, heads, parts of the keys."""
    (queries, heads, _), block = q.shape, launch.block_queries
    parts = count_parts(triton.cdiv(queries, block) * heads, k.shape[0], launch.block_keys)
    return queries // block + segments.shape[0] - 1, heads, parts


def forward(
    q: Tensor,  # (Q, H, D)
    k: Tensor,  # (K, Hkv, D)
    v: Tensor,  # (K, Hkv, D)
    segments: Tensor,  # SpanLayout.segments
    tile_offsets: Tensor,  # SpanLayout's inverse, which only gradients need
    tile_segments: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Return the output (Q, H, D) and the LSE (Q, H)."""
    (queries, _, head_dim), shared = q.shape, q.shape[1] // k.shape[1]
    out, lse = q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    compute = _compute_dtype(q, k, v)
    q, k, v, segments = *(_readable(each, compute) for each in (q, k, v)), segments.contiguous()
    strides, unit = _strides(q, k, v)
    n_segments = segments.shape[0] - 1
    launch, _, _ = choose_launches(head_dim, compute, queries, n_segments)
    grid = *_, parts = _grid(q, k, segments, launch)
    outs, lses = out, lse
    if parts > 1:
        outs, lses = (each.new_empty(parts, *each.shape, dtype=torch.float32) for each in (out, lse))
    with torch.cuda.device_of(q):  # Triton launches on the current device, whatever its arguments are on
        triton_forward.forward_kernel[grid](
            q, k, v, segments, outs, lses, *strides, n_segments, queries, shared, _exponent(scale),
            NEGATIVE=scale < 0, SPANS=True, ROOT_IS_CAUSAL=False, **_head(head_dim, unit), **_cut(launch),
        )  # fmt: skip
        if parts > 1:
            merge(outs, lses, out, lse)
    return out, lse


def backward(
    grad: Tensor | None,  # (Q, H, D)
    grad_lse: Tensor | None,  # (Q, H)
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Tensor,
    tile_offsets: Tensor,
    tile_segments: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v."""
    (queries, heads, head_dim), (keys, kv_heads, _) = q.shape, k.shape
    grad_q, grad_k, grad_v = (each.new_empty(each.shape) for each in (q, k, v))
    if q.numel() == 0:
        return grad_q, grad_k.zero_(), grad_v.zero_()
    compute = _compute_dtype(q, k, v)
    grad = torch.zeros_like(out) if grad is None else grad
    grad, q, k, v = (_readable(each, compute) for each in (grad, q, k, v))
    out, lse, segments = out.contiguous(), lse.contiguous(), segments.contiguous()
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    statistics = q.new_empty(2, heads, queries, dtype=torch.float32)
    strides, unit = _strides(grad, q, k, v)
    n_segments, head = segments.shape[0] - 1, _head(head_dim, unit)
    table = {"SPANS": True, "ROOT_IS_CAUSAL": False}
    _, query_launch, key_launch = choose_launches(head_dim, compute, queries, n_segments)
    grid = *_, parts = _grid(q, k, segments, query_launch)
    grads_q = grad_q.new_empty(parts, *grad_q.shape, dtype=torch.float32) if parts > 1 else grad_q
    with torch.cuda.device_of(q):
        triton_backward.statistics_kernel[(triton.cdiv(queries, _STATISTICS_ROWS), heads)](
            grad, out, lse, grad_lse, statistics, *strides[:2], queries,
            UNIT=unit, D=head_dim, BD=triton.next_power_of_2(head_dim), BQ=_STATISTICS_ROWS,
        )  # fmt: skip
        triton_backward.query_gradient_kernel[grid](
            grad, q, k, v, statistics, segments, grads_q, *strides, n_segments, queries, heads // kv_heads, scale,
            **table, **head, **_cut(query_launch),
        )  # fmt: skip
        triton_backward.key_gradient_kernel[(triton.cdiv(keys, key_launch.block_keys), kv_heads)](
            grad, q, k, v, statistics, segments, tile_offsets.contiguous(), tile_segments.contiguous(), grad_k, grad_v,
            *strides, n_segments, queries, keys, heads // kv_heads, scale,
            **table, KEY_TILE=KEY_TILE, **head, **_cut(key_launch),
        )  # fmt: skip
    return grads_q.sum(0).to(grad_q.dtype) if parts > 1 else grad_q, grad_k, grad_v
