"""Backward: one launch into the bottleneck, one from it to x; for small r, one launch for both.

LayerNorm's backward needs two sums over d in each row. No kernel has to compute them first, because they follow from
values of width r. Let g be the gradient of the pre-activation and h = g Wd the gradient of LayerNorm's output:

    sum(h * norm_weight) = g . along                                      along = Wd norm_weight
    sum(h * norm_weight * standardised x) = g . (preactivation - offset)  offset = Wd norm_bias + bd

The gradient of the scale too: sum(grad * (activated Wu^T + bu)) = sum(activated * (grad Wu)) + sum(grad * bu).
"""

import triton
import triton.language as tl

from lynx_kernels.ops.adapter.triton.activations import act_grad, activate
from lynx_kernels.ops.adapter.triton.blocks import own_tile

_BSUMS = tl.constexpr(16)  # partial row sums per load, so that their latencies overlap


@triton.jit
def adapter_bwd_weight_rows_kernel(
    p_weight,  # (r, d), the down-projection
    p_norm_weight,  # (d,)
    p_norm_bias,  # (d,) or None
    p_bias,  # (r,) or None
    p_along,  # (r,)
    p_offset,  # (r,)
    stride_weight,
    d,
    BD: tl.constexpr,
):
    """``along`` and ``offset`` of the module docstring. One program per row of Wd."""
    i_r = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BD)
    b_along = tl.zeros([BD], dtype=tl.float32)
    b_offset = tl.zeros([BD], dtype=tl.float32)
    for i_d in range(0, d, BD):
        m_d = i_d + o_d < d
        b_weight = tl.load(p_weight + i_r * stride_weight + i_d + o_d, mask=m_d, other=0.0).to(tl.float32)
        b_along += b_weight * tl.load(p_norm_weight + i_d + o_d, mask=m_d, other=0.0).to(tl.float32)
        if p_norm_bias is not None:
            b_offset += b_weight * tl.load(p_norm_bias + i_d + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_total = tl.sum(b_offset, 0)
    if p_bias is not None:
        b_total += tl.load(p_bias + i_r).to(tl.float32)
    tl.store(p_along + i_r, tl.sum(b_along, 0))
    tl.store(p_offset + i_r, b_total)


@triton.jit
def _through_up(
    p_grad_rows,  # [BLOCK_M, 1]
    p_weight_columns,  # [1, BLOCK_N]
    p_factor,
    stride_weight,
    m_t,
    m_r,
    d,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """factor * grad Wu. [BLOCK_M, BLOCK_N]"""
    o_d = tl.arange(0, BLOCK_K)
    p_grad_tile = p_grad_rows + o_d[None, :]
    p_weight_tile = p_weight_columns + o_d.to(tl.int64)[:, None] * stride_weight
    b_sum = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for i_d in range(0, d, BLOCK_K):
        m_d = i_d + o_d < d
        b_grad = tl.load(p_grad_tile + i_d, mask=m_t[:, None] & m_d[None, :], other=0.0)  # [BLOCK_M, BLOCK_K]
        if p_factor is not None:
            b_grad = b_grad.to(tl.float32) * tl.load(p_factor)
        b_weight = tl.load(p_weight_tile, mask=m_d[:, None] & m_r[None, :], other=0.0)  # [BLOCK_K, BLOCK_N]
        b_sum = tl.dot(b_grad.to(b_weight.dtype), b_weight, b_sum, input_precision="ieee")
        p_weight_tile += BLOCK_K * tl.cast(stride_weight, tl.int64)
    return b_sum


@triton.jit
def _into_preactivation(
    b_sum,  # [BLOCK_M, BLOCK_N]: factor * grad Wu
    p_scale,
    p_factor,
    p_preactivation,
    p_grad_preactivation,
    p_scaled_activated,
    p_scale_sums,  # (T,) for this tile
    o_t,
    m_t,
    o_out,
    m_out,
    dtype: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """Return the gradient of the pre-activation, scale * (grad Wu) * act', and the pre-activation. Store the rest."""
    b_scale = tl.load(p_scale).to(tl.float32)
    if p_factor is not None:
        b_factor = tl.load(p_factor)
        b_scale = b_scale / b_factor
    b_preactivation = tl.load(p_preactivation + o_out, mask=m_out, other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_N]
    b_activated = activate(b_preactivation, ACTIVATION)
    if p_scaled_activated is not None:
        tl.store(p_scaled_activated + o_out, (b_scale * b_activated).to(dtype), mask=m_out)
    if p_scale_sums is not None:
        b_scale_sum = tl.sum(b_sum * b_activated, 1)
        if p_factor is not None:
            b_scale_sum = b_scale_sum / b_factor
        tl.store(p_scale_sums + o_t, b_scale_sum, mask=m_t)
    b_grad = (b_sum * (b_scale * act_grad(b_preactivation, ACTIVATION))).to(dtype)
    if p_grad_preactivation is not None:
        tl.store(p_grad_preactivation + o_out, b_grad, mask=m_out)
    return b_grad, b_preactivation


@triton.jit
def _into_x(
    b_sum,  # [BLOCK_M, BLOCK_N]: the gradient of LayerNorm's output
    b_mean,  # [BLOCK_M]
    b_rstd,
    b_row,  # [BLOCK_M], with b_other: the two sums of the module docstring
    b_other,
    p_grad_rows,  # [BLOCK_M, 1]
    p_x_rows,
    p_norm_weight,
    p_norm_bias,
    p_grad_x,
    p_normalized,
    p_norm_weight_sums,  # (d,) for this tile
    p_norm_bias_sums,
    o_out_rows,  # [BLOCK_M, 1]
    m_t,
    o_d,
    d,
):
    """LayerNorm's backward and the residual's gradient, for the columns o_d of a tile."""
    m_d = o_d < d
    m_out = m_t[:, None] & m_d[None, :]
    o_out = o_out_rows + o_d[None, :]
    if p_norm_weight is not None:
        b_x = tl.load(p_x_rows + o_d[None, :], mask=m_out, other=0.0).to(tl.float32)
        b_standardized = (b_x - b_mean[:, None]) * b_rstd[:, None]  # [BLOCK_M, BLOCK_N]
        b_norm_weight = tl.load(p_norm_weight + o_d, mask=m_d, other=0.0).to(tl.float32)[None, :]
        if p_normalized is not None:
            b_normalized = b_standardized * b_norm_weight
            if p_norm_bias is not None:
                b_normalized += tl.load(p_norm_bias + o_d, mask=m_d, other=0.0).to(tl.float32)[None, :]
            tl.store(p_normalized + o_out, b_normalized.to(p_normalized.dtype.element_ty), mask=m_out)
        if p_norm_weight_sums is not None:
            b_columns = tl.sum(b_sum * b_standardized, 0)  # beyond row T both factors are 0
            tl.store(p_norm_weight_sums + o_d, b_columns, mask=m_d)
        if p_norm_bias_sums is not None:
            tl.store(p_norm_bias_sums + o_d, tl.sum(b_sum, 0), mask=m_d)
    if p_grad_x is not None:
        if p_norm_weight is not None:
            b_sum = b_sum * b_norm_weight - (b_row / d)[:, None] - b_standardized * (b_other / d)[:, None]
            # With d = 1, the gradient through LayerNorm is 0. Here it would be a rounding error times rstd.
            b_sum = tl.where(d > 1, b_rstd[:, None] * b_sum, 0.0)
        b_grad = tl.load(p_grad_rows + o_d[None, :], mask=m_out, other=0.0).to(tl.float32)
        tl.store(p_grad_x + o_out, (b_grad + b_sum).to(p_grad_x.dtype.element_ty), mask=m_out)


@triton.jit
def adapter_bwd_bottleneck_kernel(
    p_grad,  # (T, d)
    p_weight,  # (d, r), the up-projection
    p_scale,  # ()
    p_factor,  # () fp32 or None: multiplies grad before the product
    p_preactivation,  # (T, r)
    p_along,  # (r,) or None, from adapter_bwd_weight_rows_kernel
    p_offset,  # (r,) or None
    p_grad_preactivation,  # (T, r) or None
    p_scaled_activated,  # (T, r) or None
    p_row_sums,  # (tiles of r, 2, T) or None: the two sums of the module docstring
    p_scale_sums,  # (tiles of r, T) or None
    stride_grad,
    stride_weight,
    T,
    d,
    r,
    ACTIVATION: tl.constexpr,
    PRODUCT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """The gradient of the pre-activation and the other results of width r. Sums are stored per tile: no atomics."""
    i_t, i_r = own_tile(T, r, BLOCK_M, BLOCK_N, GROUP)
    o_t = (i_t * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    o_r = i_r * BLOCK_N + tl.arange(0, BLOCK_N)
    m_t = o_t < T
    m_r = o_r < r
    b_sum = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    if PRODUCT:
        b_sum = _through_up(
            p_grad + o_t[:, None] * stride_grad, p_weight + o_r[None, :], p_factor, stride_weight, m_t, m_r, d,
            BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    if p_scale_sums is not None:
        p_scale_sums += i_r.to(tl.int64) * T
    b_grad, b_preactivation = _into_preactivation(
        b_sum, p_scale, p_factor, p_preactivation, p_grad_preactivation, p_scaled_activated, p_scale_sums,
        o_t, m_t, o_t[:, None] * r + o_r[None, :], m_t[:, None] & m_r[None, :], p_weight.dtype.element_ty, ACTIVATION,
    )  # fmt: skip
    if p_row_sums is not None:
        b_along = tl.load(p_along + o_r, mask=m_r, other=0.0)[None, :]
        b_offset = tl.load(p_offset + o_r, mask=m_r, other=0.0)[None, :]
        b_grad_fp32 = b_grad.to(tl.float32)
        p_row = p_row_sums + i_r.to(tl.int64) * 2 * T + o_t
        tl.store(p_row, tl.sum(b_grad_fp32 * b_along, 1), mask=m_t)
        tl.store(p_row + T, tl.sum(b_grad_fp32 * (b_preactivation - b_offset), 1), mask=m_t)


@triton.jit
def adapter_bwd_input_kernel(
    p_grad,  # (T, d)
    p_x,  # (T, d)
    p_norm_weight,  # (d,) or None: no LayerNorm
    p_norm_bias,  # (d,) or None
    p_mean,  # (T,)
    p_rstd,  # (T,)
    p_grad_preactivation,  # (T, r) or None
    p_weight,  # (r, d), the down-projection
    p_row_sums,  # (n_sums, 2, T) or None
    p_grad_x,  # (T, d) or None
    p_normalized,  # (T, d) or None: LayerNorm's output, for the gradient of the down-projection
    p_norm_weight_sums,  # (tiles of T, d) or None
    p_norm_bias_sums,  # (tiles of T, d) or None
    stride_grad,
    stride_x,
    stride_weight,
    n_sums,
    T,
    d,
    r,
    PRODUCT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """The gradient of x: LayerNorm's backward in the epilogue of the product with Wd. Sums over T are per tile."""
    i_t, i_d = own_tile(T, d, BLOCK_M, BLOCK_N, GROUP)
    o_t = (i_t * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    o_d = i_d * BLOCK_N + tl.arange(0, BLOCK_N)
    o_r = tl.arange(0, BLOCK_K)
    m_t = o_t < T
    m_d = o_d < d
    b_sum = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    if PRODUCT:
        p_grad_preactivation_tile = p_grad_preactivation + o_t[:, None] * r + o_r[None, :]
        p_weight_tile = p_weight + o_r.to(tl.int64)[:, None] * stride_weight + o_d[None, :]
        for i_r in range(0, r, BLOCK_K):
            m_r = i_r + o_r < r
            b_grad_preactivation = tl.load(
                p_grad_preactivation_tile + i_r, mask=m_t[:, None] & m_r[None, :], other=0.0
            )  # [BLOCK_M, BLOCK_K]
            b_weight = tl.load(p_weight_tile, mask=m_r[:, None] & m_d[None, :], other=0.0)  # [BLOCK_K, BLOCK_N]
            b_sum = tl.dot(b_grad_preactivation, b_weight, b_sum, input_precision="ieee")
            p_weight_tile += BLOCK_K * tl.cast(stride_weight, tl.int64)
    # Loaded after the product; loaded before, these values would occupy registers during the loop.
    b_mean = tl.zeros([BLOCK_M], dtype=tl.float32)
    b_rstd = b_mean
    b_row = b_mean
    b_other = b_mean
    if p_norm_weight is not None:
        b_mean = tl.load(p_mean + o_t, mask=m_t, other=0.0)
        b_rstd = tl.load(p_rstd + o_t, mask=m_t, other=0.0)
        if p_row_sums is not None:
            for i_sum in range(0, n_sums, _BSUMS):
                o_sum = i_sum + tl.arange(0, _BSUMS)
                p_row = p_row_sums + (o_sum.to(tl.int64) * 2 * T)[:, None] + o_t[None, :]
                m_row = (o_sum < n_sums)[:, None] & m_t[None, :]
                b_row += tl.sum(tl.load(p_row, mask=m_row, other=0.0), 0)
                b_other += tl.sum(tl.load(p_row + T, mask=m_row, other=0.0), 0)
        if p_norm_weight_sums is not None:
            p_norm_weight_sums += i_t.to(tl.int64) * d
        if p_norm_bias_sums is not None:
            p_norm_bias_sums += i_t.to(tl.int64) * d
    _into_x(
        b_sum, b_mean, b_rstd, b_row, b_other, p_grad + o_t[:, None] * stride_grad, p_x + o_t[:, None] * stride_x,
        p_norm_weight, p_norm_bias, p_grad_x, p_normalized, p_norm_weight_sums, p_norm_bias_sums,
        o_t[:, None] * d, m_t, o_d, d,
    )  # fmt: skip


@triton.jit
def adapter_bwd_fused_kernel(
    p_grad,  # (T, d)
    p_x,  # (T, d)
    p_norm_weight,  # (d,) or None: no LayerNorm
    p_norm_bias,  # (d,) or None
    p_mean,  # (T,)
    p_rstd,  # (T,)
    p_down_weight,  # (r, d)
    p_up_weight,  # (d, r)
    p_scale,  # ()
    p_factor,  # () fp32 or None: multiplies grad before the product
    p_preactivation,  # (T, r)
    p_along,  # (r,) or None, from adapter_bwd_weight_rows_kernel
    p_offset,  # (r,) or None
    p_grad_preactivation,  # (T, r) or None
    p_scaled_activated,  # (T, r) or None
    p_scale_sums,  # (1, T) or None
    p_grad_x,  # (T, d) or None
    p_normalized,  # (T, d) or None: LayerNorm's output, for the gradient of the down-projection
    p_norm_weight_sums,  # (tiles of T, d) or None
    p_norm_bias_sums,  # (tiles of T, d) or None
    stride_grad,
    stride_x,
    stride_down,
    stride_up,
    T,
    d,
    r,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,  # all of r
    BLOCK_K: tl.constexpr,
):
    """The two kernels above in one, for BLOCK_M rows and all of r. The pre-activation's gradient stays in registers."""
    i_t = tl.program_id(0)
    o_t = (i_t * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    o_r = tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, BLOCK_K)
    m_t = o_t < T
    m_r = o_r < r
    p_grad_rows = p_grad + o_t[:, None] * stride_grad
    b_sum = _through_up(
        p_grad_rows, p_up_weight + o_r[None, :], p_factor, stride_up, m_t, m_r, d, BLOCK_M, BLOCK_N, BLOCK_K
    )
    b_grad, b_preactivation = _into_preactivation(
        b_sum, p_scale, p_factor, p_preactivation, p_grad_preactivation, p_scaled_activated, p_scale_sums, o_t, m_t,
        o_t[:, None] * r + o_r[None, :], m_t[:, None] & m_r[None, :], p_down_weight.dtype.element_ty, ACTIVATION,
    )  # fmt: skip
    b_mean = tl.zeros([BLOCK_M], dtype=tl.float32)
    b_rstd = b_mean
    b_row = b_mean
    b_other = b_mean
    if p_norm_weight is not None:
        b_mean = tl.load(p_mean + o_t, mask=m_t, other=0.0)
        b_rstd = tl.load(p_rstd + o_t, mask=m_t, other=0.0)
        if p_along is not None:
            b_grad_fp32 = b_grad.to(tl.float32)
            b_row = tl.sum(b_grad_fp32 * tl.load(p_along + o_r, mask=m_r, other=0.0)[None, :], 1)
            b_offset = tl.load(p_offset + o_r, mask=m_r, other=0.0)[None, :]
            b_other = tl.sum(b_grad_fp32 * (b_preactivation - b_offset), 1)
        if p_norm_weight_sums is not None:
            p_norm_weight_sums += i_t.to(tl.int64) * d
        if p_norm_bias_sums is not None:
            p_norm_bias_sums += i_t.to(tl.int64) * d
    p_down_tile = p_down_weight + o_r.to(tl.int64)[:, None] * stride_down + o_d[None, :]
    for i_d in range(0, d, BLOCK_K):
        b_weight = tl.load(p_down_tile + i_d, mask=m_r[:, None] & (i_d + o_d < d)[None, :], other=0.0)
        b_through = tl.dot(b_grad, b_weight, input_precision="ieee")  # [BLOCK_M, BLOCK_K]
        _into_x(
            b_through, b_mean, b_rstd, b_row, b_other, p_grad_rows, p_x + o_t[:, None] * stride_x,
            p_norm_weight, p_norm_bias, p_grad_x, p_normalized, p_norm_weight_sums, p_norm_bias_sums,
            o_t[:, None] * d, m_t, i_d + o_d, d,
        )  # fmt: skip
