"""The arguments of prefix_attention's operators and implementations.

T tokens, H query heads, Hkv key heads, head dimension D.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lynx_kernels.ops.attention_common.table import Table


class PrefixAttentionCall(NamedTuple):
    """The forward call."""

    q: Tensor  # (T, H, D)
    k: Tensor  # (T, Hkv, D)
    v: Tensor  # (T, Hkv, D)
    segments: Tensor  # PackedLayout.segments
    root_is_causal: bool
    scale: float

    @property
    def floats(self) -> tuple[Tensor, ...]:
        """The differentiable tensors, queries first."""
        return self[:3]

    @property
    def device(self) -> torch.device:
        """The device it runs on."""
        return self.q.device

    @property
    def table(self) -> Table:
        """The table that says which keys each query sees."""
        return Table(self.segments, self.root_is_causal)


class PrefixAttentionBackwardCall(NamedTuple):
    """The backward call: the gradients of the results, the results, then the inputs."""

    grad: Tensor | None  # (T, H, D)
    grad_lse: Tensor | None  # (T, H)
    out: Tensor
    lse: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    segments: Tensor
    root_is_causal: bool
    scale: float

    @property
    def table(self) -> Table:
        """The table that says which keys each query sees."""
        return Table(self.segments, self.root_is_causal)
