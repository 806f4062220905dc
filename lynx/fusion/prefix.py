"""Prefix fusion: vision tokens stand before the text, and adapters in the decoder learn to read them.

An adapter enters by giving a layer *instance* a subclass of its own class. The layer keeps its parameter names, and
checkpointing, hidden-state recording, cache and compile see the layer they know; wrappers and hooks would break one
or another of them.
"""

from functools import cache

from torch import nn

from lynx_kernels.nn import Adapter


def add_adapters(layers: nn.ModuleList, *, frequency: int, width: int, size: int, activation: str) -> set[str]:
    """Put an adapter on the output of every ``frequency``-th of the ``layers``, from the first one on.

    Returns:
        The class names the changed layers now have, for ``_no_split_modules``.
    """
    names = set()
    for layer in layers[::frequency]:
        layer.__class__ = _with_adapter(type(layer))  # type: ignore[arg-type]
        layer.output_adapter = Adapter(width, size, activation=activation)
        for module in layer.output_adapter.modules():
            module._is_hf_initialized = True  # type: ignore[assignment]  # the decoder's own initialisation must not draw it again
        names.add(type(layer).__name__)
    return names


@cache
def _with_adapter(layer_class: type[nn.Module]) -> type[nn.Module]:
    def forward(self, *args, **kwargs):
        output = layer_class.forward(self, *args, **kwargs)
        if isinstance(output, tuple):
            return (self.output_adapter(output[0]), *output[1:])
        return self.output_adapter(output)

    return type(f"{layer_class.__name__}WithAdapter", (layer_class,), {"forward": forward})
