"""Which entries count, and the chunks of rows that predict them, for all implementations."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lynx_kernels.ops.head_common.head import HeadCall


class Chunk(NamedTuple):
    """Some rows, and the entries that they predict.

    Attributes:
        rows: (n,) rows of hidden.
        is_counted: (n,) bool: whether the row predicts a counted entry. Other rows may hold anything.
        entries: (m,) the entries. Entries that are not counted may be among them.
        at: (m,) ascending, which of the n rows predicts each entry; others than 0 to n - 1 belong to other chunks.
            None: m = n, and row i predicts entry i.
    """

    rows: Tensor
    is_counted: Tensor
    entries: Tensor
    at: Tensor | None


def host_may_read(tensor: Tensor) -> bool:
    """Whether the host may read values: reading from a GPU would synchronise it."""
    return tensor.is_cpu


def counted_labels(call: HeadCall) -> Tensor:
    """Labels (N,) int64, -1 where the entry is not counted: no row predicts it, or its label is ``ignore_index``.

    Raises:
        IndexError: a label or a predictor is out of range. On a GPU this is a device-side assertion.
    """
    labels, predictors, ignore_index = call.labels, call.predictors, call.ignore_index
    vocabulary, num_rows = call.weight.shape[0], call.hidden.shape[0]
    is_counted = labels != ignore_index
    wrong = is_counted & ((labels < 0) | (labels >= vocabulary))
    _refuse(call, "labels", wrong, f"neither in [0, {vocabulary}) nor ignore_index={ignore_index}")
    if predictors is not None:
        wrong = (predictors < -1) | (predictors >= num_rows)
        _refuse(call, "predictors", wrong, f"neither a row of hidden, in [0, {num_rows}), nor -1")
        is_counted &= predictors >= 0
    return torch.where(is_counted, labels, -1)


def _refuse(call: HeadCall, name: str, wrong: Tensor, expected: str) -> None:
    if not host_may_read(wrong):
        torch._assert_async(~wrong.any(), f"{call.operation}: {name} has a value {expected}")
    elif wrong.any():
        entry = int(wrong.nonzero()[0])
        value = int(getattr(call, name)[entry])
        raise IndexError(f"{call.operation}: {name}[{entry}] is {value}, which is {expected}")


def chunks(call: HeadCall, labels: Tensor, size: int, *, by_entry: bool = False) -> Iterator[Chunk]:
    """All counted entries, ``size`` rows at a time.

    A row is in one chunk, with all its entries. ``by_entry=True`` repeats a row for each of its entries instead.

    If the host may count the counted entries, there are no others. On a GPU it may not: it drops those beyond
    ``max_supervised``, after sorting the counted ones to the front.

    Args:
        labels: from ``counted_labels``.

    Raises:
        ValueError: more entries are counted than ``max_supervised``. On a GPU this is a device-side assertion.
    """
    num_rows = call.hidden.shape[0]
    if num_rows == 0 or call.weight.shape[0] == 0:
        return
    entries, predictors = _entries(call, labels), call.predictors
    if predictors is not None and not by_entry:
        yield from _row_chunks(call, labels, entries, predictors, size)
        return
    rows = entries if predictors is None else predictors[entries].long().clamp(min=0)
    for some, theirs in zip(entries.split(size), rows.split(size), strict=True):
        if len(some):
            yield Chunk(theirs, labels[some] >= 0, some, None)


def _entries(call: HeadCall, labels: Tensor) -> Tensor:
    """The entries to compute, in order."""
    is_counted = labels >= 0
    num_entries, limit = labels.shape[0], call.max_supervised
    if host_may_read(labels):
        entries = is_counted.nonzero()[:, 0]
        if limit is not None and len(entries) > limit:
            raise ValueError(
                f"{call.operation}: {len(entries)} entries are supervised, more than max_supervised={limit}; pass a "
                "larger bound, or None"
            )
        return entries
    if limit is None or limit >= num_entries:
        return torch.arange(num_entries, device=labels.device)
    torch._assert_async(
        is_counted.sum() <= limit, f"{call.operation}: more entries are supervised than max_supervised={limit}"
    )
    return (~is_counted).to(torch.uint8).sort(stable=True).indices[:limit]


def _row_chunks(call: HeadCall, labels: Tensor, entries: Tensor, predictors: Tensor, size: int) -> Iterator[Chunk]:
    num_rows = call.hidden.shape[0]
    row = torch.where(labels[entries] >= 0, predictors[entries].long(), num_rows)  # (m,)
    row, order = row.sort(stable=True)  # entries that are not counted come last
    entries = entries[order]
    is_first = F.pad(row[1:] != row[:-1], (1, 0), value=True)[: len(row)]
    at = torch.where(row < num_rows, is_first.cumsum(0) - 1, num_rows)  # (m,)
    may_read = host_may_read(labels)
    predicts = torch.zeros(num_rows + 1, dtype=torch.bool, device=row.device).index_fill_(0, row, True)[:-1]
    if may_read:
        rows = predicts.nonzero()[:, 0]
    else:
        rows = (~predicts).to(torch.uint8).sort(stable=True).indices[: len(entries)]
    for start in range(0, len(rows), size):
        some = rows[start : start + size]
        mine = slice(None)
        if may_read:
            mine = slice(*torch.searchsorted(at, torch.tensor([start, start + size])).tolist())
        yield Chunk(some, predicts[some], entries[mine], at[mine] - start)


def add_at(total: Tensor, index: Tensor, values: Tensor) -> Tensor:
    """``total[index[i]] += values[i]`` for i = 0, 1, ... in a fixed order, so that repeated places are reproducible."""
    if total.is_cuda:
        return total.index_put_((index,), values, accumulate=True)  # sorts; index_add_ uses atomics there
    return total.index_add_(0, index, values)
