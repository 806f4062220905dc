"""Gradient checkpointing and caches: a layer that is to run again in the backward pass keeps no keys and values."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedModel


def drops_caches(decoder: PreTrainedModel) -> bool:
    """Whether layers of the decoder would pass over a cache, as transformers' do in train mode, with a warning only."""
    return any(getattr(each, "gradient_checkpointing", False) and each.training for each in (decoder, *decoder.layers))


@contextmanager
def no_checkpointing(model: nn.Module) -> Iterator[None]:
    """Without gradient checkpointing, which generation, having no backward pass, does not need."""
    checkpointing: list[Any] = [each for each in model.modules() if getattr(each, "gradient_checkpointing", False)]
    for each in checkpointing:
        each.gradient_checkpointing = False
    try:
        yield
    finally:
        for each in checkpointing:
            each.gradient_checkpointing = True
