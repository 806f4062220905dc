"""Score one chunk in plain PyTorch. Shapes: n rows, m entries, vocabulary V."""

import torch
from torch import Tensor
from torch.nn import functional as F

from lynx_kernels.ops.head_common.chunked import Scoring
from lynx_kernels.ops.head_common.entries import Chunk, add_at
from lynx_kernels.ops.head_common.head import logits_of, times_slope_


def score(scoring: Scoring, products: Tensor, chunk: Chunk) -> Tensor | None:
    """Write losses and entropies of the chunk's entries. Return the gradient of the products (n, V) if wanted."""
    call, num_rows = scoring.call, products.shape[0]
    at = torch.arange(num_rows, device=products.device) if chunk.at is None else chunk.at
    label = scoring.labels[chunk.entries]
    is_mine = (label >= 0) & (at >= 0) & (at < num_rows)  # (m,)
    at, label = torch.where(is_mine, at, 0), torch.where(is_mine, label, 0)

    logits = logits_of(call, products)
    log_probs = F.log_softmax(logits, -1, dtype=call.acc_dtype)  # (n, V)
    del products
    if call.softcap is None:
        del logits  # this frees them: only the derivative of the soft cap needs them
    losses = (call.label_smoothing - 1) * log_probs[at, label]  # (m,)
    if call.label_smoothing:
        losses -= call.label_smoothing * log_probs.mean(-1)[at]
    scoring.losses.index_add_(0, chunk.entries, torch.where(is_mine, losses, 0))
    if scoring.entropies is not None:
        scoring.entropies.index_add_(0, chunk.entries, torch.where(is_mine, entropy_of(log_probs)[at], 0))
    if scoring.grad_dtype is None:
        return None

    ones = is_mine.to(log_probs.dtype)
    factor = ones if scoring.factors is None else torch.where(is_mine, scoring.factors[chunk.entries], 0)
    factor = factor * call.factor
    grad = log_probs.exp_()
    if call.label_smoothing:
        grad -= call.label_smoothing / grad.shape[1]
    grad *= factor[:, None] if chunk.at is None else add_at(grad.new_zeros(num_rows, 1), at, factor[:, None])
    add_at(grad.view(-1), at * grad.shape[1] + label, (call.label_smoothing - 1) * factor)
    if call.softcap is not None:
        times_slope_(grad, call, logits)
    return grad.to(scoring.grad_dtype)


def entropy_of(log_probs: Tensor) -> Tensor:
    """The entropy (n,) of each row of log-probabilities (n, V); one of -inf adds nothing."""
    probs = log_probs.exp()
    return -torch.where(probs > 0, probs * log_probs, 0).sum(-1)
