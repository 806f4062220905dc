"""Clocks, and inputs as cold as a model finds them.

Between two uses of a layer's weights a model reads gigabytes of others, so with few tokens, where reading weights is
the work, they come from memory, not from a cache. A benchmark that repeats one call would find them in the cache: it
takes turns among copies of the inputs that together are four times as large as the last cache.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import cycle
from math import ceil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Runs something that often and returns the seconds of one run.
Timer = Callable[[Callable[[], object], int], float]


@dataclass(frozen=True)
class Batch:
    """What a timer runs: ``run()`` does ``calls`` calls of a provider; ``note`` says how."""

    run: Callable[[], object]
    calls: int = 1
    note: str = ""


@contextmanager
def running_on(threads: int | None) -> Iterator[None]:
    """PyTorch's operations take so many threads in this block; as many as they did where None."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def wall_timer(run: Callable[[], object], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - start) / repeats


def cuda_timer(run: Callable[[], object], repeats: int) -> float:
    """GPU time between two events: the launches of all runs but the first hide behind the work, where work is long."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    for _ in range(repeats):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e-3 / repeats


def timer_of(device: str) -> Timer:
    return cuda_timer if device == "cuda" else wall_timer


def batches(providers: dict[str, tuple[Callable[[Any], object], Sequence[Any]]], captured: bool) -> dict[str, Batch]:
    """One batch for each provider, given as a call and the copies of its inputs.

    With ``captured`` all its copies go into one CUDA graph, so that no launch from Python is timed; a provider that
    cannot be captured is launched from Python and its note says so.
    """
    # Providers that share copies share one turn: the next call, whoever makes it, takes what was not used for longest.
    turns = {id(copies): cycle(copies) for _, copies in providers.values()}
    made = {}
    for name, (call, copies) in providers.items():
        note = ""
        if captured:
            try:
                made[name] = Batch(_capture(call, copies), len(copies), "CUDA graph")
                continue
            except (RuntimeError, AssertionError) as error:
                note = f"launched from Python: {str(error).splitlines()[0]}"
        made[name] = Batch(_taking_turns(call, turns[id(copies)]), note=note)
    return made


def _taking_turns(call: Callable[[Any], object], turn: cycle) -> Callable[[], object]:
    return lambda: call(next(turn))


def _capture(call: Callable[[Any], object], copies: Sequence[Any]) -> Callable[[], object]:
    # On a stream of its own first: what a library allocates once, it must not allocate while a graph is captured.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call(copies[0])
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for inputs in copies:
            call(inputs)
    return graph.replay


def cold_copies(inputs: list[Tensor], device: str) -> list[list[Tensor]]:
    """``inputs``, and as many copies as make them four times as large as the last cache."""
    turns = _turns(sum(each.nbytes for each in inputs), device)
    return [inputs] + [
        [each.detach().clone().requires_grad_(each.requires_grad) for each in inputs] for _ in range(turns - 1)
    ]


def copying(traffic: float, device: str) -> tuple[Callable[[Any], object], list[tuple[Tensor, Tensor]]]:
    """A provider, with its cold copies, that does nothing but move ``traffic`` bytes: half read, half written."""
    numbers = max(1, int(traffic) // 8)  # of four bytes, each read and written
    shape = (_turns(8 * numbers, device), numbers)
    # Ones, not zeros: pages of zeros that nobody wrote are all the same page, and that one is in the cache.
    source, target = (torch.ones(shape, device=device) for _ in range(2))
    return lambda pair: pair[1].copy_(pair[0]), list(zip(source, target, strict=True))


def _turns(size: int, device: str) -> int:
    return ceil(4 * cache_size(device) / size)


@cache
def cache_size(device: str) -> int:
    """Bytes of the last cache before memory; 32 MiB where the system does not say."""
    if device == "cuda":
        return torch.cuda.get_device_properties(0).L2_cache_size
    said = [each.read_text().strip() for each in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size[:-1]) * 2**10 for size in said if size.endswith("K")), default=32 * 2**20)


@cache
def matmul_rate(device: str, dtype: torch.dtype) -> float:
    """FLOP/s of a product of two 2048 x 2048 matrices, the best of three: what long calls are estimated with."""
    left, right = (torch.randn(2048, 2048, device=device).to(dtype) for _ in range(2))
    seconds = [timer_of(device)(lambda: left @ right, 1) for _ in range(4)]
    return 2 * 2048**3 / min(seconds[1:])
