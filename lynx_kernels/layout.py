"""The two layouts that describe a batch to the attention kernels.

``PackedLayout`` is for self-attention over one packed row of tokens. ``SpanLayout`` is for cross-attention: queries
attend to other tokens. Both are a small int32 table on the device. The maxima that a launch needs are Python ints,
fixed when the batch is built, so no kernel reads a device tensor on the host.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from operator import index as as_int
from typing import Self

import torch
from torch import Tensor

KEY_TILE = 64  # keys per tile of SpanLayout's inverse table


class _Layout:
    """Moves a layout between devices: every tensor of it."""

    def _map_tensors(self, function: Callable[[Tensor], Tensor]) -> Self:
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if f.type is Tensor}  # type: ignore[arg-type]
        return replace(self, **{name: function(tensor) for name, tensor in tensors.items()})  # type: ignore[type-var]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """The same layout with its tensors on ``device``."""
        return self._map_tensors(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        """The same layout in pinned memory, for an asynchronous copy."""
        return self._map_tensors(lambda tensor: tensor.pin_memory())


@dataclass(frozen=True, eq=False)
class PackedLayout(_Layout):
    """A row of T tokens cut into groups. A group is a root followed by any number of branches.

    A root token sees tokens of its root: those up to itself (causal), or all of them (full). A branch token sees the
    whole root of its group, and the tokens of its own branch up to itself. It sees no other branch and no other group.
    Position ids count through the root. In every branch they continue from the end of the root.

    One rule covers all of this: key k is seen by the queries of one interval, ``first(k) <= q < last(k)``. ``last`` is
    the end of the group for a root key, and the end of the branch for a branch key. ``first`` is k itself for a causal
    key, and the start of the root for a full key.

    Attributes:
        segments: (S + 1, 4) int32, one row for each root or branch, in token order: its first token, the first token
            of its group's root, the end of that root, the end of the group. A segment ends where the next one starts.
            The last row only closes the table. A segment is a root if it starts before its root's end. Segments may be
            empty.
        position_ids: (T,) int64.
        root_is_causal: whether a root token sees only the tokens of its root up to itself.
        max_group_length, max_root_length, max_branch_length: upper bounds of the lengths, in tokens.
        max_branches: upper bound of the number of non-empty branches of a group.
    """

    segments: Tensor
    position_ids: Tensor
    root_is_causal: bool
    max_group_length: int
    max_root_length: int
    max_branch_length: int
    max_branches: int

    @classmethod
    def from_groups(
        cls,
        groups: Iterable[tuple[int, Sequence[int]]],
        *,
        root_is_causal: bool = True,
        device: torch.device | str | None = None,
    ) -> Self:
        """The layout of groups ``(root_length, [branch_length, ...])``. Lengths are in tokens and may be 0.

        Raises:
            ValueError: a length is negative (the message names the group), or there are 2^31 tokens or more.
            TypeError: a length is not an integer.
        """
        rows, start = [], 0
        max_group = max_root = max_branch = max_branches = 0
        for index, (root_length, branch_lengths) in enumerate(groups):
            lengths = [as_int(length) for length in (root_length, *branch_lengths)]
            root_length, *branch_lengths = lengths
            if any(length < 0 for length in lengths):
                raise ValueError(f"group {index} is ({root_length}, {branch_lengths}): lengths must be >= 0")
            root_end, group_end = start + root_length, start + sum(lengths)
            segment_start = start
            for length in lengths:
                if length > 0:
                    rows.append((segment_start, start, root_end, group_end))
                segment_start += length
            max_group = max(max_group, group_end - start)
            max_root = max(max_root, root_length)
            max_branch = max([max_branch, *branch_lengths])
            max_branches = max(max_branches, sum(length > 0 for length in branch_lengths))
            start = group_end
        if start >= 2**31:
            raise ValueError(
                f"the groups have {start} tokens in total, too many for int32 offsets; build smaller batches"
            )
        segments = torch.tensor([*rows, (start,) * 4], dtype=torch.int32)
        return cls(
            segments,
            _position_ids(segments, start),
            root_is_causal,
            max_group,
            max_root,
            max_branch,
            max_branches,
        ).to(device or "cpu")

    @classmethod
    def from_prefixes(
        cls,
        prefix_lengths: Sequence[int],
        text_lengths: Sequence[int],
        *,
        root_is_causal: bool = True,
        device: torch.device | str | None = None,
    ) -> Self:
        """One group per sample: a prefix (vision tokens, for example) is the root, a text is the only branch."""
        if len(prefix_lengths) != len(text_lengths):
            raise ValueError(f"{len(prefix_lengths)} prefix_lengths but {len(text_lengths)} text_lengths")
        groups = ((prefix, [text]) for prefix, text in zip(prefix_lengths, text_lengths, strict=True))
        return cls.from_groups(groups, root_is_causal=root_is_causal, device=device)

    @classmethod
    def causal(cls, lengths: Sequence[int], *, device: torch.device | str | None = None) -> Self:
        """Packed causal sequences: one branch per group, no roots."""
        return cls.from_groups(((0, [length]) for length in lengths), device=device)

    @classmethod
    def full(cls, lengths: Sequence[int], *, device: torch.device | str | None = None) -> Self:
        """Packed sequences with full attention, for example the frames of a ViT: roots without branches."""
        return cls.from_groups(((length, []) for length in lengths), root_is_causal=False, device=device)

    @classmethod
    def equal(cls, count: int, length: int, *, device: torch.device | str | None = None) -> Self:
        """``full([length] * count)``, built on the device. Under torch.compile one graph works for every ``count``."""
        total = count * length
        if total >= 2**31:
            raise ValueError(
                f"the sequences have {total} tokens in total, too many for int32 offsets; build smaller batches"
            )
        start = torch.arange(count + 1, device=device) * length  # the last one closes the table
        end = (start + length).clamp(max=total)
        return cls(
            torch.stack([start, start, end, end], 1).int(),
            torch.arange(length, device=device).repeat(count),
            root_is_causal=False,
            max_group_length=length,
            max_root_length=length,
            max_branch_length=0,
            max_branches=0,
        )

    @classmethod
    def from_padding_mask(cls, mask: Tensor, *, is_causal: bool = True, root_lengths: Tensor | None = None) -> Self:
        """The layout of a padded batch, its rows end to end. Built on the mask's device without a host read.

        Padding, on the left or the right, becomes groups of its own. Outputs there are defined but meaningless. The
        maxima are the row length, an upper bound.

        Args:
            mask: (B, L), nonzero at tokens, zero at padding. The tokens of a row must be contiguous.
            is_causal: causal sequences if true, full ones if false.
            root_lengths: (B,) integers, only with ``is_causal``: how many of a row's first tokens are a full root. Its
                other tokens are a causal branch.

        Raises:
            ValueError: the mask is not 2-D; root_lengths has another shape or comes with ``is_causal=False``; a row has
                padding between tokens; or a root is longer than its row. On a GPU the last two are device-side
                assertions.
        """
        if mask.dim() != 2:
            raise ValueError(f"mask must be (batch, length), got shape {tuple(mask.shape)}")
        rows, length = mask.shape
        if root_lengths is not None and (not is_causal or tuple(root_lengths.shape) != (rows,)):
            raise ValueError(
                f"root_lengths has shape {tuple(root_lengths.shape)} with is_causal={is_causal}; it must have shape "
                f"({rows},) and needs is_causal=True"
            )
        mask = mask != 0
        column = torch.arange(length, device=mask.device)
        counts = mask.sum(1)
        # Every row is left padding, tokens and right padding.
        begins = torch.where(mask, column, length).amin(1) if length else counts
        is_token = (column >= begins[:, None]) & (column < (begins + counts)[:, None])
        require(
            (is_token == mask).all(),
            "padding mask: a row has padding between tokens; make the tokens of a row contiguous",
        )
        offsets = torch.arange(rows, device=mask.device) * length
        begins, ends = offsets + begins, offsets + begins + counts

        def group(start: Tensor, end: Tensor) -> Tensor:  # of one segment
            return torch.stack([start, start, start if is_causal else end, end], 1)

        tokens = [group(begins, ends)]
        if root_lengths is not None:
            root_ends = begins + root_lengths
            require(
                ((begins <= root_ends) & (root_ends <= ends)).all(),
                "root_lengths: a root is negative or longer than its row",
            )
            tokens = [torch.stack([start, begins, root_ends, ends], 1) for start in (begins, root_ends)]
        segments = torch.stack([group(offsets, begins), *tokens, group(ends, offsets + length)], 1).flatten(0, 1)
        segments = torch.cat([segments, segments.new_full((1, 4), rows * length)]).int()
        root_is_causal = is_causal and root_lengths is None
        return cls(
            segments,
            _position_ids(segments, rows * length),
            root_is_causal,
            length,
            max_root_length=0 if root_is_causal else length,
            max_branch_length=length if is_causal else 0,
            max_branches=min(length, 1) if is_causal else 0,
        )

    @property
    def num_tokens(self) -> int:
        """T, the number of tokens in the row."""
        return self.position_ids.shape[0]

    def key_intervals(self) -> tuple[Tensor, Tensor]:
        """``(first, last)``, each (T,) int32: key k is seen by the queries ``first[k] <= q < last[k]``."""
        return key_intervals(self.segments, self.num_tokens, self.root_is_causal)

    def visible(self) -> Tensor:
        """(T, T) bool, ``[query, key]``: whether the query sees the key. For tests and drawings, not for kernels."""
        first, last = self.key_intervals()
        query = torch.arange(self.num_tokens, device=first.device)[:, None]
        return (first <= query) & (query < last)

    def shift_labels(self, labels: Tensor, *, ignore_index: int = -100) -> Tensor:
        """The target of each row: the label of the next token in its sequence.

        Labels shift inside branches and inside causal roots. If a group has one branch, the last root token predicts
        the first branch token. The first token of a sequence without a root has no predictor. Its label is dropped, as
        in every causal language model.

        Args:
            labels: (T,) int64 token ids, ``ignore_index`` where unsupervised.

        Returns:
            (T,) int64, ``ignore_index`` where a row predicts nothing.

        Raises:
            ValueError: labels are not (T,); the first token of one of several branches is supervised (no single row
                predicts it); or a token of a full root is supervised (its predictor sees it). On a GPU the last two are
                device-side assertions.
        """
        if tuple(labels.shape) != (self.num_tokens,):
            raise ValueError(f"labels must be ({self.num_tokens},) like the layout, got {tuple(labels.shape)}")
        segment = _segment_of_tokens(self.segments, self.num_tokens)
        start, root_start, root_end, group_end = self.segments[segment].unbind(1)
        in_root = start < root_end
        is_only_branch = (start == root_end) & (self.segments[segment + 1, 0] == group_end)
        starts_branch = (torch.arange(self.num_tokens, device=labels.device) == start) & ~in_root
        supervised = labels != ignore_index
        require(
            ~(supervised & starts_branch & (root_start < root_end) & ~is_only_branch).any(),
            "labels: the first token of one of several branches is supervised, but no single row predicts it; set its "
            "label to ignore_index (it is usually BOS), or put every branch in a group of its own",
        )
        if not self.root_is_causal:
            require(
                ~(supervised & in_root).any(),
                "labels: a token of a full root is supervised, but the row that predicts it sees it; set its label to "
                "ignore_index, or make the roots causal",
            )
        goes_on = segment[1:] == segment[:-1]
        enters_branch = in_root[:-1] & (root_start[1:] == root_start[:-1])
        targets = torch.full_like(labels, ignore_index)
        targets[:-1] = torch.where(goes_on | enters_branch, labels[1:], ignore_index)
        return targets


@dataclass(frozen=True, eq=False)
class SpanLayout(_Layout):
    """Queries cut into segments. Each segment sees one span of the keys.

    A span may be empty: then outputs and gradients are 0. Spans may overlap, and segments may share a span.

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
            ValueError: the lists differ in length, a length is negative, or a span is not inside ``[0, num_keys]``.
            TypeError: a number is not an integer.
        """
        query_lengths, num_keys = [as_int(length) for length in query_lengths], as_int(num_keys)
        key_spans = [(as_int(start), as_int(end)) for start, end in key_spans]
        if num_keys < 0:
            raise ValueError(f"num_keys is {num_keys}, must be >= 0")
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
            ValueError: key_spans is not (S, 2), query_length is below 1, or a span is not inside ``[0, num_keys]``. On
                a GPU the last is a device-side assertion.
        """
        if key_spans.dim() != 2 or key_spans.shape[1] != 2 or query_length < 1:
            raise ValueError(
                f"key_spans must be (segments, 2) and query_length at least 1, got {tuple(key_spans.shape)} and "
                f"{query_length}"
            )
        count, device = key_spans.shape[0], key_spans.device
        start, end = key_spans.unbind(1)
        require(((start >= 0) & (start <= end) & (end <= num_keys)).all(), f"key_spans must lie in [0, {num_keys}]")
        first_query = torch.arange(count, device=device) * query_length
        closing = torch.tensor([[count * query_length, num_keys, num_keys]], device=device)
        tile = torch.arange(-(-num_keys // KEY_TILE), device=device)[:, None] * KEY_TILE  # first keys
        is_seen = (start < end) & (start < tile + KEY_TILE) & (end > tile)  # (tiles, S)
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

    def visible(self) -> Tensor:
        """(num_queries, num_keys) bool: whether the query sees the key. For tests and drawings, not for kernels."""
        _, start, end = self.segments[_segment_of_tokens(self.segments, self.num_queries)].unbind(1)
        key = torch.arange(self.num_keys, device=start.device)
        return (start[:, None] <= key) & (key < end[:, None])


for _layout in (PackedLayout, SpanLayout):
    torch.export.register_dataclass(_layout, serialized_type_name=f"lynx_kernels.{_layout.__name__}")
torch.serialization.add_safe_globals([PackedLayout, SpanLayout])  # torch.export saves its example inputs


def require(condition: Tensor, message: str) -> None:
    """Raise ValueError if the 0-dim ``condition`` is false. On a GPU, and when compiled, assert asynchronously."""
    if condition.device.type == "cpu" and not torch.compiler.is_compiling():
        if not condition:
            raise ValueError(message)
    else:
        torch._assert_async(condition, message)


def _segment_of_tokens(segments: Tensor, num_tokens: int) -> Tensor:
    """(T,) int64: the segment of each token. The first column of the table holds the segments' first tokens."""
    token = torch.arange(num_tokens, dtype=torch.int32, device=segments.device)
    # The last segment that starts at or before the token. Empty segments with the same start come before it.
    return torch.searchsorted(segments[:, 0].contiguous(), token, right=True) - 1


def key_intervals(segments: Tensor, num_tokens: int, root_is_causal: bool) -> tuple[Tensor, Tensor]:
    """``PackedLayout.key_intervals``, given only the table."""
    token = torch.arange(num_tokens, dtype=torch.int32, device=segments.device)
    segment = _segment_of_tokens(segments, num_tokens)
    start, _, root_end, group_end = segments[segment].unbind(1)
    in_root = start < root_end
    first = token if root_is_causal else torch.where(in_root, start, token)
    last = torch.where(in_root, group_end, segments[segment + 1, 0])
    return first, last


def _position_ids(segments: Tensor, num_tokens: int) -> Tensor:
    """(T,) int64: positions count through the root and continue from its end in every branch."""
    start, root_start, root_end, _ = segments[_segment_of_tokens(segments, num_tokens)].long().unbind(1)
    token = torch.arange(num_tokens, device=segments.device)
    return token - start + torch.where(start < root_end, 0, root_end - root_start)
