"""Compile the kernels of a launcher for a GPU that this machine does not have.

Launchers run unchanged, on meta tensors. Inside ``compiling_for`` every launch only compiles. A fake driver has the few
methods that Triton calls before a launch.
"""

import hashlib
import itertools
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from triton.backends.amd.compiler import HIPBackend
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend, get_ptxas, sm_arch_from_capability
from triton.runtime import driver
from triton.runtime.jit import JITFunction

SHARED_MEMORY = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # limit per block, CUDA programming guide
TENSOR_CORES = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
GFX942 = "gfx942"  # CDNA 3: MI300
GFX942_SHARED_MEMORY = 64 << 10  # LDS of a workgroup, CDNA 3 instruction set architecture
GFX942_MATRIX_CORES = "v_mfma"

Arch = int | str  # the compute capability of an NVIDIA GPU times ten, or the name of an AMD GPU


def target_of(arch: Arch) -> GPUTarget:
    return GPUTarget("cuda", arch, 32) if isinstance(arch, int) else GPUTarget("hip", arch, 64)


def name_of(arch: Arch) -> str:
    return f"sm_{arch}" if isinstance(arch, int) else arch


@dataclass(repr=False)
class Compiled:
    """One kernel as compiled by one launch.

    Attributes:
        name: the name of the kernel.
        arch: the architecture it was compiled for.
        launch: the launcher's keyword arguments: the kernel's constants, ``num_warps`` and ``num_stages``.
        shared: bytes of shared memory.
        assembly: PTX, or the assembler text of an AMD GPU.
    """

    name: str
    arch: Arch
    launch: dict
    shared: int
    assembly: str

    def _count(self, pattern: str, text: str) -> int:
        found = re.search(pattern, text)
        assert found, f"{self.name}: {pattern!r} is not in the compiler's output:\n{text[-2000:]}"
        return int(found.group(1))

    @property
    def registers(self) -> int:
        """Registers per thread."""
        raise NotImplementedError

    @property
    def spilled(self) -> int:
        """Bytes that a thread stores to and loads from local memory because registers are full."""
        raise NotImplementedError

    @property
    def serialized(self) -> bool:
        """Whether ptxas had to serialise asynchronous products."""
        return False

    def has(self, instruction: str) -> bool:
        return instruction in self.assembly

    def __repr__(self) -> str:
        numbers = f"{self.registers} registers, {self.shared} bytes shared, {self.spilled} bytes spilled"
        return f"{self.name} {name_of(self.arch)}: {numbers}"


class CompiledForNvidia(Compiled):
    @cached_property
    def _ptxas(self) -> str:
        with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
            file.write(self.assembly)
            file.flush()
            command = [
                get_ptxas(self.arch).path, "-v", "--regAllocOptLevel=2",  # as Triton calls it
                f"--gpu-name={sm_arch_from_capability(self.arch)}", file.name, "-o", "/dev/null",
            ]  # fmt: skip
            return subprocess.run(command, capture_output=True, text=True, check=True).stderr

    @property
    def registers(self) -> int:
        return self._count(r"Used (\d+) registers", self._ptxas)

    @property
    def spilled(self) -> int:
        stores, loads = (self._count(rf"(\d+) bytes spill {way}", self._ptxas) for way in ("stores", "loads"))
        return stores + loads

    @property
    def serialized(self) -> bool:
        """Whether ptxas had to serialise asynchronous products."""
        return "C7515" in self._ptxas


class CompiledForAmd(Compiled):
    @property
    def registers(self) -> int:
        """Vector registers, including those of the matrix cores."""
        return self._count(r"\.vgpr_count:\s+(\d+)", self.assembly)

    @property
    def spilled(self) -> int:
        """Four bytes per spilled register. The assembler text counts registers, not how often each is moved."""
        return 4 * self._count(r"\.vgpr_spill_count:\s+(\d+)", self.assembly)


class _Driver:
    def __init__(self, arch: Arch):
        self._arch = arch

    def get_current_target(self):
        return target_of(self._arch)

    def get_current_device(self):
        return name_of(self._arch)  # the key of each kernel's cache: one entry per target

    def get_current_stream(self, device):
        return 0

    def get_active_torch_device(self):
        return torch.device("meta")


