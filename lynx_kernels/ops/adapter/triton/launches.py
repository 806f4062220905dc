"""How the adapter's Triton kernels are launched: which form, and how each product is cut. Data, with the reasons.

A plan depends on Python numbers alone (shapes, dtypes, the name of the GPU), so that choosing one reads nothing from
the device, may stand in a CUDA graph, and is the same on every rank. Plans for shapes that were timed come from
a file in the cache folder, where ``python -m lynx_kernels.ops.adapter.triton.tune`` has been run; the rest follow
the rules below. Nothing is timed unless that is run.

None of the rules is measured: no GPU yet. The reasons are arithmetic and what the compiler reports (tests/compilation).
Compiled for sm_80 every launch stays under 99 KiB of shared memory, what sm_86, 89 and 120 have, which compile alike:
one table serves every GPU.
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
    """How one product is cut: the output's tile, the step along the sum, and what Triton makes of it.

    ``num_splits`` splits the sum itself over programs: only the down-projection for a few tokens takes more than 1.
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
    """A form, ``"tiled"``, ``"fused"`` or ``"small_m"`` (``__init__.py`` describes them), and the launches it takes.

    ``down`` cuts the product into the bottleneck, ``up`` the one out of it; in the fused form they are one.
    """

    form: str
    down: Launch
    up: Launch


@dataclass(frozen=True)
class Call:
    """What a plan depends on."""

    direction: str  # "forward", "backward", or "weights": backward where nothing below the weights needs a gradient
    tokens: int
    width: int
    bottleneck: int
    stream: torch.dtype
    compute: torch.dtype  # of the weights
    aligned: bool  # whether every row starts at a multiple of 16 values, which Triton must know to load vectors
    gpu: str = ""
    multiprocessors: int = 132  # of an H100; an A100 has 108

    @property
    def wide(self) -> bool:
        """Whether the stream takes more bytes than the weights, as under autocast."""
        return self.stream.itemsize > self.compute.itemsize

    def key(self) -> str:
        """Names the calls that share a tuned plan: shapes as they are, tokens up to the next power of two."""
        tokens = triton.next_power_of_2(max(self.tokens, 1))
        dtypes = f"{self.stream}/{self.compute}".replace("torch.", "")
        return f"{self.gpu} {self.direction} T<={tokens} d={self.width} r={self.bottleneck} {dtypes}"


# Tiled, many tokens. 128 x 128 outputs use every loaded value 128 times, so L2 keeps up with the tensor cores; on 8
# warps the fp32 sum takes 64 registers a thread and leaves room to normalise; three stages take 96 KiB.
LARGE = Launch(128, 128, 64, num_warps=8, num_stages=3)
# An fp32 stream through half-precision weights (autocast): x takes twice the bytes, and steps of 64 spill on sm_80.
LARGE_WIDE = Launch(128, 128, 32, num_warps=8, num_stages=3)
# Too few large tiles to occupy the GPU: half the rows on half the warps (all of them for a wide stream). Not half the
# columns: with 64 of them ptxas serialises sm_90's products, whose left operand comes normalised from registers.
MEDIUM = Launch(64, 128, 64, num_warps=4, num_stages=3)
MEDIUM_WIDE = Launch(64, 128, 64, num_warps=8, num_stages=3)
# Backward's epilogues hold up to four tiles at once (sum, pre-activation, activation, act_grad): 128 x 128 spills 1 KiB
# on 8 warps and 0.5 KiB on 16, half the columns on 8 warps nothing, on 4 warps 1 KiB again.
LARGE_BACKWARD = Launch(128, 64, 64, num_warps=8, num_stages=3)
MEDIUM_BACKWARD = Launch(64, 64, 64, num_warps=4, num_stages=4)
# Rows that start anywhere: values are loaded one by one, past the asynchronous copies, and wait in registers. 32 x 64
# in steps of 32 is what spills nothing; the larger tiles spill up to 2 KiB.
UNALIGNED = Launch(32, 64, 32, num_warps=4, num_stages=2)
# IEEE fp32 has no tensor cores: operands live in registers, and a short step keeps them few. Fewer than 64 rows:
# from there on Triton 3.7 compiles an fp32 product of widened bf16 or fp16 values to TF32 on sm_100, whatever was asked
# for (triton-lang/triton #10176).
IEEE = Launch(32, 64, 16, num_warps=4, num_stages=3)

# Few tokens, by rows of a tile: 16 is the least a tensor core takes. The floor is the time to read both weights once,
# 2 * d * r values: 33.5 MB in bf16 at d = 4096, r = 2048, 10 us at an H100's 3.35 TB/s. To come near it a
# multiprocessor must have some 32 KB of loads in flight, so steps are long and stages many: 12 to 24 KiB of weights in
# flight a program, and two to four programs side by side. A tile is about as wide as it is high, which keeps what
# is read of x from L2 at what is read of the weights; for the same reason the up-projection of 64 rows stops at 32
# columns, where d = 4096 still makes 128 programs.
# Inward 64 tokens are two tiles of rows that share the weights through L2. From 64 rows on products are asynchronous on
# sm_90, and as their left operand comes normalised from registers, ptxas serialises them under Triton 3.6, whatever the
# width and the steps.
SMALL_M_DOWN = {
    16: Launch(16, 16, 128, num_warps=4, num_stages=4),  # steps of 256 spill 20 bytes on sm_100
    32: Launch(32, 32, 128, num_warps=4, num_stages=4),
}
SMALL_M_UP = {
    16: Launch(16, 16, 128, num_warps=4, num_stages=4),
    32: Launch(32, 16, 128, num_warps=4, num_stages=4),
    64: Launch(64, 32, 128, num_warps=4, num_stages=3),
}
FEW_UNALIGNED = Launch(32, 32, 32, num_warps=4, num_stages=2)
FEW_IEEE = Launch(32, 32, 32, num_warps=4, num_stages=3)

