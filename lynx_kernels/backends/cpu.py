"""The compiled module: kernels for CPUs, from csrc. The package works without it, only slower.

Its kernels exist once per instruction set; the best that the processor has runs, unless another one is forced.
"""

import importlib
from typing import Any


def _load() -> tuple[Any, str | None]:
    try:
        return importlib.import_module("lynx_kernels._host"), None
    except ImportError as error:
        return None, (
            f"the compiled module is missing ({error}); install a C++17 compiler with OpenMP (GCC 12 or newer) and "
            "then lynx-kernels again, the output of `pip install --verbose` says what failed"
        )


# Loaded once: torch.compile cannot trace it. MISSING is the reason where there is none.
module, MISSING = _load()


def instruction_sets() -> list[str]:
    """What kernels can run with here, best first: of "avx512bf16", "avx512", "avx2" and "plain"; [] uncompiled."""
    return module.instruction_sets() if module is not None else []


def force_instruction_set(name: str | None) -> None:
    """Run kernels with ``name`` of ``instruction_sets()`` from now on, in all threads; None takes the best again.

    Raises:
        ValueError: there are no kernels of that name, or this processor cannot run them.
        RuntimeError: the compiled module is missing.
    """
    if module is None:
        raise RuntimeError(MISSING)
    module.force_instruction_set(name or "")