@contextmanager
def _launches(arch: Arch, instead: Callable[[JITFunction, dict, Callable], None]) -> Iterator[None]:
    """Inside the block no launch runs. ``instead`` is called with the kernel, the launcher's keyword arguments, and a
    function that compiles."""
    run, before = JITFunction.run, driver._active

    def compile_only(self, *args, grid, warmup, **kwargs):
        instead(self, kwargs, lambda: run(self, *args, grid=grid, warmup=True, **kwargs))

    JITFunction.run = compile_only
    driver.set_active(_Driver(arch))
    try:
        yield
    finally:
        JITFunction.run, driver._active = run, before


@contextmanager
def compiling_for(arch: Arch) -> Iterator[list[Compiled]]:
    """Inside the block launches compile for ``sm_<arch>`` or the AMD GPU of that name, and are added to the list. None
    runs."""
    compiled: list[Compiled] = []
    make, assembly = (CompiledForNvidia, "ptx") if isinstance(arch, int) else (CompiledForAmd, "amdgcn")

    def add(kernel, named, compiles):
        made = compiles()
        compiled.append(make(kernel.fn.__name__, arch, named, made.metadata.shared, made.asm[assembly]))

    with _launches(arch, add):
        yield compiled


Launch = tuple[str, str]  # the kernel's name; the launcher's keyword arguments, as text


def launch_text(named: dict) -> str:
    return ", ".join(f"{name}={value}" for name, value in named.items())


def launches_of(launchers: Callable[[], None], arch: Arch) -> list[Launch]:
    """The launches of ``launchers()`` on a GPU, in order. Nothing is compiled."""
    found: list[Launch] = []

    def add(kernel, named, compiles):
        found.append((kernel.fn.__name__, launch_text(named)))

    with _launches(arch, add):
        launchers()
    return found


class _Reached(Exception):
    pass


def digests_of(launchers: Callable[[], None], arch: Arch) -> list[str]:
    """For each launch of ``launchers()``, a digest of everything that determines the compiled code: the kernel's Triton
    IR and options such as ``num_warps``. The IR is the same on every GPU with the same launches. A digest takes a small
    fraction of the time of compiling.

    It does not depend on source locations or names, including those of kernels and their constants.
    """
    backend = CUDABackend if isinstance(arch, int) else HIPBackend
    digests: list[str] = []

    def stop(ir, *rest):
        raise _Reached(str(ir))

    def add(kernel, named, compiles):
        try:
            ir = compiles().asm["ttir"]  # compiled earlier
        except _Reached as reached:
            ir = str(reached)
        options = {name: value for name, value in named.items() if name not in kernel.arg_names}
        digests.append(hashlib.sha256(f"{sorted(options.items())} {_anonymous(ir)}".encode()).hexdigest()[:16])

    make_ttgir = backend.__dict__["make_ttgir"]  # the stage after Triton IR
    backend.make_ttgir = staticmethod(stop)
    try:
        with _launches(arch, add):
            launchers()
    finally:
        backend.make_ttgir = make_ttgir
    return digests


# A value or a function. A value is defined by "%x = op", "%x:2 = op", or "%x: type" of a block's argument.
_IR_NAME = re.compile(r'(?P<name>%(?:\w+|"[^"]*"))(?P<defined>(?=(?::\d+)? = |: ))?|(?P<function>@(?:\w+|"[^"]*"))')


def _anonymous(ir: str) -> str:
    """The IR without source locations, with numbers instead of names."""
    numbers: dict[str, str] = {}
    count = itertools.count()

    def number(found: re.Match) -> str:
        # Regions beside each other may define the same name, depending on names in the source. So every definition gets
        # a new number.
        name = found[0]
        if found["defined"] is not None or name not in numbers:
            numbers[name] = f"{name[0]}{next(count)}"
        return numbers[name]

    return _IR_NAME.sub(number, re.sub(r' loc\((?:"[^"]*"\()?#loc\d*\)?\)|^#loc.*\n', "", ir, flags=re.MULTILINE))
