"""GPU checks for every operation. A check takes a function that calls the operation and returns its results."""

import os
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

DEVICE = os.environ.get("LYNX_GPU_TESTS_ON", "cuda")
PRESENT = DEVICE != "cuda" or torch.cuda.is_available()
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ROUNDING = 512  # bytes; the allocator rounds every tensor up to a multiple of this

Call = Callable[[], Sequence[Tensor]]


def need_free(gibibytes: float) -> None:
    """Skip the test if the GPU has less free memory."""
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    if free < gibibytes * 2**30:
        pytest.skip(f"needs {gibibytes} GiB of free GPU memory, {free / 2**30:.1f} GiB are free")


def check_deterministic(call: Call) -> None:
    """Two runs agree bit by bit in every result."""
    for index, (ours, theirs) in enumerate(zip(call(), call(), strict=True)):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, msg=lambda text, i=index: f"result {i}: {text}")


def check_never_synchronises(call: Call) -> None:
    """After everything is compiled, the call never synchronises the host with the GPU."""
    call()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def replayed(call: Call, captured: Sequence[Tensor], new: Sequence[Tensor]) -> list[Tensor]:
    """Capture ``call()``, which reads the tensors ``captured``, in a CUDA graph. Copy ``new`` into these tensors,
    replay the graph and return the results."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles kernels and fills caches, which is not allowed during capture
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    for static, changed in zip(captured, new, strict=True):
        static.copy_(changed)
    for each in results:
        each.fill_(torch.nan)  # NaN remains where the replay does not write
    graph.replay()
    return [each.clone() for each in results]


def memory_of(function: Callable[[], object]) -> tuple[int, int]:
    """Bytes of GPU memory that a call uses at its peak, and after it while its result is alive."""
    torch.cuda.empty_cache()  # cached blocks may be larger than needed and would count with their full size
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
