"""Compile what a launcher launches, for a GPU that is not there.

Launchers run as they are, on meta tensors; inside ``compiling_for`` every launch only compiles. The driver stands in
for the GPU with the few methods that Triton asks before a launch.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability
from triton.runtime import driver
from triton.runtime.jit import JITFunction

SHARED_MEMORY = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # what one block may have, CUDA programming guide
TENSOR_CORES = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}


@dataclass(repr=False)
class Compiled:
    """One kernel as compiled by one launch."""

    name: str
    arch: int
    shared: int
    ptx: str

    @cached_property
    def _ptxas(self) -> str:
        with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
            file.write(self.ptx)
            file.flush()
            command = [
                get_ptxas(self.arch).path, "-v", "--regAllocOptLevel=2",  # as Triton calls it
                f"--gpu-name={sm_arch_from_capability(self.arch)}", file.name, "-o", "/dev/null",
            ]  # fmt: skip
            return subprocess.run(command, capture_output=True, text=True, check=True).stderr

    def _count(self, pattern: str) -> int:
        found = re.search(pattern, self._ptxas)
        assert found, f"{self.name}: ptxas did not say {pattern!r}:\n{self._ptxas}"
        return int(found.group(1))

    @property
    def registers(self) -> int:
        return self._count(r"Used (\d+) registers")

    @property
    def spilled(self) -> int:
        """Bytes stored to and loaded from local memory for want of registers."""
        return self._count(r"(\d+) bytes spill stores") + self._count(r"(\d+) bytes spill loads")

    @property
    def serialized(self) -> bool:
        """Whether ptxas had to make asynchronous products wait for each other."""
        return "C7515" in self._ptxas

    def has(self, instruction: str) -> bool:
        return instruction in self.ptx

    def __repr__(self) -> str:
        numbers = f"{self.registers} registers, {self.shared} bytes shared, {self.spilled} bytes spilled"
        return f"{self.name} sm_{self.arch}: {numbers}"


class _Driver:
    def __init__(self, arch: int):
        self._arch = arch

    def get_current_target(self):
        return GPUTarget("cuda", self._arch, 32)

    def get_current_device(self):
        return f"sm_{self._arch}"  # keys each kernel's cache: one for each target

    def get_current_stream(self, device):
        return 0

    def get_active_torch_device(self):
        return torch.device("meta")


@contextmanager
def compiling_for(arch: int) -> Iterator[list[Compiled]]:
    """Launches inside the block compile for ``sm_<arch>`` and are added to the list; none runs."""
    compiled: list[Compiled] = []
    run, before = JITFunction.run, driver._active

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        compiled.append(Compiled(self.fn.__name__, arch, kernel.metadata.shared, kernel.asm["ptx"]))
        return kernel

    JITFunction.run = compile_only
    driver.set_active(_Driver(arch))
    try:
        yield compiled
    finally:
        JITFunction.run, driver._active = run, before
