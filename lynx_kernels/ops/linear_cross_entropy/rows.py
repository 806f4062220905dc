"""The rows and the dtype that a loss is computed with, for all implementations."""

from collections.abc import Sequence

import torch
from torch import Tensor


def compute_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype of the factors of every product."""
    return torch.promote_types(hidden.dtype, weight.dtype)


def host_may_read(tensor: Tensor) -> bool:
    """Whether the host may read values: reading from a GPU would synchronise it."""
    return tensor.is_cpu


def check_labels(labels: Tensor, vocabulary: int, ignore_index: int) -> None:
    """Raise IndexError for labels (T,) that are out of range. On a GPU this is a device-side assertion."""
    wrong = (labels != ignore_index) & ((labels < 0) | (labels >= vocabulary))
    expected = f"neither in [0, {vocabulary}) nor ignore_index={ignore_index}"
    if not host_may_read(labels):
        torch._assert_async(~wrong.any(), f"linear_cross_entropy: shift_labels has a value {expected}")
    elif wrong.any():
        row = int(wrong.nonzero()[0])
        raise IndexError(f"linear_cross_entropy: shift_labels[{row}] is {int(labels[row])}, which is {expected}")


def chunks(labels: Tensor, ignore_index: int, size: int, max_supervised: int | None = None) -> Sequence[Tensor | slice]:
    """The rows to compute, ``size`` at a time: only the supervised ones if the host may count them, otherwise all.

    With ``max_supervised`` a GPU does not compute all rows. It sorts the supervised rows to the front, and the host
    drops the rows beyond the bound without reading them.
    """
    num_rows = labels.shape[0]
    limit = num_rows if max_supervised is None else max_supervised
    supervised = labels != ignore_index
    if host_may_read(labels):
        rows = supervised.nonzero()[:, 0]
        if rows.shape[0] > limit:
            raise ValueError(
                f"linear_cross_entropy: {rows.shape[0]} rows are supervised, more than max_supervised={limit}; pass a "
                "larger bound, or None"
            )
    elif limit < num_rows:
        torch._assert_async(
            supervised.sum() <= limit,
            f"linear_cross_entropy: more rows are supervised than max_supervised={limit}",
        )
        rows = (~supervised).to(torch.uint8).sort(stable=True).indices[:limit]
    else:
        return [slice(start, start + size) for start in range(0, num_rows, size)]
    return [chunk for chunk in rows.split(size) if chunk.shape[0]]
