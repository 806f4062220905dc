"""The decoder's vocabulary projection: logits, and the loss without a (T, V) matrix of them."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lynx.data.conversation import IGNORED
from lynx_kernels import children, linear_cross_entropy
from lynx_kernels.backends import onednn
from lynx_kernels.backends.dtypes import acc_dtype
from lynx_kernels.layout import require


def changed_reason(head: nn.Module, device: torch.device | None) -> str | None:
    """Why the head must be called, or None where its weight and bias say what calling it does."""
    return children.changed_reason(head, nn.Linear, device)


def logits(head: nn.Module, hidden: Tensor) -> Tensor:
    """The logits (..., V) of rows (..., width)."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or changed_reason(head, hidden.device) is not None:
        return head(hidden)
    weight, bias = children.weight_and_bias(head)
    # The largest product of a new token.
    return onednn.linear(hidden, weight, bias) if onednn.is_quicker(hidden, weight) else head(hidden)


def loss(
    head: nn.Module,
    hidden: Tensor,
    labels: Tensor,
    *,
    logits: Tensor | None = None,
    predictors: Tensor | None = None,
    weights: Tensor | None = None,
    num_items: Tensor | int | None = None,
    max_supervised: int | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """The mean cross entropy of the labels.

    ``linear_cross_entropy`` takes weight and bias of a head that nobody changed. Another is called, once, with the rows
    that are supervised: all logits of these rows are then in memory. It is not called where the logits are known.

    Args:
        head: the projection.
        hidden: (T, width).
        labels: (N,) int64, -100 where not supervised.
        logits: (T, V), of all rows, where the head was called already.
        predictors: (N,) int64, the rows that predict the labels, -1 where none does; without them N is T, and row i
            predicts label i.
        weights: (N,), of the labels.
        num_items, max_supervised, label_smoothing: as ``linear_cross_entropy`` takes them.

    Raises:
        ValueError: more rows are supervised than max_supervised, or label_smoothing is not in [0, 1].
        IndexError: a label is out of range.
    """
    reason = changed_reason(head, hidden.device)
    if reason is None:
        weight, bias = children.weight_and_bias(head)
        return linear_cross_entropy(
            hidden, weight, labels, predictors=predictors, weights=weights, bias=bias, num_items=num_items,
            max_supervised=max_supervised, label_smoothing=label_smoothing,
        )  # fmt: skip
    children.log_once(head, {"the head": reason})
    labels = labels.to(hidden.device)
    if predictors is not None:
        labels = torch.where(predictors < 0, IGNORED, labels)
    entries = _supervised(labels, max_supervised)
    rows = entries if predictors is None else predictors[entries].clamp(min=0)
    labels = labels[entries]
    is_supervised = labels != IGNORED
    # A row that is not supervised may hold anything: 0 * nan would spoil the gradient of a weight.
    if logits is None:
        scores = head(torch.where(is_supervised[:, None], hidden[rows], 0)[None])[0]  # (n, V)
    else:
        scores = torch.where(is_supervised.to(logits.device)[:, None], logits[rows.to(logits.device)], 0)
    labels, is_supervised = labels.to(scores.device), is_supervised.to(scores.device)
    losses = F.cross_entropy(
        scores.to(acc_dtype(scores.dtype)),
        labels,
        ignore_index=IGNORED,
        reduction="none",
        label_smoothing=label_smoothing,
    )
    of_labels = is_supervised
    if weights is not None:
        of_labels = torch.where(is_supervised, weights[entries].to(losses), 0)
        losses = losses * of_labels
    total, count = losses.sum(), of_labels.sum() if num_items is None else num_items
    if isinstance(count, Tensor):
        return total / torch.where(count == 0, 1, count).to(total.device)
    return total / (count or 1)


def _supervised(labels: Tensor, max_supervised: int | None) -> Tensor:
    """The numbers of the supervised labels; of more, where they are on a device, which the host does not read."""
    is_supervised = labels != IGNORED
    if max_supervised is not None:
        message = f"more rows are supervised than max_supervised={max_supervised}"
        require(is_supervised.sum() <= max_supervised, message)
    if labels.is_cpu and not torch.compiler.is_compiling():
        return is_supervised.nonzero()[:, 0]
    at_most = len(labels) if max_supervised is None else max_supervised
    return (~is_supervised).to(torch.uint8).sort(stable=True).indices[:at_most]
