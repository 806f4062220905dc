"""How the adapter's Triton kernels are launched: which form, and how each product is cut. Data, with the reasons.

A plan depends on Python numbers alone (shapes, dtypes, the name of the GPU), so that choosing one reads nothing from
the device, may stand in a CUDA graph, and is the same on every rank. Plans for shapes that were timed come from
``tuned.json`` beside this file, where ``python -m lynx_kernels.adapter.tune`` has been run; the rest follow the rules
below. Nothing is timed unless that is run.

None of the rules is measured: no GPU yet. The reasons are arithmetic and what the compiler reports (tests/compilation).
Every launch stays under 99 KiB of shared memory, what sm_86, 89 and 120 have: one table serves every GPU from sm_80 on,
and where there is more, two programs share it.
"""

import json
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

import torch
import triton

TUNED = Path(__file__).with_name("tuned.json")


@dataclass(frozen=True)
class Launch:
    """How one product is cut: the output's tile, the step along the sum, and what Triton makes of it.

    ``parts`` cuts the sum itself, in programs of its own: only the down-projection for a few tokens takes more than 1.
    """

    block_rows: int
    block_columns: int
    block_inner: int
    num_warps: int
    num_stages: int
    parts: int = 1

    def programs(self, rows: int, columns: int) -> int:
        return triton.cdiv(rows, self.block_rows) * triton.cdiv(columns, self.block_columns) * self.parts


@dataclass(frozen=True)
class Plan:
    """A form, ``"tiled"``, ``"fused"`` or ``"few"`` (``triton.py`` says what they are), and the launches it takes.

    ``inward`` cuts the product into the bottleneck (the only one of the fused form), ``outward`` the one out of it.
    """

    form: str
    inward: Launch
    outward: Launch | None = None


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
    device: str = ""  # the name of the GPU
    multiprocessors: int = 132  # of an H100; an A100 has 108

    def key(self) -> str:
        """Names the calls that share a tuned plan: shapes as they are, tokens up to the next power of two."""
        tokens = triton.next_power_of_2(max(self.tokens, 1))
        dtypes = f"{self.stream}/{self.compute}".replace("torch.", "")
        return f"{self.device} {self.direction} T<={tokens} d={self.width} r={self.bottleneck} {dtypes}"


# Many tokens. 128 x 128 outputs use every loaded value 128 times, so L2 keeps up with the tensor cores; on 8 warps the
# fp32 sum takes 64 registers a thread and leaves room to normalise; three stages take 96 KiB.
LARGE = Launch(128, 128, 64, num_warps=8, num_stages=3)
# Too few large tiles to occupy the GPU: half the rows on half the warps. Not half the columns: with 64 of them ptxas
# serialises sm_90's products, whose left operand comes normalised from registers.
MEDIUM = Launch(64, 128, 64, num_warps=4, num_stages=3)
# Backward's epilogues hold up to four tiles at once (sum, pre-activation, activation, slope): 128 x 128 spills 1 KiB
# on 8 warps and 0.5 KiB on 16, half the columns on 8 warps nothing, on 4 warps 1 KiB again.
LARGE_BACKWARD = Launch(128, 64, 64, num_warps=8, num_stages=3)
MEDIUM_BACKWARD = Launch(64, 64, 64, num_warps=4, num_stages=4)
# IEEE fp32 has no tensor cores: operands live in registers, and a short step keeps them few. Fewer than 64 rows:
# from there on Triton 3.7 compiles an fp32 product of widened bf16 or fp16 values to TF32 on sm_100, whatever was asked
# for (triton-lang/triton #10176).
IEEE = Launch(32, 64, 16, num_warps=4, num_stages=3)

FEW_TOKENS = 64
SMALL_BOTTLENECK = 256
LIGHT_WEIGHT = 2**17


@cache
def choose_plan(call: Call) -> Plan:
    """The plan of a call: the tuned one where there is one, else by the rules."""
    if call.aligned and (tuned := tuned_plans().get(call.key())) is not None:
        return tuned
    return plan_by_rule(call)


def plan_by_rule(call: Call) -> Plan:
    """The plan of a call by rule, whatever was timed."""
    if call.direction == "forward" and call.tokens <= FEW_TOKENS and call.width * call.bottleneck > LIGHT_WEIGHT:
        return _few(call)
    if call.bottleneck <= SMALL_BOTTLENECK and call.direction != "weights":
        return _fused(call)
    return _tiled(call)


def _few(call: Call) -> Plan:
    return Plan("few", Launch(16, 16, 64, 4, 3, parts=3), Launch(16, 16, 64, 4, 3))


def _fused(call: Call) -> Plan:
    columns = max(16, triton.next_power_of_2(call.bottleneck))
    return Plan("fused", Launch(64, columns, 64, 4, 2))


def _tiled(call: Call) -> Plan:
    return Plan("tiled", MEDIUM_BACKWARD, MEDIUM_BACKWARD)


@cache
def tuned_plans() -> dict[str, Plan]:
    """What ``tuned.json`` holds, by ``Call.key``; nothing where there is no such file."""
    if not TUNED.exists():
        return {}
    return {key: plan_from_json(each) for key, each in json.loads(TUNED.read_text()).items()}


def plan_from_json(each: dict) -> Plan:
    outward = None if each["outward"] is None else Launch(**each["outward"])
    return Plan(each["form"], Launch(**each["inward"]), outward)
