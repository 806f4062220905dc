"""Triton kernels compiled for GPUs that this machine does not have. Not possible in a process that interprets them."""

from pathlib import Path

import pytest

from lynx_kernels.backends import triton as triton_backend


def pytest_collection_modifyitems(items):
    if triton_backend.INTERPRETED:
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(pytest.mark.skip("TRITON_INTERPRET=1: this process interprets kernels"))
