"""What every operation is asked on a GPU, given as a call that returns its results. Nothing here knows an operation."""

import os
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

DEVICE = os.environ.get("LYNX_GPU_TESTS_ON", "cuda")
PRESENT = DEVICE != "cuda" or torch.cuda.is_available()
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ROUNDING = 512  # bytes: the allocator rounds every tensor up to a multiple

Call = Callable[[], Sequence[Tensor]]


def need_free(gibibytes: float) -> None:
    """Skip the test where the GPU has less memory free."""
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    if free < gibibytes * 2**30:
        pytest.skip(f"needs {gibibytes} GiB of free GPU memory, there are {free / 2**30:.1f}")


def check_deterministic(call: Call) -> None:
    """Two runs agree bit by bit, in every result."""
    for index, (ours, theirs) in enumerate(zip(call(), call(), strict=True)):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, msg=lambda said, i=index: f"result {i}: {said}")


def check_never_waits(call: Call) -> None:
    """The call never makes the host wait for the GPU, once everything is compiled."""
    call()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def replayed(call: Call, captured: Sequence[Tensor], new: Sequence[Tensor]) -> list[Tensor]:
    """Capture ``call()``, which reads the tensors ``captured``, in a CUDA graph, copy ``new`` into them, and return
    what a replay then gives."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles kernels and fills caches, which a capture may not
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    for static, changed in zip(captured, new, strict=True):
        static.copy_(changed)
    for each in results:
        each.fill_(torch.nan)  # what the replay does not write shows
    graph.replay()
    return [each.clone() for each in results]


def memory_of(function: Callable[[], object]) -> tuple[int, int]:
    """Bytes of GPU memory that a call holds at its peak, and after it while its result is alive."""
    torch.cuda.empty_cache()  # of blocks that are somewhat too large, and would count as they are
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
