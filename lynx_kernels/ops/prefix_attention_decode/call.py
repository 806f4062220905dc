"""The arguments of prefix_attention_decode's operators and implementations.

B branches of Q queries, R roots, room for Lr keys per root and Lb per branch, heads H and Hkv, head dimension D.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class DecodeCall(NamedTuple):
    """The forward call."""

    q: Tensor  # (B, Q, H, D)
    root_k: Tensor  # (R, Lr, Hkv, D)
    root_v: Tensor
    branch_k: Tensor  # (B, Lb, Hkv, D)
    branch_v: Tensor
    branch_to_root: Tensor  # (B,) int32 or int64
    root_lengths: Tensor  # (R,) int32 or int64
    branch_lengths: Tensor  # (B,) int32 or int64
    scale: float

    @property
    def floats(self) -> tuple[Tensor, ...]:
        """The differentiable tensors, queries first."""
        return self[:5]

    @property
    def caches(self) -> dict[str, Tensor]:
        """Keys and values, by name."""
        return dict(zip(self._fields[1:5], self[1:5], strict=True))

    @property
    def indices(self) -> dict[str, Tensor]:
        """The index tensors, which say what parts of the caches are used, by name."""
        return dict(zip(self._fields[5:8], self[5:8], strict=True))

    @property
    def device(self) -> torch.device:
        """The device it runs on."""
        return self.q.device


class DecodeBackwardCall(NamedTuple):
    """The backward call: the gradients of the results, the results, then the inputs."""

    grad: Tensor | None  # (B, Q, H, D)
    grad_lse: Tensor | None  # (B, Q, H)
    out: Tensor
    lse: Tensor
    q: Tensor
    root_k: Tensor
    root_v: Tensor
    branch_k: Tensor
    branch_v: Tensor
    branch_to_root: Tensor
    root_lengths: Tensor
    branch_lengths: Tensor
    scale: float
