"""Put the kernels into a model of transformers that is there already, say what runs where, and take them out again.

Nothing of a model's code is copied. What changes is the name of the attention function in the model's configurations,
of which layers with cross-attention get a copy, and two hooks on the model for its loss.
"""

import copy
import inspect
import re
import weakref
from dataclasses import dataclass, field, replace
from itertools import groupby
from types import TracebackType
from typing import Any, Literal, Self

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedConfig, PreTrainedModel

from lynx_kernels.integrations import head_loss, logs, outsiders
from lynx_kernels.integrations.attention_mask import AttentionMask
from lynx_kernels.integrations.token_mixers import KINDS, TokenMixers, takes_rows
from lynx_kernels.integrations.transformers import (
    CROSS_NAME,
    KEEP_SAMPLES_APART,
    NAME,
    UNSUPPORTED,
    VARLEN_NAME,
    register,
)

_INTERFACE, _CUTS_AT_SAMPLES = "ALL_ATTENTION_FUNCTIONS", "is_flash_attention_requested"
# What the names of classes, and of modules and their parents, say of layers whose keys are other tokens.
_CROSS = re.compile(r"cross|perceiver|resampler|encoder_attn", re.IGNORECASE)
# Inputs that say which images a token sees. Mllama's tokens before the first one see all of the row's.
_SEEN_IMAGES = ("cross_attention_mask", "image_attention_mask")
_patched: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()


@dataclass(frozen=True)
class Part:
    """A layer, or the loss, and what runs there.

    Attributes:
        name: as in ``named_modules``.
        kind: its class.
        runs: "lynx", or "its own".
        why: what runs, and why.
    """

    name: str
    kind: str
    runs: str
    why: str


@dataclass
class Patch:
    """What ``apply`` changed in a model. Also a context manager, which undoes it at its end."""

    model: PreTrainedModel
    _parts: list[Part]
    _configs: list[tuple[PreTrainedConfig, str | None]]  # with the names they had
    _crossing: list[tuple[nn.Module, PreTrainedConfig]]  # layers with the configurations they had
    _hooks: list[RemovableHandle]
    _classes: dict[str, type] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for each in self.model.modules():
            logs.ran.pop(each, None)
        self._classes = {name: type(each) for name, each in self.model.named_modules()}
        _patched.add(self.model)

    def parts(self) -> list[Part]:
        """The attention layers, the layers beside them that mix tokens, and the loss, in the order of the model.

        For layers that ran since, ``runs`` and ``why`` are what ran last.
        """
        layers = {**dict(self.model.named_modules()), "loss": self.model}
        found = []
        for part in self._parts:
            is_layer = part.runs == "lynx" and part.name in layers
            ran = logs.ran.get(layers[part.name]) if is_layer else None
            found.append(part if ran is None else Part(part.name, part.kind, *ran))
        return found

    def report(self) -> str:
        """A table of ``parts``. Layers that differ by their numbers alone share a line."""

        def without_numbers(part: Part) -> tuple[str, ...]:
            return re.sub(r"\d+", "*", part.name), part.kind, part.runs, part.why

        rows = [("layer", "class", "runs", "")]
        for (name, *rest), group in groupby(self.parts(), without_numbers):
            numbers = [list(map(int, re.findall(r"\d+", part.name))) for part in group]
            for first, last in zip(numbers[0], numbers[-1], strict=True):
                name = name.replace("*", str(first) if first == last else f"{first}-{last}", 1)
            kind, runs, why = rest
            rows.append((name, kind, runs, why))
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        return "\n".join("  ".join([*map(str.ljust, row[:3], widths), row[3]]).rstrip() for row in rows)

    def undo(self) -> None:
        """Give the model back as it was. Undoing twice changes nothing.

        Raises:
            RuntimeError: something wrapped or replaced a part of the model since. It may hold on to what is undone
                here, so it has to go first.
        """
        if self.model not in _patched:
            return
        now = {name: type(each) for name, each in self.model.named_modules()}
        for name in {**self._classes, **now}:
            was, found = self._classes.get(name), now.get(name)
            if was is not found:
                what = f"{'.'.join(('model', name)) if name else 'the model'} is {_class_name(found)}"
                raise RuntimeError(
                    f"undo: {what} and was {_class_name(was)} when apply() changed the model; undo that first (peft: "
                    f"unload() or merge_and_unload(); FSDP: keep the patch until the run ends)"
                )
        for config, implementation in self._configs:
            config._attn_implementation_internal = implementation
        for layer, config in self._crossing:
            layer.config = config
        for hook in self._hooks:
            hook.remove()
        _patched.discard(self.model)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Patch":
        raise TypeError("a Patch belongs to one model; copy the model, and call apply() on an unpatched copy")

    def __reduce__(self) -> Any:
        raise TypeError("a Patch cannot be pickled; save the model, and call apply() where it is loaded")


