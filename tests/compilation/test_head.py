"""The compiled kernel of the output head."""

from functools import partial

import pytest

from tests.compilation import cases, table
from tests.compilation.cases import FP32, HEAD_CASES
from tests.compilation.offline import SHARED_MEMORY, compiling_for

LOAD = "ld.global.v4.b32"  # 16 bytes per thread
ALIGNED = [case for case in HEAD_CASES if case.shape.startswith(("V=32000", "V=262144"))]


def compiled(launch, arch):
    with compiling_for(arch) as kernels:
        launch()
    [kernel] = kernels
    return kernel


@pytest.mark.parametrize("arch", table.ARCHS)
@pytest.mark.parametrize("case", HEAD_CASES, ids=str)
def test_no_spills(case, arch):
    """Registers must also be few enough for three blocks of 256 threads per multiprocessor."""
    for row in table.results(case, arch):
        assert row.spilled == 0, row
        assert row.registers <= 80, row


@pytest.mark.parametrize("case", [ALIGNED[0], ALIGNED[6]], ids=str)
def test_wide_accesses(case):
    kernel = compiled(case.launch, 90)
    assert kernel.has(LOAD), kernel
    assert kernel.has("st.global.v4.b32"), kernel


@pytest.mark.parametrize("arch", SHARED_MEMORY)
def test_the_gradient_waits_for_the_losses(arch):
    """It may replace logits that other threads of the block still read. Writing it has no other barrier."""
    barriers = [
        compiled(partial(cases.head, 32000, FP32, asked, {}), arch).assembly.count("bar.sync")
        for asked in ((), ("gradient",))
    ]
    assert barriers[1] == barriers[0] + 1
