"""Forward for many tokens: one launch each for statistics, down- and up-projection; for small r, one launch for all."""

import triton
import triton.language as tl

from lynx_kernels.ops.adapter.triton.activations import activate
from lynx_kernels.ops.adapter.triton.blocks import mean_and_squares, own_tile, rstd_of


@triton.jit
def adapter_fwd_stats_kernel(
    p_x,  # (T, d)
    p_mean,  # (T,)
    p_rstd,  # (T,)
    stride_x,
    T,
    d,
    eps,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """LayerNorm's mean and rstd of BLOCK_M rows."""
    o_t = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    m_t = o_t < T
    b_mean, b_squares = mean_and_squares(p_x + o_t[:, None] * stride_x, m_t, 0, d, BLOCK_M, BLOCK_K)
    tl.store(p_mean + o_t, b_mean, mask=m_t)
    tl.store(p_rstd + o_t, rstd_of(b_squares, d, eps), mask=m_t)


@triton.jit
def _into_bottleneck(
    p_x_rows,  # [BLOCK_M, 1]
    p_norm_weight,
    p_norm_bias,
    b_mean,  # [BLOCK_M]
    b_rstd,
    p_weight_rows,  # [1, BLOCK_N]
    p_bias,
    m_t,
    o_r,
    d,
    r,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """LayerNorm(x) Wd^T + bd, [BLOCK_M, BLOCK_N]. x is normalised in registers before the product."""
    o_d = tl.arange(0, BLOCK_K)
    m_r = o_r < r
    p_x_tile = p_x_rows + o_d[None, :]
    p_weight_tile = p_weight_rows + o_d[:, None]
    b_sum = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for i_d in range(0, d, BLOCK_K):
        m_d = i_d + o_d < d
        b_x = tl.load(p_x_tile + i_d, mask=m_t[:, None] & m_d[None, :], other=0.0)  # [BLOCK_M, BLOCK_K]
        if p_norm_weight is not None:
            # Beyond d the norm weight is 0, so that -mean does not enter the product there.
            b_norm_weight = tl.load(p_norm_weight + i_d + o_d, mask=m_d, other=0.0).to(tl.float32)
            b_x = (b_x.to(tl.float32) - b_mean[:, None]) * b_rstd[:, None] * b_norm_weight[None, :]
            if p_norm_bias is not None:
                b_x += tl.load(p_norm_bias + i_d + o_d, mask=m_d, other=0.0).to(tl.float32)[None, :]
        b_weight = tl.load(p_weight_tile + i_d, mask=m_d[:, None] & m_r[None, :], other=0.0)  # [BLOCK_K, BLOCK_N]
        b_sum = tl.dot(b_x.to(b_weight.dtype), b_weight, b_sum, input_precision="ieee")
    if p_bias is not None:
        b_sum += tl.load(p_bias + o_r, mask=m_r, other=0.0).to(tl.float32)[None, :]
    return b_sum


@triton.jit
def _store_out(b_sum, p_bias, b_scale, p_x_rows, p_out_rows, m_t, o_d, d):
    """Store x + scale * (b_sum + bu), for the columns o_d."""
    m_d = o_d < d
    if p_bias is not None:
        b_sum += tl.load(p_bias + o_d, mask=m_d, other=0.0).to(tl.float32)[None, :]
    m_out = m_t[:, None] & m_d[None, :]
    b_x = tl.load(p_x_rows + o_d[None, :], mask=m_out, other=0.0).to(tl.float32)
    tl.store(p_out_rows + o_d[None, :], (b_x + b_scale * b_sum).to(p_out_rows.dtype.element_ty), mask=m_out)


@triton.jit
def adapter_fwd_down_kernel(
    p_x,  # (T, d)
    p_norm_weight,  # (d,) or None: no LayerNorm
    p_norm_bias,  # (d,) or None
    p_mean,  # (T,)
    p_rstd,  # (T,)
    p_weight,  # (r, d)
    p_bias,  # (r,) or None
    p_preactivation,  # (T, r)
    p_activated,  # (T, r)
    stride_x,
    stride_weight,
    T,
    d,
    r,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """LayerNorm(x) Wd^T + bd and its activation."""
    i_t, i_r = own_tile(T, r, BLOCK_M, BLOCK_N, GROUP)
    o_t = (i_t * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    o_r = i_r * BLOCK_N + tl.arange(0, BLOCK_N)
    m_t = o_t < T
    b_mean = tl.zeros([BLOCK_M], dtype=tl.float32)
    b_rstd = b_mean
    if p_norm_weight is not None:
        b_mean = tl.load(p_mean + o_t, mask=m_t, other=0.0)
        b_rstd = tl.load(p_rstd + o_t, mask=m_t, other=0.0)
    b_sum = _into_bottleneck(
        p_x + o_t[:, None] * stride_x, p_norm_weight, p_norm_bias, b_mean, b_rstd,
        p_weight + o_r.to(tl.int64)[None, :] * stride_weight, p_bias, m_t, o_r, d, r, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    # The activation uses the rounded value, because backward reads that one.
    b_preactivation = b_sum.to(p_preactivation.dtype.element_ty)
    b_activated = activate(b_preactivation.to(tl.float32), ACTIVATION)
    o_out = o_t[:, None] * r + o_r[None, :]
    m_out = m_t[:, None] & (o_r < r)[None, :]
    tl.store(p_preactivation + o_out, b_preactivation, mask=m_out)
    tl.store(p_activated + o_out, b_activated.to(p_activated.dtype.element_ty), mask=m_out)


@triton.jit
def adapter_fwd_up_kernel(
    p_activated,  # (T, r)
    p_weight,  # (d, r)
    p_bias,  # (d,) or None
    p_scale,  # ()
    p_x,  # (T, d)
    p_out,  # (T, d)
    stride_x,
    stride_weight,
    T,
    d,
    r,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """x + scale * (activated Wu^T + bu)."""
    i_t, i_d = own_tile(T, d, BLOCK_M, BLOCK_N, GROUP)
    o_t = (i_t * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    o_d = i_d * BLOCK_N + tl.arange(0, BLOCK_N)
    o_r = tl.arange(0, BLOCK_K)
    m_t = o_t < T
    m_d = o_d < d
    p_activated_tile = p_activated + o_t[:, None] * r + o_r[None, :]
    p_weight_tile = p_weight + o_d.to(tl.int64)[None, :] * stride_weight + o_r[:, None]
    b_sum = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for i_r in range(0, r, BLOCK_K):
        m_r = i_r + o_r < r
        b_activated = tl.load(p_activated_tile + i_r, mask=m_t[:, None] & m_r[None, :], other=0.0)  # [BLOCK_M, BLOCK_K]
        b_weight = tl.load(p_weight_tile + i_r, mask=m_r[:, None] & m_d[None, :], other=0.0)  # [BLOCK_K, BLOCK_N]
        b_sum = tl.dot(b_activated, b_weight, b_sum, input_precision="ieee")
    b_scale = tl.load(p_scale).to(tl.float32)
    _store_out(b_sum, p_bias, b_scale, p_x + o_t[:, None] * stride_x, p_out + o_t[:, None] * d, m_t, o_d, d)


@triton.jit
def adapter_fwd_fused_kernel(
    p_x,  # (T, d)
    p_norm_weight,  # (d,) or None: no LayerNorm
    p_norm_bias,  # (d,) or None
    p_down_weight,  # (r, d)
    p_down_bias,  # (r,) or None
    p_up_weight,  # (d, r)
    p_up_bias,  # (d,) or None
    p_scale,  # ()
    p_mean,  # (T,)
    p_rstd,  # (T,)
    p_preactivation,  # (T, r)
    p_out,  # (T, d)
    stride_x,
    stride_down,
    stride_up,
    T,
    d,
    r,
    eps,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,  # all of r
    BLOCK_K: tl.constexpr,
):
    """The whole adapter for BLOCK_M rows. The bottleneck stays in registers. The second read of x hits L2."""
    o_t = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    o_r = tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, BLOCK_K)
    m_t = o_t < T
    m_r = o_r < r
    p_x_rows = p_x + o_t[:, None] * stride_x
    b_mean = tl.zeros([BLOCK_M], dtype=tl.float32)
    b_rstd = b_mean
    if p_norm_weight is not None:
        b_mean, b_squares = mean_and_squares(p_x_rows, m_t, 0, d, BLOCK_M, BLOCK_K)
        b_rstd = rstd_of(b_squares, d, eps)
        tl.store(p_mean + o_t, b_mean, mask=m_t)
        tl.store(p_rstd + o_t, b_rstd, mask=m_t)
    b_sum = _into_bottleneck(
        p_x_rows, p_norm_weight, p_norm_bias, b_mean, b_rstd,
        p_down_weight + o_r.to(tl.int64)[None, :] * stride_down, p_down_bias, m_t, o_r, d, r, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    b_preactivation = b_sum.to(p_preactivation.dtype.element_ty)  # [BLOCK_M, BLOCK_N]
    tl.store(p_preactivation + o_t[:, None] * r + o_r[None, :], b_preactivation, mask=m_t[:, None] & m_r[None, :])
    b_activated = activate(b_preactivation.to(tl.float32), ACTIVATION).to(p_up_weight.dtype.element_ty)
    b_scale = tl.load(p_scale).to(tl.float32)
    p_up_tile = p_up_weight + o_d.to(tl.int64)[None, :] * stride_up + o_r[:, None]
    p_out_rows = p_out + o_t[:, None] * d
    for i_d in range(0, d, BLOCK_K):
        m_up = m_r[:, None] & (i_d + o_d < d)[None, :]
        b_weight = tl.load(p_up_tile, mask=m_up, other=0.0)  # [BLOCK_N, BLOCK_K]
        b_up = tl.dot(b_activated, b_weight, input_precision="ieee")  # [BLOCK_M, BLOCK_K]
        _store_out(b_up, p_up_bias, b_scale, p_x_rows, p_out_rows, m_t, i_d + o_d, d)
        p_up_tile += BLOCK_K * tl.cast(stride_up, tl.int64)
