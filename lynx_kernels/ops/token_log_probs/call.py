"""The arguments of token_log_probs's operators and implementations.

T rows, width d, vocabulary V, N entries.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lynx_kernels.ops.head_common.head import HeadCall

IGNORED = -100  # the label of an entry that is not counted


class TokenLogProbsCall(NamedTuple):
    """The forward call."""

    hidden: Tensor  # (T, d)
    weight: Tensor  # (V, d)
    labels: Tensor  # (N,) int64
    predictors: Tensor | None  # (N,) int64 or int32
    bias: Tensor | None  # (V,)
    softcap: float | None
    logit_scale: float
    temperature: float
    with_entropy: bool
    with_jacobian: bool  # whether to compute d log_prob / d hidden now

    @property
    def device(self) -> torch.device:
        """The device it runs on."""
        return self.hidden.device


class TokenLogProbsBackwardCall(NamedTuple):
    """The backward of a call without the Jacobian."""

    grad: Tensor  # (N,)
    hidden: Tensor
    weight: Tensor
    labels: Tensor
    predictors: Tensor | None
    bias: Tensor | None
    softcap: float | None
    logit_scale: float
    temperature: float
    needs: list[bool]  # which of hidden, weight and bias need a gradient


class TokenLogProbsJacobianCall(NamedTuple):
    """The backward of a call with the Jacobian."""

    grad: Tensor  # (N,)
    jacobian: Tensor  # (N, d), d log_prob / d hidden, 0 where an entry is not counted
    labels: Tensor
    predictors: Tensor | None
    num_rows: int  # T


def head_call(call: TokenLogProbsCall | TokenLogProbsBackwardCall) -> HeadCall:
    """The same call, of losses instead of log-probabilities."""
    return HeadCall(
        "token_log_probs", call.hidden, call.weight, call.labels, call.predictors, call.bias, call.softcap,
        call.logit_scale, call.temperature, ignore_index=IGNORED,
    )  # fmt: skip
