"""The names of the released model's parameters, in the release and here."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

# For each section our prefix, the prefix in the release, and the other differences in a name.
_SECTIONS: tuple[tuple[str, str, Mapping[str, str]], ...] = (
    (
        "language_model.",
        "LLM.",
        {
            "output_adapter.norm.": "output_adapter.adapter_norm_before.",
            "output_adapter.down.": "output_adapter.adapter_down.",
            "output_adapter.up.": "output_adapter.adapter_up.",
            "output_adapter.scale": "output_adapter.scaling",
        },
    ),
    (
        "vision_tower.",
        "vision_encoder.",
        {
            "embeddings.class_embedding": "cls_token",
            "embeddings.position_embedding": "pos_embed",
            "embeddings.patch_embedding.": "patch_embed.proj.",
            "encoder.layers.": "blocks.",
            ".layer_norm1.": ".norm1.",
            ".layer_norm2.": ".norm2.",
            ".self_attn.": ".attn.",
            ".projection.": ".proj.",
        },
    ),
    ("resampler.frame_position", "absolute_frame_pos_embed", {}),
    ("resampler.", "bridge.", {".attention.": ".0.", ".feed_forward.": ".1."}),
)


def reference_name(name: str) -> str:
    """The name in the release of our parameter ``name``; for ``qkv`` that of the fused weight."""
    for ours, theirs, parts in _SECTIONS:
        if name.startswith(ours):
            name = theirs + name.removeprefix(ours)
            for part, their_part in parts.items():
                name = name.replace(part, their_part)
            return name
    raise ValueError(f"the release has no parameter like {name}")


def to_reference(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """One of our parameters as one or several of the release, which are views of it."""
    key = reference_name(name)
    if ".attn.qkv." in key:
        parts = dict(zip("qkv", tensor.chunk(3), strict=True))
        if key.endswith(".bias"):  # the release has no bias for keys: it would not change the softmax
            del parts["k"]
        return {key.replace(".qkv.", f".{part}_proj."): value for part, value in parts.items()}
    if key == "absolute_frame_pos_embed":
        return {key: tensor[None, :, None]}
    return {key: tensor}


def from_reference(name: str, take: Callable[[str], Tensor]) -> Tensor:
    """One of our parameters, made of the tensors that ``take`` returns for the keys of the release."""
    key = reference_name(name)
    if ".attn.qkv." in key:
        query, value = (take(key.replace(".qkv.", f".{part}_proj.")) for part in "qv")
        has_keys = key.endswith(".weight")
        middle = take(key.replace(".qkv.", ".k_proj.")) if has_keys else torch.zeros_like(value)
        return torch.cat([query, middle, value])
    if key == "absolute_frame_pos_embed":
        return take(key)[0, :, 0]
    return take(key)
