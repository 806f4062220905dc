"""What nvcc makes of the CUDA kernels, for GPUs that need not be there."""

import functools
import re
import shutil
import subprocess
import sys
from collections import Counter

import pytest
from triton import knobs

from lynx_kernels.backends.cuda_build import LOG, SOURCES, MissingToolError, cached, find_tools

try:
    TOOLS = find_tools()
except MissingToolError as error:
    pytest.skip(str(error), allow_module_level=True)

ARCHS = ("sm_80", "sm_90a", "sm_100a")
# How many there are of each. Forward and backward of embeddings in nine pairs of dtypes, frames in elements of three
# sizes; where rows or outputs may be moved 16 bytes at a time, once so and once one by one. Both products of the
# adapter in three dtypes, for 1, 4 and 8 tokens, and for rows that cannot be read 16 bytes at a time. Decoding in three
# dtypes, for two head dimensions and 1, 4 and 8 rows.
KERNELS = {
    "PackRows": 18, "SumRows": 18, "FindUses": 1, "CopyFrames": 6, "ResizeFrames": 3, "FillFilters": 1,
    "few4Down": 12, "few2Up": 12, "Attend": 18, "Merge": 1,
}  # fmt: skip
# Kernels whose blocks share a multiprocessor by design: how many of them, of how many threads.
BLOCKS = {"few4Down": (2, 256), "few2Up": (2, 256), "Attend": (4, 128), "Attend of 8 rows": (3, 128)}
REGISTERS = 65536  # of a multiprocessor; a warp is given them in units of 256
SHARED_OF_A_MULTIPROCESSOR = 164 * 1024  # on sm_80; sm_90 and sm_100 have 228
# Bytes of a block; the system takes another KiB of each, or none, as the architecture has it.
SHARED = {"SumRows": 128, "ResizeFrames": 1536}
# 16-byte loads and stores: 4 rows of packs from either source; one a round; single bytes in, packs out; parts in.
WIDE = {"PackRows": (8, 4), "SumRows": (1, 1), "CopyFrames": (0, 1), "Merge": (1, 0)}


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


def kind(name):
    return next(each for each in KERNELS if each in name)


def moves_packs(name):
    """Whether the kernel moves several values at once: its last template argument."""
    if kind(name) in ("few4Down", "few2Up"):
        return "Lb1E" in name
    return kind(name) in ("Attend", "Merge") or bool(re.search(r"Li([248])E", name))


def tile(name):
    """Tokens or rows of a block: the last number among the template arguments."""
    return int(re.findall(r"Li(\d+)E", name)[-1])


def blocks_of(name):
    """How many blocks shall share a multiprocessor, and their threads; None where the kernel does not say."""
    return BLOCKS.get("Attend of 8 rows" if kind(name) == "Attend" and tile(name) == 8 else kind(name))


def count(pattern, text):
    return len(re.findall(rf"\b{pattern}\b", text))


def test_every_kernel_is_there_for_every_gpu():
    for arch in ARCHS:
        assert Counter(map(kind, instructions(arch))) == KERNELS
        assert all((name, arch) in resources() for name in instructions(arch))
    assert len(re.findall(r"sm_80\.ptx", cuobjdump("-lptx"))) == len(SOURCES)  # for GPUs to come


@pytest.mark.parametrize("arch", ARCHS)
def test_registers_and_shared_memory(arch):
    """At 48 registers a multiprocessor has room for 1280 threads, with 16 bytes and more of each on their way.

    Resizing computes more than it reads, and has some more for its sums.
    """
    for name in instructions(arch):
        used = resources()[name, arch]
        if blocks := blocks_of(name):
            number, threads = blocks
            assert number * threads * used["REG"] <= REGISTERS, name
            assert number * used["SHARED"] <= SHARED_OF_A_MULTIPROCESSOR, name
            assert used["LOCAL"] == used["STACK"] == 0, name
            continue
        assert used["REG"] <= (80 if kind(name) == "ResizeFrames" else 48), name
        assert used["LOCAL"] == used["STACK"] == 0, name
        assert used["SHARED"] - SHARED.get(kind(name), 0) in (0, 1024), name


