"""The arguments of prefix_attention's operators and implementations.

T tokens, H query heads, Hkv key heads, head dimension D of queries and keys, Dv of values.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class PrefixAttentionCall(NamedTuple):
    """The forward call."""

    q: Tensor  # (T, H, D)
    k: Tensor  # (T, Hkv, D)
    v: Tensor  # (T, Hkv, Dv)
    sinks: Tensor | None  # (H,)
    runs: Tensor  # the three tables of PackedLayout
    tokens: Tensor
    key_runs: Tensor
    window: int | None
    chunk: int | None
    scale: float
    softcap: float | None

    @property
    def floats(self) -> tuple[Tensor, ...]:
        """Queries, keys and values: the tensors that decide dtype and device."""
        return self[:3]

    @property
    def device(self) -> torch.device:
        """The device it runs on."""
        return self.q.device


class PrefixAttentionBackwardCall(NamedTuple):
    """The backward call: the gradients of the results, the results, then the inputs."""

    grad: Tensor | None  # (T, H, Dv)
    grad_lse: Tensor | None  # (T, H)
    out: Tensor
    lse: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    sinks: Tensor | None
    runs: Tensor
    tokens: Tensor
    key_runs: Tensor
    window: int | None
    chunk: int | None
    scale: float
    softcap: float | None
