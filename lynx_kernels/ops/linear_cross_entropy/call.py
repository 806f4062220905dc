"""The arguments of linear_cross_entropy and of its two operators.

T rows, width d, vocabulary V.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class LossCall(NamedTuple):
    """The call of the operation. It chooses the implementation."""

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
        """The device it runs on."""
        return self.hidden.device


class LossesCall(NamedTuple):
    """The operator that returns the loss of each row."""

    hidden: Tensor
    weight: Tensor
    shift_labels: Tensor
    label_smoothing: float
    ignore_index: int


class LossesBackwardCall(NamedTuple):
    """The backward of LossesCall."""

    grad: Tensor  # (T,)
    hidden: Tensor
    weight: Tensor
    shift_labels: Tensor
    label_smoothing: float
    ignore_index: int
    needs: list[bool]  # which of hidden and weight need a gradient


class LossSumCall(NamedTuple):
    """The operator that returns the sum of the losses together with its gradients."""

    hidden: Tensor
    weight: Tensor
    shift_labels: Tensor
    label_smoothing: float
    ignore_index: int
    max_supervised: int  # upper bound of the number of supervised rows
    needs: list[bool]  # which of hidden and weight need a gradient
