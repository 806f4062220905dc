"""The layouts in which the released model's weights come, made into one: {key of the release: tensor}."""

import logging
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

logger = logging.getLogger(__name__)

SECTIONS = ("vision_encoder.", "LLM.", "bridge.", "absolute_frame_pos_embed")
_WRAPPERS = ("model", "module", "state_dict")
# What an original EVA checkpoint has beyond the tower that Lynx takes: its last norm, and heads of its pretraining.
_UNUSED_IN_EVA = ("norm.", "fc_norm.", "head.", "lm_head.", "mask_token")
_EVA_NAMES = {".attn.q_bias": ".attn.q_proj.bias", ".attn.v_bias": ".attn.v_proj.bias"}


def of_lynx(content: Mapping[str, Any]) -> dict[str, Tensor]:
    """The whole model's weights, or those beyond a frozen language model and vision tower.

    Raises:
        ValueError: they are another model's, hold something else than tensors, or one weight twice.
    """
    content = _unwrapped(content)
    if not any(_without(key, "module.", "model.").startswith(SECTIONS) for key in content):
        raise ValueError(f"these are no weights of Lynx: the keys are {_some(content)}, expected {', '.join(SECTIONS)}")
    return _split_qkv(_renamed(content, lambda key: _without(key, "module.", "model.")))


def of_vision(content: Mapping[str, Any]) -> dict[str, Tensor]:
    """An EVA vision tower's weights, original or as the release names them.

    Raises:
        ValueError: as for ``of_lynx``.
    """
    content = _unwrapped(content)
    found = _renamed(content, lambda key: _without(key, "module.", "model.", "vision_encoder."))
    if not any(key.startswith("blocks.") for key in found):
        raise ValueError(f"these are no weights of an EVA vision tower: the keys are {_some(content)}")
    unused = sorted(key for key in found if key.startswith(_UNUSED_IN_EVA))
    if unused:
        logger.warning("of the vision tower's weights, Lynx has no use for %s", ", ".join(unused))
    return _split_qkv({f"vision_encoder.{key}": found[key] for key in found if key not in unused})


def of_language_model(content: Mapping[str, Any]) -> dict[str, Tensor]:
    """A Llama's weights as transformers names them.

    Raises:
        ValueError: as for ``of_lynx``.
    """

    def name(key: str) -> str:
        key = _without(key, "module.", "LLM.")
        return key.removeprefix("model.") if key.startswith(("model.model.", "model.lm_head.")) else key

    found = _renamed(_unwrapped(content), name)
    if not any(key.startswith("model.layers.") for key in found):
        raise ValueError(f"these are no weights of a Llama of transformers: the keys are {_some(content)}")
    return {f"LLM.{key}": tensor for key, tensor in found.items()}


def _unwrapped(content: Mapping[str, Any]) -> Mapping[str, Any]:
    for name in _WRAPPERS:
        if isinstance(content.get(name), Mapping):
            return _unwrapped(content[name])
    others = [f"{key!r} ({type(key).__name__})" for key in content if not isinstance(key, str)]
    if others:
        raise ValueError(f"the weights have keys that are no names: {', '.join(others)}")
    return content


def _without(key: str, *prefixes: str) -> str:
    while key.startswith(prefixes):
        for prefix in prefixes:
            key = key.removeprefix(prefix)
    return key


def _renamed(content: Mapping[str, Any], name: Callable[[str], str]) -> dict[str, Tensor]:
    others = [f"{key} ({type(value).__name__})" for key, value in content.items() if not isinstance(value, Tensor)]
    if others:
        raise ValueError(f"the weights hold something else than tensors: {', '.join(others)}")
    renamed = {name(key): tensor for key, tensor in content.items()}
    if len(renamed) < len(content):
        twice = sorted(key for key, count in Counter(map(name, content)).items() if count > 1)
        raise ValueError(f"the weights hold twice, but for prefixes: {', '.join(twice)}")
    return renamed


def _split_qkv(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """EVA's original layout, queries, keys and values in one weight, as that of the release, which splits them."""
    split: dict[str, Tensor] = {}
    for key, tensor in state.items():
        if key.startswith("vision_encoder.") and key.endswith(".attn.qkv.weight") and tensor.dim():
            for part, third in zip("qkv", tensor.tensor_split(3), strict=True):
                split[key.replace(".qkv.", f".{part}_proj.")] = third
        else:
            for original, ours in _EVA_NAMES.items():
                key = key.replace(original, ours)
            split[key] = tensor
    return split


def _some(content: Mapping[str, Any]) -> str:
    return ", ".join([*map(str, list(content)[:3]), "..."]) if content else "none"
