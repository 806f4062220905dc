"""What a call needs of memory, measured apart from its time."""

import json
import os
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, UntypedStorage

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else every use of the profiler prints two lines


def peak(call: Callable[[], object], device: str) -> int:
    """The most bytes that a call has allocated at one time. Its results count, its inputs do not.

    On CUDA by the allocator's own counter. On CPUs PyTorch has none, so the profiler records every allocation of a
    tensor; what libraries such as oneDNN allocate past PyTorch is not seen.
    """
    call()  # what is allocated once and kept is not a cost of each call
    if device != "cuda":
        return max(0, *accumulate(_allocations(call)), 0)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _allocations(call: Callable[[], object]) -> list[int]:
    """Bytes of every allocation (positive) and release (negative) on the CPU, in order of time."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    with TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    found = [each for each in events if each["name"] == "[memory]"]
    return [each["args"]["Bytes"] for each in sorted(found, key=lambda each: each["ts"])]


def saved(call: Callable[[], object], parameters: Sequence[Tensor]) -> int:
    """Bytes that a call, forward and backward, keeps from one to the other; storages of ``parameters`` not counted."""
    elsewhere = {each.untyped_storage().data_ptr() for each in parameters}
    kept: dict[int, UntypedStorage] = {}  # holding them keeps their addresses from being used again

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in elsewhere:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call()
    return sum(storage.nbytes() for storage in kept.values())
