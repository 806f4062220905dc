"""What ``attn_implementation="lynx"`` says of models and layers: by the logger ``lynx_kernels``, and to reports."""

import logging
import weakref
from typing import Any

import torch

logger = logging.getLogger("lynx_kernels")
_said: set[tuple[str, str]] = set()  # (kind of layer, message) that were logged
ran: "weakref.WeakKeyDictionary[Any, tuple[str, str]]" = weakref.WeakKeyDictionary()  # layer -> what ran there last


def note(layer: Any, runs: str, what: str) -> None:
    """Remember what ran in a layer, for the report of a patch. Compiled code does not."""
    if not torch.compiler.is_compiling() and isinstance(layer, torch.nn.Module):
        ran[layer] = (runs, what)


@torch.compiler.assume_constant_result
def say(level: int, layer: str, what: str) -> None:
    """Log a message once for each kind of layer; from compiled code, while it is compiled."""
    if (layer, what) not in _said:
        _said.add((layer, what))
        logger.log(level, "%s: %s", layer, what)


def model_name(config: Any) -> str:
    return getattr(config, "model_type", None) or "this model"
