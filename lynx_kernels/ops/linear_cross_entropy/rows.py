"""Which rows a loss is computed at, and in which dtype: what every implementation needs."""

from collections.abc import Sequence

import torch
from torch import Tensor


def compute_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype of the factors of every product."""
    return torch.promote_types(hidden.dtype, weight.dtype)


def host_may_read(tensor: Tensor) -> bool:
    """Whether reading a value costs nothing: on a device it would stall it."""
    return tensor.is_cpu


def check_labels(labels: Tensor, vocabulary: int, ignore_index: int) -> None:
    """Refuse labels (T,) that are no token: with an IndexError, on a device with its own assertion."""
    wrong = (labels != ignore_index) & ((labels < 0) | (labels >= vocabulary))
    expected = f"neither in [0, {vocabulary}) nor ignore_index={ignore_index}"
    if not host_may_read(labels):
        torch._assert_async(~wrong.any(), f"linear_cross_entropy: shift_labels has a value {expected}")
    elif wrong.any():
        row = int(wrong.nonzero()[0])
        raise IndexError(f"linear_cross_entropy: shift_labels[{row}] is {int(labels[row])}, {expected}")


def chunks(labels: Tensor, ignore_index: int, size: int, max_supervised: int | None = None) -> Sequence[Tensor | slice]:
    """The rows to work on, ``size`` at a time: the supervised ones where the host may count them, elsewhere all.

    With ``max_supervised`` a device need not work on all: it sorts the supervised rows to the front, and the host cuts
    off the rest unread.
    """
    num_rows = labels.shape[0]
    at_most = num_rows if max_supervised is None else max_supervised
    supervised = labels != ignore_index
    if host_may_read(labels):
        rows = supervised.nonzero()[:, 0]
        if rows.shape[0] > at_most:
            raise ValueError(
                f"linear_cross_entropy: {rows.shape[0]} rows are supervised, more than max_supervised={at_most}"
            )
    elif at_most < num_rows:
        torch._assert_async(
            supervised.sum() <= at_most,
            f"linear_cross_entropy: more rows are supervised than max_supervised={at_most}",
        )
        rows = (~supervised).to(torch.uint8).sort(stable=True).indices[:at_most]
    else:
        return [slice(start, start + size) for start in range(0, num_rows, size)]
    return [chunk for chunk in rows.split(size) if chunk.shape[0]]
