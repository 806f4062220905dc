"""The down-projection for small M: it is bound by reading the weights, so every multiprocessor must read.

A small M has too few tiles to occupy a GPU, so the sum over d is split. The first kernel stores the sums of each split.
The second combines them in a fixed order. The up-projection needs no splits, because its output is d wide.

LayerNorm needs no launch of its own. Each split s standardises its columns of x by their own mean m_s and standard
deviation. This is exact where |mean| >> std. It never rounds more than the mean of the whole row would, because the sum
of squares is smallest around a split's own mean. Let p_s be the product of a split, f_s = (its std) / (the row's std),
along_s = Wd norm_weight and offset_s = Wd norm_bias, both over the split's columns:

    LayerNorm(x) Wd^T = sum over s of f_s p_s + (m_s - mean) * rstd * along_s + offset_s
"""

import triton
import triton.language as tl

from lynx_kernels.ops.adapter.triton.activations import activate
from lynx_kernels.ops.adapter.triton.blocks import mean_and_squares, rstd_of


@triton.jit
def _split_rstd_of(b_squares, n, eps):
    """rstd of a split, never infinite. With one value and eps = 0 the product is 0, and any factor works."""
    return tl.where(b_squares / n + tl.cast(eps, tl.float32) > 0, rstd_of(b_squares, n, eps), 1.0)


