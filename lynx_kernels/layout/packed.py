"""PackedLayout, for self-attention: who sees whom in one packed row of tokens."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from operator import index as as_int
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor

from lynx_kernels.layout.base import Layout, check_size, require, segment_of_tokens
from lynx_kernels.layout.blocks import find_blocks
from lynx_kernels.layout.forest import RUN_COLUMNS, find_runs, read_segments, run_table
from lynx_kernels.layout.tables import check_packed

if TYPE_CHECKING:
    from lynx_kernels.layout.drawing import Drawing


@dataclass(frozen=True, eq=False)
class PackedLayout(Layout):
    """A row of T tokens cut into segments that form a forest.

    Segments stand in depth-first order. A segment has a parent, which is an earlier segment, or none. It is causal or
    full. A token sees all tokens of its segment's ancestors and, in its own segment, those up to itself (causal) or
    all of them (full). It sees nothing else. Its position counts the tokens on the path from the root.

    - One causal segment a sample: packed causal sequences. Full segments alone: the frames of a ViT.
    - Vision tokens, then a child of text: prefix tuning (causal), or a prefix-LM (full).
    - Several children: one image and many questions, or one prompt and many completions.
    - A chain text, full image, text, ...: Gemma 3 and PaliGemma. Deeper trees: conversations that fork.

    With a ``window`` w a query at position p also sees only positions above p - w; with a ``chunk`` c only those of its
    chunk of c positions. A full segment sees all of itself whatever they are.

    Two rules hold, and all kernels are built on them. Without window or chunk, key k is seen by the queries of one
    interval, ``first(k) <= q < last(k)``. And rows fall into runs: in a run, row number minus position is constant. A
    segment joins the run of its nearest non-empty ancestor if it starts right behind that ancestor's last row. There
    are as many runs as leaves. A query sees ranges of rows: a prefix of the run of each ancestor, and its own run up to
    ``see_end``.

    CPUs refuse tables made by hand that they cannot use. GPUs read what these point to: ``check`` them first.

    Attributes:
        runs: (R + 1, 3 + 3 P) int32, one row a run, in token order: its first row; row number minus position; the
            first run behind its descendants; then start, end and offset of the P ranges of earlier runs that it sees,
            in the order of the path, empty ones first. A run ends where the next one starts. The last row only closes
            the table.
        tokens: (3, T) int32: ``first``, ``see_end`` and ``last`` of each token. first is the token itself (causal) or
            its segment's start (full); see_end the token + 1 or the segment's end; last the end of the subtree.
        key_runs: (K + 1,) int32: the first rows of maximal parts of runs in which ``last`` is constant, and T.
        segments: (S + 1,) int32: the first rows of the segments, and T.
        position_ids: (T,) int64.
        max_length: upper bound of the tokens on a path.
        has_full: whether a segment of more than one token may be full.
        window, chunk: in places along the path, at least 1; at most one of them.
    """

    runs: Tensor
    tokens: Tensor
    key_runs: Tensor
    segments: Tensor
    position_ids: Tensor
    max_length: int
    has_full: bool
    window: int | None = None
    chunk: int | None = None

    @classmethod
    def from_segments(
        cls,
        lengths: Sequence[int],
        parents: Sequence[int],
        *,
        full: bool | Sequence[bool] | None = None,
        window: int | None = None,
        chunk: int | None = None,
        device: torch.device | str | None = None,
    ) -> Self:
        """The layout of segments in depth-first order.

        Args:
            lengths: tokens of each segment, may be 0.
            parents: for segment i, -1 (none), i - 1, or an ancestor of i - 1.
            full: whether segments are full, one bool for all or one a segment; None: none is.
            window, chunk: as in ``with_local``.
            device: of the layout.

        Raises:
            ValueError: a length is negative, the order is not depth first (both name the segment), the lists differ
                in length, there are 2^31 tokens or more, or window and chunk are invalid.
            TypeError: a number is not an integer.
        """
        segments = read_segments(lengths, parents)
        total = segments.starts[-1]
        check_size("the segments", total)
        count = len(segments.lengths)
        is_full = [full] * count if isinstance(full, bool) else [False] * count if full is None else list(full)
        if len(is_full) != count:
            raise ValueError(f"{count} lengths but {len(is_full)} values of full")
        runs, key_runs = find_runs(segments)
        starts = torch.tensor(segments.starts, dtype=torch.int32)
        repeats = torch.tensor(segments.lengths, dtype=torch.int64)

        def by_token(values: Sequence[int] | Tensor) -> Tensor:  # (S,) -> (T,) int32
            return torch.as_tensor(values, dtype=torch.int32).repeat_interleave(repeats, output_size=total)

        token, last = torch.arange(total, dtype=torch.int32), by_token(segments.subtree_ends)
        first, see_end = token, token + 1
        if any(is_full):
            is_in_full = torch.tensor(is_full, dtype=torch.bool).repeat_interleave(repeats, output_size=total)
            first = torch.where(is_in_full, by_token(starts[:-1]), first)
            see_end = torch.where(is_in_full, by_token(starts[1:]), see_end)
        path_starts = torch.tensor(segments.path_starts, dtype=torch.int32)
        layout = cls(
            run_table(runs, total, last),
            torch.stack([first, see_end, last]),
            torch.tensor([*key_runs, total], dtype=torch.int32),
            starts,
            token.long() - by_token(starts[:-1] - path_starts),
            max_length=max(map(sum, zip(segments.path_starts, segments.lengths, strict=True)), default=0),
            has_full=any(each and length > 1 for each, length in zip(is_full, segments.lengths, strict=True)),
        )
        return layout.with_local(window=window, chunk=chunk).to(device or "cpu")

    def with_local(self, *, window: int | None = None, chunk: int | None = None) -> Self:
        """The same forest, its tensors shared, with another window or chunk, or none.

        Args:
            window: a query at position p sees positions above ``p - window``, at least 1.
            chunk: a query at position p sees the positions p' with ``p' // chunk == p // chunk``, at least 1.

        Both count places along the path, whatever ``position_ids`` a model uses. A full segment sees all of itself.

        Raises:
            ValueError: both are given, or one is below 1.
            TypeError: one is not an integer.
        """
        window, chunk = checked_locality(window, chunk)
        return replace(self, window=window, chunk=chunk)

    def with_full(self, blocks: Tensor) -> Self:
        """The same forest with full segments inside its causal ones, built on the device without a host read.

        Gemma 3 and PaliGemma know the tokens of their images by a number per token, not by lengths.

        Args:
            blocks: (T,) integers. Tokens that follow each other on a path and have the same number see each other,
                whatever window or chunk is; below 0: the token stays causal.

        Raises:
            ValueError: blocks are not (T,); a block goes on where paths fork, so that those that it sees depend on the
                path; or it lies in a full segment. On a GPU the last two are device-side assertions.
        """
        if tuple(blocks.shape) != (self.num_tokens,):
            raise ValueError(f"blocks must be ({self.num_tokens},) like the layout, got {tuple(blocks.shape)}")
        found = find_blocks(blocks, self.tokens, self.key_runs, self.predictors)
        require(
            found.is_whole, "blocks: a block goes on where paths fork, or lies in a full segment; number it anew there"
        )
        first, see_end, last = self.tokens
        first = torch.where(found.is_inside, found.starts.int(), first)
        see_end = torch.where(found.is_inside, found.ends.int(), see_end)
        return replace(self, tokens=torch.stack([first, see_end, last]), has_full=True)

    @classmethod
    def from_groups(
        cls,
        groups: Iterable[tuple[int, Sequence[int]]],
        *,
        root_is_causal: bool = True,
        device: torch.device | str | None = None,
    ) -> Self:
        """Trees of two levels: ``(root_length, [branch_length, ...])`` each. Lengths are in tokens and may be 0.

        Raises:
            ValueError: a length is negative (the message names the group), or there are 2^31 tokens or more.
            TypeError: a length is not an integer.
        """
        lengths: list[int] = []
        parents: list[int] = []
        for index, (root_length, branch_lengths) in enumerate(groups):
            of_group = [as_int(length) for length in (root_length, *branch_lengths)]
            if any(length < 0 for length in of_group):
                raise ValueError(f"group {index} is ({of_group[0]}, {of_group[1:]}): lengths must be >= 0")
            parents += [-1, *[len(lengths)] * len(branch_lengths)]
            lengths += of_group
        full = None if root_is_causal else [parent == -1 for parent in parents]
        return cls.from_segments(lengths, parents, full=full, device=device)

    @classmethod
    def from_prefixes(
        cls,
        prefix_lengths: Sequence[int],
        text_lengths: Sequence[int],
        *,
        root_is_causal: bool = True,
        device: torch.device | str | None = None,
    ) -> Self:
        """One tree a sample: a prefix (vision tokens, for example) is the root, a text its only child."""
        if len(prefix_lengths) != len(text_lengths):
            raise ValueError(f"{len(prefix_lengths)} prefix_lengths but {len(text_lengths)} text_lengths")
        groups = ((prefix, [text]) for prefix, text in zip(prefix_lengths, text_lengths, strict=True))
        return cls.from_groups(groups, root_is_causal=root_is_causal, device=device)

    @classmethod
    def causal(cls, lengths: Sequence[int], *, device: torch.device | str | None = None) -> Self:
        """Packed causal sequences."""
        return cls.from_segments(lengths, [-1] * len(lengths), device=device)

    @classmethod
    def full(cls, lengths: Sequence[int], *, device: torch.device | str | None = None) -> Self:
        """Packed sequences with full attention, for example the frames of a ViT."""
        return cls.from_segments(lengths, [-1] * len(lengths), full=True, device=device)

    @classmethod
    def equal(cls, count: int, length: int, *, device: torch.device | str | None = None) -> Self:
        """``full([length] * count)``, built on the device. Under torch.compile one graph works for every ``count``."""
        check_size("the sequences", count * length)
        starts = torch.arange(count + 1, device=device) * length
        return cls._from_sequences(starts, count * length, max_length=length, full_ends=starts[1:])

    @classmethod
    def from_offsets(cls, offsets: Tensor, num_tokens: int, *, is_causal: bool = True) -> Self:
        """Packed sequences from their cu_seqlens, built on their device without a host read.

        Args:
            offsets: (N + 1,) int32 or int64: sequence i is the tokens ``offsets[i] <= t < offsets[i + 1]``.
            num_tokens: T, the last offset.
            is_causal: causal sequences if true, full ones if false.

        Raises:
            ValueError: the offsets do not go from 0 to ``num_tokens``, or decrease. On a GPU a device-side assertion.
        """
        check_size("the sequences", num_tokens)
        rises = (offsets[:1] == 0).all() & (offsets[-1:] == num_tokens).all() & (offsets[1:] >= offsets[:-1]).all()
        require(rises, f"offsets of sequences must go from 0 to the number of tokens, {num_tokens}, without decreasing")
        full_ends = None if is_causal else offsets[1:]
        return cls._from_sequences(offsets, num_tokens, max_length=num_tokens, full_ends=full_ends)

    @classmethod
    def _from_sequences(
        cls, starts: Tensor, num_tokens: int, *, max_length: int, full_ends: Tensor | None = None
    ) -> Self:
        """Sequences that see only themselves, on the device of ``starts`` (N + 1,), their first rows, closed by T.

        ``full_ends`` (N,): a sequence is a full segment up to that row, and its causal child from there on.
        """
        starts = segments = starts.int()
        sequence = segment_of_tokens(starts, num_tokens)  # (T,)
        token = torch.arange(num_tokens, dtype=torch.int32, device=starts.device)
        start, end = starts[sequence], starts[sequence + 1]
        first, see_end = token, token + 1
        if full_ends is not None:
            full_end = full_ends.int()[sequence]
            first = torch.where(token < full_end, start, first)
            see_end = torch.where(token < full_end, full_end, see_end)
            segments = torch.cat([torch.stack([starts[:-1], full_ends.int()], 1).flatten(), starts[-1:]])
        number = torch.arange(1, starts.shape[0] + 1, dtype=torch.int32, device=starts.device)
        return cls(
            torch.stack([starts, starts, number.clamp(max=starts.shape[0] - 1)], 1),
            torch.stack([first, see_end, end]),
            starts,
            segments,
            (token - start).long(),
            max_length=max_length,
            has_full=full_ends is not None,
        )

    @classmethod
    def from_padding_mask(cls, mask: Tensor, *, is_causal: bool = True, root_lengths: Tensor | None = None) -> Self:
        """The layout of a padded batch, its rows end to end. Built on the mask's device without a host read.

        Padding, on the left or the right, becomes segments of its own. Outputs there are defined but meaningless.

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
        check_size("the rows", rows * length)
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
        full_ends = None if is_causal else torch.stack([begins, ends, offsets + length], 1).flatten()
        if root_lengths is not None:
            root_ends = begins + root_lengths
            require(
                ((begins <= root_ends) & (root_ends <= ends)).all(),
                "root_lengths: a root is negative or longer than its row",
            )
            full_ends = torch.stack([offsets, root_ends, ends], 1).flatten()  # none of the pads is full
        starts = torch.cat([torch.stack([offsets, begins, ends], 1).flatten(), offsets.new_full((1,), rows * length)])
        return cls._from_sequences(starts, rows * length, max_length=length, full_ends=full_ends)

    def check(self) -> None:
        """Raise ValueError where the tables, made by hand, are not those of a forest. GPUs assert it on the device."""
        check_packed(self.runs, self.tokens, self.key_runs)
        token = torch.arange(self.num_tokens, device=self.runs.device)
        is_told = (self.tokens[0] >= token).all() | self.has_full
        require(is_told, "the layout's has_full is False, but a segment is full")
        places = path_positions(self.runs, self.num_tokens)
        require((places < self.max_length).all(), f"the layout's max_length, {self.max_length}, is less than a path")

    @property
    def num_tokens(self) -> int:
        """T, the number of tokens in the row."""
        return self.position_ids.shape[0]

    @property
    def max_ranges(self) -> int:
        """Of how many runs a query sees keys, at most."""
        return (self.runs.shape[1] - RUN_COLUMNS) // 3 + 1

    @property
    def predictors(self) -> Tensor:
        """(T,) int64: the row that predicts each token, the one before it on its path.

        -1 where there is none: at the first token of a tree, and inside a full segment, where that row sees the token.
        """
        token = torch.arange(self.num_tokens, device=self.runs.device)
        run = segment_of_tokens(self.runs[:, 0], self.num_tokens)
        before = token - 1
        starts_run = token == self.runs[run, 0]
        # The nearest ancestor's range is the last one. Without ancestors its end is 0, or it does not exist.
        above = self.runs[run, -2].long() - 1 if self.max_ranges > 1 else torch.full_like(token, -1)
        return torch.where(starts_run, above, torch.where(self.tokens[0] < token, -1, before))

    def select(self, labels: Tensor, *, ignore_index: int = -100) -> tuple[Tensor, Tensor]:
        """The supervised tokens and the rows that predict them: ``labels`` and ``predictors`` of a loss.

        The first token of a branch is predicted by the last row of its parent, which may predict several. The first
        token of a tree has no predictor. Its label is dropped, as in every causal language model.

        Args:
            labels: (T,) int64 token ids, ``ignore_index`` where unsupervised.

        Returns:
            Two (N,) int64 tensors. On a CPU, N counts the labels that have predictors. On other devices it is T, so
            that nothing is read on the host: labels are ``ignore_index`` and predictors -1 where there is nothing to
            predict.

        Raises:
            ValueError: labels are not (T,), or a token of a full segment is supervised whose predictor sees it. On a
                GPU the latter is a device-side assertion.
        """
        if tuple(labels.shape) != (self.num_tokens,):
            raise ValueError(f"labels must be ({self.num_tokens},) like the layout, got {tuple(labels.shape)}")
        token = torch.arange(self.num_tokens, device=labels.device)
        supervised = labels != ignore_index
        if self.has_full:
            require(
                ~(supervised & (self.tokens[0] < token)).any(),
                "labels: a token inside a full segment is supervised, but the row that would predict it sees it; set "
                "its label to ignore_index, or make the segment causal",
            )
        predictors = self.predictors
        chosen = supervised & (predictors >= 0)
        if labels.is_cpu and not torch.compiler.is_compiling():
            return labels[chosen], predictors[chosen]
        return torch.where(chosen, labels, ignore_index), torch.where(chosen, predictors, -1)

    def key_intervals(self) -> tuple[Tensor, Tensor]:
        """``(first, last)``, each (T,) int32: key k is seen by ``first[k] <= q < last[k]``; window and chunk aside."""
        return self.tokens[0], self.tokens[2]

    def visible(self, rows: Tensor | None = None) -> Tensor:
        """(..., n, n) bool, ``[query, key]``: whether the query sees the key. For tests and drawings, not for kernels.

        ``rows`` (..., n) are those looked at, all T by default.
        """
        rows = torch.arange(self.num_tokens, device=self.tokens.device) if rows is None else rows
        return visible(rows, self.tokens, self.runs, self.window, self.chunk)

    def draw(self, names: Sequence[str] | None = None) -> "Drawing":
        """An image of who sees whom: SVG in a notebook or by ``save``, and characters for a terminal by ``print``.

        Args:
            names: one a segment, in the order of ``from_segments``; "0", "1", ... by default.
        """
        from lynx_kernels.layout.drawing import draw

        return draw(self, names)


