"""Tests that need a GPU: ``PYTHONPATH=. python -m pytest tests/gpu``. The package need not be installed.

``LYNX_GPU_TESTS_ON=cpu`` runs the tests that do not need CUDA on the CPU, at small sizes. This tests the tests, not the
kernels.
"""

from pathlib import Path

import pytest

from lynx_kernels.backends import triton as triton_backend
from tests.gpu import bench


def _reason() -> str | None:
    if triton_backend.INTERPRETED:
        return "TRITON_INTERPRET=1: this process interprets kernels"
    return None if bench.PRESENT else f"no {bench.DEVICE} device"


def pytest_collection_modifyitems(items):
    if reason := _reason():
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(pytest.mark.skip(reason))


@pytest.fixture
def cuda():
    """For tests that use CUDA itself: graphs, synchronisation, memory."""
    if bench.DEVICE != "cuda":
        pytest.skip(f"needs CUDA, but these tests run on {bench.DEVICE}")
