"""token_log_probs by chunks of rows, for "chunked" and "triton", which differ in ``score``.

What backward multiplies a log-probability's gradient by is known only then. With a frozen head, forward computes
d log_prob / d hidden from the logits that it already has, and backward scales its rows: two products, where computing
the logits again would take three. With a trained head this would be a matrix as large as the head for each entry, so
the logits are computed again.
"""

import torch
from torch import Tensor

from lynx_kernels.ops.head_common.chunked import CHUNK, Score, gradients, run
from lynx_kernels.ops.head_common.entries import add_at
from lynx_kernels.ops.token_log_probs.call import (
    IGNORED,
    TokenLogProbsBackwardCall,
    TokenLogProbsCall,
    TokenLogProbsJacobianCall,
    head_call,
)


def forward(score: Score, call: TokenLogProbsCall) -> tuple[Tensor, Tensor, Tensor]:
    """Return the log-probability (N,) of each entry; its entropy (N,) and its Jacobian (N, d) in the dtype of hidden,
    or (0,) where these are not wanted."""
    head = head_call(call)
    scores = run(
        head,
        score,
        needs=[call.with_jacobian, False, False],
        factors=call.hidden.new_full(call.labels.shape, -1, dtype=head.acc_dtype),  # a loss is minus a log-probability
        by_entry=call.with_jacobian,
        with_entropies=call.with_entropy,
    )
    return 0 - scores.losses, scores.entropies, scores.grad_hidden


def backward(score: Score, call: TokenLogProbsBackwardCall) -> list[Tensor]:
    """Return the gradients of hidden, weight and bias listed in ``needs``. The others are not computed."""
    return gradients(head_call(call), score, -call.grad, call.needs)


def backward_of_jacobian(call: TokenLogProbsJacobianCall) -> Tensor:
    """Return the gradient of hidden (T, d): the rows of the Jacobian, scaled and added in the order of the entries."""
    grad, jacobian, labels, predictors, num_rows = call
    is_counted = labels != IGNORED
    if predictors is not None:
        is_counted &= predictors >= 0
    grad = torch.where(is_counted, grad, 0)[:, None]
    if predictors is None:
        return (jacobian * grad).to(jacobian.dtype)
    total = grad.new_zeros((num_rows, jacobian.shape[1]))
    rows = predictors.long().clamp(min=0)
    for row, derivative, factor in zip(rows.split(CHUNK), jacobian.split(CHUNK), grad.split(CHUNK), strict=True):
        add_at(total, row, derivative * factor)
    return total.to(jacobian.dtype)
