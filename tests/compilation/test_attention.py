"""What the compiler makes of attention's kernels."""

import sys

import pytest

from tests.compilation import table
from tests.compilation.cases import ATTENTION_CASES, FP32
from tests.compilation.offline import SHARED_MEMORY, TENSOR_CORES

WITHOUT_PRODUCTS = {"statistics_kernel", "merge_kernel"}
HALF = [case for case in ATTENTION_CASES if case.compute != FP32]
# The most bytes that a thread stores and loads; 0 elsewhere.
SPILLS: dict[tuple[str, str, int], int] = {}


def test_the_cases_cover_every_launch():
    modules = [module for name, module in sys.modules.items() if name.startswith("lynx_kernels.attention.triton")]
    shipped = {each for found in modules for each in vars(found).values() if type(each).__name__ == "Launch"}
    assert shipped
    compiled = {row.launch for case in ATTENTION_CASES for row in table.results(case, 90)}
    for launch in shipped:
        cut = f"BQ={launch.block_queries}, BK={launch.block_keys}, "
        cut += f"num_warps={launch.num_warps}, num_stages={launch.num_stages}"
        assert any(cut in each for each in compiled), launch


@pytest.mark.parametrize("arch", SHARED_MEMORY)
@pytest.mark.parametrize("case", HALF, ids=str)
def test_half_precision(case, arch):
    for row in table.results(case, arch):
        if row.kernel in WITHOUT_PRODUCTS:
            continue
        assert {"mma.sync", TENSOR_CORES[arch]} & {*row.instructions}, row
        assert table.SERIALIZED not in row.instructions, row
