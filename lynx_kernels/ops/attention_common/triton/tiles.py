"""Functions that the Triton attention kernels share: find a program's tile; load, multiply and store tiles.

Names follow flash-linear-attention: ``b_`` values of a block, ``p_`` a pointer, ``o_`` offsets, ``m_`` a mask, ``i_``
an index. A head dimension D that is not a power of two may be split into two adjacent tiles: D = 88 is 64 columns
``b_x`` and 24 of 32 columns ``b_x_rest``. That is 96 columns of work instead of 128. If one tile holds D, REST is 0 and
the rest is not read.
Strides are in units of UNIT elements. So Triton knows the alignment of rows and uses vector loads. Row strides in
elements fit in 32 bits. Head and sequence strides may not; they are multiplied by a 64-bit index before UNIT.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def find_block(p_starts, width, n_rows, i_tile, BLOCK: tl.constexpr):
    """The row of a table of token ranges that tile i_tile belongs to, and the number of the tile in that range.

    A range starts at the first value of its row and ends where the next one starts; rows are width values apart. Range
    r owns the tiles from ``start(r) // BLOCK + r`` up to those of range r + 1. These are as many tiles as it has
    blocks, or one more. So a grid of ``T // BLOCK + n_rows`` programs is enough for any lengths, and no plan is needed.
    """
    i_low = i_tile * 0
    i_high = i_low + n_rows
    while i_high - i_low > 1:
        i_middle = (i_low + i_high) // 2
        i_first = tl.load(p_starts + i_middle.to(tl.int64) * width) // BLOCK + i_middle
        is_after = i_first > i_tile
        i_low = tl.where(is_after, i_low, i_middle)
        i_high = tl.where(is_after, i_middle, i_high)
    return i_low, i_tile - tl.load(p_starts + i_low.to(tl.int64) * width) // BLOCK - i_low


@triton.jit
def cut(i_start, i_whole, i_whole_end, i_end, BLOCK: tl.constexpr):
    """Tiles from i_start on that cover the tokens before i_end. Those from i_whole to i_whole_end need no mask.

    Returns how many tiles need one at the front, how many need none, and how many need one at the back.
    """
    n_tiles = tl.cdiv(tl.maximum(i_end - i_start, 0), BLOCK)
    n_front = tl.minimum(tl.cdiv(tl.maximum(i_whole - i_start, 0), BLOCK), n_tiles)
    n_unmasked = tl.maximum(tl.maximum(i_whole_end - i_start, 0) // BLOCK - n_front, 0)
    return n_front, n_unmasked, n_tiles - n_front - n_unmasked


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


@triton.jit
def tanh(b_x):
    """tanh to about two units in the last place of fp32. By exp alone it would lose the digits of small values."""
    b_square = b_x * b_x
    b_series = 1.57394409e-2 * b_square - 5.23025580e-2  # the minimax polynomial of CUDA's tanhf
    b_series = b_series * b_square + 1.33152977e-1
    b_series = b_series * b_square - 3.33327681e-1
    b_small = b_series * b_square * b_x + b_x
    b_exp = tl.exp(-2 * tl.abs(b_x))  # never overflows
    b_large = (1 - b_exp) / (1 + b_exp)
    return tl.where(tl.abs(b_x) < 0.55, b_small, tl.where(b_x < 0, -b_large, b_large))


@triton.jit
def capped(b_products, inner):
    """Scores up to a factor: the products, or tanh(inner * products) if there is a soft cap, else inner is None."""
    if inner is not None:
        b_products = tanh(b_products * inner)
    return b_products
