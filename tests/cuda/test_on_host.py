"""The test bench itself: every kind of fault that it must find, planted in ``faults.cpp``."""

import pytest

from tests.cuda import host_kernels
from tests.cuda.host_kernels import HERE, KernelError, run

FAULTS = HERE / "faults.cpp"

if host_kernels.MISSING:
    pytest.skip(host_kernels.MISSING, allow_module_level=True)


def test_without_a_fault():
    assert run(FAULTS, "0") == b"496"


@pytest.mark.parametrize("fault", [1, 3])
def test_reading_what_no_thread_wrote(fault):
    """An element of shared memory that is never written, and one that some orders of threads write too late."""
    assert run(FAULTS, str(fault)) != b"496"


@pytest.mark.parametrize(
    ("fault", "message"),
    [(2, "index 32 out of bounds"), (4, "not a valid value for type 'bool'"), (5, "heap-buffer-overflow")],
)
def test_the_sanitizers(fault, message):
    with pytest.raises(KernelError, match=message):
        run(FAULTS, str(fault))
