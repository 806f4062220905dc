"""Calls of linear_cross_entropy: the operation's own, and those of its two operators.

T rows, width d, vocabulary V.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class LossCall(NamedTuple):
    """What is asked for: by this an implementation is chosen."""

    hidden: Tensor  # (T, d)
    weight: Tensor  # (V, d)
    shift_labels: Tensor  # (T,) int64
    label_smoothing: float = 0.0
    ignore_index: int = -100
    reduction: str = "mean"
    num_items: int | Tensor | None = None
    max_supervised: int | None = None

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self.hidden.device


class LossesCall(NamedTuple):
    """The operator that gives each row's loss."""

    hidden: Tensor
    weight: Tensor
    shift_labels: Tensor
    label_smoothing: float
    ignore_index: int


class LossesBackwardCall(NamedTuple):
    """Its backward."""

    grad: Tensor  # (T,)
    hidden: Tensor
    weight: Tensor
    shift_labels: Tensor
    label_smoothing: float
    ignore_index: int
    needs: list[bool]  # which of hidden and weight want a gradient


class LossSumCall(NamedTuple):
    """The operator that gives the sum of the losses, and its gradients with it."""

    hidden: Tensor
    weight: Tensor
    shift_labels: Tensor
    label_smoothing: float
    ignore_index: int
    max_supervised: int  # at least the number of supervised rows
    needs: list[bool]  # which of hidden and weight want a gradient
