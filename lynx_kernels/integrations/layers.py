"""New modules inside the layers of a decoder of transformers.

A module is added by giving a layer *instance* a subclass of its own class. The layer keeps its parameter names, and
checkpointing, hidden-state recording, cache and compilation still recognise it. Wrappers and hooks would each break one
of them.
"""

from collections.abc import Callable
from typing import Any

from torch import nn


def insert(layer: nn.Module, name: str, module: nn.Module, derive: Callable[[type], type]) -> str:
    """Make ``module`` the submodule ``name`` of a layer, whose class becomes ``derive(type(layer))``.

    Returns:
        The class name the layer now has, for ``_no_split_modules``.
    """
    layer.__class__ = derive(type(layer))
    layer.add_module(name, module)
    for each in module.modules():
        each._is_hf_initialized = True  # type: ignore[assignment]  # or the decoder's own initialisation draws it again
    return type(layer).__name__


def take_out(layer: nn.Module, name: str) -> None:
    """Undo ``insert``: the layer gets the class back that it had."""
    delattr(layer, name)
    layer.__class__ = type(layer).__bases__[0]


def subclass(layer_class: type[nn.Module], ending: str, forward: Callable, again: Callable[[type], type]) -> type:
    """A layer's class with another ``forward`` and an ``ending`` to its name.

    Who reads the signature or the code of its ``forward`` finds those of the layer's class.

    It is not an attribute of any module, so pickle makes it again by calling ``again(layer_class)``.
    """

    forward.__wrapped__ = layer_class.forward  # type: ignore[attr-defined]

    def reduce(self: Any, protocol: int) -> tuple[Callable, tuple, dict[str, Any]]:
        return _empty, (again, layer_class), self.__dict__

    return type(f"{layer_class.__name__}{ending}", (layer_class,), {"forward": forward, "__reduce_ex__": reduce})


def _empty(derive: Callable[[type], type], layer_class: type) -> Any:
    return object.__new__(derive(layer_class))
