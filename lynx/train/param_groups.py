"""The groups of parameters that a stage may train, and what is done to the parameters of each."""

from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from lynx.fusion import FUSIONS
from lynx.media import tower
from lynx.model import LynxForConditionalGeneration

PARAM_GROUPS = {
    "resampler": "the resampler, or the projection in its place: what makes vision tokens of frames",
    "frame_positions": "the learned positions of a video's frames",
    **{fusion.param_group: fusion.param_group_help for fusion in FUSIONS.values()},
    "vision_tower": "the vision tower",
    "language_model": "the decoder itself, embeddings and output head included",
}
# Learned tables that are not weights of a product: there is no reason to pull them to 0.
_TABLES = ("latents", "frame_position", "class_embedding", "position_embedding")


def group_of(name: str) -> str:
    """The group, of ``PARAM_GROUPS``, that the parameter of this name belongs to."""
    first, _, rest = name.partition(".")
    if first in ("resampler", "projection"):
        return "frame_positions" if rest == "frame_position" else "resampler"
    if first == "language_model":
        for fusion in FUSIONS.values():
            if fusion.submodule in rest.split("."):
                return fusion.param_group
    return first


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay pulls on a parameter: it does on matrices.

    Not on norms, biases, scales and gates (vectors all of them), nor on latents and the class and position
    embeddings: those are values, not weights of a product.
    """
    return parameter.dim() > 1 and not name.endswith(_TABLES)


def set_trainable(
    model: LynxForConditionalGeneration, trainable: Collection[str], frozen_dtype: torch.dtype = torch.float32
) -> dict[str, int]:
    """Let the parameters of some groups train, in fp32, and freeze all others, in ``frozen_dtype``.

    A frozen parameter needs no gradient and gets no optimizer state. A trainable one needs fp32: a step of 1e-5 leaves
    most bf16 weights as they were. What the vision tower never uses does not train: DDP would wait for its gradient.

    Args:
        model: a Lynx model.
        trainable: names in ``PARAM_GROUPS``.
        frozen_dtype: of the parameters that do not train.

    Returns:
        How many parameters each group that trains has.

    Raises:
        ValueError: the model has no parameters of a group.
    """
    counts = dict.fromkeys(trainable, 0)
    unused = tower.unused_parameters(model.config.vision_config) if "vision_tower" in counts else set()
    for name, parameter in model.named_parameters():
        group = group_of(name)
        trains = group in counts and name.removeprefix("vision_tower.") not in unused
        parameter.requires_grad_(trains)
        parameter.data = parameter.data.to(torch.float32 if trains else frozen_dtype)
        parameter.grad = None
        if trains:
            counts[group] += parameter.numel()
    if empty := [group for group, count in counts.items() if not count]:
        present = sorted({group_of(name) for name, _ in model.named_parameters()})
        raise ValueError(f"trainable: the model has no {' and no '.join(empty)}; it has {', '.join(present)}")
    return counts


def optimizer_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The parameters that train, for AdamW: those that decay, then those that do not."""
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    return [
        {"params": [parameter for name, parameter in trained if decays(name, parameter)], "weight_decay": weight_decay},
        {"params": [parameter for name, parameter in trained if not decays(name, parameter)], "weight_decay": 0.0},
    ]
