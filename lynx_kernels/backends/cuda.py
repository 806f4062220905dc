"""The library of CUDA C++ kernels: whether it is available, and its operators.

``LYNX_CUDA=1 pip install --no-build-isolation ...`` builds it into the package. If the package has no library,
``LYNX_CUDA=1`` in the environment builds one into a cache when lynx_kernels is imported. Nothing else runs nvcc.
"""

import os
from pathlib import Path
from typing import Any

import torch

_PACKAGE = Path(__file__).parents[1]


def kernels() -> Any:
    """The operators of the library, as in ``torch.ops``."""
    return torch.ops.lynx_kernels_cuda


def _load() -> str | None:
    """Load the library. Return why this failed, or None."""
    build_requested = os.environ.get("LYNX_CUDA") == "1"
    path = next(iter(_PACKAGE.glob("_cuda*.so")), None)
    if path is None and not build_requested:
        return (
            "the CUDA kernels are not built: install with LYNX_CUDA=1 and --no-build-isolation, or set LYNX_CUDA=1 "
            "at run time, which builds them once (nvcc and ninja are needed)"
        )
    if path is None:
        # Imported here because `python -m lynx_kernels.backends.cuda_build` runs the same file as a program.
        from lynx_kernels.backends import cuda_build

        path = cuda_build.cached(cuda_build.find_tools())
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"the CUDA kernels cannot be loaded: {error}"
    return None


# Decided once, at import, because torch.compile cannot trace it. If a requested build fails, the import raises.
MISSING = _load()