def test_nothing_spills():
    said = (library().parent / LOG).read_text()
    expected = sum(KERNELS.values()) * len(ARCHS)
    assert len(re.findall(r"0 bytes spill stores, 0 bytes spill loads", said)) >= expected
    assert not re.search(r"[1-9]\d* bytes spill", said)
    for arch in ARCHS:
        for name, text in instructions(arch).items():
            assert not count(r"(LDL|STL)[.\w]*", text), name


@pytest.mark.parametrize("arch", ARCHS)
def test_wide_accesses(arch):
    for name, text in instructions(arch).items():
        loads, stores = count(r"LDG\.E[.\w]*\.128[.\w]*", text), count(r"STG\.E[.\w]*\.128[.\w]*", text)
        if blocks_of(name):
            assert_streams(name, text)
            continue
        if not moves_packs(name):
            assert loads == stores == 0, name
            continue
        least_loads, least_stores = WIDE[kind(name)]
        assert loads >= least_loads, name
        assert stores >= least_stores, name
        if kind(name) == "Merge":  # reads fp32, and writes what q has
            continue
        singles = r"STG\.E[.\w]*U16[.\w]*" if kind(name) == "CopyFrames" else r"(LDG|STG)\.E[.\w]*U16[.\w]*"
        assert count(singles, text) == 0, name


def assert_streams(name, text):
    """Weights, keys and values come in loads of 16 bytes, for the first round and again for the next, and those of the
    adapter's first round are asked for before anything is waited for; where rows do not allow it, one by one."""
    streamed = r"LDG\.E[.\w]*\.128\.CONSTANT"
    a_round = 8 if kind(name) == "Attend" or tile(name) <= 4 else 4
    if not moves_packs(name):
        assert count(streamed, text) == 0, name
        return
    assert count(streamed, text) >= 2 * a_round, name
    if kind(name) != "Attend":
        assert count(streamed, text.split("BAR.SYNC")[0]) >= a_round, name


def test_torch_without_cuda_loads_it():
    """In a process of its own, whatever GPU there is: schemas are known, CPU tensors are refused."""
    code = f"""
import torch
torch.ops.load_library({str(library())!r})
kernels = torch.ops.lynx_kernels_cuda
print(kernels.pack_embeddings.default._schema)
print(kernels.pack_embeddings_backward.default._schema)
print(kernels.pack_frames.default._schema)
print(kernels.adapter_small_m.default._schema)
print(kernels.prefix_attention_decode.default._schema)
try:
    kernels.pack_embeddings(torch.zeros(1).long(), torch.ones(1, 4), torch.ones(1, 4), torch.zeros(1).int())
except NotImplementedError as error:
    print("CPU" in str(error))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    forward, backward, frames, few, decode, refused = result.stdout.splitlines()
    assert forward.endswith("(Tensor token_ids, Tensor embedding, Tensor vision, Tensor vision_index) -> Tensor")
    assert backward.endswith("(Tensor grad, Tensor vision_index, int num_vision, ScalarType dtype) -> Tensor")
    assert "pack_frames(Tensor[] frames, Tensor(a!) out, Tensor levels" in frames
    assert few.endswith("float eps, int activation) -> (Tensor, Tensor, Tensor, Tensor)")
    assert decode.endswith("Tensor branch_lengths, float scale) -> (Tensor, Tensor)")
    assert refused == "True"


def test_it_needs_no_cuda_library():
    """Neither the toolkit's nor torch's: only what a CPU build of torch has too."""
    needed = subprocess.run(["ldd", str(library())], capture_output=True, text=True, check=True).stdout
    assert "libtorch_cpu" in needed
    assert not re.search(r"libcuda|libcudart|libtorch_cuda|libc10_cuda", needed)
