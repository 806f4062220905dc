"""Where Triton kernels can run. The first kernel that runs imports Triton; importing lynx_kernels does not."""

import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lynx_kernels.backends.dispatch import GPUS

# Both are fixed for the process: Triton decides at decoration time whether a kernel is interpreted. As constants they
# also leave nothing for torch.compile to trace.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
INSTALLED = importlib.util.find_spec("triton") is not None
ARCHITECTURES = ("cpu",) if INTERPRETED else GPUS


def unsupported_reason(*tensors: Tensor | None) -> str | None:
    """Why Triton kernels cannot take these tensors, or None if they can."""
    if not INSTALLED:
        return "triton is not installed"
    if any(each is not None and each.dtype == torch.float64 for each in tensors):
        return "the Triton kernels accumulate in fp32, and an argument is fp64"
    return None


def not_preferred_reason(call: Any) -> str | None:
    """Why Triton kernels run only when named by ``impl=``, or None. The interpreter is for tests."""
    return "the Triton interpreter runs only when named by impl=" if INTERPRETED else None


def lazy(module: str, function: str) -> Callable[..., Any]:
    """A function that imports ``module`` when it is first called, then calls ``module.function``."""

    def call(*args: Any) -> Any:
        return getattr(importlib.import_module(module), function)(*args)

    return call
