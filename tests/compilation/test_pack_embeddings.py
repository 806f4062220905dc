"""The compiled kernels of pack_embeddings."""

import pytest

from tests.compilation import table
from tests.compilation.cases import EMBEDDINGS_CASES
from tests.compilation.offline import SHARED_MEMORY, compiling_for

LOAD, STORE = "ld.global.v4.b32", "st.global.v4.b32"  # 16 bytes per thread
WIDE = [case for case in EMBEDDINGS_CASES if case.shape.endswith("d=4096")]
RAGGED = [case for case in EMBEDDINGS_CASES if case not in WIDE]


def compiled(case, arch):
    with compiling_for(arch) as kernels:
        case.launch()
    return kernels


@pytest.mark.parametrize("arch", table.ARCHS)
@pytest.mark.parametrize("case", EMBEDDINGS_CASES, ids=str)
def test_no_spills(case, arch):
    """Registers must also be few enough for 1024 threads per multiprocessor. Threads of an MI300 have twice as many."""
    for row in table.results(case, arch):
        assert row.spilled == 0, row
        assert row.registers <= (64 if arch in SHARED_MEMORY else 128), row


@pytest.mark.parametrize("arch", SHARED_MEMORY)
@pytest.mark.parametrize("case", WIDE, ids=str)
def test_wide_accesses(case, arch):
    """Every access to rows moves 16 bytes."""
    pack, find, total = compiled(case, arch)
    for kernel in (pack, total):
        assert kernel.has(LOAD), kernel
        assert kernel.has(STORE), kernel
        for narrow in ("global.b16", "global.v2.b16", "global.v2.b32", "global.v4.b16"):
            assert narrow not in kernel.assembly, kernel
    assert pack.assembly.count(".b8 assertMessage_") == 2, pack  # only our two assertions, none for integer overflow
    assert find.has("atom") or find.has("red"), find


@pytest.mark.parametrize("case", RAGGED, ids=str)
def test_unaligned_rows(case):
    """No access may be wider than one value."""
    for kernel in compiled(case, 80):
        assert not kernel.has(LOAD), kernel
