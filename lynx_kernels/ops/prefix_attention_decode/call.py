"""A call of prefix_attention_decode, as its operators and every implementation take it.

B branches of Q queries, R roots, room for Lr keys a root and Lb a branch, heads H and Hkv, head dimension D.
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
        """What is differentiable, queries first."""
        return self[:5]

    @property
    def caches(self) -> dict[str, Tensor]:
        """Keys and values, by name."""
        return dict(zip(self._fields[1:5], self[1:5], strict=True))

    @property
    def indices(self) -> dict[str, Tensor]:
        """What says which of them are read, by name."""
        return dict(zip(self._fields[5:8], self[5:8], strict=True))

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self.q.device


class DecodeBackwardCall(NamedTuple):
    """The backward call: gradients and values of the results, then what came in."""

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
