"""Functions that the adapter's Triton kernels share. Shapes everywhere: T tokens, width d, bottleneck r.

Names follow flash-linear-attention: ``b_`` values of a block, ``p_`` a pointer, ``o_`` offsets, ``m_`` a mask, ``i_``
an index. A pointer may be None; its code is then not compiled. Products run in the dtype of the weights and accumulate
in fp32. "ieee" excludes TF32 from fp32 products. Row offsets are int64, because T * d can exceed 2^31.
"""

import triton
import triton.language as tl


@triton.jit
def own_tile(rows, columns, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """The tile of this program. GROUP row tiles are processed together over all columns: both operands stay in L2."""
    i_program = tl.program_id(0)
    n_rows = tl.cdiv(rows, BLOCK_M)
    n_columns = tl.cdiv(columns, BLOCK_N)
    i_group = i_program // (GROUP * n_columns)
    i_within = i_program % (GROUP * n_columns)
    n_group = tl.minimum(n_rows - i_group * GROUP, GROUP)
    return i_group * GROUP + i_within % n_group, i_within // n_group


@triton.jit
def mean_and_squares(p_x_rows, m_t, i_from, i_to, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """The mean of each row over the columns i_from..i_to, and the sum of squares around it; each [BLOCK_M].

    One pass, shifted by the mean of the first BLOCK_K columns. Without the shift, squares would cancel completely where
    |mean| >> std. The shift is at most sqrt(columns / BLOCK_K) standard deviations from the true mean. So cancellation
    costs at most a factor of columns / BLOCK_K (64 of the 1.7e7 of fp32), and usually nothing.
    """
    o_d = tl.arange(0, BLOCK_K)
    p_tile = p_x_rows + i_from
    m_first = m_t[:, None] & (i_from + o_d < i_to)[None, :]
    b_first = tl.load(p_tile + o_d[None, :], mask=m_first, other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_K]
    b_shift = tl.sum(b_first, 1) / tl.minimum(BLOCK_K, i_to - i_from)
    b_sums = tl.zeros([BLOCK_M, BLOCK_K], dtype=tl.float32)
    b_squares = tl.zeros([BLOCK_M, BLOCK_K], dtype=tl.float32)
    for i_d in range(i_from, i_to, BLOCK_K):
        m_x = m_t[:, None] & (i_d + o_d < i_to)[None, :]
        b_x = tl.load(p_x_rows + i_d + o_d[None, :], mask=m_x, other=0.0).to(tl.float32)
        b_centred = tl.where(m_x, b_x - b_shift[:, None], 0.0)
        b_sums += b_centred
        b_squares += b_centred * b_centred
    b_sum = tl.sum(b_sums, 1)
    b_rest = b_sum / (i_to - i_from)  # the mean minus the shift
    return b_shift + b_rest, tl.maximum(tl.sum(b_squares, 1) - b_sum * b_rest, 0.0)


@triton.jit
def rstd_of(b_squares, n, eps):
    """1 / sqrt(variance + eps) of n values, given the sum of squares around their mean."""
    return tl.rsqrt(b_squares / n + tl.cast(eps, tl.float32))  # a cast, because torch.compile passes floats as fp64