def apply(
    model: PreTrainedModel,
    *,
    attention: bool = True,
    vision: bool = True,
    cross_attention: bool = True,
    loss: bool = True,
    on_unsupported: Literal["keep", "raise"] = "keep",
) -> Patch:
    """Run the kernels in a model of transformers.

    Args:
        model: on any device, in any dtype. Its parameters and modules stay as they are, and so does its ``state_dict``.
        attention: decoders run ``attn_implementation="lynx"``, see ``lynx_kernels.integrations.transformers``.
        vision: vision towers that cut one row of patches at ``cu_seqlens`` run one call a layer.
        cross_attention: layers that attend to other tokens than their own (Mllama, Idefics, Perceiver resamplers,
            Q-Formers) run ``cross_attention``, where a query sees one span of them.
        loss: in ``train()``, with labels, the loss comes from ``linear_cross_entropy`` and ``logits`` is None. In
            ``eval()``, and in code that torch.compile compiles, nothing changes. A model with a loss of its own keeps
            it. The labels of a packed row are scored by the rows that predict them on their paths.
        on_unsupported: what happens to layers and losses that cannot run the kernels: they stay, or it is an error.

    Returns:
        A patch: ``print(patch.report())`` tells what runs where, ``patch.undo()`` takes everything back. A copy of the
        model (``copy.deepcopy``, pickle) runs the same attention and loss, and has no patch of its own.

    Raises:
        TypeError: the model is not one of transformers: ``apply`` comes before peft and DDP wrap it.
        RuntimeError: it is patched already.
        ValueError: with ``on_unsupported="raise"``: names the layers, and why they cannot run.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"apply: expected a model of transformers, got {_class_name(type(model))}; call apply() before other "
            f"libraries wrap the model, or on the model inside"
        )
    if on_unsupported not in ("keep", "raise"):
        raise ValueError(f"on_unsupported is {on_unsupported!r}, must be 'keep' or 'raise'")
    if model in _patched:
        raise RuntimeError(f"apply: this {type(model).__name__} is patched already; undo() its patch first")
    register()
    parts, configs, crossing = _plan(model, attention=attention, vision=vision, cross_attention=cross_attention)
    mixers, parts = _mixers(model, parts)
    reason = head_loss.why_not(model) if loss else "loss=False"
    how = "in train() with labels: linear_cross_entropy, logits are None" if reason is None else reason
    parts.append(Part("loss", "loss", "lynx" if reason is None else "its own", how))
    unsupported = [part for part in parts if part.runs != "lynx" and not part.why.endswith("=False")]
    if on_unsupported == "raise" and unsupported:
        lines = "\n".join(f"  {part.name} ({part.kind}): {part.why}" for part in unsupported)
        raise ValueError(f"apply: these parts of {type(model).__name__} cannot run the kernels:\n{lines}")
    before = [(config, config._attn_implementation_internal) for config, _ in configs]
    for config, name in configs:
        config._attn_implementation_internal = name
    had: list[tuple[nn.Module, Any]] = [(layer, layer.config) for layer in crossing]
    for layer, config in had:
        copied = copy.copy(config)
        copied._attn_implementation_internal = CROSS_NAME
        layer.config = copied
    hooks = [model.register_forward_pre_hook(_check_packed, with_kwargs=True)]
    if not _takes_positions(model) and (decoder := _decoder_that_takes_positions(model)) is not None:
        hooks.append(decoder.register_forward_pre_hook(_check_positions, with_kwargs=True))
    if mixers:
        hooks += TokenMixers(model, mixers).handles
    if head_loss.why_own(model) is None:
        hooks += head_loss.HeadLoss(model, promises=reason is None).handles
    return Patch(model, parts, before, had, hooks)


def is_patched(model: nn.Module) -> bool:
    """Whether ``apply`` changed the model, and nobody undid it."""
    return model in _patched


def _check_packed(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Refuse a packed row whose tokens would not have the positions, images and labels that they have alone."""
    mask = head_loss.argument("attention_mask", model, args, kwargs)
    if not isinstance(mask, AttentionMask) or not mask.is_packed:
        return None
    name, positions = type(model).__name__, head_loss.argument("position_ids", model, args, kwargs)
    seen_images = [each for each in _SEEN_IMAGES if head_loss.argument(each, model, args, kwargs) is not None]
    if seen_images and mask.images is None:
        raise ValueError(
            f"{name}: {seen_images[0]} in a packed row does not say which images are of which sample; take the inputs "
            f"of a PackedCollator"
        )
    if "cross_attention_mask" in seen_images and not any(map(_runs_cross_attention, model.modules())):
        raise ValueError(f"{name}: packed rows with images need apply(cross_attention=True)")
    if not _takes_positions(model) and _decoder_that_takes_positions(model) is None:
        raise ValueError(f"{name} takes no position_ids, so the samples of a packed row would go on from each other")
    if positions is None:
        raise ValueError(f"{name}: a packed row needs position_ids: layout.position_ids[None], or a PackedCollator's")
    if positions.dim() < 3 and any(hasattr(each, "get_rope_index") for each in model.modules()):
        raise ValueError(
            f"{name} has positions in three dimensions (M-RoPE), got position_ids of shape {tuple(positions.shape)}; "
            f"take those of a PackedCollator, or of get_rope_index for each sample, end to end"
        )
    if "attention_mask" not in kwargs:
        return None
    more: dict[str, Any] = {"attention_mask": replace(mask, model=name)}  # for what refuses it later
    if "cross_attention_mask" in seen_images:
        sees = head_loss.argument("cross_attention_mask", model, args, kwargs)  # (1, T, images, tiles)
        more["packed_images"] = (mask.images, sees.shape[2])
    labels = kwargs.get("labels")
    own = "compiled code computes its loss" if torch.compiler.is_compiling() else head_loss.why_own(model)
    if labels is not None and own is not None:
        assert mask.layout is not None
        if mask.layout.max_ranges > 1:
            raise ValueError(
                f"{name} would score the first tokens of branches by the rows before them, not by their parents: "
                f"{own}; pass the branches as samples of their own"
            )
        more["labels"] = labels.masked_fill(mask.layout.predictors.view_as(labels) < 0, head_loss.IGNORE)
    return args, {**kwargs, **more}


