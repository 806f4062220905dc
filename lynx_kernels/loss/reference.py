"""The definition of linear_cross_entropy, in plain PyTorch.

    loss[t] = cross_entropy(hidden[t] W^T, label[t]) where label[t] is not ignore_index, else 0

Logits exist for a chunk of rows at a time, in fp32 (fp64 for fp64 inputs), and are computed again for backward, so
nothing is saved. Shapes: T rows, width d, vocabulary V, n rows in a chunk.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from lynx_kernels.dtypes import wide

CHUNK = 1024  # rows; 131 MB of logits with 32000 tokens


def forward(
    hidden: Tensor,  # (T, d)
    weight: Tensor,  # (V, d)
    labels: Tensor,  # (T,)
    label_smoothing: float,
    ignore_index: int,
) -> Tensor:
    """Return the loss of each row (T,)."""
    _check_labels(labels, weight.shape[0], ignore_index)
    compute = compute_dtype(hidden, weight)
    weight = weight.to(compute)
    losses = hidden.new_zeros(labels.shape, dtype=wide(compute))
    for rows in _chunks(labels, ignore_index):
        logits = _product(hidden[rows].to(compute), weight.t())  # (n, V)
        losses[rows] = F.cross_entropy(
            logits, labels[rows], ignore_index=ignore_index, label_smoothing=label_smoothing, reduction="none"
        )
    return losses


def backward(
    grad: Tensor,  # (T,)
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    label_smoothing: float,
    ignore_index: int,
    needs: list[bool],  # which of hidden and weight want a gradient
) -> list[Tensor]:
    """Return the gradients of hidden and weight that ``needs`` asks for; the rest is not computed."""
    needs_hidden, needs_weight = needs
    compute = compute_dtype(hidden, weight)
    weight_compute = weight.to(compute)
    grad_hidden = torch.zeros_like(hidden, memory_format=torch.contiguous_format)
    grad_weight = weight.new_zeros(weight.shape if needs_weight else 0, dtype=wide(compute))
    for rows in _chunks(labels, ignore_index):
        label = labels[rows][:, None]  # (n, 1)
        supervised = label != ignore_index
        x = torch.where(supervised, hidden[rows], 0).to(compute)  # (n, d); 0 * nan would spoil the weight's gradient
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


def compute_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype of the factors of every product."""
    return torch.promote_types(hidden.dtype, weight.dtype)


def _host_may_read(tensor: Tensor) -> bool:
    return tensor.is_cpu  # reading a value from a device would stall it


def _check_labels(labels: Tensor, vocabulary: int, ignore_index: int) -> None:
    wrong = (labels != ignore_index) & ((labels < 0) | (labels >= vocabulary))
    expected = f"neither in [0, {vocabulary}) nor ignore_index={ignore_index}"
    if not _host_may_read(labels):
        torch._assert_async(~wrong.any(), f"linear_cross_entropy: shift_labels has a value {expected}")
    elif wrong.any():
        row = int(wrong.nonzero()[0])
        raise IndexError(f"linear_cross_entropy: shift_labels[{row}] is {int(labels[row])}, {expected}")


def _chunks(labels: Tensor, ignore_index: int) -> Sequence[Tensor | slice]:
    # The rows to work on: the supervised ones where the host may count them, elsewhere all.
    if _host_may_read(labels):
        return (labels != ignore_index).nonzero()[:, 0].split(CHUNK)
    return [slice(start, start + CHUNK) for start in range(0, labels.shape[0], CHUNK)]


def _product(left: Tensor, right: Tensor) -> Tensor:
    # left @ right in at least fp32, though the factors, of one dtype, may be narrower.
    if left.is_cuda and left.dtype.itemsize == 2:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.to(wide(left.dtype)) @ right.to(wide(right.dtype))
