"""New modules inside the layers of somebody else's decoder.

A module enters by giving a layer *instance* a subclass of its own class. The layer keeps its parameter names, and
checkpointing, hidden-state recording, cache and compile see the layer they know; wrappers and hooks would break one
or another of them.
"""

from collections.abc import Callable

from torch import nn


def insert(layer: nn.Module, name: str, module: nn.Module, derive: Callable[[type], type]) -> str:
    """Make ``module`` the submodule ``name`` of a layer whose class becomes ``derive`` of what it was.

    Returns:
        The class name the layer now has, for ``_no_split_modules``.
    """
    layer.__class__ = derive(type(layer))
    layer.add_module(name, module)
    for each in module.modules():
        each._is_hf_initialized = True  # type: ignore[assignment]  # the decoder's own initialisation must not draw it again
    return type(layer).__name__
