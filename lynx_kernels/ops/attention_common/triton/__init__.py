"""Attention of rows of queries to rows of keys in Triton: what prefix and cross attention share but for the table.

One launch forward (two where few queries split their keys), three backward. Grids follow from shapes alone, and
programs find their tiles in the layout's table: nothing is read on the host and nothing planned, so calls capture into
CUDA graphs. Work is cut by tiles, not by samples: a grid's programs are as long as their tile sees keys, and a long
causal sequence starts with its longest.
"""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from lynx_kernels.layout import KEY_TILE
from lynx_kernels.ops.attention_common.triton import bwd as triton_backward
from lynx_kernels.ops.attention_common.triton import fwd as triton_forward
from lynx_kernels.ops.attention_common.triton.launches import (
    Launch,
    choose_launches,
    compute_dtype,
    constants,
    exponent,
    in_units,
)
from lynx_kernels.ops.attention_common.triton.splits import count_parts, merge

_STATISTICS_ROWS = 32


@dataclass(frozen=True)
class Table:
    """Who sees whom: the segments of a PackedLayout, or those of a SpanLayout with its inverse."""

    segments: Tensor
    root_is_causal: bool = False
    inverse: tuple[Tensor, Tensor] | None = None  # tile_offsets and tile_segments, which only gradients read

    @property
    def n_segments(self) -> int:
        return self.segments.shape[0] - 1

    @property
    def spans(self) -> bool:
        return self.inverse is not None

    def query_grid(self, q: Tensor, keys: int, launch: Launch) -> tuple[int, int, int]:
        """Tiles of queries, heads, and the parts that keys are cut into."""
        (queries, heads, _), block = q.shape, launch.block_queries
        parts = count_parts(triton.cdiv(queries, block) * heads, keys, launch.block_keys) if self.spans else 1
        return queries // block + self.n_segments, heads, parts

    def key_grid(self, k: Tensor, launch: Launch) -> tuple[int, int]:
        """Tiles of keys, and their heads."""
        (keys, kv_heads, _), block = k.shape, launch.block_keys
        return triton.cdiv(keys, block) if self.spans else keys // block + self.n_segments, kv_heads


def _readable(tensor: Tensor, compute: torch.dtype) -> Tensor:
    # Values of a row side by side, or loads are no vectors; rows near enough for the offsets inside a tile to be int32.
    tensor = tensor.to(compute)
    return tensor if tensor.stride(-1) == 1 and tensor.stride(0) < 2**24 else tensor.contiguous()


def _strides(*tensors: Tensor) -> tuple[list[int], int]:
    """Strides of tokens and heads of every tensor in units, and the elements of a unit."""
    return in_units(*(tensor.stride(dim) for tensor in tensors for dim in (0, 1)))


def forward(
    q: Tensor,  # (Q, H, D)
    k: Tensor,  # (K, Hkv, D)
    v: Tensor,  # (K, Hkv, D)
    table: Table,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Return the output (Q, H, D) and the LSE (Q, H)."""
    (queries, heads, head_dim), (keys, kv_heads, _) = q.shape, k.shape
    out, lse = q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    compute = compute_dtype(q, k, v)
    q, k, v = (_readable(each, compute) for each in (q, k, v))
    strides, unit = _strides(q, k, v)
    launch, _, _ = choose_launches(head_dim, compute, queries, table.n_segments, table.spans)
    grid = *_, parts = table.query_grid(q, keys, launch)
    outs, lses = out, lse
    if parts > 1:
        outs, lses = (each.new_empty(parts, *each.shape, dtype=torch.float32) for each in (out, lse))
    with torch.cuda.device_of(q):  # Triton launches on the current device, whatever its arguments are on
        triton_forward.forward_kernel[grid](
            q, k, v, table.segments.contiguous(), outs, lses, *strides,
            table.n_segments, queries, heads // kv_heads, exponent(scale),
            NEGATIVE=scale < 0, SPANS=table.spans, ROOT_IS_CAUSAL=table.root_is_causal,
            **constants(launch, head_dim, unit),
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
    table: Table,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v."""
    (queries, heads, head_dim), (keys, kv_heads, _) = q.shape, k.shape
    grad_q, grad_k, grad_v = (each.new_empty(each.shape) for each in (q, k, v))
    if q.numel() == 0:
        return grad_q, grad_k.zero_(), grad_v.zero_()
    compute = compute_dtype(q, k, v)
    grad = torch.zeros_like(out) if grad is None else grad
    grad, q, k, v = (_readable(each, compute) for each in (grad, q, k, v))
    out, lse, segments = out.contiguous(), lse.contiguous(), table.segments.contiguous()
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    inverse = (None, None) if table.inverse is None else [each.contiguous() for each in table.inverse]
    statistics = q.new_empty(2, heads, queries, dtype=torch.float32)
    strides, unit = _strides(grad, q, k, v)
    who_sees_whom = {"SPANS": table.spans, "ROOT_IS_CAUSAL": table.root_is_causal}
    _, query_launch, key_launch = choose_launches(head_dim, compute, queries, table.n_segments, table.spans)
    grid = *_, parts = table.query_grid(q, keys, query_launch)
    grads_q = grad_q.new_empty(parts, *grad_q.shape, dtype=torch.float32) if parts > 1 else grad_q
    with torch.cuda.device_of(q):
        triton_backward.statistics_kernel[(triton.cdiv(queries, _STATISTICS_ROWS), heads)](
            grad, out, lse, grad_lse, statistics, *strides[:2], queries,
            UNIT=unit, D=head_dim, BD=triton.next_power_of_2(head_dim), BQ=_STATISTICS_ROWS,
        )  # fmt: skip
        triton_backward.query_gradient_kernel[grid](
            grad, q, k, v, statistics, segments, grads_q, *strides,
            table.n_segments, queries, heads // kv_heads, scale,
            **who_sees_whom, **constants(query_launch, head_dim, unit),
        )  # fmt: skip
        triton_backward.key_gradient_kernel[table.key_grid(k, key_launch)](
            grad, q, k, v, statistics, segments, *inverse, grad_k, grad_v, *strides,
            table.n_segments, queries, keys, heads // kv_heads, scale,
            **who_sees_whom, KEY_TILE=KEY_TILE, **constants(key_launch, head_dim, unit),
        )  # fmt: skip
    return grads_q.sum(0).to(grad_q.dtype) if parts > 1 else grad_q, grad_k, grad_v
