"""Where CUDA C++ kernels can run, and the library they are in.

It is either inside the package (``LYNX_CUDA=1 pip install --no-build-isolation ...`` built it) or in a cache, where it
is built when a GPU's tensors first ask for it. ``LYNX_CUDA=0`` forbids the latter.
"""

import os
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_PACKAGE = Path(__file__).parents[1]


def unsupported_reason(tensor: Tensor) -> str | None:
    """Why CUDA kernels cannot take tensors on this one's device, or None if they can.

    Builds the kernels where that is all that lacks.
    """
    return device_unsupported_reason(tensor) or library_missing_reason()


def device_unsupported_reason(tensor: Tensor) -> str | None:
    """Why they could not even if they were built: what to ask before anything that depends on shapes."""
    device = tensor.device
    if device.type != "cuda":
        return f"CUDA kernels need a GPU, and the tensors are on {device.type}"
    if torch.version.cuda is None:
        return "CUDA kernels need an NVIDIA GPU, and this torch is not built for any"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "CUDA kernels need compute capability 8.0 (Ampere) or newer"
    return None


@torch.compiler.assume_constant_result  # torch.compile asks it, and does not trace it
def library_missing_reason() -> str | None:
    """Why there is no library, or None where it is loaded. Decided once."""
    return _load()


def kernels() -> Any:
    """The operators of the library, as ``torch.ops`` has them."""
    return torch.ops.lynx_kernels_cuda


@cache
def _load() -> str | None:
    from lynx_kernels.backends import (
        cuda_build,  # not with the package: it is a program too, python -m lynx_kernels.backends.cuda_build
    )

    path = next(iter(_PACKAGE.glob("_cuda*.so")), None)
    try:
        if path is None:
            if os.environ.get("LYNX_CUDA") == "0":
                return "the CUDA kernels are not built, and LYNX_CUDA=0 forbids to build them on first use"
            path = cuda_build.cached(cuda_build.find_tools())
        torch.ops.load_library(path)
    except cuda_build.MissingToolError as error:
        return f"the CUDA kernels are not built, and cannot be here: {error}"
    except (cuda_build.BuildError, OSError) as error:
        why = f"the CUDA kernels cannot be {'loaded' if path else 'built'}: {error}"
        warnings.warn(f"{why}\nOther implementations run in their place (LYNX_CUDA=0 silences this).", stacklevel=2)
        return why
    return None
