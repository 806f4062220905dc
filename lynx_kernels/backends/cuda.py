"""The library of the CUDA C++ kernels: whether it is there, and its operators.

It is part of the package where ``LYNX_CUDA=1 pip install --no-build-isolation ...`` built it. Where it is not,
``LYNX_CUDA=1`` in the environment builds it, into a cache, when lynx_kernels is imported. Nothing else runs nvcc.
"""

import os
from pathlib import Path
from typing import Any

import torch

_PACKAGE = Path(__file__).parents[1]


def kernels() -> Any:
    """The operators of the library, as ``torch.ops`` has them."""
    return torch.ops.lynx_kernels_cuda


def _load() -> str | None:
    """Load the library; why it cannot be, or None."""
    asked = os.environ.get("LYNX_CUDA") == "1"
    path = next(iter(_PACKAGE.glob("_cuda*.so")), None)
    if path is None and not asked:
        return (
            "the CUDA kernels are not built: install with LYNX_CUDA=1 and --no-build-isolation, or set LYNX_CUDA=1 "
            "when you run, which builds them once (nvcc and ninja are needed)"
        )
    if path is None:
        from lynx_kernels.backends import cuda_build  # a program too: python -m lynx_kernels.backends.cuda_build

        path = cuda_build.cached(cuda_build.find_tools())
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"the CUDA kernels cannot be loaded: {error}"
    return None


# Decided once, with the import: torch.compile cannot trace the question. Who asked for a build hears of its failure.
MISSING = _load()
