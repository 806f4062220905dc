"""What ``attn_implementation="lynx"`` says once about a model or a kind of layer, by the logger ``lynx_kernels``."""

import logging
from typing import Any

import torch

logger = logging.getLogger("lynx_kernels")
_said: set[tuple[str, str]] = set()  # (kind of layer, message) that were logged


@torch.compiler.assume_constant_result
def say(level: int, layer: str, what: str) -> None:
    """Log a message once for each kind of layer; from compiled code, while it is compiled."""
    if (layer, what) not in _said:
        _said.add((layer, what))
        logger.log(level, "%s: %s", layer, what)


def model_name(config: Any) -> str:
    return getattr(config, "model_type", None) or "this model"
