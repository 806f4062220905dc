"""What nvcc makes of the CUDA kernels, for GPUs that need not be there."""

import re
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import cache

import pytest
from triton import knobs

from lynx_kernels.backends import cuda_build
from lynx_kernels.backends.cuda_build import MissingToolError

try:
    TOOLS = cuda_build.find_tools()
except MissingToolError as error:
    pytest.skip(str(error), allow_module_level=True)

CODE = {"sm_80": "sm_80", "sm_90": "sm_90a", "sm_100": "sm_100a"}  # what each architecture is compiled to
EVERY_ARCHITECTURE = pytest.mark.parametrize("architecture", CODE)
# Kernels whose blocks share a multiprocessor by design: how many blocks, of how many threads.
BLOCKS = {
    "adapter_fwd_small_m_down_kernel": (2, 256),
    "adapter_fwd_small_m_up_kernel": (2, 256),
    "prefix_attention_decode_fwd_kernel": (4, 128),
}
BLOCKS_OF_8_ROWS = 3  # of decoding
REGISTERS = 65536  # of a multiprocessor
SHARED_OF_A_MULTIPROCESSOR = 164 * 1024  # on sm_80; sm_90 and sm_100 have 228
SYSTEM_SHARED = 1024  # what some architectures add to every block
# Bytes of shared memory of a block, 0 elsewhere.
SHARED = {"pack_embeddings_bwd_sum_kernel": 128, "pack_frames_fwd_resize_kernel": 1536}
# Sines read CUDA's table of coefficients 16 bytes at a time; around the calls that divide, a register or two are saved.
SINES = "pack_frames_fwd_filters_kernel"
MOST_SAVED_BY_SINES = 16  # bytes
# At 48 registers a multiprocessor has room for 1280 threads. Resizing computes more than it reads.
MOST_REGISTERS = {"pack_frames_fwd_resize_kernel": 80}


@pytest.fixture(scope="module")
def library():
    """The library, built now unless these very sources were built before."""
    return cuda_build.cached(TOOLS)


@cache
def cuobjdump(library, *options):
    program = shutil.which("cuobjdump") or knobs.nvidia.cuobjdump.path
    return subprocess.run([program, *options, str(library)], capture_output=True, text=True, check=True).stdout


def instructions(library, architecture):
    """The instructions of every kernel, by its mangled name."""
    text = cuobjdump(library, "-sass", "-arch", CODE[architecture])
    parts = re.split(r"\s+Function : (\S+)", text)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


def resources(library, architecture):
    """Bytes and registers of every kernel, by its mangled name: REG, SHARED, LOCAL, ..."""
    found = {}
    for section in cuobjdump(library, "-res-usage").split("\narch = ")[1:]:
        if section.split()[0] == CODE[architecture]:
            for name, used in re.findall(r"Function (\S+):\n(.*REG:.*)", section):
                found[name] = {what: int(value) for what, value in re.findall(r"([A-Z]+):(\d+)", used)}
    return found


def kernel(name):
    """The name that a profiler shows."""
    found = re.search(r"\d([a-z][a-z_]*_kernel)I?", name)
    assert found, name
    return found[1]


def block_m(name):
    """Tokens or rows of a block: the last number among the template arguments."""
    return int(re.findall(r"Li(\d+)E", name)[-1])


def moves_vectors(name):
    """Whether the kernel loads or stores several numbers at once, as its template arguments say."""
    if kernel(name).startswith("adapter"):
        return "Lb1E" in name
    if kernel(name).startswith("prefix_attention_decode"):
        return True
    return bool(re.search(r"Li[248]E", name))


def has(pattern, text):
    return re.search(rf"\b{pattern}\b", text) is not None


@EVERY_ARCHITECTURE
def test_kernels_are_there_for_the_architectures_that_their_files_name(architecture, library):
    expected = set()
    for source in cuda_build.sources(TOOLS.csrc):
        if architecture in cuda_build.architectures(source):
            for path in [source, *source.parent.glob("*.h")]:
                expected |= set(re.findall(r"^LYNX_GLOBAL\((\w+)\)", path.read_text(), re.MULTILINE))
    assert {kernel(name) for name in instructions(library, architecture)} == expected
    assert instructions(library, architecture).keys() == resources(library, architecture).keys()


def test_kernels_are_named_by_their_operations(library):
    """``<operation>_<fwd or bwd>..._kernel``, so that a profiler's trace tells them apart."""
    operations = [path.name for path in TOOLS.csrc.iterdir() if (path / "cuda").is_dir()]
    for name in instructions(library, "sm_80"):
        assert re.fullmatch(rf"({'|'.join(operations)})_(fwd|bwd)(_[a-z_]+)?_kernel", kernel(name))


