"""Triton kernels in Triton's interpreter: ``make test`` runs this folder in a process with TRITON_INTERPRET=1.

Interpretation is fixed when a kernel is decorated, so a process either interprets or compiles.
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
                item.add_marker(
                    pytest.mark.skip("needs TRITON_INTERPRET=1 (make test runs it in a process of its own)")
                )


@pytest.fixture(autouse=True)
def _checked(monkeypatch):
    """bf16 as on a GPU; every access inside its tensor, every result written: torch.empty and its kin give NaN."""
    bfloat16.install(monkeypatch)
    checks.install(monkeypatch)
    torch.use_deterministic_algorithms(True)  # with its default fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)
