"""SpanLayout, for cross-attention: queries attend to spans of other tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from operator import index as as_int
from typing import Self

import torch
from torch import Tensor

from lynx_kernels.layout.base import Layout, check_size, require, segment_of_tokens
from lynx_kernels.layout.tables import KEY_TILE, check_spans, seen_by_tile


@dataclass(frozen=True, eq=False)
class SpanLayout(Layout):
    """Queries cut into segments. Each segment sees one span of the keys.

    A span may be empty: then outputs and gradients are 0. Spans may overlap, and segments may share a span. CPUs refuse
    tables made by hand that they cannot use, GPUs read what these point to: ``check`` them first.

    Attributes:
        segments: (S + 1, 3) int32, one row per segment: its first query, the first key it sees, the end of the keys it
            sees. A segment ends where the next one starts. The last row only closes the table.
        tile_offsets: (number of key tiles + 1,) int32. The inverse table, for the gradients of keys. Key tile i holds
            the keys from ``i * KEY_TILE``. The segments ``tile_segments[tile_offsets[i]:tile_offsets[i + 1]]`` see it.
        tile_segments: (...,) int32, indices of segments, ascending within a tile.
        num_queries, num_keys: how many queries and keys there are.
        max_query_length, max_span_length: upper bounds of the lengths of segments and of spans.
    """

    segments: Tensor
    tile_offsets: Tensor
    tile_segments: Tensor
    num_queries: int
    num_keys: int
    max_query_length: int
    max_span_length: int

    @classmethod
    def from_spans(
        cls,
        query_lengths: Sequence[int],
        key_spans: Sequence[tuple[int, int]],
        num_keys: int,
        *,
        device: torch.device | str | None = None,
    ) -> Self:
        """Segment i has ``query_lengths[i]`` queries and sees the keys ``start <= k < end`` of ``key_spans[i]``.

        Raises:
            ValueError: the lists differ in length, a length is negative, a span is not inside ``[0, num_keys]``, or
                there are 2^31 queries or keys or more.
            TypeError: a number is not an integer.
        """
        query_lengths, num_keys = [as_int(length) for length in query_lengths], as_int(num_keys)
        key_spans = [(as_int(start), as_int(end)) for start, end in key_spans]
        _check_num_keys(num_keys)
        if len(query_lengths) != len(key_spans):
            raise ValueError(f"{len(query_lengths)} query_lengths but {len(key_spans)} key_spans")
        rows, first_query = [], 0
        seen_by: list[list[int]] = [[] for _ in range(-(-num_keys // KEY_TILE))]
        for index, (length, (start, end)) in enumerate(zip(query_lengths, key_spans, strict=True)):
            if length < 0:
                raise ValueError(f"query_lengths[{index}] is {length}, must be >= 0")
            if not 0 <= start <= end <= num_keys:
                raise ValueError(
                    f"key_spans[{index}] is ({start}, {end}); it must lie in [0, {num_keys}], and its start must not "
                    "exceed its end"
                )
            rows.append((first_query, start, end))
            first_query += length
            if length > 0 and end > start:
                for tile in range(start // KEY_TILE, (end - 1) // KEY_TILE + 1):
                    seen_by[tile].append(index)
        check_size("the segments", first_query)
        tile_offsets = [0]
        for segments in seen_by:
            tile_offsets.append(tile_offsets[-1] + len(segments))
        return cls(
            segments=torch.tensor([*rows, (first_query, num_keys, num_keys)], dtype=torch.int32),
            tile_offsets=torch.tensor(tile_offsets, dtype=torch.int32),
            tile_segments=torch.tensor([index for segments in seen_by for index in segments], dtype=torch.int32),
            num_queries=first_query,
            num_keys=num_keys,
            max_query_length=max(query_lengths, default=0),
            max_span_length=max((end - start for start, end in key_spans), default=0),
        ).to(device or "cpu")

    @classmethod
    def from_equal_segments(cls, key_spans: Tensor, query_length: int, num_keys: int, *, max_span_length: int) -> Self:
        """Segments of equal length. Built on the device of ``key_spans`` without a host read.

        Args:
            key_spans: (S, 2) integers: the first key and the end of the keys that each segment sees.
            query_length: queries per segment, at least 1.
            num_keys: how many keys there are.
            max_span_length: upper bound of the spans' lengths.

        Raises:
            ValueError: key_spans is not (S, 2), query_length is below 1, there are 2^31 queries or keys or more, a span
                is not inside ``[0, num_keys]``, or it is longer than max_span_length. On a GPU the last two are
                device-side assertions.
            TypeError: key_spans are not integers.
        """
        if key_spans.is_floating_point() or key_spans.is_complex() or key_spans.dtype == torch.bool:
            raise TypeError(f"key_spans are {key_spans.dtype}, expected integers")
        if key_spans.dim() != 2 or key_spans.shape[1] != 2 or query_length < 1:
            raise ValueError(
                f"key_spans must be (segments, 2) and query_length at least 1, got {tuple(key_spans.shape)} and "
                f"{query_length}"
            )
        count, device = key_spans.shape[0], key_spans.device
        check_size("the segments", count * query_length)
        _check_num_keys(num_keys)
        start, end = key_spans.long().unbind(1)
        require(((start >= 0) & (start <= end) & (end <= num_keys)).all(), f"key_spans must lie in [0, {num_keys}]")
        require(
            (end - start <= max_span_length).all(), f"key_spans: one is longer than max_span_length, {max_span_length}"
        )
        first_query = torch.arange(count, device=device) * query_length
        closing = torch.tensor([[count * query_length, num_keys, num_keys]], device=device)
        is_seen = seen_by_tile(start, end, num_keys)  # (tiles, S)
        # A stable sort moves the pairs that see each other to the front, in order. The entries behind are never read.
        tile_segments = (~is_seen).flatten().to(torch.uint8).argsort(stable=True) % max(count, 1)
        return cls(
            segments=torch.cat([torch.stack([first_query, start, end], 1), closing]).int(),
            tile_offsets=torch.nn.functional.pad(is_seen.sum(1).cumsum(0), (1, 0)).int(),
            tile_segments=tile_segments.int(),
            num_queries=count * query_length,
            num_keys=num_keys,
            max_query_length=query_length,
            max_span_length=max_span_length,
        )

    def check(self) -> None:
        """Raise ValueError where the tables, made by hand, are not those of a layout. May read them on the host."""
        check_spans(self.segments, self.tile_offsets, self.tile_segments, self.num_queries, self.num_keys)
        lengths = self.segments.diff(dim=0)[:, 0], self.segments[:, 2] - self.segments[:, 1]
        bounds = {"max_query_length": self.max_query_length, "max_span_length": self.max_span_length}
        for (name, bound), found in zip(bounds.items(), lengths, strict=True):
            require((found <= bound).all(), f"the layout's {name}, {bound}, is less than a length")

    def visible(self) -> Tensor:
        """(num_queries, num_keys) bool: whether the query sees the key. For tests and drawings, not for kernels."""
        _, start, end = self.segments[segment_of_tokens(self.segments[:, 0], self.num_queries)].unbind(1)
        key = torch.arange(self.num_keys, device=start.device)
        return (start[:, None] <= key) & (key < end[:, None])


def _check_num_keys(num_keys: int) -> None:
    if num_keys < 0:
        raise ValueError(f"num_keys is {num_keys}, must be >= 0")
    check_size("the keys", num_keys)


torch.export.register_dataclass(SpanLayout, serialized_type_name="lynx_kernels.SpanLayout")
torch.serialization.add_safe_globals([SpanLayout])  # torch.export saves its example inputs
