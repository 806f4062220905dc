"""The bench itself: each fault it looks for, planted in ``faults.cpp``."""

import pytest

from tests.cuda import host_kernels
from tests.cuda.host_kernels import HERE, KernelError, run

FAULTS = HERE / "faults.cpp"

if host_kernels.MISSING:
    pytest.skip(host_kernels.MISSING, allow_module_level=True)


def test_nothing_to_complain_about():
    assert run(FAULTS, "0") == b"496"


@pytest.mark.parametrize("fault", [1, 3])
def test_what_nobody_wrote_is_wrong(fault):
    """An element of shared memory that is never written, and one that is written too late by some order of threads."""
    assert run(FAULTS, str(fault)) != b"496"


@pytest.mark.parametrize(
    ("fault", "message"),
    [(2, "index 32 out of bounds"), (4, "not a valid value for type 'bool'"), (5, "heap-buffer-overflow")],
)
def test_what_the_sanitizers_see(fault, message):
    with pytest.raises(KernelError, match=message):
        run(FAULTS, str(fault))
