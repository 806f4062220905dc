"""The different layouts of the released model's weights, turned into one: {key of the release: tensor}."""

import logging
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

logger = logging.getLogger(__name__)

SECTIONS = ("vision_encoder.", "LLM.", "bridge.", "absolute_frame_pos_embed")
_WRAPPERS = ("model", "module", "state_dict")
# What an original EVA checkpoint has and Lynx does not use: its last norm, and the heads of its pretraining.
_UNUSED_IN_EVA = ("norm.", "fc_norm.", "head.", "lm_head.", "mask_token")
_EVA_NAMES = {".attn.q_bias": ".attn.q_proj.bias", ".attn.v_bias": ".attn.v_proj.bias"}


def of_lynx(content: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights of the whole model, or all but those of a frozen language model and vision tower.

    Raises:
        ValueError: they are not weights of Lynx, not all tensors, or hold one weight twice.
    """
    content = _unwrapped(content)
    if not any(_without(key, "module.", "model.").startswith(SECTIONS) for key in content):
        raise ValueError(f"these are not weights of Lynx: {_some(content)}, expected {', '.join(SECTIONS)}")
    return _split_qkv(_renamed(content, lambda key: _without(key, "module.", "model.")))


def of_vision(content: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights of an EVA vision tower, with the original names or those of the release.

    Raises:
        ValueError: as for ``of_lynx``.
    """
    content = _unwrapped(content)
    found = _renamed(content, lambda key: _without(key, "module.", "model.", "vision_encoder."))
    if not any(key.startswith("blocks.") for key in found):
        raise ValueError(f"these are not weights of an EVA vision tower: {_some(content)}")
    unused = sorted(key for key in found if key.startswith(_UNUSED_IN_EVA))
    if unused:
        logger.warning("Lynx does not use these weights of the vision tower: %s", ", ".join(unused))
    return _split_qkv({f"vision_encoder.{key}": found[key] for key in found if key not in unused})


def of_language_model(content: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights of a Llama, with the names of transformers.

    Raises:
        ValueError: as for ``of_lynx``.
    """

    def name(key: str) -> str:
        key = _without(key, "module.", "LLM.")
        return key.removeprefix("model.") if key.startswith(("model.model.", "model.lm_head.")) else key

    found = _renamed(_unwrapped(content), name)
    if not any(key.startswith("model.layers.") for key in found):
        raise ValueError(f"these are not weights of a Llama of transformers: {_some(content)}")
    return {f"LLM.{key}": tensor for key, tensor in found.items()}


def _unwrapped(content: Mapping[str, Any]) -> Mapping[str, Any]:
    for name in _WRAPPERS:
        if isinstance(content.get(name), Mapping):
            return _unwrapped(content[name])
    others = [f"{key!r} ({type(key).__name__})" for key in content if not isinstance(key, str)]
    if others:
        raise ValueError(f"the weights have keys that are not strings: {', '.join(others)}")
    return content


def _without(key: str, *prefixes: str) -> str:
    while key.startswith(prefixes):
        for prefix in prefixes:
            key = key.removeprefix(prefix)
    return key


def _renamed(content: Mapping[str, Any], name: Callable[[str], str]) -> dict[str, Tensor]:
    others = [f"{key} ({type(value).__name__})" for key, value in content.items() if not isinstance(value, Tensor)]
    if others:
        raise ValueError(f"the weights hold values that are not tensors: {', '.join(others)}")
    renamed = {name(key): tensor for key, tensor in content.items()}
    if len(renamed) < len(content):
        twice = sorted(key for key, count in Counter(map(name, content)).items() if count > 1)
        raise ValueError(f"the weights hold some keys twice, under different prefixes: {', '.join(twice)}")
    return renamed


def _split_qkv(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Split EVA's original weights of queries, keys and values, which are one, into three as in the release."""
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
    """What the keys are, in words."""
    return f"the keys are {', '.join([*map(str, list(content)[:3]), '...'])}" if content else "there are no keys"
