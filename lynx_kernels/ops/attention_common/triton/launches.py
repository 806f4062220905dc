"""How the Triton attention kernels are launched: how their work is cut, and what the host tells all of them."""

import math
from dataclasses import dataclass

import torch
import triton
from torch import Tensor


@dataclass(frozen=True)
class Launch:
    """How a kernel is cut: queries and keys a tile, and what Triton makes of it."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# None of these is measured: no GPU yet. They follow what the compiler reports, with heads that share keys, which costs
# registers: bf16 at a head_dim of up to 128 spills nothing, but for tens of bytes that tests/compilation names.

# 128 x 64 on 8 warps: 64 fp32 sums and 32 scores a thread.
FWD = Launch(128, 64, num_warps=8, num_stages=3)
# Three operands beside the sums: 64 keys spill on sm_80 (96 bytes), 32 do not.
BWD_DQ = Launch(128, 32, num_warps=8, num_stages=2)
# Two sums and two tiles of scores: 64 queries spill 140 bytes on sm_90, and two stages 928 on sm_100.
BWD_DKDV = Launch(32, 64, num_warps=8, num_stages=1)
# Half the queries on half the warps, for segments that would leave most of 128 rows empty.
SHORT_FWD = Launch(64, 64, num_warps=4, num_stages=3)
SHORT_BWD_DQ = Launch(64, 64, num_warps=4, num_stages=2)
# For spans seen by at most 32 queries, as by the latents of a resampler. 64 keys spill on sm_100 at a head_dim of 88,
# 124 bytes forward and 244 backward; 32 do not.
SMALL_M_FWD = Launch(32, 32, num_warps=4, num_stages=3)
SMALL_M_BWD_DQ = Launch(32, 32, num_warps=4, num_stages=2)
# Beyond a head_dim of 128 three stages of 128 x 64 take 256 KiB, more than a block may have.
WIDE_FWD = Launch(128, 32, num_warps=8, num_stages=2)
WIDE_BWD_DQ = Launch(64, 32, num_warps=8, num_stages=1)
# IEEE fp32 has no tensor cores: operands live in registers, spread over 8 warps. Fewer than 64 rows, or Triton 3.7
# compiles TF32 on sm_100.
IEEE = Launch(32, 32, num_warps=8, num_stages=1)


def choose_launches(
    head_dim: int, compute: torch.dtype, queries: int, n_segments: int, spans: bool
) -> tuple[Launch, Launch, Launch]:
    """The launches of the forward, of the gradient of queries and of that of keys, over a layout of spans or packed."""
    if compute == torch.float32:
        return (IEEE,) * 3
    if head_dim > 128:
        return WIDE_FWD, WIDE_BWD_DQ, BWD_DKDV
    # Queries a segment are few on average; empty segments count.
    if spans and queries <= SMALL_M_FWD.block_m * n_segments:
        return SMALL_M_FWD, SMALL_M_BWD_DQ, BWD_DKDV
    if queries <= SHORT_FWD.block_m * n_segments:
        return SHORT_FWD, SHORT_BWD_DQ, BWD_DKDV
    return FWD, BWD_DQ, BWD_DKDV


def columns(head_dim: int) -> tuple[int, int]:
    """Widths of the one or two tiles, side by side, that hold a row of a head: powers of two, at least 16."""
    whole = triton.next_power_of_2(max(head_dim, 16))
    half = whole // 2
    rest = triton.next_power_of_2(max(head_dim - half, 16))
    return (half, rest) if half >= 16 and half + rest < whole else (whole, 0)


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """What they are multiplied in: their dtype, or fp32 where they differ."""
    dtypes = {tensor.dtype for tensor in tensors}
    return dtypes.pop() if len(dtypes) == 1 else torch.float32


def in_units(*strides: int) -> tuple[list[int], int]:
    """Strides in units, and the elements of a unit: from it Triton knows that rows start at multiples."""
    unit = 8 if all(stride % 8 == 0 for stride in strides) else 1
    return [stride // unit for stride in strides], unit


def exponent(scale: float) -> float:
    """The scale of scores that are powers of 2. Not 0: scores of 0 must not be -inf times 0 where keys are hidden."""
    return max(abs(scale) * math.log2(math.e), 1e-30)


def constants(launch: Launch, head_dim: int, unit: int) -> dict[str, int]:
    """What every kernel over tiles of queries and keys is compiled with."""
    width, rest = columns(head_dim)
    return {
        "UNIT": unit, "D": head_dim, "BD": width, "REST": rest, "BLOCK_M": launch.block_m, "BLOCK_N": launch.block_n,
        "num_warps": launch.num_warps, "num_stages": launch.num_stages,
    }  # fmt: skip
