"""What nvcc makes of the CUDA kernels, for GPUs that need not be there."""

import functools
import re
import shutil
import subprocess
import sys

import pytest
from triton import knobs

from lynx_kernels.cuda_build import LOG, SOURCES, MissingToolError, cached, find_tools

try:
    TOOLS = find_tools()
except MissingToolError as error:
    pytest.skip(str(error), allow_module_level=True)

ARCHS = ("sm_80", "sm_90a", "sm_100a")


@functools.cache
def library():
    return cached(TOOLS)


def cuobjdump(*options):
    program = shutil.which("cuobjdump") or knobs.nvidia.cuobjdump.path
    command = [program, *options, str(library())]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@functools.cache
def instructions(arch):
    """The instructions of every kernel, by its mangled name."""
    parts = re.split(r"\s+Function : (\S+)", cuobjdump("-sass", "-arch", arch))[1:]
    return {name: text for name, text in zip(parts[::2], parts[1::2], strict=True) if "run_kernel" in name}


@functools.cache
def resources():
    """(kernel, GPU) -> bytes and registers: REG, SHARED, LOCAL, ..."""
    found, arch = {}, None
    for line in cuobjdump("-res-usage").splitlines():
        if match := re.match(r"arch = (\S+)", line):
            arch = match[1]
        elif match := re.match(r"\s*Function (\S*run_kernel\S*):", line):
            name = match[1]
        elif "REG:" in line and "run_kernel" in name:
            found[name, arch] = {what: int(value) for what, value in re.findall(r"([A-Z]+):(\d+)", line)}
            name = ""
    return found


def packs(name):
    """How many values the kernel moves at once: its last template argument."""
    match = re.search(r"Li(\d+)E", name)
    return int(match[1]) if match else 1


def count(pattern, text):
    return len(re.findall(rf"\b{pattern}\b", text))


def test_every_kernel_is_there_for_every_gpu():
    """Two directions, nine pairs of dtypes, wide and single accesses; and the one that finds uses."""
    for arch in ARCHS:
        assert len(instructions(arch)) == 2 * 9 * 2 + 1
    assert len(resources()) >= 37 * len(ARCHS)
    assert len(re.findall(r"sm_80\.ptx", cuobjdump("-lptx"))) == len(SOURCES)  # for GPUs to come


@pytest.mark.parametrize("arch", ARCHS)
def test_registers_and_shared_memory(arch):
    """At 48 registers a multiprocessor has room for 1280 threads, with 16 bytes and more of each on their way."""
    for name in instructions(arch):
        used = resources()[name, arch]
        assert used["REG"] <= 48, name
        assert used["LOCAL"] == used["STACK"] == 0, name
        assert used["SHARED"] <= (128 if "SumRows" in name else 0) + (1024 if arch != "sm_80" else 0), name


def test_nothing_spills():
    said = (library().parent / LOG).read_text()
    assert len(re.findall(r"0 bytes spill stores, 0 bytes spill loads", said)) >= 37 * len(ARCHS)
    assert not re.search(r"[1-9]\d* bytes spill", said)
    for arch in ARCHS:
        for name, text in instructions(arch).items():
            assert not count(r"(LDL|STL)[.\w]*", text), name


@pytest.mark.parametrize("arch", ARCHS)
def test_wide_accesses(arch):
    """Rows move 16 bytes at a time: forward 4 loads in flight from either source, backward one a round."""
    for name, text in instructions(arch).items():
        loads, stores = count(r"LDG\.E[.\w]*\.128[.\w]*", text), count(r"STG\.E[.\w]*\.128[.\w]*", text)
        singles = count(r"(LDG|STG)\.E[.\w]*U16[.\w]*", text)
        if packs(name) == 1:
            assert loads == stores == 0, name
        else:
            assert (loads, stores) >= ((8, 4) if "PackRows" in name else (1, 1)), name
            assert singles == 0, name


def test_torch_without_cuda_loads_it():
    """In a process of its own, whatever GPU there is: schemas are known, CPU tensors are refused."""
    code = f"""
import torch
torch.ops.load_library({str(library())!r})
kernels = torch.ops.lynx_kernels_cuda
print(kernels.pack_embeddings.default._schema)
print(kernels.pack_embeddings_backward.default._schema)
try:
    kernels.pack_embeddings(torch.zeros(1).long(), torch.ones(1, 4), torch.ones(1, 4), torch.zeros(1).int())
except NotImplementedError as error:
    print("CPU" in str(error))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    forward, backward, refused = result.stdout.splitlines()
    assert forward.endswith("(Tensor token_ids, Tensor embedding, Tensor vision, Tensor vision_index) -> Tensor")
    assert backward.endswith("(Tensor grad, Tensor vision_index, int num_vision, ScalarType dtype) -> Tensor")
    assert refused == "True"


def test_it_needs_no_cuda_library():
    """Neither the toolkit's nor torch's: only what a CPU build of torch has too."""
    needed = subprocess.run(["ldd", str(library())], capture_output=True, text=True, check=True).stdout
    assert "libtorch_cpu" in needed
    assert not re.search(r"libcuda|libcudart|libtorch_cuda|libc10_cuda", needed)
