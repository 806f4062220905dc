"""What every operation is asked on a GPU, given as a function of its tensors. Nothing here knows an operation."""

import os
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from tests.lynx_kernels.helpers import Function, run

DEVICE = os.environ.get("LYNX_GPU_TESTS_ON", "cuda")
PRESENT = DEVICE != "cuda" or torch.cuda.is_available()
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def need_free(gibibytes: float) -> None:
    """Skip the test where the GPU has less memory free."""
    free, _ = torch.cuda.mem_get_info()
    if free < gibibytes * 2**30:
        pytest.skip(f"needs {gibibytes} GiB of free GPU memory, there are {free / 2**30:.1f}")


def check_deterministic(function: Function, inputs: Sequence[Tensor | None], grad: Tensor) -> None:
    """Two runs agree bit by bit, in the output and in every gradient."""
    first, second = run(function, inputs, grad), run(function, inputs, grad)
    for index, (ours, theirs) in enumerate(zip(first, second, strict=True)):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, msg=lambda said, i=index: f"result {i}: {said}")


def check_never_waits(function: Function, inputs: Sequence[Tensor | None], grad: Tensor) -> None:
    """Neither forward nor backward makes the host wait for the GPU, once everything is compiled."""
    run(function, inputs, grad)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(function, inputs, grad)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def replayed(function: Function, first: Sequence[Tensor], second: Sequence[Tensor]) -> list[Tensor]:
    """Capture ``function(*first)`` in a CUDA graph with its gradients under the last of the tensors, copy ``second``
    into the captured tensors, and return what a replay then gives."""
    *inputs, grad = [each.clone() for each in first]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles kernels and fills caches, which a capture may not
        for _ in range(3):
            run(function, inputs, grad)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run(function, inputs, grad)
    for static, new in zip([*inputs, grad], second, strict=True):
        static.copy_(new)
    for each in results:
        each.fill_(torch.nan)  # what the replay does not write shows
    graph.replay()
    return [each.clone() for each in results]


def memory_of(function: Callable[[], Tensor]) -> tuple[int, int]:
    """Bytes of GPU memory that a call holds at its peak, and after it while its result is alive."""
    kept_alive = function()  # compiles kernels, fills caches
    del kept_alive
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept_alive = function()
    torch.cuda.synchronize()
    peak, after = torch.cuda.max_memory_allocated() - before, torch.cuda.memory_allocated() - before
    del kept_alive
    return peak, after
