"""Launches of the Triton attention kernels: tile sizes, and the arguments that all of them take."""

import math
from dataclasses import dataclass

import torch
import triton
from torch import Tensor


@dataclass(frozen=True)
class Launch:
    """Queries (block_m) and keys (block_n) per tile, warps and stages."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# None of these is measured, because no GPU was available. They follow the compiler's reports, for heads that share keys
# (which costs registers). bf16 with a head_dim up to 128 spills nothing, except tens of bytes listed in
# tests/compilation.

# 128 x 64 on 8 warps: 64 fp32 accumulators and 32 scores per thread.
FWD = Launch(128, 64, num_warps=8, num_stages=3)
# Three operands besides the accumulators: 64 keys spill 96 bytes on sm_80, 32 do not spill.
BWD_DQ = Launch(128, 32, num_warps=8, num_stages=2)
# Two accumulators and two tiles of scores: 64 queries spill 140 bytes on sm_90; two stages spill 928 on sm_100.
BWD_DKDV = Launch(32, 64, num_warps=8, num_stages=1)
# Half the queries on half the warps, for segments that would leave most of 128 rows empty.
SHORT_FWD = Launch(64, 64, num_warps=4, num_stages=3)
SHORT_BWD_DQ = Launch(64, 64, num_warps=4, num_stages=2)
# For segments of at most 32 queries with spans, such as the latents of a resampler. With a head_dim of 88, 64 keys
# spill on sm_100, 124 bytes forward and 244 backward; 32 do not spill.
SMALL_M_FWD = Launch(32, 32, num_warps=4, num_stages=3)
SMALL_M_BWD_DQ = Launch(32, 32, num_warps=4, num_stages=2)
# For a head_dim above 128: three stages of 128 x 64 would take 256 KiB, more than a block can have.
WIDE_FWD = Launch(128, 32, num_warps=8, num_stages=2)
WIDE_BWD_DQ = Launch(64, 32, num_warps=8, num_stages=1)
# For a head_dim above 256: accumulators of 32 x 512 take 64 registers per thread.
WIDEST = Launch(32, 32, num_warps=8, num_stages=1)
# IEEE fp32 does not use tensor cores; operands are in registers, spread over 8 warps. Fewer than 64 rows, because with
# more Triton 3.7 compiles TF32 on sm_100.
IEEE = Launch(32, 32, num_warps=8, num_stages=1)
WIDEST_IEEE = Launch(16, 16, num_warps=8, num_stages=1)


def choose_launches(
    head_dim: int, compute: torch.dtype, queries: int, n_segments: int, spans: bool
) -> tuple[Launch, Launch, Launch]:
    """The launches of forward, bwd_dq and bwd_dkdv. ``spans``: whether the layout is a SpanLayout."""
    if compute == torch.float32:
        return (IEEE if head_dim <= 256 else WIDEST_IEEE,) * 3
    if head_dim > 256:
        return (WIDEST,) * 3
    if head_dim > 128:
        return WIDE_FWD, WIDE_BWD_DQ, BWD_DKDV
    # Compared with the average number of queries per segment, empty segments included.
    if spans and queries <= SMALL_M_FWD.block_m * n_segments:
        return SMALL_M_FWD, SMALL_M_BWD_DQ, BWD_DKDV
    if queries <= SHORT_FWD.block_m * n_segments:
        return SHORT_FWD, SHORT_BWD_DQ, BWD_DKDV
    return FWD, BWD_DQ, BWD_DKDV


def columns(head_dim: int) -> tuple[int, int]:
    """Widths of the one or two adjacent tiles that hold one row of a head: powers of two, at least 16."""
    whole = triton.next_power_of_2(max(head_dim, 16))
    half = whole // 2
    rest = triton.next_power_of_2(max(head_dim - half, 16))
    return (half, rest) if half >= 16 and half + rest < whole else (whole, 0)


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype of the products: that of the tensors, or fp32 if they differ."""
    dtypes = {tensor.dtype for tensor in tensors}
    return dtypes.pop() if len(dtypes) == 1 else torch.float32


def in_units(*strides: int) -> tuple[list[int], int]:
    """Strides in units, and the number of elements in a unit. The unit tells Triton the alignment of rows."""
    unit = 8 if all(stride % 8 == 0 for stride in strides) else 1
    return [stride // unit for stride in strides], unit


def strides_of(*tensors: Tensor) -> tuple[list[int], int]:
    """Token and head strides of (T, H, D) tensors, in units, and the number of elements in a unit."""
    return in_units(*(tensor.stride(dim) for tensor in tensors for dim in (0, 1)))


def readable(tensor: Tensor, compute: torch.dtype) -> Tensor:
    """The (T, H, D) tensor in that dtype, copied where its strides do not suit the kernels."""
    # Vector loads need unit stride inside a row. Row strides must be small enough for int32 offsets inside a tile.
    tensor = tensor.to(compute)
    return tensor if tensor.stride(-1) == 1 and tensor.stride(0) < 2**24 else tensor.contiguous()


def exponent(scale: float) -> float:
    """The scale of scores in base 2. Never 0, because a masked score of -inf times 0 would be NaN."""
    return max(abs(scale) * math.log2(math.e), 1e-30)


def constants(launch: Launch, unit: int, head_dim: int, value_dim: int | None = None) -> dict[str, int]:
    """The compile-time arguments of a kernel over query and key tiles. ``value_dim``: of kernels that take one."""
    (width, rest), values = columns(head_dim), {}
    if value_dim is not None:
        value_width, value_rest = columns(value_dim)
        values = {"DV": value_dim, "BDV": value_width, "RESTV": value_rest}
    return {
        "UNIT": unit, "D": head_dim, "BD": width, "REST": rest, **values,
        "BLOCK_M": launch.block_m, "BLOCK_N": launch.block_n,
        "num_warps": launch.num_warps, "num_stages": launch.num_stages,
    }  # fmt: skip
