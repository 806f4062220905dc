"""The keys that a tile of queries visits: ranges of ancestors' runs, then its own run. PackedLayout has the tables.

A row of the table of runs is n_ranges triples: the run's start, offset and the first run behind its subtree; then
start, end and offset of each earlier range. Ranges are visited in pairs, so that one loop over tiles is enough where
there are one or two: pair i is earlier range i, and with the last one the tile's own run. First all unmasked tiles are
visited, then all masked ones, which is the same order for any number of pairs.

LOCAL is None, "window" or "chunk"; extent is the size of either. A query at position p sees positions from its floor
on: ``p - window + 1``, or its chunk's start, and in any case its full segment. The floors do not fall along a run. So a
tile of keys lies before all floors and is not visited, or behind all and needs no mask, or needs a mask.
"""

import triton
import triton.language as tl

from lynx_kernels.ops.attention_common.triton.tiles import cut, find_block


@triton.jit
def tile_of_queries(p_runs, n_runs, n_ranges, BLOCK_M: tl.constexpr):
    """The queries of this program and the row of their run: the first query, the end of its run, a pointer.

    The end is at most the first query if there is no work. The last tiles of a run start first, because they see the
    most keys.
    """
    width = n_ranges * 3
    i_run, i_block = find_block(p_runs, width, n_runs, tl.program_id(0), BLOCK_M)
    p_run = p_runs + i_run.to(tl.int64) * width
    i_start = tl.load(p_run)
    i_end = tl.load(p_run + width)
    i_first = i_start + (tl.cdiv(i_end - i_start, BLOCK_M) - 1 - i_block) * BLOCK_M
    return tl.where(i_first < i_start, i_end, i_first), i_end, p_run


@triton.jit
def _floor(i_pos, i_first_pos, extent, LOCAL: tl.constexpr):
    """The first position that queries see, given theirs, and those of the first tokens of their segments if full."""
    if LOCAL == "window":
        i_floor = i_pos - extent + 1
    else:
        tl.static_assert(LOCAL == "chunk", "LOCAL is None, window or chunk")
        i_floor = i_pos // extent * extent
    return tl.minimum(i_floor, i_first_pos)


@triton.jit
def sight_of_queries(p_tokens, n_tokens, p_run, i_first, i_end, extent, LOCAL: tl.constexpr, BLOCK_M: tl.constexpr):
    """How far the queries of a tile see: a tuple for ``pair_of_ranges`` and ``masked_tile``.

    Where each one's view of its own run ends, (BLOCK_M,), at the first and at the last query; and the same three of
    their floors, as positions, 0 unless LOCAL.
    """
    i_last = tl.minimum(i_first + BLOCK_M, i_end) - 1
    o_q = tl.minimum(i_first + tl.arange(0, BLOCK_M), i_last)  # rows behind the run are like its last
    p_see_end = p_tokens + tl.cast(n_tokens, tl.int64)
    b_end = tl.load(p_see_end + o_q)
    i_end_of_first = tl.load(p_see_end + i_first)
    i_end_of_last = tl.load(p_see_end + i_last)
    b_floor = b_end
    i_floor_of_first = i_first * 0
    i_floor_of_last = i_first * 0
    if LOCAL is not None:
        i_offset = tl.load(p_run + 1)
        b_floor = _floor(o_q - i_offset, tl.load(p_tokens + o_q) - i_offset, extent, LOCAL)
        i_floor_of_first = _floor(i_first - i_offset, tl.load(p_tokens + i_first) - i_offset, extent, LOCAL)
        i_floor_of_last = _floor(i_last - i_offset, tl.load(p_tokens + i_last) - i_offset, extent, LOCAL)
    return b_end, i_end_of_first, i_end_of_last, b_floor, i_floor_of_first, i_floor_of_last


@triton.jit
def _tiles(i_start, i_whole_end, i_end, i_offset, sight, LOCAL: tl.constexpr, BLOCK_N: tl.constexpr):
    """The tiles of one range: its first visited key, its end, its offset, and what ``cut`` returns."""
    i_whole = i_start
    if LOCAL is not None:
        _, _, _, _, i_floor_of_first, i_floor_of_last = sight
        i_start = tl.minimum(tl.maximum(i_start, i_floor_of_first + i_offset), i_end)
        i_whole = i_floor_of_last + i_offset
    n_front, n_unmasked, n_back = cut(i_start, i_whole, i_whole_end, i_end, BLOCK_N)
    return i_start, i_end, i_offset, n_front, n_unmasked, n_back


