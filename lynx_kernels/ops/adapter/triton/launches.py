"""Launches of the adapter's Triton kernels: the form, and the tiles of each product. Tables with their reasons.

A plan depends only on Python values (shapes, dtypes, the name of the GPU). So choosing one reads nothing from the
device, works inside a CUDA graph, and gives the same plan on every rank. ``python -m
lynx_kernels.ops.adapter.triton.tune`` times shapes and stores their plans in the cache folder. All other shapes follow
the rules below. Nothing else is timed.

The rules are not measured, because no GPU was available. Their reasons are arithmetic and the compiler's reports
(tests/compilation). Compiled for sm_80, every launch uses less than 99 KiB of shared memory, the limit of sm_86, sm_89
and sm_120, which run that code. So one table works for every GPU.
"""

import json
from dataclasses import dataclass, replace
from functools import cache

import torch
import triton

from lynx_kernels.backends.cuda_build import cache_folder

TUNED = cache_folder() / "adapter-tuned.json"


@dataclass(frozen=True)
class Launch:
    """Tiles of one product: the output tile (block_m, block_n), the step along the sum (block_k), warps and stages.

    ``num_splits`` splits the sum over several programs. It exceeds 1 only in the small_m down-projection.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    num_splits: int = 1

    def programs(self, rows: int, columns: int) -> int:
        return triton.cdiv(rows, self.block_m) * triton.cdiv(columns, self.block_n) * self.num_splits


@dataclass(frozen=True)
class Plan:
    """A form, ``"tiled"``, ``"fused"`` or ``"small_m"`` (see ``__init__.py``), and its launches.

    ``down`` is the product into the bottleneck, ``up`` the product out of it. In the fused form both are one launch.
    """

    form: str
    down: Launch
    up: Launch


@dataclass(frozen=True)
class Call:
    """The properties of a call that a plan depends on."""

    direction: str  # "forward"; "backward"; "weights": backward where neither x nor LayerNorm needs a gradient
    tokens: int
    width: int
    bottleneck: int
    stream: torch.dtype
    compute: torch.dtype  # dtype of the weights
    aligned: bool  # whether all row strides are multiples of 16 values, which Triton needs for vector loads
    gpu: str = ""
    multiprocessors: int = 132  # of an H100; an A100 has 108

    @property
    def has_wide_stream(self) -> bool:
        """Whether x has more bytes per value than the weights, as under autocast."""
        return self.stream.itemsize > self.compute.itemsize

    def key(self) -> str:
        """The key of a tuned plan. Calls share it if they differ only in tokens with the same next power of two."""
        tokens = triton.next_power_of_2(max(self.tokens, 1))
        dtypes = f"{self.stream}/{self.compute}".replace("torch.", "")
        return f"{self.gpu} {self.direction} T<={tokens} d={self.width} r={self.bottleneck} {dtypes}"


# Tiled, many tokens. Tiles of 128 x 128 use every loaded value 128 times, so L2 keeps up with the tensor cores. On 8
# warps the fp32 accumulator takes 64 registers per thread, which leaves room to normalise. Three stages take 96 KiB.
LARGE = Launch(128, 128, 64, num_warps=8, num_stages=3)
# fp32 x with half-precision weights (autocast): x takes twice the bytes, and block_k = 64 spills on sm_80.
LARGE_WIDE = Launch(128, 128, 32, num_warps=8, num_stages=3)
# Where large tiles are too few to occupy the GPU: half the rows on half the warps (on all warps for a wide stream). Not
# half the columns: with 64 of them ptxas serialises the products of sm_90, whose left operand is normalised in
# registers.
MEDIUM = Launch(64, 128, 64, num_warps=4, num_stages=3)
MEDIUM_WIDE = Launch(64, 128, 64, num_warps=8, num_stages=3)
# Backward's epilogues hold up to four tiles (accumulator, pre-activation, activation, act_grad). 128 x 128 spills 1 KiB
# on 8 warps and 0.5 KiB on 16. 128 x 64 spills nothing on 8 warps and 1 KiB on 4.
LARGE_BACKWARD = Launch(128, 64, 64, num_warps=8, num_stages=3)
MEDIUM_BACKWARD = Launch(64, 64, 64, num_warps=4, num_stages=4)
# Unaligned rows: values are loaded one by one, without asynchronous copies, and wait in registers. 32 x 64 with
# block_k = 32 spills nothing. Larger tiles spill up to 2 KiB.
UNALIGNED = Launch(32, 64, 32, num_warps=4, num_stages=2)
# IEEE fp32 does not use tensor cores. Operands are in registers, and a small block_k keeps them few. Fewer than 64
# rows: with more, Triton 3.7 compiles an fp32 product of widened bf16 or fp16 values to TF32 on sm_100, despite "ieee"
# (triton-lang/triton #10176).
IEEE = Launch(32, 64, 16, num_warps=4, num_stages=3)

# Small M, by rows of a tile; 16 is the minimum for a tensor core. The lower bound is the time to read both weights
# once, 2 * d * r values: 33.5 MB in bf16 at d = 4096, r = 2048, or 10 us at an H100's 3.35 TB/s. To get close to it, a
# multiprocessor needs about 32 KB of loads in flight. So block_k is large and stages are many: 12 to 24 KiB of weights
# in flight per program, two to four programs per multiprocessor. Tiles are about square, so that reads of x from L2 do
# not exceed reads of the weights. For the same reason the up-projection of 64 rows has 32 columns, which still makes
# 128 programs at d = 4096.
# In the down-projection 64 tokens are two row tiles that share the weights through L2. From 64 rows on, products are
# asynchronous on sm_90. Their left operand is normalised in registers, so ptxas serialises them under Triton 3.6, at
# every block_n and block_k.
SMALL_M_DOWN = {
    16: Launch(16, 16, 128, num_warps=4, num_stages=4),  # block_k = 256 spills 20 bytes on sm_100
    32: Launch(32, 32, 128, num_warps=4, num_stages=4),
}
SMALL_M_UP = {
    16: Launch(16, 16, 128, num_warps=4, num_stages=4),
    32: Launch(32, 16, 128, num_warps=4, num_stages=4),
    64: Launch(64, 32, 128, num_warps=4, num_stages=3),
}
SMALL_M_UNALIGNED = Launch(32, 32, 32, num_warps=4, num_stages=2)
SMALL_M_IEEE = Launch(32, 32, 32, num_warps=4, num_stages=3)

SMALL_M_TOKENS = 64
SMALL_BOTTLENECK = 256
# Backward holds four tiles as wide as the bottleneck. 64 rows x 256 columns spill 0.9 KiB on 8 warps. 32 rows do not
# spill, but every block of rows reads both weights from L2: eight times the traffic of the tiled form.
SMALL_BOTTLENECK_BACKWARD = 128
# Up to this size, one multiprocessor reads both weights (512 KiB in bf16, at about 100 GB/s) in 5 us, the cost of two
# more launches. So small M takes the fused form too.
LIGHT_WEIGHT = 2**17


@cache
def choose_plan(call: Call) -> Plan:
    """The plan of a call: the tuned plan if there is one, otherwise by the rules."""
    tuned = tuned_plans().get(call.key()) if call.aligned else None
    return tuned or plan_by_rule(call)


def plan_by_rule(call: Call) -> Plan:
    """The plan of a call by the rules, without tuned plans."""
    heavy = call.width * call.bottleneck > LIGHT_WEIGHT
    if call.direction == "forward" and call.tokens <= SMALL_M_TOKENS and heavy:
        return small_m_plan(call)
    small = SMALL_BOTTLENECK if call.direction == "forward" else SMALL_BOTTLENECK_BACKWARD
    if call.bottleneck <= small and call.direction != "weights":
        return fused_plan(call)
    return tiled_plan(call)


def small_m_plan(call: Call) -> Plan:
    """Enough splits for two programs per multiprocessor, but no split shorter than block_k."""
    down = _small_m_launch(call, SMALL_M_DOWN)
    num_splits = triton.cdiv(2 * call.multiprocessors, max(down.programs(call.tokens, call.bottleneck), 1))
    num_splits = max(min(num_splits, triton.cdiv(call.width, down.block_k)), 1)
    return Plan("small_m", replace(down, num_splits=num_splits), _small_m_launch(call, SMALL_M_UP))


def _small_m_launch(call: Call, by_rows: dict[int, Launch]) -> Launch:
    if call.compute == torch.float32:
        return SMALL_M_IEEE
    if not call.aligned:
        return SMALL_M_UNALIGNED
    max_rows = 32 if call.has_wide_stream else max(by_rows)  # a wide stream spills at 64 rows on sm_80
    return by_rows[min(max(triton.next_power_of_2(call.tokens), 16), max_rows)]


def fused_plan(call: Call) -> Plan:
    """The whole bottleneck in one tile of at least 16 columns, with as many rows as registers and occupancy allow."""
    launch = _fused_launch(call, max(16, triton.next_power_of_2(call.bottleneck)))
    return Plan("fused", launch, launch)


def _fused_launch(call: Call, columns: int) -> Launch:
    warps = 4 if columns <= 64 else 8
    if call.compute == torch.float32:
        return Launch(32 if columns <= 64 else 16, columns, 16, num_warps=4, num_stages=2)
    if not call.aligned:
        return Launch(16, columns, 32, num_warps=warps, num_stages=2)
    if call.has_wide_stream:  # with 64 rows ptxas spills, or serialises the products of sm_90
        return Launch(32, columns, 64, num_warps=warps, num_stages=2)
    # Every block of rows reads both weights from L2, so it should have many rows. 64 rows do not spill. With 256
    # columns it is 32, because ptxas serialises the products of sm_90 under Triton 3.6. If these blocks would occupy
    # less than a third of the GPU: 16 rows.
    many = Launch(64 if columns <= 128 else 32, columns, 64, num_warps=warps, num_stages=2)
    if 3 * many.programs(call.tokens, 1) >= call.multiprocessors:
        return many
    return Launch(16, columns, 64, num_warps=warps, num_stages=3)


def tiled_plan(call: Call) -> Plan:
    return Plan("tiled", _tiled_launch(call, call.bottleneck), _tiled_launch(call, call.width))


def _tiled_launch(call: Call, columns: int) -> Launch:
    if call.tokens <= SMALL_M_TOKENS and call.direction != "forward":
        return _small_m_launch(call, SMALL_M_UP)
    if call.compute == torch.float32:
        return IEEE
    if not call.aligned:
        return UNALIGNED
    if call.direction != "forward":
        large, medium = LARGE_BACKWARD, MEDIUM_BACKWARD
    elif call.has_wide_stream:
        large, medium = LARGE_WIDE, MEDIUM_WIDE
    else:
        large, medium = LARGE, MEDIUM
    return large if large.programs(call.tokens, columns) >= call.multiprocessors else medium


@cache
def tuned_plans() -> dict[str, Plan]:
    """``Call.key()`` -> tuned plan, from the file; empty if there is no file."""
    if not TUNED.exists():
        return {}
    return {key: _plan(**each) for key, each in json.loads(TUNED.read_text()).items()}


def _plan(form: str, down: dict, up: dict) -> Plan:
    return Plan(form, Launch(**down), Launch(**up))


def use_plan(call: Call, plan: Plan | None) -> None:
    """Use ``plan`` for calls with the key of ``call``, in this process. None returns to the rules."""
    tuned_plans().pop(call.key(), None)
    if plan is not None:
        tuned_plans()[call.key()] = plan
    choose_plan.cache_clear()
