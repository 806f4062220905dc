"""The definition of a score, in plain PyTorch: one row of logits for each entry, recomputed in backward.

    loss[i] = cross_entropy(logits[i], labels[i]) and entropy[i] = entropy(softmax(logits[i]))
    where logits[i] = softcap * tanh(logit_scale * (hidden[predictors[i]] W^T + bias) / softcap) / temperature

where an entry is counted, else 0. Logits exist for one chunk of entries at a time, in fp32 (fp64 for fp64 inputs).
Shapes: T rows, N entries, width d, vocabulary V, n entries in a chunk.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from lynx_kernels.ops.head_common.entries import Chunk, add_at, chunks, counted_labels
from lynx_kernels.ops.head_common.head import HeadCall, logits_of, product, times_slope_

CHUNK = 1024  # entries; 131 MB of logits with 32000 tokens


def forward(call: HeadCall) -> tuple[Tensor, Tensor]:
    """Return the loss and the entropy of each entry, (N,) and (N,)."""
    labels = counted_labels(call)
    losses, entropies = call.hidden.new_zeros((2, *labels.shape), dtype=call.acc_dtype)
    for chunk, _, logits in _logits(call, labels):
        losses[chunk.entries] = F.cross_entropy(
            logits, labels[chunk.entries], ignore_index=-1, label_smoothing=call.label_smoothing, reduction="none"
        )
        entropy = torch.special.entr(logits.softmax(-1)).sum(-1)  # (n,)
        entropies[chunk.entries] = torch.where(chunk.is_counted, entropy, 0)
    return losses, entropies


def backward(call: HeadCall, grad: Tensor, needs: list[bool]) -> list[Tensor]:
    """The gradients of hidden, weight and bias listed in ``needs``, for losses with the gradient ``grad`` (N,)."""
    hidden, weight, bias, labels = call.hidden, call.weight, call.bias, counted_labels(call)
    needs_hidden, needs_weight, needs_bias = needs
    compute, acc = call.compute_dtype, call.acc_dtype
    grad_hidden = hidden.new_zeros(hidden.shape if needs_hidden else 0, dtype=acc)
    grad_weight = weight.new_zeros(weight.shape if needs_weight else 0, dtype=acc)
    grad_bias = weight.new_zeros(weight.shape[0] if needs_bias else 0, dtype=acc)
    for chunk, x, logits in _logits(call, labels):
        label = labels[chunk.entries].clamp(min=0)[:, None]  # (n, 1)
        factor = torch.where(chunk.is_counted, grad[chunk.entries], 0).to(acc) * call.factor  # (n,)
        grad_logits = logits.softmax(-1).sub_(call.label_smoothing / weight.shape[0])  # (n, V)
        grad_logits.scatter_add_(1, label, torch.full_like(grad_logits[:, :1], call.label_smoothing - 1))
        grad_logits = times_slope_(grad_logits.mul_(factor[:, None]), call, logits)
        if needs_bias:
            grad_bias += grad_logits.sum(0)
        grad_logits = grad_logits.to(compute)
        if needs_hidden:
            add_at(grad_hidden, chunk.rows, product(grad_logits, weight.to(compute)))
        if needs_weight:
            grad_weight += product(grad_logits.t(), x)
    gradients = [grad_hidden.to(hidden.dtype), grad_weight.to(weight.dtype)]
    gradients.append(grad_bias if bias is None else grad_bias.to(bias.dtype))
    return [gradient for gradient, needed in zip(gradients, needs, strict=True) if needed]


def _logits(call: HeadCall, labels: Tensor) -> Iterator[tuple[Chunk, Tensor, Tensor]]:
    """Chunk by chunk, the rows (n, d) and their logits (n, V). What is not counted may be NaN; its row is then 0."""
    weight = call.weight.to(call.compute_dtype)
    for chunk in chunks(call, labels, CHUNK, by_entry=True):
        x = torch.where(chunk.is_counted[:, None], call.hidden[chunk.rows], 0).to(call.compute_dtype)
        yield chunk, x, logits_of(call, product(x, weight.t()))
