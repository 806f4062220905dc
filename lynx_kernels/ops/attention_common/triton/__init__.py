"""prefix_attention and cross_attention in Triton. They share all kernels and differ only in the table.

Forward takes one launch, or two if few queries split their keys. Backward takes three. Grids depend on shapes only, and
programs find their tiles in the layout's table. The host reads nothing and plans nothing, so calls can be captured into
CUDA graphs. Work is divided into tiles, not samples. The time of a program grows with the keys that its tile sees. In a
long causal sequence the longest programs start first.
"""

from typing import Any

import torch
import triton
from torch import Tensor

from lynx_kernels.layout import KEY_TILE
from lynx_kernels.ops.attention_common.table import Table
from lynx_kernels.ops.attention_common.triton import bwd, fwd
from lynx_kernels.ops.attention_common.triton.launches import (
    Launch,
    choose_launches,
    compute_dtype,
    constants,
    exponent,
    in_units,
)
from lynx_kernels.ops.attention_common.triton.splits import choose_num_splits, combine

_PREPROCESS_ROWS = 32


def _query_grid(table: Table, q: Tensor, keys: int, launch: Launch) -> tuple[int, int, int]:
    """The grid over query tiles, heads, and splits of the keys."""
    (queries, heads, _), block = q.shape, launch.block_m
    splits = choose_num_splits(triton.cdiv(queries, block) * heads, keys, launch.block_n) if table.has_spans else 1
    return queries // block + table.num_segments, heads, splits


def _key_grid(table: Table, k: Tensor, launch: Launch) -> tuple[int, int]:
    """The grid over key tiles and key heads."""
    (keys, kv_heads, _), block = k.shape, launch.block_n
    return triton.cdiv(keys, block) if table.has_spans else keys // block + table.num_segments, kv_heads


def _readable(tensor: Tensor, compute: torch.dtype) -> Tensor:
    # Vector loads need unit stride inside a row. Row strides must be small enough for int32 offsets inside a tile.
    tensor = tensor.to(compute)
    return tensor if tensor.stride(-1) == 1 and tensor.stride(0) < 2**24 else tensor.contiguous()


def _strides(*tensors: Tensor) -> tuple[list[int], int]:
    """Token and head strides of every tensor, in units, and the number of elements in a unit."""
    return in_units(*(tensor.stride(dim) for tensor in tensors for dim in (0, 1)))


def forward(call: Any) -> tuple[Tensor, Tensor]:
    """Return the output (Q, H, D) and the LSE (Q, H) of a call of prefix_attention or cross_attention."""
    q, k, v, table, scale = call.q, call.k, call.v, call.table, call.scale
    (queries, heads, head_dim), (keys, kv_heads, _) = q.shape, k.shape
    out, lse = q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    compute = compute_dtype(q, k, v)
    q, k, v = (_readable(each, compute) for each in (q, k, v))
    strides, unit = _strides(q, k, v)
    launch, _, _ = choose_launches(head_dim, compute, queries, table.num_segments, table.has_spans)
    grid = *_, num_splits = _query_grid(table, q, keys, launch)
    outs, lses = out, lse
    if num_splits > 1:
        outs, lses = (each.new_empty(num_splits, *each.shape, dtype=torch.float32) for each in (out, lse))
    with torch.cuda.device_of(q):  # Triton launches on the current device, not on that of the arguments
        fwd.attention_fwd_kernel[grid](
            q, k, v, table.segments.contiguous(), outs, lses, *strides,
            table.num_segments, queries, heads // kv_heads, exponent(scale),
            NEGATIVE=scale < 0, SPANS=table.has_spans, ROOT_IS_CAUSAL=table.root_is_causal,
            **constants(launch, head_dim, unit),
        )  # fmt: skip
        if num_splits > 1:
            combine(outs, lses, out, lse)
    return out, lse


def backward(call: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v."""
    grad, grad_lse, out, lse, q, k, v = call[:7]
    table, scale = call.table, call.scale
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
    lse_delta = q.new_empty(2, heads, queries, dtype=torch.float32)
    strides, unit = _strides(grad, q, k, v)
    visibility = {"SPANS": table.has_spans, "ROOT_IS_CAUSAL": table.root_is_causal}
    _, dq_launch, dkdv_launch = choose_launches(head_dim, compute, queries, table.num_segments, table.has_spans)
    grid = *_, num_splits = _query_grid(table, q, keys, dq_launch)
    grads_q = grad_q.new_empty(num_splits, *grad_q.shape, dtype=torch.float32) if num_splits > 1 else grad_q
    with torch.cuda.device_of(q):
        bwd.attention_bwd_preprocess_kernel[(triton.cdiv(queries, _PREPROCESS_ROWS), heads)](
            grad, out, lse, grad_lse, lse_delta, *strides[:2], queries,
            UNIT=unit, D=head_dim, BD=triton.next_power_of_2(head_dim), BLOCK_M=_PREPROCESS_ROWS,
        )  # fmt: skip
        bwd.attention_bwd_dq_kernel[grid](
            grad, q, k, v, lse_delta, segments, grads_q, *strides,
            table.num_segments, queries, heads // kv_heads, scale,
            **visibility, **constants(dq_launch, head_dim, unit),
        )  # fmt: skip
        bwd.attention_bwd_dkdv_kernel[_key_grid(table, k, dkdv_launch)](
            grad, q, k, v, lse_delta, segments, *inverse, grad_k, grad_v, *strides,
            table.num_segments, queries, keys, heads // kv_heads, scale,
            **visibility, KEY_TILE=KEY_TILE, **constants(dkdv_launch, head_dim, unit),
        )  # fmt: skip
    return grads_q.sum(0).to(grad_q.dtype) if num_splits > 1 else grad_q, grad_k, grad_v
