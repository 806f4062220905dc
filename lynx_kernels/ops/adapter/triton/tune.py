"""Time the launches of the adapter's Triton kernels on this GPU, for the given shapes, and store the fastest.

    python -m lynx_kernels.ops.adapter.triton.tune 8192x4096x2048 64x4096x2048 --dtype bf16

The search starts from the plans that the rules give, for forward and backward. It changes one number at a time as long
as this is faster. A plan must give correct results before it is timed. The fastest plans are stored in
``adapter-tuned.json`` in the cache folder ($LYNX_CACHE, by default ~/.cache/lynx_kernels). Every later process uses
them. Only this command starts the search.
"""

import argparse
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
import triton
from torch import Tensor
from triton.errors import TritonError

from lynx_kernels.ops.adapter import reference
from lynx_kernels.ops.adapter import triton as implementation
from lynx_kernels.ops.adapter.call import AdapterBackwardCall, AdapterCall
from lynx_kernels.ops.adapter.triton import launches
from lynx_kernels.ops.adapter.triton.launches import Call, Launch, Plan

_MIN = {"block_m": 16, "block_n": 16, "block_k": 16, "num_warps": 1, "num_stages": 1, "num_splits": 1}
_MAX = {"block_m": 256, "block_n": 256, "block_k": 512, "num_warps": 16, "num_stages": 8, "num_splits": 64}
_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

Clock = Callable[[Callable[[], object]], float]  # returns the time of a call, in ms


def make_inputs(
    tokens: int, width: int, bottleneck: int, stream: torch.dtype, compute: torch.dtype, device: str
) -> list[Tensor]:
    """Random tensors for ``forward``."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int, dtype: torch.dtype = compute, deviation: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator) * deviation).to(device, dtype)

    return [
        random(tokens, width, dtype=stream), random(width), random(width),
        random(bottleneck, width, deviation=width**-0.5), random(bottleneck),
        random(width, bottleneck, deviation=bottleneck**-0.5), random(width),
        torch.tensor(0.7, device=device),
    ]  # fmt: skip


def neighbours(plan: Plan, compute: torch.dtype) -> Iterator[Plan]:
    """The plans that differ in one number: stages and splits by one, the others doubled or halved."""
    for names in (("down", "up"),) if plan.form == "fused" else (("down",), ("up",)):
        launch = getattr(plan, names[0])
        for field, value in asdict(launch).items():
            if field == "num_splits" and (plan.form != "small_m" or "up" in names):
                continue
            if field == "block_n" and plan.form == "fused":  # always the whole bottleneck
                continue
            changed = (value - 1, value + 1) if field in ("num_stages", "num_splits") else (value // 2, value * 2)
            for other in changed:
                near = replace(launch, **{field: other})
                if _MIN[field] <= other <= _MAX[field] and _is_ieee(near, compute):
                    yield replace(plan, **dict.fromkeys(names, near))


def _is_ieee(launch: Launch, compute: torch.dtype) -> bool:
    return compute != torch.float32 or launch.block_m < 64  # for the reason at launches.IEEE


def initial_plans(call: Call) -> list[Plan]:
    """The plans from which the search starts: the one of the rules, and the other forms that can run the call."""
    plans = [launches.plan_by_rule(call), launches.tiled_plan(call)]
    if call.direction == "forward":
        plans.append(launches.small_m_plan(call))
    if call.bottleneck <= launches.SMALL_BOTTLENECK:
        plans.append(launches.fused_plan(call))
    return list(dict.fromkeys(plans))


def tune(inputs: list[Tensor], clock: Clock) -> dict[Call, dict[Plan, float]]:
    """Search plans for forward and backward of these arguments. From then on this process uses the fastest.

    Returns:
        For each call (forward, backward), the time of each plan in ms; infinite if it fails or gives wrong results.

    Raises:
        ValueError: row strides are not multiples of 16 values; such calls never use tuned plans.
    """
    x, down_weight, up_weight = inputs[0], inputs[3], inputs[5]
    grad = x.flip(0).contiguous()
    call_forward = AdapterCall._make([*inputs, 1e-5, "silu"])
    saved = implementation.forward(call_forward)[1:]
    call_backward = AdapterBackwardCall._make([grad, *inputs, *saved, "silu", [True] * 8])
    runs: dict[str, Callable[[], Sequence[Tensor]]] = {
        "forward": lambda: implementation.forward(call_forward)[:1],
        "backward": lambda: implementation.backward(call_backward),
    }
    results = {}
    for direction, run in runs.items():
        call = implementation.describe(direction, x, down_weight, up_weight)
        if not call.aligned:
            raise ValueError(f"tune: d={call.width}, r={call.bottleneck} and all row strides must be multiples of 16")
        results[call] = _search(call, run, _allowed(direction, inputs, grad), clock)
    return results


def _allowed(direction: str, inputs: list[Tensor], grad: Tensor) -> list[tuple[Tensor, float]]:
    """The results in fp64, each with its allowed error: four times the reference's own error, plus four eps."""

    def define(*tensors: Tensor) -> list[Tensor]:
        *arguments, grad = tensors
        out, *saved = reference.forward(AdapterCall._make([*arguments, 1e-5, "silu"]))
        if direction == "forward":
            return [out]
        return reference.backward(AdapterBackwardCall._make([grad, *arguments, *saved, "silu", [True] * 8]))

    exact, plain = define(*(each.double() for each in (*inputs, grad))), define(*inputs, grad)
    allowed = []
    for truth, other in zip(exact, plain, strict=True):
        # The gradient of scale sums over all tokens and columns. Its terms may cancel, but rounding errors do not.
        magnitude = truth.abs().max() if truth.dim() else math.sqrt(grad.numel()) * 4
        error = (other.double() - truth).abs().max()
        allowed.append((truth, float(4 * (error + torch.finfo(inputs[3].dtype).eps * magnitude))))
    return allowed


