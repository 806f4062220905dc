"""From segments and their parents to the table of a PackedLayout, on the host.

Segments stand in depth-first order, so the parent of segment i is segment i - 1 or one of its ancestors, and the
descendants of a segment stand right behind it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import index as as_int

import torch
from torch import Tensor

RUN_COLUMNS = 3  # of a row of the table, before its ranges


@dataclass
class Run:
    """Rows whose number minus their place along the path is ``offset``, and the rows before them that they see."""

    start: int
    end: int
    offset: int
    ranges: list[tuple[int, int, int]]  # start, end, offset: a prefix of an ancestor's run


@dataclass
class Segments:
    """Segments in depth-first order. ``starts`` is closed by the number of tokens."""

    lengths: list[int]
    parents: list[int]
    starts: list[int]
    path_starts: list[int]  # tokens on the path before the segment
    subtree_ends: list[int]  # of rows


def read_segments(lengths: Sequence[int], parents: Sequence[int]) -> Segments:
    """Check the arguments of ``PackedLayout.from_segments``. Raises its errors, which name the segment."""
    lengths, parents = [as_int(each) for each in lengths], [as_int(each) for each in parents]
    if len(lengths) != len(parents):
        raise ValueError(f"{len(lengths)} lengths but {len(parents)} parents")
    starts = [0, *accumulate(lengths)]
    path_starts: list[int] = []
    path: list[int] = []  # from the root to segment i - 1
    depths: list[int] = []
    for index, (length, parent) in enumerate(zip(lengths, parents, strict=True)):
        if length < 0:
            raise ValueError(f"segment {index} has length {length}: lengths must be >= 0")
        depth = 0
        if parent != -1:
            depth = depths[parent] + 1 if 0 <= parent < index else 0
            if not 0 < depth <= len(path) or path[depth - 1] != parent:
                allowed = ", ".join(map(str, [-1, *path])) if len(path) < 20 else f"-1, {index - 1} or its ancestors"
                raise ValueError(
                    f"segment {index} has parent {parent}, but segments must be in depth-first order: the parent is "
                    f"-1 (none), the segment before or one of that one's ancestors; here {allowed}"
                )
        del path[depth:]
        path.append(index)
        depths.append(depth)
        path_starts.append(0 if parent == -1 else path_starts[parent] + lengths[parent])
    subtree_ends = starts[1:]
    for index in reversed(range(len(lengths))):
        if parents[index] >= 0:
            subtree_ends[parents[index]] = max(subtree_ends[parents[index]], subtree_ends[index])
    return Segments(lengths, parents, starts, path_starts, subtree_ends)


def find_runs(segments: Segments) -> tuple[list[Run], list[int]]:
    """The runs, and the first rows of the stretches of a run whose keys all have the same last query."""
    runs: list[Run] = []
    key_runs: list[int] = []
    run_of, nearest = [-1] * len(segments.lengths), [-1] * len(segments.lengths)  # the nearest non-empty ancestor
    before = (-1, -1)  # the run and the last query of the keys before
    for index, length in enumerate(segments.lengths):
        parent = segments.parents[index]
        ancestor = parent if parent < 0 or segments.lengths[parent] > 0 else nearest[parent]
        nearest[index] = ancestor
        if length == 0:
            continue
        start, end = segments.starts[index], segments.starts[index] + length
        # Rows decide whether it goes on, not whether it is the first child: either may be empty.
        if ancestor >= 0 and segments.starts[ancestor + 1] == start:
            run_of[index] = run_of[ancestor]
            runs[-1].end = end
        else:
            ranges = []
            if ancestor >= 0:
                above = runs[run_of[ancestor]]
                ranges = [*above.ranges, (above.start, segments.starts[ancestor + 1], above.offset)]
            run_of[index] = len(runs)
            runs.append(Run(start, end, start - segments.path_starts[index], ranges))
        seen_until = run_of[index], segments.subtree_ends[index]
        if before != seen_until:
            key_runs.append(start)
        before = seen_until
    return runs, key_runs


def run_table(runs: Sequence[Run], num_tokens: int, last: Tensor) -> Tensor:
    """``PackedLayout.runs``, given the last query of each row (T,)."""
    num_ranges = max((len(run.ranges) for run in runs), default=0)
    rows = []
    for run in runs:
        ranges = [*[(0, 0, 0)] * (num_ranges - len(run.ranges)), *run.ranges]
        rows.append([run.start, run.offset, 0, *[number for each in ranges for number in each]])
    table = torch.tensor([*rows, [num_tokens, 0, 0, *[0] * (3 * num_ranges)]], dtype=torch.int32)
    starts = table[:, 0].contiguous()
    table[:-1, 2] = torch.searchsorted(starts, last[starts[:-1].long()]).int()
    table[-1, 2] = len(runs)
    return table
