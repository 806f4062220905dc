"""Bottleneck adapters in the decoder of a model of transformers, saved apart from it, and out of it again."""

import json
import os
from collections.abc import Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from lynx_kernels.integrations import layers as layers_of_models
from lynx_kernels.nn import Adapter

_METADATA = "lynx_kernels.adapters"


class Adapters:
    """Adapters that stand in a model. ``add_adapters`` and ``load_adapters`` make them.

    Attributes:
        model: the model.
        modules: the adapters by their names in the model, in the order of its layers.
        settings: what ``add_adapters`` was called with.
    """

    def __init__(self, model: PreTrainedModel, owners: dict[str, nn.Module], settings: dict[str, Any]):
        self.model = model
        self.settings = settings
        self._name = settings["name"]
        self._owners = owners
        self._classes = {name: type(each) for name, each in owners.items()}
        self.modules: dict[str, Adapter] = {
            f"{name}.{self._name}": each.get_submodule(self._name)  # type: ignore[misc]
            for name, each in owners.items()
        }

    def parameters(self) -> Iterator[nn.Parameter]:
        """The adapters' parameters, for an optimizer, or to be left trainable where the model's are frozen."""
        for each in self.modules.values():
            yield from each.parameters()

    def tensors(self) -> dict[str, Tensor]:
        """Parameters and buffers by their names in the model, detached."""
        return {
            f"{name}.{key}": value for name, each in self.modules.items() for key, value in each.state_dict().items()
        }

    def save(self, path: str | os.PathLike) -> None:
        """Write weights and settings into one safetensors file, which replaces a file that is there."""
        tensors = {name: each.contiguous() for name, each in self.tensors().items()}
        unfinished = Path(f"{os.fspath(path)}.unfinished")
        try:
            save_file(tensors, unfinished, metadata={_METADATA: json.dumps(self.settings)})
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)

    def remove(self) -> None:
        """Give the model back as it was.

        Raises:
            RuntimeError: a layer was changed since; what came later must go first.
        """
        for name, owner in self._owners.items():
            if type(owner) is not self._classes[name] or not isinstance(getattr(owner, self._name, None), Adapter):
                raise RuntimeError(
                    f"adapters: {name} was changed after the adapter {self._name!r} was added (it is a "
                    f"{type(owner).__name__} now); undo what came later, then remove the adapters"
                )
        for owner in self._owners.values():
            layers_of_models.take_out(owner, self._name)
        self._owners.clear()
        self.modules.clear()


def add_adapters(
    model: PreTrainedModel,
    bottleneck: int,
    *,
    at: str | None = None,
    parallel: bool = False,
    layers: Sequence[int] | None = None,
    name: str = "adapter",
    **options: Any,
) -> Adapters:
    """Put an ``nn.Adapter`` into layers of a model's decoder. The model's own parameters keep their names.

    Args:
        model: of transformers; of a model with images, the decoder of its text.
        bottleneck: r, the width between an adapter's projections.
        at: the name of a layer's child that gets the adapter, for example ``"mlp"`` or ``"self_attn"`` (Houlsby et al.,
            arXiv 1902.00751); None for the layer itself (Lynx, arXiv 2307.02469).
        parallel: whether the adapter reads what that module reads, and its output is added to that module's (He et al.,
            arXiv 2110.04366). Otherwise it follows the module.
        layers: the numbers of the layers; None for all.
        name: of the submodule. Adapters of several names may stand in one model.
        **options: of ``nn.Adapter``: activation, norm, residual, scale, scale_per_channel, dropout,
            starts_as_identity, ... A parallel adapter has no residual.

    Returns:
        The adapters, in the dtype and on the device of their layers. Nothing is frozen.

    Raises:
        ValueError: there is no such layer or child, or it has a submodule of that name already; the message names it.
        TypeError: an option that ``nn.Adapter`` does not have.
    """
    if parallel:
        if options.get("residual") is not None:
            raise ValueError(f"add_adapters: residual={options['residual']!r}, but a parallel adapter has no residual")
        options["residual"] = None
    decoder = _decoder_layers(model)
    numbers = range(len(decoder)) if layers is None else layers
    owners: dict[str, nn.Module] = {}
    paths = {id(each): path for path, each in model.named_modules()}
    for number in numbers:
        if not 0 <= number < len(decoder):
            raise ValueError(f"add_adapters: layer {number} is not one of the decoder's 0 to {len(decoder) - 1}")
        owner = decoder[number] if at is None else getattr(decoder[number], at, None)
        if not isinstance(owner, nn.Module):
            children = ", ".join(child for child, _ in decoder[number].named_children())
            raise ValueError(f"add_adapters: layer {number} has no child {at!r}; it has {children}")
        if hasattr(owner, name):
            raise ValueError(f"add_adapters: {paths[id(owner)]} has an attribute {name!r} already; choose another name")
        owners[paths[id(owner)]] = owner
    width = model.get_decoder().config.get_text_config().hidden_size
    made = [Adapter(width, bottleneck, **options).to(**_place(owner, model)) for owner in owners.values()]
    for owner, adapter in zip(owners.values(), made, strict=True):
        layers_of_models.insert(owner, name, adapter, partial(_with_adapter, name=name, parallel=parallel))
    settings = {"bottleneck": bottleneck, "at": at, "parallel": parallel, "layers": list(numbers), "name": name}
    return Adapters(model, owners, {**settings, **options})