FEW_TOKENS = 64
SMALL_BOTTLENECK = 256
# Backward holds four tiles as wide as the bottleneck: 64 rows x 256 spill 0.9 KiB on 8 warps. 32 rows do not, but each
# such block of rows would read all of both weights from L2, eight times the tiled form's traffic.
SMALL_BOTTLENECK_BACKWARD = 128
# Up to here one multiprocessor reads both weights (at some 100 GB/s, 512 KiB in bf16) in the 5 us that two launches
# more would cost: a few tokens take the fused form too.
LIGHT_WEIGHT = 2**17


@cache
def choose_plan(call: Call) -> Plan:
    """The plan of a call: the tuned one where there is one, else by the rules."""
    tuned = tuned_plans().get(call.key()) if call.aligned else None
    return tuned or plan_by_rule(call)


def plan_by_rule(call: Call) -> Plan:
    """The plan of a call by the rules, whatever was timed."""
    heavy = call.width * call.bottleneck > LIGHT_WEIGHT
    if call.direction == "forward" and call.tokens <= FEW_TOKENS and heavy:
        return small_m_plan(call)
    small = SMALL_BOTTLENECK if call.direction == "forward" else SMALL_BOTTLENECK_BACKWARD
    if call.bottleneck <= small and call.direction != "weights":
        return fused_plan(call)
    return tiled_plan(call)


def small_m_plan(call: Call) -> Plan:
    """As many splits as make two programs a multiprocessor, and no split shorter than a step."""
    down = _small_m_launch(call, SMALL_M_DOWN)
    num_splits = triton.cdiv(2 * call.multiprocessors, max(down.programs(call.tokens, call.bottleneck), 1))
    num_splits = max(min(num_splits, triton.cdiv(call.width, down.block_k)), 1)
    return Plan("small_m", replace(down, num_splits=num_splits), _small_m_launch(call, SMALL_M_UP))


def _small_m_launch(call: Call, by_rows: dict[int, Launch]) -> Launch:
    if call.compute == torch.float32:
        return FEW_IEEE
    if not call.aligned:
        return FEW_UNALIGNED
    most = 32 if call.wide else max(by_rows)  # a wide stream spills at 64 rows on sm_80
    return by_rows[min(max(triton.next_power_of_2(call.tokens), 16), most)]


def fused_plan(call: Call) -> Plan:
    """All of the bottleneck in one tile, 16 columns at least, and as many rows as registers and programs allow."""
    launch = _fused_launch(call, max(16, triton.next_power_of_2(call.bottleneck)))
    return Plan("fused", launch, launch)


def _fused_launch(call: Call, columns: int) -> Launch:
    warps = 4 if columns <= 64 else 8
    if call.compute == torch.float32:
        return Launch(32 if columns <= 64 else 16, columns, 16, num_warps=4, num_stages=2)
    if not call.aligned:
        return Launch(16, columns, 32, num_warps=warps, num_stages=2)
    if call.wide:  # 64 rows: ptxas serialises sm_90's products, or spills
        return Launch(32, columns, 64, num_warps=warps, num_stages=2)
    # Every block of rows reads all of both weights from L2: as many rows as spill nothing, as soon as they occupy a
    # third of the GPU; else 16. 64 rows, but half as many of 256 columns, whose products on sm_90 ptxas serialises
    # under Triton 3.6.
    many = Launch(64 if columns <= 128 else 32, columns, 64, num_warps=warps, num_stages=2)
    if 3 * many.programs(call.tokens, 1) >= call.multiprocessors:
        return many
    return Launch(16, columns, 64, num_warps=warps, num_stages=3)


def tiled_plan(call: Call) -> Plan:
    return Plan("tiled", _tiled_launch(call, call.bottleneck), _tiled_launch(call, call.width))


def _tiled_launch(call: Call, columns: int) -> Launch:
    if call.tokens <= FEW_TOKENS and call.direction != "forward":
        return _small_m_launch(call, SMALL_M_UP)
    if call.compute == torch.float32:
        return IEEE
    if not call.aligned:
        return UNALIGNED
    if call.direction != "forward":
        large, medium = LARGE_BACKWARD, MEDIUM_BACKWARD
    elif call.wide:
        large, medium = LARGE_WIDE, MEDIUM_WIDE
    else:
        large, medium = LARGE, MEDIUM
    return large if large.programs(call.tokens, columns) >= call.multiprocessors else medium


@cache
def tuned_plans() -> dict[str, Plan]:
    """What the file of tuned plans holds, by ``Call.key``; nothing where there is no such file."""
    if not TUNED.exists():
        return {}
    return {key: _plan(**each) for key, each in json.loads(TUNED.read_text()).items()}


def _plan(form: str, down: dict, up: dict) -> Plan:
    return Plan(form, Launch(**down), Launch(**up))


def use_plan(call: Call, plan: Plan | None) -> None:
    """Give calls with the key of ``call`` this plan, in this process; None gives them back to the rules."""
    tuned_plans().pop(call.key(), None)
    if plan is not None:
        tuned_plans()[call.key()] = plan
    choose_plan.cache_clear()
