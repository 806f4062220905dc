"""compiled.csv is up to date, and checks that apply to every case."""

import csv
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl

from tests.compilation import offline, table
from tests.compilation.cases import CASES, FP32
from tests.compilation.offline import GFX942, GFX942_MATRIX_CORES, TENSOR_CORES

# Launches chosen for NVIDIA's GPUs that need too much shared memory on an MI300; loading the kernel fails there.
TOO_LARGE_FOR_GFX942 = {
    # Three stages of the widest tiles.
    "adapter T=128 d=4096 r=256, bf16": {"adapter_fwd_fused_kernel"},
    # fp32 x doubles the tiles in shared memory.
    "adapter T=8192 d=4096 r=2048, fp32 through bf16": {"adapter_bwd_bottleneck_kernel"},
    "adapter T=512 d=4096 r=2048, fp32 through bf16": {"adapter_bwd_bottleneck_kernel"},
    "adapter T=8192 d=4096 r=256, fp32 through bf16": {"adapter_bwd_bottleneck_kernel"},
    # Three stages of 64 keys at a head_dim of 128, or of 32 at 256.
    "prefix_attention T=8192 in 16 H=8/4 D=128, bf16": {"prefix_attention_fwd_kernel"},
    "prefix_attention T=8160 in 160 H=8/4 D=128, bf16": {"prefix_attention_fwd_kernel"},
    "prefix_attention T=8192 in 16 H=8/8 D=128, bf16": {"prefix_attention_fwd_kernel"},
    "prefix_attention T=8192 in 16 H=8/4 D=128, fp16": {"prefix_attention_fwd_kernel"},
    "prefix_attention T=8192 in 16 of 2 ranges H=8/4 D=128, bf16": {"prefix_attention_fwd_kernel"},
    "prefix_attention T=512 in 3 of 3 ranges H=8/4 D=128, bf16": {"prefix_attention_fwd_kernel"},
    "prefix_attention T=8192 in 16 window H=8/4 D=128, bf16": {"prefix_attention_fwd_kernel"},
    "prefix_attention T=8192 in 16 of 2 ranges, window H=8/4 D=128, bf16": {"prefix_attention_fwd_kernel"},
    "cross_attention Q=8192 in 4 K=3604 H=16/16 D=128, bf16": {"cross_attention_fwd_kernel"},
    "prefix_attention_decode B=5 of one root H=32/4 D=128, bf16": {"prefix_attention_decode_fwd_kernel"},
    "prefix_attention_decode B=5 of one root H=32/4 D=256, bf16": {"prefix_attention_decode_fwd_kernel"},
}
MATRIX_CORES = {**TENSOR_CORES, GFX942: GFX942_MATRIX_CORES}
# One case of each operation, which the tests compile for every GPU.
SAMPLES = list({case.operation: case for case in reversed(CASES)}.values())
same_triton = pytest.mark.skipif(not table.stored(), reason="compiled.csv was written with another version of Triton")
every_case = pytest.mark.parametrize("case", CASES, ids=str)


@same_triton
@every_case
def test_stored_digests_are_current(case):
    assert table.is_stored(case), "run `make kernel-table`"


@same_triton
@pytest.mark.parametrize("arch", table.ARCHS)
@pytest.mark.parametrize("case", SAMPLES, ids=str)
def test_stored_results_equal_the_compiler_output(case, arch):
    assert table.stored_rows(case, arch) == table.compile_case(case, arch), "run `make kernel-table`"


@pytest.mark.parametrize("arch", table.ARCHS)
@every_case
def test_every_case_compiles_and_fits(case, arch):
    rows = table.results(case, arch)
    assert tuple(row.kernel for row in rows) == case.kernels
    too_large = TOO_LARGE_FOR_GFX942.get(str(case), set()) if arch == GFX942 else set()
    assert {row.kernel for row in rows if row.shared > table.LIMITS[arch]} == too_large
    assert all(0 < row.registers <= (512 if arch == GFX942 else 255) for row in rows)


@pytest.mark.parametrize("arch", table.ARCHS)
@every_case
def test_products_keep_their_precision(case, arch):
    """Half precision uses tensor cores. fp32 must be IEEE: TF32 would show as a tensor-core instruction. The matrix
    cores of an MI300 have an IEEE instruction."""
    found = {each for row in table.results(case, arch) for each in row.instructions}
    if case.compute == FP32:
        assert not found & {"mma.sync", *TENSOR_CORES.values()}
    else:
        assert found & {"mma.sync", MATRIX_CORES[arch]}


@same_triton
def test_every_case_is_stored_and_no_other():
    assert list(dict.fromkeys(each.case for each in table.stored())) == [str(case) for case in CASES]


def test_stored_results_are_from_the_pinned_triton():
    [pinned] = re.findall(r"^triton==(.*)", (Path(__file__).parents[2] / "constraints.txt").read_text(), re.MULTILINE)
    assert table.PATH.read_text().startswith(f"# Triton {pinned}\n"), "run `make kernel-table`"


def _adding(by):
    @triton.jit
    def kernel(p_x, size: tl.constexpr):
        o_x = tl.arange(0, size)
        tl.store(p_x + o_x, tl.load(p_x + o_x) + by)

    return kernel


def _adding_one():
    @triton.jit
    def other_name(p_x, count: tl.constexpr):
        places = tl.arange(0, count)
        tl.store(p_x + places, tl.load(p_x + places) + 1)

    return other_name


def _two_loops():
    @triton.jit
    def kernel(p_x, n):
        for i in range(n):
            b_x = tl.load(p_x + i)
            tl.store(p_x + i, b_x * b_x)
        for i in range(n):
            b_x = tl.load(p_x + i)
            tl.store(p_x + i, b_x * b_x)

    return kernel


def _two_loops_with_other_names():
    @triton.jit
    def kernel(p_x, n):
        for i in range(n):
            b_x = tl.load(p_x + i)
            tl.store(p_x + i, b_x * b_x)
        for j in range(n):
            b_y = tl.load(p_x + j)
            tl.store(p_x + j, b_y * b_y)

    return kernel


def digest(kernel, **launch):
    return offline.digests_of(lambda: kernel[(1,)](torch.empty(16, device="meta"), **launch), 90)


def test_digest_does_not_depend_on_names_in_sibling_regions():
    assert digest(_two_loops(), n=16) == digest(_two_loops_with_other_names(), n=16)


def test_digest_depends_on_code_and_options_but_not_on_names():
    expected = digest(_adding(tl.constexpr(1)), size=16)
    assert len(expected) == 1
    assert digest(_adding_one(), count=16) == expected
    assert digest(_adding_one(), count=8) != expected
    assert digest(_adding(tl.constexpr(2)), size=16) != expected
    assert digest(_adding_one(), count=16, num_warps=8) != expected


def test_new_names_compile_nothing(tmp_path, monkeypatch):
    """The results stored under the old names are reused."""
    now = table.launches(SAMPLES[-1])
    before = [replace(each, kernel="old", launch="OLD=1", results=dict.fromkeys(each.results, "7 0 0")) for each in now]
    for name, value in (("stored", lambda: before), ("CASES", SAMPLES[-1:]), ("REPORT", tmp_path / "kernels.md")):
        monkeypatch.setattr(table, name, value)
    monkeypatch.setattr(table, "PATH", tmp_path / "compiled.csv")
    assert table.renew() == 0
    with table.PATH.open() as file:
        lines = [*csv.reader(file)][2:]
    assert lines == [[each.case, each.kernel, each.launch, each.digest, *["7 0 0"] * 4] for each in now]