@triton.jit
def pair_of_ranges(
    i_pair, n_pairs, p_run, sight, LOCAL: tl.constexpr, RANGES: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """The tiles of both ranges of a pair. If there is one range only, both are the tile's own run."""
    _, i_end_of_first, i_end_of_last, _, _, _ = sight
    i_start = tl.load(p_run)
    i_offset = tl.load(p_run + 1)
    if RANGES > 2:  # other pairs have no own run
        is_last = i_pair == n_pairs - 1
        i_end_of_first = tl.where(is_last, i_end_of_first, i_start)
        i_end_of_last = tl.where(is_last, i_end_of_last, i_start)
    own = _tiles(i_start, i_end_of_first, i_end_of_last, i_offset, sight, LOCAL, BLOCK_N)
    earlier = own
    if RANGES > 1:
        p_range = p_run + 3 + i_pair * 3
        i_end = tl.load(p_range + 1)
        earlier = _tiles(tl.load(p_range), i_end, i_end, tl.load(p_range + 2), sight, LOCAL, BLOCK_N)
    return earlier, own


@triton.jit
def unmasked_keys(earlier, own, RANGES: tl.constexpr, BLOCK_N: tl.constexpr):
    """Where the unmasked tiles of the pair start: ``range(first, end, BLOCK_N)``, from split on shift further."""
    i_start, _, _, n_front, n_unmasked, _ = own
    i_first = i_start + n_front * BLOCK_N
    i_split = i_first
    i_shift = i_first * 0
    if RANGES > 1:
        i_own = i_first
        i_start, _, _, n_front, n_earlier, _ = earlier
        i_first = i_start + n_front * BLOCK_N
        i_split = i_first + n_earlier * BLOCK_N
        i_shift = i_own - i_split
    return i_first, i_split + n_unmasked * BLOCK_N, i_split, i_shift


@triton.jit
def unmasked_key(i, i_split, i_shift, RANGES: tl.constexpr):
    """The first key of the unmasked tile i of ``range(first, end, BLOCK_N)``."""
    if RANGES > 1:
        i = tl.where(i < i_split, i, i + i_shift)
    return tl.cast(i, tl.int64)


@triton.jit
def number_of_masked_tiles(earlier, own, RANGES: tl.constexpr):
    """How many masked tiles the pair has."""
    _, _, _, n_front, _, n_back = own
    n_masked = n_front + n_back
    if RANGES > 1:
        _, _, _, n_front, _, n_back = earlier
        n_masked += n_front + n_back
    return n_masked


@triton.jit
def masked_tile(i, earlier, own, sight, RANGES: tl.constexpr, BLOCK_N: tl.constexpr):
    """Of masked tile i: the first key, the number of its keys, and the first of them that each query sees no more.

    The last value is the first of them that each query sees if LOCAL.
    """
    b_end, _, _, b_floor, _, _ = sight
    i_start, i_end, i_offset, n_front, n_unmasked, _ = own
    if RANGES > 1:
        i_earlier, i_earlier_end, i_earlier_offset, n_earlier_front, n_earlier_unmasked, n_earlier_back = earlier
        n_earlier = n_earlier_front + n_earlier_back
        is_earlier = i < n_earlier
        i = tl.where(is_earlier, i, i - n_earlier)
        i_start = tl.where(is_earlier, i_earlier, i_start)
        i_end = tl.where(is_earlier, i_earlier_end, i_end)
        i_offset = tl.where(is_earlier, i_earlier_offset, i_offset)
        n_front = tl.where(is_earlier, n_earlier_front, n_front)
        n_unmasked = tl.where(is_earlier, n_earlier_unmasked, n_unmasked)
        b_end = tl.where(is_earlier, i_earlier_end, b_end)
    i_key = i_start + tl.where(i < n_front, i, i + n_unmasked) * BLOCK_N
    return i_key.to(tl.int64), i_end - i_key, b_end - i_key, b_floor + i_offset - i_key
