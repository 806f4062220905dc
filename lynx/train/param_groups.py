"""The parts of a model that a stage may train, and what is done to the parameters of each."""

from collections.abc import Collection

import torch
from torch import nn

from lynx.fusion import FUSIONS

PARTS = {
    "resampler": "the resampler, or the projection in its place: what makes vision tokens of frames",
    "frame_positions": "the learned positions of a video's frames",
    **{fusion.param_group: fusion.param_group_help for fusion in FUSIONS.values()},
    "vision_tower": "the vision tower",
    "language_model": "the decoder itself, embeddings and output head included",
}
# Learned tables that are no weights of a product: pulling them to 0 has no reason.
_TABLES = ("latents", "frame_position", "class_embedding", "position_embedding")


def part_of(name: str) -> str:
    """The part, of ``PARTS``, that the parameter of this name belongs to."""
    first, _, rest = name.partition(".")
    if first in ("resampler", "projection"):
        return "frame_positions" if rest == "frame_position" else "resampler"
    if first == "language_model":
        for fusion in FUSIONS.values():
            if fusion.submodule in rest.split("."):
                return fusion.param_group
    return first


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay pulls on a parameter: on matrices it does.

    Not on norms, biases, scales and gates (vectors all of them), nor on latents and the class and position
    embeddings: those are values, not weights of a product.
    """
    return parameter.dim() > 1 and not name.endswith(_TABLES)


def choose(model: nn.Module, trains: Collection[str], frozen_dtype: torch.dtype = torch.float32) -> dict[str, int]:
    """Let the parameters of some parts train, in fp32, and freeze all others, in ``frozen_dtype``.

    A frozen parameter needs no gradient and gets no optimizer state. It could not do with less precision if it trained:
    a step of 1e-5 leaves most bf16 weights as they were.

    Returns:
        How many parameters each part that trains has.

    Raises:
        ValueError: a part is not in this model.
    """
    counts = dict.fromkeys(trains, 0)
    for name, parameter in model.named_parameters():
        part = part_of(name)
        is_trained = part in counts
        parameter.requires_grad_(is_trained)
        parameter.data = parameter.data.to(torch.float32 if is_trained else frozen_dtype)
        parameter.grad = None
        if is_trained:
            counts[part] += parameter.numel()
    if empty := [part for part, count in counts.items() if not count]:
        present = sorted({part_of(name) for name, _ in model.named_parameters()})
        raise ValueError(f"the model has no {' and no '.join(empty)} to train; it has {', '.join(present)}")
    return counts


def optimizer_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """The parameters that train, for AdamW: those that decay, then those that do not."""
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    return [
        {"params": [parameter for name, parameter in trained if decays(name, parameter)], "weight_decay": weight_decay},
        {"params": [parameter for name, parameter in trained if not decays(name, parameter)], "weight_decay": 0.0},
    ]
