"""CUDA kernels without a GPU: their phases run on a CPU, and what nvcc makes of them."""

import pytest

from lynx_kernels.backends import cuda as cuda_backend
from lynx_kernels.backends import dispatch
from lynx_kernels.backends import triton as triton_backend
from tests.cuda import host_kernels


@pytest.fixture
def on_host(monkeypatch):
    """``impl="cuda"`` takes CPU tensors, and its kernels run here. Triton kernels cannot."""
    if host_kernels.MISSING:
        pytest.skip(host_kernels.MISSING)
    kernels = host_kernels.HostKernels()
    monkeypatch.setattr(cuda_backend, "kernels", lambda: kernels)
    monkeypatch.setattr(cuda_backend, "MISSING", None)
    monkeypatch.setattr(dispatch, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(triton_backend, "INSTALLED", False)
    return kernels
