"""What the tables of the two layouts must hold, for tables made by hand: a kernel reads rows where they point."""

from typing import NoReturn

import torch
from torch import Tensor

from lynx_kernels.layout.base import require, segment_of_tokens
from lynx_kernels.layout.forest import RUN_COLUMNS

KEY_TILE = 64  # keys per tile of SpanLayout's inverse table


def check_shapes(operation: str, local: dict[str, int | None], **tables: tuple[Tensor, tuple[int | None, ...]]) -> None:
    """Check what costs nothing: the dtypes and shapes of tables, None for any size, and that a window is at least 1.

    Raises:
        TypeError: a table is not int32.
        ValueError: it has another shape, or a window or chunk is below 1.
    """
    for name, (table, expected) in tables.items():
        if table.dtype != torch.int32:
            raise TypeError(f"{operation}: the layout's {name} are {table.dtype}, expected int32")
        shape = tuple(table.shape)
        if len(shape) != len(expected) or any(
            size is not None and size != found for size, found in zip(expected, shape, strict=True)
        ):
            wanted = ", ".join("any" if size is None else str(size) for size in expected)
            raise ValueError(f"{operation}: the layout's {name} have shape {shape}, expected ({wanted})")
    for name, value in local.items():
        if value is not None and value < 1:
            raise ValueError(f"{operation}: the layout's {name} is {value}, must be at least 1")


def check_packed(runs: Tensor, tokens: Tensor, key_runs: Tensor) -> None:
    """Check the tables of a ``PackedLayout``.

    Raises:
        ValueError: they are not those of a forest. On a GPU this is a device-side assertion, shapes aside.
    """
    num_tokens = tokens.shape[1]
    if runs.shape[0] < 1 or runs.shape[1] < RUN_COLUMNS or runs.shape[1] % 3:
        _refuse(f"runs have shape {tuple(runs.shape)}")
    _check_ends("runs", runs[:, 0], num_tokens)
    _check_ends("key_runs", key_runs, num_tokens)
    starts, ends = runs[:-1, 0], runs[1:, 0]
    is_used = starts < ends
    begin, end, offset = runs[:-1, RUN_COLUMNS:].unflatten(1, (-1, 3)).unbind(2)  # (R, P)
    require(((runs[:-1, 1] >= 0) & (runs[:-1, 1] <= starts)).all(), _of("runs", "an offset that is not in its rows"))
    sees = (offset >= 0) & (offset <= begin) & (begin <= end) & (end <= starts[:, None])
    require(sees.all(), _of("runs", "a run that sees rows that are not before it"))
    if num_tokens == 0:
        return
    first, see_end, last = tokens
    row = torch.arange(num_tokens, dtype=torch.int32, device=tokens.device)
    run = segment_of_tokens(runs[:, 0], num_tokens)
    start, stop = starts[run], ends[run]
    is_right = (start <= first) & (first <= row) & (row < see_end) & (see_end <= stop) & (stop <= last)
    # The last key that a row sees is seen from it on, and the next one is not.
    is_right &= first[(see_end - 1).clamp(0, num_tokens - 1).long()] <= row
    is_right &= (see_end == stop) | (row < first[see_end.clamp(0, num_tokens - 1).long()])
    inside = run[1:] == run[:-1]  # both rows are of one run
    falls = ((first[1:] < first[:-1]) | (see_end[1:] < see_end[:-1]) | (last[1:] > last[:-1])) & inside
    ends_with_run = runs[:, 0][torch.searchsorted(runs[:, 0].contiguous(), last.clamp(max=num_tokens))] == last
    require(
        (is_right & ends_with_run).all() & ~falls.any(),
        _of("tokens", "a token that sees, or is seen by, rows that it cannot"),
    )
    key_run = key_runs[segment_of_tokens(key_runs, num_tokens)].long()
    require(
        ((key_run >= start) & (last == last[key_run])).all(),
        _of("key_runs", "one that is not a part of a run whose keys have one last query"),
    )
    # What a run sees before it, by its ranges and by the last queries of the keys before it.
    by_last = starts - torch.searchsorted(last.sort().values, starts.contiguous(), right=True)
    is_range = begin < end
    seen_run = run[begin.clamp(0, num_tokens - 1).long()]
    whole = (starts[seen_run] == begin) & (end <= ends[seen_run]) & (runs[seen_run, 1] == offset)
    whole &= last[(end - 1).clamp(0, num_tokens - 1).long()] > starts[:, None]
    whole[:, 1:] &= (end[:, :-1] <= begin[:, 1:]) | ~is_range[:, :-1]
    is_known = (whole | ~is_range).all(1) & ((end - begin).sum(1) == by_last)
    behind = runs[:-1, 2]
    number = torch.arange(len(starts), device=runs.device)
    is_known &= (number < behind) & (behind <= len(starts))
    is_known &= runs[behind.clamp(0, len(starts)).long(), 0] == last[starts.clamp(max=num_tokens - 1).long()]
    require((is_known | ~is_used).all(), _of("runs", "a run that does not see what its tokens see"))


def check_spans(segments: Tensor, tile_offsets: Tensor, tile_segments: Tensor, num_queries: int, num_keys: int) -> None:
    """Check the tables of a ``SpanLayout``.

    Raises:
        ValueError: a segment or a span is not inside the queries and keys, or the inverse table is of other spans. On a
            GPU the first is a device-side assertion, shapes aside.
    """
    if segments.shape[0] < 1:
        _refuse(f"segments have shape {tuple(segments.shape)}")
    _check_ends("segments", segments[:, 0], num_queries)
    start, end = segments[:-1, 1:].unbind(1)
    require(
        ((start >= 0) & (start <= end) & (end <= num_keys)).all(),
        _of("segments", f"one that sees keys outside 0 to {num_keys}"),
    )
    is_seen = seen_by_tile(start, torch.where(segments[1:, 0] > segments[:-1, 0], end, start), num_keys)
    expected = is_seen.nonzero()[:, 1]
    offsets = torch.nn.functional.pad(is_seen.sum(1).cumsum(0), (1, 0))
    found = tile_segments[: len(expected)].long()
    if not torch.equal(offsets, tile_offsets.long()) or not torch.equal(expected, found):
        _refuse("tile_offsets and tile_segments are not the inverse table of its segments")


def seen_by_tile(start: Tensor, end: Tensor, num_keys: int) -> Tensor:
    """(tiles, S) bool: whether the span of a segment, its first key and its end each (S,), has keys of the tile."""
    tile = torch.arange(-(-num_keys // KEY_TILE), device=start.device)[:, None] * KEY_TILE  # first keys
    return (start < end) & (start < tile + KEY_TILE) & (end > tile)


def _check_ends(name: str, starts: Tensor, num_rows: int) -> None:
    if len(starts) == 0:
        _refuse(f"{name} are empty")
    is_right = (starts[0] == 0) & (starts[-1] == num_rows) & (starts[1:] >= starts[:-1]).all()
    require(is_right, _of(name, f"rows that do not go from 0 to {num_rows} in order"))


def _of(name: str, problem: str) -> str:
    return f"the layout's {name} have {problem}; make layouts by their constructors"


def _refuse(problem: str) -> NoReturn:
    raise ValueError(f"the layout's {problem}; make layouts by their constructors")
