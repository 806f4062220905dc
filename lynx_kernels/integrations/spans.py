"""The spans of keys that the queries of a cross-attention see, read from its dense mask once for all layers."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from lynx_kernels.layout import SpanLayout

_read: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # mask -> {(its version, shapes): what was read}


@dataclass(frozen=True)
class Spans:
    """What each query sees.

    Attributes:
        layout: of all rows, end to end.
        order: (B, K) int64, the order of each row's keys in which they are the layout's; None: as they are.
        has_blind: whether a query sees no key.
    """

    layout: SpanLayout
    order: Tensor | None
    has_blind: bool


def read_spans(
    mask: Tensor | None,
    rows: int,
    queries: int,
    key_rows: int,
    keys: int,
    device: torch.device,
    images: tuple[Tensor, int] | None = None,
) -> Spans | str:
    """The spans of a mask (B or 1, 1, Q or 1, K) for B rows of Q queries, or why it has none.

    It reads the mask on the host, once for all layers that get it. Where a query's keys are in several parts, keys that
    only queries with all keys see are moved behind the others, as those of tiles that an image does not have.

    Args:
        mask: bool, true where a query sees a key; or floats that are added to scores, 0 or the lowest of their dtype;
            None: all see all.
        rows, queries: B and Q.
        key_rows, keys: B, or 1 for keys that all rows share; and K.
        device: of the layout.
        images: of a packed row, what each query sees besides: no other keys than those of its sample's images, (Q, 2)
            the first one and the end of them; and how many images the row has, of equal numbers of keys.
    """
    if mask is None and images is None:
        spans = torch.tensor([[0, keys]]).expand(rows * queries, 2)
        return Spans(_layout(spans, queries, key_rows, keys).to(device), None, keys == 0)
    if mask is None:
        mask = torch.ones(1, 1, 1, keys, dtype=torch.bool, device=device)
    found = _read.setdefault(mask, {})
    version = 0 if mask.is_inference() else mask._version
    key = (version, rows, queries, key_rows, keys, device, None if images is None else id(images[0]))
    if key not in found:
        found.clear()  # what was written into the tensor since is another mask
        found[key] = _spans(mask, rows, queries, key_rows, keys, device, images)
    spans_or_reason: Spans | str = found[key]
    return spans_or_reason


def _spans(
    mask: Tensor,
    rows: int,
    queries: int,
    key_rows: int,
    keys: int,
    device: torch.device,
    images: tuple[Tensor, int] | None,
) -> Spans | str:
    if mask.dim() != 4 or mask.shape[1] != 1:
        return "its mask differs from head to head"
    if mask.shape[0] not in (1, rows) or mask.shape[2] not in (1, queries) or mask.shape[3] != keys:
        return f"its mask is {tuple(mask.shape)}, for {rows} rows of {queries} queries and {keys} keys"
    if not rows * queries * keys:
        return "it has no queries or no keys"
    seen = mask if mask.dtype == torch.bool else mask == 0
    has_bias = torch.zeros((), dtype=torch.bool, device=mask.device)
    if mask.is_floating_point():
        has_bias = (~seen & (mask > torch.finfo(mask.dtype).min / 2)).any()
    elif mask.dtype != torch.bool:
        return f"its mask is {mask.dtype}, neither bool nor floating point"
    seen = seen[:, 0].expand(rows, queries, keys)
    if images is not None:
        own, count = images[0].to(device), images[1]
        image = torch.arange(keys, device=device) // (keys // count)
        seen = seen & (own[:, :1] <= image) & (image < own[:, 1:])
    spans, is_cut = _first_and_end(seen)
    order = None
    read = torch.cat([spans.flatten(), torch.stack([is_cut, has_bias])]).tolist()
    if read[-1]:
        return "its mask adds to the scores"
    if read[-2]:
        sees_all = seen.all(-1, keepdim=True)
        order = (~(seen & ~sees_all).any(1)).to(torch.uint8).argsort(dim=-1, stable=True)  # (B, K)
        spans, is_cut = _first_and_end(seen.gather(2, order[:, None].expand_as(seen)))
        read = torch.cat([spans.flatten(), is_cut[None]]).tolist()
        if read[-1]:
            return "a query sees keys in several parts"
    on_host = torch.tensor(read[: 2 * rows * queries]).view(-1, 2)
    has_blind = bool((on_host[:, 0] == on_host[:, 1]).any())
    layout = _layout(on_host, queries, key_rows if order is None else rows, keys).to(device)
    return Spans(layout, order, has_blind)


def _first_and_end(seen: Tensor) -> tuple[Tensor, Tensor]:
    """(B, Q, 2): each query's first key and the end of its keys, both 0 where it sees none; whether any is in parts."""
    as_int = seen.to(torch.uint8)
    count = seen.sum(-1)
    first = as_int.argmax(-1)
    end = torch.where(count > 0, seen.shape[-1] - as_int.flip(-1).argmax(-1), 0)
    return torch.stack([first, end], -1), (end - first != count).any()


def _layout(spans: Tensor, queries: int, key_rows: int, keys: int) -> SpanLayout:
    """The layout of (B * Q, 2) spans on the host, each of its row's keys. Neighbours with one span are a segment."""
    rows = len(spans) // max(queries, 1)
    offsets = torch.arange(rows).repeat_interleave(queries)[:, None] * (keys if key_rows > 1 else 0)
    spans, counts = torch.unique_consecutive(spans + offsets, dim=0, return_counts=True)
    return SpanLayout.from_spans(counts.tolist(), [(start, end) for start, end in spans.tolist()], key_rows * keys)
