"""The compiled module: CPU kernels, built from csrc. The package works without it, only slower.

Every kernel is compiled once per instruction set. The best set that the CPU supports runs, unless another is forced.
"""

import importlib
import warnings
from pathlib import Path
from typing import Any

# What setup.py leaves where the C++ did not compile: pip shows it to nobody.
BUILD_FAILURE = Path(__file__).parents[1] / "host_build_failure.txt"


def _load() -> tuple[Any, str | None]:
    try:
        return importlib.import_module("lynx_kernels._host"), None
    except ImportError as error:
        if not BUILD_FAILURE.is_file():
            failure = f"the compiled module is missing ({error})"
        else:
            failure = f"the compiled module is missing: its build failed ({BUILD_FAILURE.read_text().strip()})"
            warnings.warn(f"lynx_kernels runs in plain PyTorch on CPUs: {failure}", stacklevel=2)
        return None, (
            f"{failure}; install a C++17 compiler with OpenMP (GCC 12 or newer), then install lynx-kernels again; the "
            "output of `pip install --verbose` says what failed"
        )


# Loaded once, because torch.compile cannot trace the import. MISSING says why there is no module, or is None.
module, MISSING = _load()


def instruction_sets() -> list[str]:
    """The instruction sets that kernels can use here, best first: "avx512bf16", "avx512", "avx2", "plain".

    The list is empty where the compiled module is missing.
    """
    return module.instruction_sets() if module is not None else []


def force_instruction_set(name: str | None) -> None:
    """From now on run the kernels of ``name``, one of ``instruction_sets()``, in all threads. None: the best again.

    Raises:
        ValueError: no kernels have this name, or this CPU cannot run them.
        RuntimeError: the compiled module is missing.
    """
    if module is None:
        raise RuntimeError(MISSING)
    module.force_instruction_set(name or "")
