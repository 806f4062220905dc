"""Every case compiles for AMD too, and docs/kernels.md says what the compiler says."""

import re
from pathlib import Path

import pytest

from tests.compilation import table
from tests.compilation.cases import CASES
from tests.compilation.offline import GFX942, GFX942_MATRIX_CORES, GFX942_SHARED_MEMORY

WRITTEN = table.PATH.read_text()
# An fp32 stream doubles the tiles that wait in shared memory. This launch was chosen for NVIDIA's GPUs, and Triton
# refuses it on an MI300 when it loads the kernel.
TOO_LARGE_FOR_GFX942 = {
    "adapter T=8192 d=4096 r=2048, fp32 through bf16": {"backward_bottleneck_kernel"},
}
same_triton = pytest.mark.skipif(
    table.version_line() not in WRITTEN, reason="docs/kernels.md was written with another version of Triton"
)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gfx942(case):
    compiled = table.compile_case(case, GFX942)
    assert {each.name for each in compiled if each.shared > GFX942_SHARED_MEMORY} == TOO_LARGE_FOR_GFX942.get(
        str(case), set()
    )
    assert any(each.has(GFX942_MATRIX_CORES) for each in compiled)
    for each in compiled:
        assert 0 < each.registers <= 512, each
        assert each.spilled <= 128, each


@same_triton
@pytest.mark.parametrize("arch", [90, GFX942])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_table_is_what_the_compiler_says(case, arch):
    """For two of the GPUs; a difference has all of them written anew."""
    compiled = [table.row(each) for each in table.compile_case(case, arch)]
    assert table.rows_in(WRITTEN, case, arch) == compiled, "write it anew: make kernel-table"


def test_the_table_has_every_case_and_gpu():
    assert re.findall(r"^## .*", WRITTEN, re.MULTILINE) == [table.heading(case) for case in CASES]
    for case in CASES:
        for arch in table.ARCHS:
            assert len(table.rows_in(WRITTEN, case, arch)) == len(table.rows_in(WRITTEN, case, 90)) > 0


def test_the_table_is_of_the_triton_we_test_with():
    [pinned] = re.findall(r"^triton==(.*)", (Path(__file__).parents[2] / "constraints.txt").read_text(), re.MULTILINE)
    assert f"Triton {pinned}." in WRITTEN, "write it anew: make kernel-table"
