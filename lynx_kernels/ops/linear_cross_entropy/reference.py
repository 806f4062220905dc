"""The reference of linear_cross_entropy, in plain PyTorch.

    loss[t] = cross_entropy(hidden[t] W^T, label[t]) where label[t] is not ignore_index, else 0

Logits exist for one chunk of rows at a time, in fp32 (fp64 for fp64 inputs). Backward recomputes them, so nothing is
saved. Shapes: T rows, width d, vocabulary V, n rows in a chunk.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from lynx_kernels.backends.dtypes import acc_dtype
from lynx_kernels.ops.linear_cross_entropy import rows as supervised_rows
from lynx_kernels.ops.linear_cross_entropy.call import LossesBackwardCall, LossesCall

CHUNK = 1024  # rows; 131 MB of logits with 32000 tokens


def forward(call: LossesCall) -> Tensor:
    """Return the loss of each row (T,)."""
    hidden, weight, labels, label_smoothing, ignore_index = call
    supervised_rows.check_labels(labels, weight.shape[0], ignore_index)
    compute = supervised_rows.compute_dtype(hidden, weight)
    weight = weight.to(compute)
    losses = hidden.new_zeros(labels.shape, dtype=acc_dtype(compute))
    for rows in supervised_rows.chunks(labels, ignore_index, CHUNK):
        logits = _product(hidden[rows].to(compute), weight.t())  # (n, V)
        losses[rows] = F.cross_entropy(
            logits, labels[rows], ignore_index=ignore_index, label_smoothing=label_smoothing, reduction="none"
        )
    return losses


def backward(call: LossesBackwardCall) -> list[Tensor]:
    """Return the gradients of hidden and weight listed in ``needs``. The others are not computed."""
    grad, hidden, weight, labels, label_smoothing, ignore_index, needs = call
    needs_hidden, needs_weight = needs
    compute = supervised_rows.compute_dtype(hidden, weight)
    weight_compute = weight.to(compute)
    grad_hidden = torch.zeros_like(hidden, memory_format=torch.contiguous_format)
    grad_weight = weight.new_zeros(weight.shape if needs_weight else 0, dtype=acc_dtype(compute))
    for rows in supervised_rows.chunks(labels, ignore_index, CHUNK):
        label = labels[rows][:, None]  # (n, 1)
        supervised = label != ignore_index
        x = torch.where(supervised, hidden[rows], 0).to(compute)  # (n, d); 0 * NaN would make the weight's gradient NaN
        grad_logits = _product(x, weight_compute.t()).softmax(-1).sub_(label_smoothing / weight.shape[0])  # (n, V)
        grad_logits.scatter_add_(
            1, torch.where(supervised, label, 0), torch.full_like(grad_logits[:, :1], label_smoothing - 1)
        )
        grad_logits = grad_logits.mul_(torch.where(supervised, grad[rows][:, None], 0)).to(compute)
        if needs_hidden:
            grad_hidden[rows] = _product(grad_logits, weight_compute).to(hidden.dtype)
        if needs_weight:
            grad_weight += _product(grad_logits.t(), x)
    gradients = (grad_hidden, grad_weight.to(weight.dtype))
    return [gradient for gradient, needed in zip(gradients, needs, strict=True) if needed]


def _product(left: Tensor, right: Tensor) -> Tensor:
    # left @ right with the result in at least fp32. Both factors have one dtype, which may be narrower.
    if left.is_cuda and left.dtype.itemsize == 2:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.to(acc_dtype(left.dtype)) @ right.to(acc_dtype(right.dtype))
