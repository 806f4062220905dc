"""The arguments of linear_cross_entropy's operators and implementations.

T rows, width d, vocabulary V, N entries.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lynx_kernels.ops.head_common.head import HeadCall


class LinearCrossEntropyCall(NamedTuple):
    """The forward call."""

    hidden: Tensor  # (T, d)
    weight: Tensor  # (V, d)
    labels: Tensor  # (N,) int64
    predictors: Tensor | None  # (N,) int64 or int32
    weights: Tensor | None  # (N,), 0 where the entry is not counted
    bias: Tensor | None  # (V,)
    softcap: float | None
    logit_scale: float
    label_smoothing: float
    ignore_index: int
    max_supervised: int | None
    sums: bool  # return the sum of the losses, and compute its gradients now
    needs: list[bool]  # which of hidden, weight and bias need a gradient of the sum

    @property
    def device(self) -> torch.device:
        """The device it runs on."""
        return self.hidden.device


class LinearCrossEntropyBackwardCall(NamedTuple):
    """The backward of a call that does not sum."""

    grad: Tensor  # (N,)
    hidden: Tensor
    weight: Tensor
    labels: Tensor
    predictors: Tensor | None
    weights: Tensor | None
    bias: Tensor | None
    softcap: float | None
    logit_scale: float
    label_smoothing: float
    ignore_index: int
    max_supervised: int | None
    needs: list[bool]  # which of hidden, weight and bias need a gradient

    @property
    def factors(self) -> Tensor:
        """(N,): the gradient of each loss before it is weighted."""
        return self.grad if self.weights is None else self.grad * self.weights


def head_call(call: LinearCrossEntropyCall | LinearCrossEntropyBackwardCall) -> HeadCall:
    """The same call, of losses without weights."""
    return HeadCall(
        "linear_cross_entropy", call.hidden, call.weight, call.labels, call.predictors, call.bias, call.softcap,
        call.logit_scale, label_smoothing=call.label_smoothing, ignore_index=call.ignore_index,
        max_supervised=call.max_supervised,
    )  # fmt: skip


def weighted(losses: Tensor, weights: Tensor | None) -> Tensor:
    """losses (N,) times their weights."""
    return losses if weights is None else losses * weights.to(losses.dtype)