def _check_positions(decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse a packed row whose positions did not reach the decoder."""
    mask, positions = (head_loss.argument(each, decoder, args, kwargs) for each in ("attention_mask", "position_ids"))
    if isinstance(mask, AttentionMask) and mask.is_packed and positions is None:
        raise ValueError(f"{mask.model} does not pass position_ids on, so packed samples would go on from each other")


def _takes_positions(model: nn.Module) -> bool:
    return "position_ids" in inspect.signature(model.forward).parameters


def _decoder_that_takes_positions(model: PreTrainedModel) -> nn.Module | None:
    """The decoder to which a model may pass its keyword arguments on, position_ids among them."""
    kinds = {each.kind for each in inspect.signature(model.forward).parameters.values()}
    decoder = model.get_decoder()
    is_inside = inspect.Parameter.VAR_KEYWORD in kinds and isinstance(decoder, nn.Module) and decoder is not model
    return decoder if is_inside and _takes_positions(decoder) else None


def _runs_cross_attention(layer: nn.Module) -> bool:
    return getattr(getattr(layer, "config", None), "_attn_implementation", None) == CROSS_NAME


def _plan(
    model: PreTrainedModel, *, attention: bool, vision: bool, cross_attention: bool
) -> tuple[list[Part], list[tuple[PreTrainedConfig, str]], list[nn.Module]]:
    """The layers and what will run there; configurations with the names of their attention functions; cross layers."""
    parts: list[Part] = []
    crossing: list[nn.Module] = []
    configs: dict[int, tuple[PreTrainedConfig, str]] = {}
    kept: dict[int, str] = {}  # configurations that must stay, and why
    for layer in model.modules():
        if _calls_interface(layer) and (feature := _asks_for(layer)) is not None:
            kept.setdefault(id(layer.config), f"{type(layer).__name__} has {feature}")
    owners = {name: each for name, each in model.named_modules() if isinstance(each, PreTrainedModel)}
    for name, layer in model.named_modules():
        kind = type(layer).__name__
        if not _calls_interface(layer):
            if (mixer := _mixes_samples(name, layer, model)) is not None:
                parts.append(Part(name, kind, "its own", mixer))
            continue
        owner = owners[max((each for each in owners if f"{name}.".startswith(f"{each}." if each else "")), key=len)]
        config: Any = layer.config
        reason = _outside(owner) or kept.get(id(config))
        # Layers of decoders know their number in the cache, also those with full attention to a prefix.
        is_decoder = bool(getattr(layer, "is_causal", False)) or hasattr(layer, "layer_idx")
        cuts = _CUTS_AT_SAMPLES in _names_in_forward(layer) | _names_in_forward(owner)
        if reason is None and _is_cross(name, layer):
            reason = None if cross_attention else "cross_attention=False"
            chosen, why = CROSS_NAME, "cross_attention, where a query sees one span of keys"
        elif reason is None and is_decoder:
            reason = None if attention else "attention=False"
            chosen, why = NAME, "prefix_attention for padded and packed rows; decoding over a cache runs SDPA"
        elif reason is None and cuts:
            reason = None if vision else "vision=False"
            chosen, why = VARLEN_NAME, "prefix_attention, one call for all frames"
        elif reason is None:
            reason = "full attention in rows of one length, which PyTorch's is as good at"
        if reason is None:
            if chosen == CROSS_NAME:
                crossing.append(layer)
            else:
                configs[id(config)] = (config, chosen)
            parts.append(Part(name, kind, "lynx", why))
        else:
            parts.append(Part(name, kind, "its own", reason))
    return parts, list(configs.values()), crossing


def _is_cross(name: str, layer: nn.Module) -> bool:
    names = [type(layer).__name__, *name.split(".")[-2:]]
    return bool(getattr(layer, "is_cross_attention", False)) or any(map(_CROSS.search, names))


def _calls_interface(layer: nn.Module) -> bool:
    return isinstance(getattr(layer, "config", None), PreTrainedConfig) and _INTERFACE in _names_in_forward(layer)


def _names_in_forward(layer: nn.Module) -> set[str]:
    """The global names that the forward of a layer reads."""
    code = getattr(inspect.unwrap(type(layer).forward), "__code__", None)
    return set() if code is None else set(code.co_names)


def _asks_for(layer: nn.Module) -> str | None:
    """A feature that our attention does not have and that the forward of a layer names as a keyword argument."""
    code = inspect.unwrap(type(layer).forward).__code__
    keywords = {name for each in code.co_consts if isinstance(each, tuple) for name in each}
    return next((feature for name, feature in UNSUPPORTED.items() if name in keywords), None)


def _outside(owner: PreTrainedModel) -> str | None:
    try:
        outsiders.check(type(owner), NAME)  # type: ignore[arg-type]  # a class is hashable
    except ValueError as error:
        return str(error)
    return None


def _mixes_samples(name: str, layer: nn.Module, model: PreTrainedModel) -> str | None:
    """Why a layer that is no attention keeps a model from packed rows, or None."""
    kind = _kind_of_layer(layer, model)
    if kind is None or kind in KEEP_SAMPLES_APART or any(_has_number(child) for child in layer.children()):
        return None
    return f"{kind}: not attention; it would mix the samples of a packed row, which is refused"


def _mixers(model: PreTrainedModel, parts: list[Part]) -> tuple[list[nn.Module], list[Part]]:
    """The layers that mix tokens without being attention, if packed rows can do with all of them; and what they say."""
    types = getattr(model.config.get_text_config(), "layer_types", None) or ()
    layers = dict(model.named_modules())
    found = [part for part in parts if part.runs != "lynx" and _kind_of_layer(layers.get(part.name), model) in KINDS]
    numbers = {layers[part.name].layer_idx for part in found}
    takes_keywords = inspect.Parameter.VAR_KEYWORD in {
        each.kind for each in inspect.signature(model.forward).parameters.values()
    }
    if (
        not takes_keywords
        or set(types) - KEEP_SAMPLES_APART - KINDS
        or numbers != {number for number, kind in enumerate(types) if kind in KINDS}
        or not all(takes_rows(layers[part.name]) for part in found)
    ):
        return [], parts
    names = {part.name for part in found}
    why = "not attention; each sample of a packed row is a row of its own there"
    parts = [
        replace(part, why=f"{_kind_of_layer(layers[part.name], model)}: {why}") if part.name in names else part
        for part in parts
    ]
    return [layers[name] for name in names], parts


def _kind_of_layer(layer: nn.Module | None, model: PreTrainedModel) -> str | None:
    """What the configuration says that a layer with a number is."""
    types = getattr(getattr(layer, "config", None) or model.config.get_text_config(), "layer_types", None) or ()
    number = getattr(layer, "layer_idx", None)
    return types[number] if isinstance(number, int) and number < len(types) else None


def _has_number(layer: nn.Module) -> bool:
    return isinstance(getattr(layer, "layer_idx", None), int)


def _class_name(found: type | None) -> str:
    return "not there" if found is None else f"a {found.__module__}.{found.__qualname__}"
