"""Fixtures for the tests of compiled code, and of the operations with an output head."""

import pytest
import torch

from lynx_kernels.backends import cpu as cpu_backend
from lynx_kernels.ops.head_common import chunked, entries, reference


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


@pytest.fixture(params=["cpu", "device"])
def host(request, monkeypatch):
    """Small chunks. The test runs twice: as on a CPU, and as on a GPU, whose tensors the host may not read."""
    for module in (chunked, reference):
        monkeypatch.setattr(module, "CHUNK", 7)
    if request.param == "device":
        monkeypatch.setattr(entries, "host_may_read", lambda tensor: False)
    return request.param


@pytest.fixture
def products(monkeypatch):
    """Records the shapes (rows, inner, columns) of all products with an output head."""
    found = []

    def spy(module, name):
        real = getattr(module, name)

        def run(left, right):
            assert left.shape[1] == right.shape[0]
            found.append((left.shape[0], left.shape[1], right.shape[1]))
            return real(left, right)

        monkeypatch.setattr(module, name, run)

    def add_product(total, left, right):
        product = chunked._product(left, right)
        return product if total is None else total + product

    monkeypatch.setattr(chunked, "_add_product", add_product)
    spy(chunked, "_product")
    spy(reference, "product")
    return found