def load_adapters(model: PreTrainedModel, path: str | os.PathLike) -> Adapters:
    """Add the adapters that ``Adapters.save`` wrote.

    Raises:
        ValueError: the file holds no adapters, or they do not fit this model; then the model stays as it was.
    """
    try:
        with safe_open(path, "pt") as file:
            written = (file.metadata() or {}).get(_METADATA)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no dict
    except SafetensorError as error:
        raise ValueError(f"load_adapters: {os.fspath(path)} cannot be read as safetensors: {error}") from error
    if written is None:
        raise ValueError(f"load_adapters: {os.fspath(path)} holds no adapters: Adapters.save writes such files")
    adapters = add_adapters(model, **json.loads(written))
    try:
        _load(adapters, tensors)
    except ValueError as error:
        adapters.remove()
        raise ValueError(
            f"load_adapters: {os.fspath(path)} does not fit this {type(model).__name__}: {error}"
        ) from None
    return adapters


def _load(adapters: Adapters, tensors: dict[str, Tensor]) -> None:
    expected = {
        f"{name}.{key}": value
        for name, module in adapters.modules.items()
        for key, value in module.state_dict().items()
    }
    if different := sorted(expected.keys() ^ tensors.keys()):
        raise ValueError(f"{different[0]} is only in one of them")
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {tuple(expected[name].shape)}")
    with torch.no_grad():
        for name, tensor in tensors.items():
            expected[name].copy_(tensor)


def _decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The longest list of modules in the decoder, each of which holds one that knows its layer's number."""
    found = [
        each
        for each in model.get_decoder().modules()
        if isinstance(each, nn.ModuleList)
        and len(each) > 0
        and all(any(isinstance(getattr(part, "layer_idx", None), int) for part in layer.modules()) for layer in each)
    ]
    if not found:
        raise ValueError(f"add_adapters: {type(model).__name__} has no decoder whose layers know their numbers")
    return max(found, key=len)


def _place(owner: nn.Module, model: PreTrainedModel) -> dict[str, Any]:
    first = next(owner.parameters(), None)
    if first is None:
        return {"dtype": model.dtype, "device": model.device}
    return {"dtype": first.dtype if first.is_floating_point() else model.dtype, "device": first.device}


@cache
def _with_adapter(owner_class: type[nn.Module], *, name: str, parallel: bool) -> type[nn.Module]:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = owner_class.forward(self, *args, **kwargs)
        first = output[0] if isinstance(output, tuple) else output
        adapter = getattr(self, name)
        first = first + adapter(args[0] if args else kwargs["hidden_states"]) if parallel else adapter(first)
        return (first, *output[1:]) if isinstance(output, tuple) else first

    again = partial(_with_adapter, name=name, parallel=parallel)
    return layers_of_models.subclass(owner_class, "WithAdapter", forward, again)