def path_positions(runs: Tensor, num_tokens: int) -> Tensor:
    """(T,) int32: the places of tokens along their paths, which ``position_ids`` need not be for a kernel."""
    token = torch.arange(num_tokens, dtype=torch.int32, device=runs.device)
    return token - runs[segment_of_tokens(runs[:, 0], num_tokens), 1]


def checked_locality(window: int | None, chunk: int | None) -> tuple[int | None, int | None]:
    """``window`` and ``chunk`` as Python ints. Raises as ``PackedLayout.with_local``."""
    if window is not None and chunk is not None:
        raise ValueError(f"window={window} and chunk={chunk}: a layer has one of them; leave out the other")
    for name, value in (("window", window), ("chunk", chunk)):
        if value is not None and as_int(value) < 1:
            raise ValueError(f"{name} is {value}, must be >= 1")
    return None if window is None else as_int(window), None if chunk is None else as_int(chunk)


def visible(rows: Tensor, tokens: Tensor, runs: Tensor, window: int | None, chunk: int | None) -> Tensor:
    """(..., n, n) bool, ``[query, key]``: who sees whom among the rows (..., n) of a layout."""
    first, see_end, last = (each[rows][..., None, :] for each in tokens)  # (..., 1, n): of keys
    query = rows[..., :, None]
    in_tree = (first <= query) & (query < last)
    place = path_positions(runs, tokens.shape[1])[rows]  # (..., n)
    of_query, of_key = place[..., :, None], place[..., None, :]
    if window is not None:
        near = of_query - of_key < window
    elif chunk is not None:
        near = of_query // chunk == of_key // chunk
    else:
        return in_tree
    return in_tree & (near | (query < see_end))


torch.export.register_dataclass(PackedLayout, serialized_type_name="lynx_kernels.PackedLayout")
torch.serialization.add_safe_globals([PackedLayout])  # torch.export saves its example inputs
