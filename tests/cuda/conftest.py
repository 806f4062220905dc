"""CUDA kernels without a GPU: their phases run on the CPU, and what nvcc makes of them."""

import pytest

from lynx_kernels import cuda_runtime
from tests.cuda import host_kernels


@pytest.fixture
def on_host(monkeypatch):
    """``impl="cuda"`` takes CPU tensors, and its kernels run here."""
    if host_kernels.MISSING:
        pytest.skip(host_kernels.MISSING)
    kernels = host_kernels.HostKernels()
    monkeypatch.setattr(cuda_runtime, "kernels", lambda: kernels)
    monkeypatch.setattr(cuda_runtime, "unsuited", lambda tensor: None)
    monkeypatch.setattr(cuda_runtime, "missing", lambda: None)
    return kernels