def _search(
    call: Call, run: Callable[[], Sequence[Tensor]], allowed: list[tuple[Tensor, float]], clock: Clock
) -> dict[Plan, float]:
    before = launches.choose_plan(call)
    times: dict[Plan, float] = {}

    def measure(plan: Plan) -> float:
        if plan not in times:
            launches.use_plan(call, plan)
            try:
                times[plan] = clock(run) if _is_right(run(), allowed) else math.inf
            except TritonError:  # too much shared memory or too many registers, or the tile does not compile
                times[plan] = math.inf
        return times[plan]

    try:
        for plan in dict.fromkeys([before, *initial_plans(call)]):
            measure(plan)  # measured first, so that it wins ties
            while measure(better := min(neighbours(plan, call.compute), key=measure)) < measure(plan):
                plan = better
    finally:
        launches.use_plan(call, min(times, key=times.__getitem__, default=before))
    return times


def _is_right(results: Sequence[Tensor], allowed: list[tuple[Tensor, float]]) -> bool:
    pairs = zip(results, allowed, strict=True)
    return all(bool((ours.double() - truth).abs().max() <= most) for ours, (truth, most) in pairs)


def store(results: dict[Call, dict[Plan, float]], path: Path) -> None:
    """Add the fastest plan of every call to the file. Other entries stay."""
    content = json.loads(path.read_text()) if path.exists() else {}
    for call, times in results.items():
        content[call.key()] = asdict(min(times, key=times.__getitem__))
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
    unfinished.replace(path)  # atomic: no process reads an incomplete file


def table(results: dict[Call, dict[Plan, float]]) -> str:
    """A text table: for every call, the plan of the rules and the five fastest plans."""
    lines = []
    for call, times in results.items():
        rule = launches.plan_by_rule(call)
        lines.append(f"{call.key()}\n  {times[rule]:9.4f} ms by rule: {rule}")
        lines += [f"  {times[plan]:9.4f} ms {plan}" for plan in sorted(times, key=times.__getitem__)[:5]]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", nargs="+", metavar="TxDxR", help="tokens, width and bottleneck, as in 8192x4096x2048")
    parser.add_argument("--dtype", choices=_DTYPES, default="bf16", help="of the weights (default: %(default)s)")
    parser.add_argument("--stream", choices=_DTYPES, help="dtype of x (default: that of the weights)")
    parser.add_argument("--output", type=Path, default=launches.TUNED, help="default: where the kernels look")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("PyTorch finds no GPU on this machine; run the search on a machine with a GPU")
    for shape in options.shapes:
        tokens, width, bottleneck = map(int, shape.split("x"))
        compute, stream = _DTYPES[options.dtype], _DTYPES[options.stream or options.dtype]
        inputs = make_inputs(tokens, width, bottleneck, stream, compute, "cuda")
        results = tune(inputs, partial(triton.testing.do_bench, return_mode="median"))
        print(table(results), flush=True)
        store(results, options.output)


if __name__ == "__main__":
    main()
