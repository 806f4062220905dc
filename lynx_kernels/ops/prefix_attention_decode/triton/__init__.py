"""Decoding in Triton: one launch over splits of the keys of roots and branches, and one that combines the splits.

The keys of a root are read once for as many of its branches as fit into a tile, so the beams of one image read it once.
Grids depend on the shapes of the caches, and lengths stay on the device, so calls can be captured into CUDA graphs.
"""

import torch
import triton
from torch import Tensor

from lynx_kernels.ops.attention_common.triton.launches import Launch, compute_dtype, constants, exponent, in_units
from lynx_kernels.ops.attention_common.triton.splits import choose_num_splits, combine
from lynx_kernels.ops.prefix_attention_decode.call import DecodeCall
from lynx_kernels.ops.prefix_attention_decode.triton import fwd

_SCAN = 64  # branches scanned at once to find those of one root


def choose_launch(head_dim: int, compute: torch.dtype, rows: int) -> Launch:
    """The launch for ``rows`` rows that share keys. Not measured, because no GPU was available."""
    block_m = max(16, triton.next_power_of_2(rows))
    if compute == torch.float32:
        return Launch(min(block_m, 32), 32, num_warps=4, num_stages=1)
    # Above a head_dim of 128 three stages of 64 keys would take 192 KiB; a block has 163 KiB on sm_80.
    return Launch(min(block_m, 64), 64 if head_dim <= 128 else 32, num_warps=4, num_stages=3)


def _alike(k: Tensor, v: Tensor, compute: torch.dtype) -> tuple[Tensor, Tensor]:
    # The kernel takes one set of strides for both. The caches of one layer have equal strides, so nothing is copied.
    k, v = k.to(compute), v.to(compute)
    if k.stride() != v.stride() or k.stride(3) != 1 or k.stride(1) >= 2**24:
        return k.contiguous(), v.contiguous()
    return k, v


def forward(call: DecodeCall) -> tuple[Tensor, Tensor]:
    """Return the output (B, Q, H, D) and the LSE (B, Q, H)."""
    q, root_k, root_v, branch_k, branch_v = call.floats
    (branches, queries, heads, head_dim), (roots, root_keys, kv_heads, _) = q.shape, root_k.shape
    out, lse = q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    compute = compute_dtype(q, root_k, root_v, branch_k, branch_v)
    q = q.to(compute).contiguous()
    root, branch = _alike(root_k, root_v, compute), _alike(branch_k, branch_v, compute)
    strides, unit = in_units(*root[0].stride()[:3], *branch[0].stride()[:3])
    rows = queries * (heads // kv_heads)
    launch = choose_launch(head_dim, compute, rows * triton.cdiv(branches, roots))
    slots, tiles = max(1, launch.block_m // rows), triton.cdiv(rows, launch.block_m)
    # The number of programs per split of roots; at least one for each group of branches.
    root_programs = min(branches, max(roots, triton.cdiv(branches, slots))) * tiles * kv_heads
    root_splits = choose_num_splits(root_programs, root_keys, launch.block_n) if root_keys else 0
    branch_splits = choose_num_splits(branches * tiles * kv_heads, branch_k.shape[1], launch.block_n)
    outs, lses = (each.new_empty(root_splits + branch_splits, *each.shape, dtype=torch.float32) for each in (out, lse))
    with torch.cuda.device_of(q):  # Triton launches on the current device, not on that of the arguments
        fwd.prefix_attention_decode_fwd_kernel[(branches * tiles, kv_heads, root_splits + branch_splits)](
            q, *root, *branch, *(each.contiguous() for each in call.indices.values()),
            outs, lses, *strides, branches, queries, heads // kv_heads, slots, root_splits, exponent(call.scale),
            NEGATIVE=call.scale < 0, SCAN=_SCAN, **constants(launch, unit, head_dim),
        )  # fmt: skip
        combine(outs, lses, out, lse)
    return out, lse
