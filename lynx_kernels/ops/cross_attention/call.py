"""The arguments of cross_attention's operators and implementations.

Q queries, K keys, H query heads, Hkv key heads, head dimension D.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class CrossAttentionCall(NamedTuple):
    """The forward call."""

    q: Tensor  # (Q, H, D)
    k: Tensor  # (K, Hkv, D)
    v: Tensor  # (K, Hkv, D)
    segments: Tensor  # SpanLayout.segments
    tile_offsets: Tensor  # SpanLayout's inverse table, which GPUs use for the gradients of keys
    tile_segments: Tensor
    scale: float

    @property
    def floats(self) -> tuple[Tensor, ...]:
        """The differentiable tensors, queries first."""
        return self[:3]

    @property
    def device(self) -> torch.device:
        """The device it runs on."""
        return self.q.device


class CrossAttentionBackwardCall(NamedTuple):
    """The backward call: the gradients of the results, the results, then the inputs."""

    grad: Tensor | None  # (Q, H, D)
    grad_lse: Tensor | None  # (Q, H)
    out: Tensor
    lse: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    segments: Tensor
    tile_offsets: Tensor
    tile_segments: Tensor
    scale: float
