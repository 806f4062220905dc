"""Triton kernels in Triton's interpreter: ``make test`` runs this folder in a process with TRITON_INTERPRET=1.

Triton decides when a kernel is decorated, so a process either interprets all kernels or compiles all.
"""

from pathlib import Path

import pytest
import torch

from lynx_kernels.backends import triton as triton_backend
from tests.interpreter import bfloat16, checks


def pytest_collection_modifyitems(items):
    if not triton_backend.INTERPRETED:
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(pytest.mark.skip("needs TRITON_INTERPRET=1 (make test runs it in a separate process)"))


@pytest.fixture(autouse=True)
def _checked(monkeypatch):
    """bf16 as on a GPU. Every access must be inside its tensor, and every result written: torch.empty gives NaN."""
    bfloat16.install(monkeypatch)
    checks.install(monkeypatch)
    torch.use_deterministic_algorithms(True)  # with its default fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)
