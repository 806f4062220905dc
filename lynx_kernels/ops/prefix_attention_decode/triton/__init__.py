"""Decoding in Triton: one launch over splits of the keys of ranges and branches, and one that combines the splits.

A range is read once for as many of the branches that read it in the same place as fit into a tile, so the beams of one
image read it once. Grids depend on the shapes of the caches, and ranges and lengths stay on the device, so calls can be
captured into CUDA graphs.
"""

from dataclasses import replace

import torch
import triton
from torch import Tensor

from lynx_kernels.ops.attention_common.triton.launches import (
    WIDEST,
    WIDEST_IEEE,
    Launch,
    compute_dtype,
    constants,
    exponent,
    in_units,
)
from lynx_kernels.ops.attention_common.triton.splits import choose_num_splits, combine
from lynx_kernels.ops.prefix_attention_decode.call import DecodeCall
from lynx_kernels.ops.prefix_attention_decode.triton import fwd

_SCAN = 64  # branches scanned at once to find those of one range


def choose_launch(head_dim: int, compute: torch.dtype, rows: int, is_local: bool) -> Launch:
    """The launch for ``rows`` rows that may share keys. Not measured, because no GPU was available."""
    block_m = max(16, triton.next_power_of_2(rows))
    if head_dim > 256:
        return WIDEST_IEEE if compute == torch.float32 else replace(WIDEST, block_m=min(block_m, WIDEST.block_m))
    if compute == torch.float32:
        return Launch(min(block_m, 32), 32, num_warps=4, num_stages=1)
    # With a window, sm_90's products of 64 rows would wait for each other.
    most = 32 if is_local and head_dim > 64 else 64
    # Above a head_dim of 128 three stages of 64 keys would take 192 KiB; a block has 163 KiB on sm_80.
    return Launch(min(block_m, most), 64 if head_dim <= 128 else 32, num_warps=4, num_stages=3)


def _readable(cache: Tensor, compute: torch.dtype) -> Tensor:
    """The cache (..., Hkv, D) in that dtype, copied where its strides do not suit the kernel."""
    cache = cache.to(compute)
    return cache if cache.stride(-1) == 1 and cache.stride(-3) < 2**24 else cache.contiguous()


def forward(call: DecodeCall) -> tuple[Tensor, Tensor]:
    """Return the output (B, Q, H, Dv) and the LSE (B, Q, H)."""
    (branches, queries, heads, head_dim), (num_shared, kv_heads, value_dim) = call.q.shape, call.shared_v.shape
    out = call.q.new_empty(branches, queries, heads, value_dim)
    lse = call.q.new_empty(branches, queries, heads, dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    compute = compute_dtype(*call.floats)
    q = call.q.to(compute).contiguous()
    caches = [_readable(each, compute) for each in call.caches.values()]
    strides, unit = in_units(*(stride for each in caches for stride in each.stride()[:-1]))
    rows = queries * (heads // kv_heads)
    # How many branches share a range is known on the device only. Tiles and splits suit a range that all branches read.
    kind, extent = ("window", call.window) if call.window is not None else ("chunk", call.chunk)
    launch = choose_launch(head_dim, compute, rows * branches, extent is not None)
    slots, tiles = max(1, launch.block_m // rows), triton.cdiv(rows, launch.block_m)
    num_ranges, branch_room = call.ranges.shape[1], call.branch_k.shape[1]
    range_splits, shared_splits = 1, 0
    if num_ranges and num_shared:
        programs = triton.cdiv(branches, slots) * tiles * kv_heads * num_ranges
        range_splits = choose_num_splits(programs, num_shared, launch.block_n)
        shared_splits = num_ranges * range_splits
    splits = shared_splits + choose_num_splits(branches * tiles * kv_heads, branch_room, launch.block_n)
    outs, lses = (each.new_empty(splits, *each.shape, dtype=torch.float32) for each in (out, lse))
    local, extent = (None, 0) if extent is None else (kind, min(extent, num_ranges * num_shared + branch_room))
    scale, inner = exponent(call.scale), None
    if call.softcap is not None:
        scale, inner = exponent(call.softcap), call.scale / call.softcap
    with torch.cuda.device_of(q):  # Triton launches on the current device, not on that of the arguments
        fwd.prefix_attention_decode_fwd_kernel[(branches * tiles, kv_heads, splits)](
            q, *caches, None if call.sinks is None else call.sinks.contiguous(),
            *(each.contiguous() for each in call.indices.values()), outs, lses, *strides,
            branches, queries, num_ranges, heads // kv_heads, slots, range_splits, shared_splits, extent, scale, inner,
            NEGATIVE=call.scale < 0 and inner is None, LOCAL=local, SCAN=_SCAN,
            **constants(launch, unit, head_dim, value_dim),
        )  # fmt: skip
        combine(outs, lses, out, lse)
    return out, lse
