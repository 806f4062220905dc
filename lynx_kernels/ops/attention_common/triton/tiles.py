"""Functions that the Triton attention kernels share: find a program's tile; load, multiply and store tiles.

Names follow flash-linear-attention: ``b_`` values of a block, ``p_`` a pointer, ``o_`` offsets, ``m_`` a mask, ``i_``
an index. A head dimension D that is not a power of two may be split into two adjacent tiles: D = 88 is 64 columns
``b_x`` and 24 of 32 columns ``b_x_rest``. That is 96 columns of work instead of 128. If one tile holds D, REST is 0 and
the rest is not read.
Strides are in units of UNIT elements. So Triton knows the alignment of rows and uses vector loads. Row strides in
elements fit in 32 bits. Head and sequence strides may not; they are multiplied by a 64-bit index before UNIT.
"""

from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl


def named(suffix: str) -> Callable[[Any], str]:
    """The name, in a profiler's trace, of a kernel shared by prefix_attention and cross_attention."""

    def name(specialization: Any) -> str:
        operation = "cross_attention" if specialization.constants["SPANS"] else "prefix_attention"
        return f"{operation}_{suffix}_kernel"

    return name


@triton.jit
def find_segment(p_segments, n_segments, i_tile, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """The segment of tile i_tile, and the index of the tile in it.

    Segment s owns the tiles from ``start(s) // BLOCK + s`` up to those of segment s + 1. These are as many tiles as it
    has blocks, or one more. So a grid of ``T // BLOCK + S`` programs is enough for any lengths, and no plan is needed.
    """
    i_low = i_tile * 0
    i_high = i_low + n_segments
    while i_high - i_low > 1:
        i_middle = (i_low + i_high) // 2
        i_first = tl.load(p_segments + i_middle * WIDTH) // BLOCK + i_middle
        is_after = i_first > i_tile
        i_low = tl.where(is_after, i_low, i_middle)
        i_high = tl.where(is_after, i_middle, i_high)
    return i_low, i_tile - tl.load(p_segments + i_low * WIDTH) // BLOCK - i_low


@triton.jit
def tile_of_queries(
    p_segments,
    n_segments,
    SPANS: tl.constexpr,
    ROOT_IS_CAUSAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The queries of this program, and the two key ranges they see: one fully, the other causally.

    Returns the first query; the end of its segment (at most the first query if there is no work); and the start and end
    of both ranges, a tuple for tiles_of_keys. The last tiles of a segment start first, because in a causal segment they
    see the most keys.
    """
    WIDTH: tl.constexpr = 3 if SPANS else 4
    i_segment, i_block = find_segment(p_segments, n_segments, tl.program_id(0), WIDTH, BLOCK_M)
    p_row = p_segments + i_segment * WIDTH
    i_start = tl.load(p_row)
    i_end = tl.load(p_row + WIDTH)
    i_first = i_start + (tl.cdiv(i_end - i_start, BLOCK_M) - 1 - i_block) * BLOCK_M
    i_first = tl.where(i_first < i_start, i_end, i_first)
    if SPANS:
        # This program's split of the span; the number of splits is the third dimension of the grid.
        i_key_start = tl.load(p_row + 1)
        i_key_end = tl.load(p_row + 2)
        split_size = tl.cdiv(tl.cdiv(i_key_end - i_key_start, BLOCK_N), tl.num_programs(2)) * BLOCK_N
        i_full = tl.minimum(i_key_start + tl.program_id(2) * split_size, i_key_end)
        i_full_end = tl.minimum(i_full + split_size, i_key_end)
        i_causal = i_first + 1
        i_causal_end = i_causal
    else:
        i_root = tl.load(p_row + 1)
        i_root_end = tl.load(p_row + 2)
        i_last = tl.minimum(i_first + BLOCK_M, i_end)
        is_root = i_start < i_root_end
        # A causal root sees one causal range. So does a branch that directly follows its root. A full root sees itself.
        is_joined = i_start == i_root_end
        if ROOT_IS_CAUSAL:
            is_joined = is_joined | is_root
        i_full = i_root
        i_full_end = tl.where(is_joined, i_root, i_root_end)
        i_causal = tl.where(is_joined, i_root, tl.where(is_root, i_last, i_start))
        i_causal_end = i_last
    return i_first, i_end, (i_full, i_full_end, i_causal, i_causal_end)


@triton.jit
def tiles_of_keys(i_first, ranges, BLOCK_N: tl.constexpr):
    """The number of unmasked tiles, which all queries from i_first on see; the number of masked tiles; and a tuple for
    unmasked_tile and masked_tile."""
    i_full, i_full_end, i_causal, i_causal_end = ranges
    n_full = (i_full_end - i_full) // BLOCK_N
    n_causal = tl.maximum(i_first + 1 - i_causal, 0) // BLOCK_N
    n_full_masked = tl.cdiv(i_full_end - i_full, BLOCK_N) - n_full
    n_masked = n_full_masked + tl.cdiv(i_causal_end - i_causal, BLOCK_N) - n_causal
    return n_full + n_causal, n_masked, (n_full, n_full_masked, n_causal)


@triton.jit
def unmasked_tile(i, ranges, counts, BLOCK_N: tl.constexpr):
    """The first key of unmasked tile i."""
    i_full, _, i_causal, _ = ranges
    n_full, _, _ = counts
    return tl.where(i < n_full, i_full + i * BLOCK_N, i_causal + (i - n_full) * BLOCK_N).to(tl.int64)


@triton.jit
def masked_tile(i, o_q, ranges, counts, BLOCK_N: tl.constexpr):
    """The first key of masked tile i, the number of its keys, and how many of them each query sees."""
    i_full, i_full_end, i_causal, i_causal_end = ranges
    n_full, n_full_masked, n_causal = counts
    is_full = i < n_full_masked
    i_key = tl.where(is_full, i_full + n_full * BLOCK_N, i_causal + (n_causal + i - n_full_masked) * BLOCK_N)
    n_keys = tl.where(is_full, i_full_end, i_causal_end) - i_key
    return i_key.to(tl.int64), n_keys, tl.where(is_full, n_keys, o_q + 1 - i_key)


@triton.jit
def load_columns(
    p_first, stride, n_rows, MASKED: tl.constexpr,
    D: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Load [ROWS, WIDTH]: rows from p_first, columns from FIRST. 0 beyond D and, if MASKED, beyond n_rows."""
    o_row = tl.arange(0, ROWS)
    o_d = FIRST + tl.arange(0, WIDTH)
    p_tile = p_first + o_row[:, None] * stride + o_d[None, :]
    if MASKED and FIRST + WIDTH > D:
        b_tile = tl.load(p_tile, mask=(o_row[:, None] < n_rows) & (o_d[None, :] < D), other=0.0)
    elif MASKED:
        b_tile = tl.load(p_tile, mask=o_row[:, None] < n_rows, other=0.0)
    elif FIRST + WIDTH > D:
        b_tile = tl.load(p_tile, mask=o_d[None, :] < D, other=0.0)
    else:
        b_tile = tl.load(p_tile)
    return b_tile


@triton.jit
def load_rows(
    p_first, stride, n_rows, MASKED: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, REST: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Load [ROWS, BD] and [ROWS, REST] of a (T, H, D) tensor. p_first points to the first row and the head."""
    b_tile = load_columns(p_first, stride, n_rows, MASKED, D, 0, BD, ROWS)
    b_rest = b_tile  # unused if REST is 0; Triton functions cannot return None
    if REST > 0:
        b_rest = load_columns(p_first, stride, n_rows, MASKED, D, BD, REST, ROWS)
    return b_tile, b_rest


@triton.jit
def store_rows(
    p_first, stride, n_rows, b_tile, b_rest,
    D: tl.constexpr, BD: tl.constexpr, REST: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Store what ``load_rows`` loads."""
    o_row = tl.arange(0, ROWS)
    o_d = tl.arange(0, BD)
    p_tile = p_first + o_row[:, None] * stride
    m_row = o_row[:, None] < n_rows
    element = p_first.dtype.element_ty
    tl.store(p_tile + o_d[None, :], b_tile.to(element), mask=m_row & (o_d[None, :] < D))
    if REST > 0:
        o_rest = BD + tl.arange(0, REST)
        tl.store(p_tile + o_rest[None, :], b_rest.to(element), mask=m_row & (o_rest[None, :] < D))


@triton.jit
def zero_rows(BD: tl.constexpr, REST: tl.constexpr, ROWS: tl.constexpr):
    """Zero accumulators. If REST is 0 the second has one column, because loops cannot carry None."""
    return tl.zeros([ROWS, BD], dtype=tl.float32), tl.zeros([ROWS, REST if REST > 0 else 1], dtype=tl.float32)


@triton.jit
def products_of_rows(b_left, b_left_rest, b_right, b_right_rest, REST: tl.constexpr):
    """left @ right^T, [left rows, right rows] in fp32."""
    b_out = tl.dot(b_left, tl.trans(b_right), input_precision="ieee")
    if REST > 0:
        b_out = tl.dot(b_left_rest, tl.trans(b_right_rest), b_out, input_precision="ieee")
    return b_out


@triton.jit
def add_weighted_rows(b_acc, b_acc_rest, b_left, b_rows, b_rows_rest, REST: tl.constexpr):
    """b_acc + b_left @ rows, with b_left rounded to the dtype of the rows."""
    b_left = b_left.to(b_rows.dtype)
    b_acc = tl.dot(b_left, b_rows, b_acc, input_precision="ieee")
    if REST > 0:
        b_acc_rest = tl.dot(b_left, b_rows_rest, b_acc_rest, input_precision="ieee")
    return b_acc, b_acc_rest
