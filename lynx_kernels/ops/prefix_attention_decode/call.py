"""The arguments of prefix_attention_decode's operators and implementations.

B branches of Q queries and P ranges, K shared keys and room for Lb keys per branch, heads H and Hkv, head dimension D
of queries and keys, Dv of values.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class DecodeCall(NamedTuple):
    """The forward call."""

    q: Tensor  # (B, Q, H, D)
    shared_k: Tensor  # (K, Hkv, D)
    shared_v: Tensor  # (K, Hkv, Dv)
    branch_k: Tensor  # (B, Lb, Hkv, D)
    branch_v: Tensor  # (B, Lb, Hkv, Dv)
    sinks: Tensor | None  # (H,)
    ranges: Tensor  # (B, P, 2) int32 or int64
    branch_lengths: Tensor  # (B,) int32 or int64
    window: int | None
    chunk: int | None
    scale: float
    softcap: float | None

    @property
    def floats(self) -> tuple[Tensor, ...]:
        """Queries, keys and values: the tensors that decide dtype and device."""
        return self[:5]

    @property
    def caches(self) -> dict[str, Tensor]:
        """Keys and values, by name."""
        return dict(zip(self._fields[1:5], self[1:5], strict=True))

    @property
    def indices(self) -> dict[str, Tensor]:
        """The index tensors, which say what parts of the caches are used, by name."""
        return dict(zip(self._fields[6:8], self[6:8], strict=True))

    @property
    def device(self) -> torch.device:
        """The device it runs on."""
        return self.q.device


class DecodeBackwardCall(NamedTuple):
    """The backward call: the gradients of the results, the results, then the inputs."""

    grad: Tensor | None  # (B, Q, H, Dv)
    grad_lse: Tensor | None  # (B, Q, H)
    out: Tensor
    lse: Tensor
    q: Tensor
    shared_k: Tensor
    shared_v: Tensor
    branch_k: Tensor
    branch_v: Tensor
    sinks: Tensor | None
    ranges: Tensor
    branch_lengths: Tensor
    window: int | None
    chunk: int | None
    scale: float
    softcap: float | None