@triton.jit
def adapter_fwd_small_m_kernel(
    p_x,  # (T, d)
    p_norm_weight,  # (d,) or None: no LayerNorm
    p_norm_bias,  # (d,) or None
    p_weight,  # (r, d)
    p_sums,  # (num_splits, T, r)
    p_statistics,  # (num_splits, 2, T) or None: mean, and sum of squares around it
    p_weight_rows,  # (num_splits, 2, r) or None: along, offset
    stride_x,
    stride_weight,
    T,
    d,
    r,
    split_size,  # columns of a split
    eps,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile of the product of one split."""
    n_t = tl.cdiv(T, BLOCK_M)
    n_r = tl.cdiv(r, BLOCK_N)
    i_program = tl.program_id(0)
    i_t = i_program % n_t  # row tiles first: programs that share a weight tile run together
    i_r = i_program // n_t % n_r
    i_split = i_program // (n_t * n_r)
    i_from = i_split * split_size
    i_to = tl.minimum(i_from + split_size, d)
    o_t = (i_t * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    o_r = i_r * BLOCK_N + tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, BLOCK_K)
    m_t = o_t < T
    m_r = o_r < r
    p_x_rows = p_x + o_t[:, None] * stride_x
    p_weight_tile = p_weight + o_r.to(tl.int64)[None, :] * stride_weight + o_d[:, None]
    if p_norm_weight is not None:
        b_mean, b_squares = mean_and_squares(p_x_rows, m_t, i_from, i_to, BLOCK_M, BLOCK_K)
        b_rstd = _split_rstd_of(b_squares, i_to - i_from, eps)
        if i_r == 0:
            tl.store(p_statistics + (i_split * 2) * T + o_t, b_mean, mask=m_t)
            tl.store(p_statistics + (i_split * 2 + 1) * T + o_t, b_squares, mask=m_t)
        b_along = tl.zeros([BLOCK_K, BLOCK_N], dtype=tl.float32)
        b_offset = tl.zeros([BLOCK_K, BLOCK_N], dtype=tl.float32)
    b_sum = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for i_d in range(i_from, i_to, BLOCK_K):
        m_d = i_d + o_d < i_to
        b_x = tl.load(p_x_rows + i_d + o_d[None, :], mask=m_t[:, None] & m_d[None, :], other=0.0)  # [BLOCK_M, BLOCK_K]
        b_weight = tl.load(p_weight_tile + i_d, mask=m_d[:, None] & m_r[None, :], other=0.0)  # [BLOCK_K, BLOCK_N]
        if p_norm_weight is not None:
            b_norm_weight = tl.load(p_norm_weight + i_d + o_d, mask=m_d, other=0.0).to(tl.float32)
            b_x = (b_x.to(tl.float32) - b_mean[:, None]) * b_rstd[:, None] * b_norm_weight[None, :]
            # Accumulated in registers and reduced once at the end, because a sum over d crosses warps.
            b_along += b_weight.to(tl.float32) * b_norm_weight[:, None]
            if p_norm_bias is not None:
                b_norm_bias = tl.load(p_norm_bias + i_d + o_d, mask=m_d, other=0.0).to(tl.float32)
                b_offset += b_weight.to(tl.float32) * b_norm_bias[:, None]
        b_sum = tl.dot(b_x.to(b_weight.dtype), b_weight, b_sum, input_precision="ieee")
    p_sums_rows = p_sums + (i_split.to(tl.int64) * T + o_t)[:, None] * r
    tl.store(p_sums_rows + o_r[None, :], b_sum, mask=m_t[:, None] & m_r[None, :])
    if p_norm_weight is not None and i_t == 0:
        tl.store(p_weight_rows + (i_split * 2) * r + o_r, tl.sum(b_along, 0), mask=m_r)
        tl.store(p_weight_rows + (i_split * 2 + 1) * r + o_r, tl.sum(b_offset, 0), mask=m_r)


@triton.jit
def adapter_fwd_small_m_combine_kernel(
    p_sums,  # (num_splits, T, r)
    p_statistics,  # (num_splits, 2, T) or None: no LayerNorm
    p_weight_rows,  # (num_splits, 2, r) or None
    p_bias,  # (r,) or None
    p_mean,  # (T,)
    p_rstd,  # (T,)
    p_preactivation,  # (T, r)
    p_activated,  # (T, r)
    T,
    d,
    r,
    split_size,
    num_splits,
    eps,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Combine the splits as in the module docstring, and apply the activation."""
    n_r = tl.cdiv(r, BLOCK_N)
    i_t = tl.program_id(0) // n_r
    i_r = tl.program_id(0) % n_r
    o_t = (i_t * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    o_r = i_r * BLOCK_N + tl.arange(0, BLOCK_N)
    m_t = o_t < T
    m_r = o_r < r
    m_out = m_t[:, None] & m_r[None, :]
    o_out = o_t[:, None] * r + o_r[None, :]
    if p_statistics is not None:
        b_first = tl.load(p_statistics + o_t, mask=m_t, other=0.0)  # [BLOCK_M]
        b_shift = tl.zeros([BLOCK_M], dtype=tl.float32)
        # Relative to the first split's mean, so that nothing cancels where |mean| >> std.
        for i_split in range(num_splits):
            n = tl.minimum(split_size, d - i_split * split_size)
            b_shift += n * (tl.load(p_statistics + i_split * 2 * T + o_t, mask=m_t, other=0.0) - b_first)
        b_mean = b_first + b_shift / d
        b_squares = tl.zeros([BLOCK_M], dtype=tl.float32)
        for i_split in range(num_splits):
            n = tl.minimum(split_size, d - i_split * split_size)
            b_away = tl.load(p_statistics + i_split * 2 * T + o_t, mask=m_t, other=0.0) - b_mean
            b_squares += tl.load(p_statistics + (i_split * 2 + 1) * T + o_t, mask=m_t, other=0.0) + n * b_away * b_away
        b_rstd = rstd_of(b_squares, d, eps)
        if i_r == 0:
            tl.store(p_mean + o_t, b_mean, mask=m_t)
            tl.store(p_rstd + o_t, b_rstd, mask=m_t)
    b_sum = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    p_split = p_sums + o_out
    for i_split in range(num_splits):
        b_split = tl.load(p_split, mask=m_out, other=0.0)  # [BLOCK_M, BLOCK_N]
        p_split += tl.cast(T, tl.int64) * r
        if p_statistics is not None:
            n = tl.minimum(split_size, d - i_split * split_size)
            b_away = tl.load(p_statistics + i_split * 2 * T + o_t, mask=m_t, other=0.0) - b_mean
            b_split_squares = tl.load(p_statistics + (i_split * 2 + 1) * T + o_t, mask=m_t, other=0.0)
            b_factor = b_rstd / _split_rstd_of(b_split_squares, n, eps)
            b_along = tl.load(p_weight_rows + i_split * 2 * r + o_r, mask=m_r, other=0.0)
            b_offset = tl.load(p_weight_rows + (i_split * 2 + 1) * r + o_r, mask=m_r, other=0.0)
            b_split = b_split * b_factor[:, None] + (b_away * b_rstd)[:, None] * b_along[None, :] + b_offset[None, :]
        b_sum += b_split
    if p_bias is not None:
        b_sum += tl.load(p_bias + o_r, mask=m_r, other=0.0).to(tl.float32)[None, :]
    b_preactivation = b_sum.to(p_preactivation.dtype.element_ty)  # rounded before the activation, as backward reads it
    b_activated = activate(b_preactivation.to(tl.float32), ACTIVATION)
    tl.store(p_preactivation + o_out, b_preactivation, mask=m_out)
    tl.store(p_activated + o_out, b_activated.to(p_activated.dtype.element_ty), mask=m_out)