def test_other_gpus_get_ptx(library):
    named = [each for each in cuda_build.sources(TOOLS.csrc) if "sm_80" in cuda_build.architectures(each)]
    assert len(re.findall(r"sm_80\.ptx", cuobjdump(library, "-lptx"))) == len(named)


def test_a_file_is_compiled_only_for_the_architectures_it_names(tmp_path):
    source = tmp_path / "csrc/operation/cuda/kernel.cu"
    source.parent.mkdir(parents=True)
    source.write_text("// architectures: sm_90\n__global__ void operation_fwd_kernel(int* out) { *out = 1; }\n")
    cuda_build.build(tmp_path / "_cuda.so", replace(TOOLS, csrc=tmp_path / "csrc"))
    assert re.findall(r"\.(sm_\w+)\.cubin", cuobjdump(tmp_path / "_cuda.so", "-lelf")) == ["sm_90a"]
    assert "ptx" not in cuobjdump(tmp_path / "_cuda.so", "-lptx")


@EVERY_ARCHITECTURE
def test_registers_and_shared_memory(architecture, library):
    for name, used in resources(library, architecture).items():
        assert used["LOCAL"] == 0, name
        assert used["STACK"] <= (MOST_SAVED_BY_SINES if kernel(name) == SINES else 0), name
        if kernel(name) in BLOCKS:
            count, threads = BLOCKS[kernel(name)]
            if kernel(name).startswith("prefix_attention_decode") and block_m(name) == 8:
                count = BLOCKS_OF_8_ROWS
            assert count * threads * used["REG"] <= REGISTERS, name
            assert count * used["SHARED"] <= SHARED_OF_A_MULTIPROCESSOR, name
        else:
            assert used["REG"] <= MOST_REGISTERS.get(kernel(name), 48), name
            assert used["SHARED"] <= SHARED.get(kernel(name), 0) + SYSTEM_SHARED, name


def test_nothing_spills(library):
    for architecture in CODE:
        for name, text in instructions(library, architecture).items():
            assert kernel(name) == SINES or not has(r"(LDL|STL)[.\w]*", text), name


@EVERY_ARCHITECTURE
def test_vectors_of_16_bytes(architecture, library):
    """Kernels that move vectors load or store 16 bytes at a time, and the others never do."""
    for name, text in instructions(library, architecture).items():
        if kernel(name) not in BLOCKS and kernel(name) != SINES:
            assert has(r"(LDG|STG)\.E[.\w]*\.128[.\w]*", text) == moves_vectors(name), name


@EVERY_ARCHITECTURE
def test_streams(architecture, library):
    """Weights, keys and values are streamed in loads of 16 bytes if their rows are aligned. The adapter issues its
    first loads before any barrier."""
    for name, text in instructions(library, architecture).items():
        if kernel(name) in BLOCKS:
            start = text.split("BAR.SYNC")[0] if kernel(name).startswith("adapter") else text
            assert has(r"LDG\.E[.\w]*\.128\.CONSTANT", start) == moves_vectors(name), name


def test_torch_without_cuda_loads_it(library):
    """In a process of its own, whatever GPU there is: schemas are known, CPU tensors are rejected."""
    code = f"""
import torch
torch.ops.load_library({str(library)!r})
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
    forward, backward, frames, small_m, decode, rejected = result.stdout.splitlines()
    assert forward.endswith("(Tensor token_ids, Tensor embedding, Tensor vision, Tensor vision_index) -> Tensor")
    assert backward.endswith("(Tensor grad, Tensor vision_index, int num_vision, ScalarType dtype) -> Tensor")
    assert "pack_frames(Tensor[] frames, Tensor(a!) out, Tensor levels" in frames
    assert small_m.endswith("float eps, int activation) -> (Tensor, Tensor, Tensor, Tensor)")
    assert decode.endswith("Tensor branch_lengths, float scale) -> (Tensor, Tensor)")
    assert rejected == "True"


def test_it_needs_no_cuda_library(library):
    """Neither the toolkit's nor torch's, only what a CPU build of torch has too."""
    needed = subprocess.run(["ldd", str(library)], capture_output=True, text=True, check=True).stdout
    assert "libtorch_cpu" in needed
    assert not re.search(r"libcuda|libcudart|libtorch_cuda|libc10_cuda", needed)
