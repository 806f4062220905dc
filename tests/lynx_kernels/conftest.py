"""Fixtures for the tests of compiled code."""

import pytest
import torch

from lynx_kernels.backends import cpu as cpu_backend


@pytest.fixture
def poison():
    """Fill uninitialised memory with NaN, so that a test fails if an output is not written."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=cpu_backend.instruction_sets())
def instruction_set(request):
    """Each instruction set that this CPU supports, forced while the test runs."""
    cpu_backend.force_instruction_set(request.param)
    yield request.param
    cpu_backend.force_instruction_set(None)


@pytest.fixture
def restore_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
