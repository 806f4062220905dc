"""The adapter's Triton kernels. Shapes: T tokens, width d, bottleneck r; each program owns one tile of its output.

Dialect of flash-linear-attention: ``b_`` a block's values, ``p_`` a pointer, ``o_`` offsets, ``m_`` a mask, ``i_`` an
index. An absent pointer is None and takes its code with it. Products run in the dtype of the weights and add up in
fp32; "ieee" keeps TF32 out of fp32 products. Row offsets are int64: T * d passes 2^31.
"""

import triton
import triton.language as tl

_ROOT_HALF = tl.constexpr(0.7071067811865476)
_TWICE_ROOT_TWO_OVER_PI = tl.constexpr(1.5957691216057308)
_ROOT_HALF_OVER_PI = tl.constexpr(0.3989422804014327)
_CUBIC = tl.constexpr(0.044715)


@triton.jit
def _activate(b_x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "silu":
        b_out = b_x * tl.sigmoid(b_x)
    elif ACTIVATION == "relu":
        b_out = tl.where(b_x < 0, 0.0, b_x)  # not maximum, which would swallow a NaN
    elif ACTIVATION == "gelu":
        b_out = 0.5 * b_x * (1 + tl.erf(b_x * _ROOT_HALF))
    else:  # gelu_tanh: (1 + tanh(u)) / 2 is sigmoid(2u)
        b_out = b_x * tl.sigmoid(b_x * (1 + b_x * b_x * _CUBIC) * _TWICE_ROOT_TWO_OVER_PI)
    return b_out


@triton.jit
def _slope(b_x, ACTIVATION: tl.constexpr):
    """The activation's derivative at b_x."""
    if ACTIVATION == "silu":
        b_gate = tl.sigmoid(b_x)
        b_out = b_gate * (1 + b_x * (1 - b_gate))
    elif ACTIVATION == "relu":
        b_out = tl.where(b_x <= 0, 0.0, 1.0)
    elif ACTIVATION == "gelu":
        b_out = 0.5 * (1 + tl.erf(b_x * _ROOT_HALF)) + b_x * _ROOT_HALF_OVER_PI * tl.exp(-0.5 * b_x * b_x)
    else:
        b_square = b_x * b_x * _CUBIC
        b_gate = tl.sigmoid(b_x * (1 + b_square) * _TWICE_ROOT_TWO_OVER_PI)
        b_out = b_gate + b_x * b_gate * (1 - b_gate) * (1 + 3 * b_square) * _TWICE_ROOT_TWO_OVER_PI
    return b_out


@triton.jit
def _own_tile(rows, columns, BROWS: tl.constexpr, BCOLUMNS: tl.constexpr, GROUP: tl.constexpr):
    """This program's tile. GROUP tiles of rows go together over all columns, so that both operands stay in L2."""
    i_program = tl.program_id(0)
    n_rows = tl.cdiv(rows, BROWS)
    n_columns = tl.cdiv(columns, BCOLUMNS)
    i_group = i_program // (GROUP * n_columns)
    i_within = i_program % (GROUP * n_columns)
    n_group = tl.minimum(n_rows - i_group * GROUP, GROUP)
    return i_group * GROUP + i_within % n_group, i_within // n_group


@triton.jit
def statistics_kernel(
    p_x,  # (T, d)
    p_mean,  # (T,)
    p_rstd,  # (T,)
    stride_x,
    d,
    eps,
    BD: tl.constexpr,
):
    """LayerNorm's mean and 1 / deviation of one row: the mean first, then the squares around it.

    The second pass also sums the deviations: what is left of them is the rounding error of the first mean. Where
    |mean| >> deviation, sums of plain squares would lose everything and an uncorrected mean some digits.
    """
    i_t = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BD)
    p_row = p_x + i_t * stride_x
    b_sum = tl.zeros([BD], dtype=tl.float32)
    for i_d in range(0, d, BD):
        b_sum += tl.load(p_row + i_d + o_d, mask=i_d + o_d < d, other=0.0).to(tl.float32)
    b_mean = tl.sum(b_sum, 0) / d
    b_rest = tl.zeros([BD], dtype=tl.float32)
    b_squares = tl.zeros([BD], dtype=tl.float32)
    for i_d in range(0, d, BD):
        m_d = i_d + o_d < d
        b_x = tl.load(p_row + i_d + o_d, mask=m_d, other=0.0).to(tl.float32)
        b_centred = tl.where(m_d, b_x - b_mean, 0.0)
        b_rest += b_centred
        b_squares += b_centred * b_centred
    b_shift = tl.sum(b_rest, 0) / d
    b_variance = tl.maximum(tl.sum(b_squares, 0) / d - b_shift * b_shift, 0.0)
    tl.store(p_mean + i_t, b_mean + b_shift)
    tl.store(p_rstd + i_t, tl.rsqrt(b_variance + tl.cast(eps, tl.float32)))


@triton.jit
def down_kernel(
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
    BROWS: tl.constexpr,
    BCOLUMNS: tl.constexpr,
    BINNER: tl.constexpr,
    GROUP: tl.constexpr,
):
    """LayerNorm(x) Wd^T + bd and its activation; x is normalised on its way to the product."""
    i_t, i_r = _own_tile(T, r, BROWS, BCOLUMNS, GROUP)
    o_t = (i_t * BROWS + tl.arange(0, BROWS)).to(tl.int64)
    o_r = i_r * BCOLUMNS + tl.arange(0, BCOLUMNS)
    o_d = tl.arange(0, BINNER)
    m_t = o_t < T
    m_r = o_r < r
    p_x_tile = p_x + o_t[:, None] * stride_x + o_d[None, :]
    p_weight_tile = p_weight + o_r.to(tl.int64)[None, :] * stride_weight + o_d[:, None]
    if p_norm_weight is not None:
        b_mean = tl.load(p_mean + o_t, mask=m_t, other=0.0)  # [BROWS]
        b_rstd = tl.load(p_rstd + o_t, mask=m_t, other=0.0)
    b_sum = tl.zeros([BROWS, BCOLUMNS], dtype=tl.float32)
    for i_d in range(0, d, BINNER):
        m_d = i_d + o_d < d
        b_x = tl.load(p_x_tile + i_d, mask=m_t[:, None] & m_d[None, :], other=0.0)  # [BROWS, BINNER]
        if p_norm_weight is not None:
            # A weight of 0 beyond d also removes the mean from the columns that are not there.
            b_norm_weight = tl.load(p_norm_weight + i_d + o_d, mask=m_d, other=0.0).to(tl.float32)
            b_x = (b_x.to(tl.float32) - b_mean[:, None]) * b_rstd[:, None] * b_norm_weight[None, :]
            if p_norm_bias is not None:
                b_x += tl.load(p_norm_bias + i_d + o_d, mask=m_d, other=0.0).to(tl.float32)[None, :]
        b_weight = tl.load(p_weight_tile + i_d, mask=m_d[:, None] & m_r[None, :], other=0.0)  # [BINNER, BCOLUMNS]
        b_sum = tl.dot(b_x.to(b_weight.dtype), b_weight, b_sum, input_precision="ieee")
    if p_bias is not None:
        b_sum += tl.load(p_bias + o_r, mask=m_r, other=0.0).to(tl.float32)[None, :]
    # The activation sees the rounded value, the one that backward will read.
    b_preactivation = b_sum.to(p_preactivation.dtype.element_ty)
    b_activated = _activate(b_preactivation.to(tl.float32), ACTIVATION)
    o_out = o_t[:, None] * r + o_r[None, :]
    m_out = m_t[:, None] & m_r[None, :]
    tl.store(p_preactivation + o_out, b_preactivation, mask=m_out)
    tl.store(p_activated + o_out, b_activated.to(p_activated.dtype.element_ty), mask=m_out)


@triton.jit
def up_kernel(
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
    BROWS: tl.constexpr,
    BCOLUMNS: tl.constexpr,
    BINNER: tl.constexpr,
    GROUP: tl.constexpr,
):
    """x + scale * (activated Wu^T + bu)."""
    i_t, i_d = _own_tile(T, d, BROWS, BCOLUMNS, GROUP)
    o_t = (i_t * BROWS + tl.arange(0, BROWS)).to(tl.int64)
    o_d = i_d * BCOLUMNS + tl.arange(0, BCOLUMNS)
    o_r = tl.arange(0, BINNER)
    m_t = o_t < T
    m_d = o_d < d
    p_activated_tile = p_activated + o_t[:, None] * r + o_r[None, :]
    p_weight_tile = p_weight + o_d.to(tl.int64)[None, :] * stride_weight + o_r[:, None]
    b_sum = tl.zeros([BROWS, BCOLUMNS], dtype=tl.float32)
    for i_r in range(0, r, BINNER):
        m_r = i_r + o_r < r
        b_activated = tl.load(p_activated_tile + i_r, mask=m_t[:, None] & m_r[None, :], other=0.0)  # [BROWS, BINNER]
        b_weight = tl.load(p_weight_tile + i_r, mask=m_r[:, None] & m_d[None, :], other=0.0)  # [BINNER, BCOLUMNS]
        b_sum = tl.dot(b_activated, b_weight, b_sum, input_precision="ieee")
    if p_bias is not None:
        b_sum += tl.load(p_bias + o_d, mask=m_d, other=0.0).to(tl.float32)[None, :]
    m_out = m_t[:, None] & m_d[None, :]
    b_x = tl.load(p_x + o_t[:, None] * stride_x + o_d[None, :], mask=m_out, other=0.0).to(tl.float32)
    b_out = b_x + tl.load(p_scale).to(tl.float32) * b_sum
    tl.store(p_out + o_t[:, None] * d + o_d[None, :], b_out.to(p_out.dtype.element_ty), mask=m_out)


@triton.jit
def weight_rows_kernel(
    p_weight,  # (r, d), of the down-projection
    p_norm_weight,  # (d,)
    p_norm_bias,  # (d,) or None
    p_bias,  # (r,) or None
    p_along,  # (r,): Wd norm_weight
    p_offset,  # (r,): Wd norm_bias + bd
    stride_weight,
    d,
    BD: tl.constexpr,
):
    """What LayerNorm's backward must know of the weights to find its row sums in r-wide values."""
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
def backward_bottleneck_kernel(
    p_grad,  # (T, d)
    p_weight,  # (d, r), of the up-projection
    p_scale,  # ()
    p_preactivation,  # (T, r)
    p_along,  # (r,) or None, as weight_rows_kernel gives them
    p_offset,  # (r,) or None
    p_grad_preactivation,  # (T, r) or None
    p_scaled_activated,  # (T, r) or None
    p_row_sums,  # (tiles of r, 2, T) or None: of the gradient into the standardised x, and of its product with it
    p_scale_sums,  # (tiles of r, T) or None
    stride_grad,
    stride_weight,
    T,
    d,
    r,
    ACTIVATION: tl.constexpr,
    PRODUCT: tl.constexpr,
    BROWS: tl.constexpr,
    BCOLUMNS: tl.constexpr,
    BINNER: tl.constexpr,
    GROUP: tl.constexpr,
):
    """The gradient of the pre-activation, scale * (grad Wu) * act', and what else r-wide values give.

    With g that gradient and h = g Wd the one into LayerNorm's output, the sums over d that LayerNorm's backward needs
    are sum(h * norm_weight) = g . (Wd norm_weight) and sum(h * norm_weight * standardised x) =
    g . (preactivation - bd - Wd norm_bias). The gradient of scale, sum(grad * (activated Wu^T + bu)), likewise is
    sum(activated * (grad Wu)) and a sum over bu. Sums are stored by tile and added afterwards: no atomics.
    """
    i_t, i_r = _own_tile(T, r, BROWS, BCOLUMNS, GROUP)
    o_t = (i_t * BROWS + tl.arange(0, BROWS)).to(tl.int64)
    o_r = i_r * BCOLUMNS + tl.arange(0, BCOLUMNS)
    o_d = tl.arange(0, BINNER)
    m_t = o_t < T
    m_r = o_r < r
    o_out = o_t[:, None] * r + o_r[None, :]
    m_out = m_t[:, None] & m_r[None, :]
    if PRODUCT:
        p_grad_tile = p_grad + o_t[:, None] * stride_grad + o_d[None, :]
        p_weight_tile = p_weight + o_d.to(tl.int64)[:, None] * stride_weight + o_r[None, :]
        b_sum = tl.zeros([BROWS, BCOLUMNS], dtype=tl.float32)
        for i_d in range(0, d, BINNER):
            m_d = i_d + o_d < d
            b_grad = tl.load(p_grad_tile + i_d, mask=m_t[:, None] & m_d[None, :], other=0.0)  # [BROWS, BINNER]
            b_weight = tl.load(p_weight_tile, mask=m_d[:, None] & m_r[None, :], other=0.0)  # [BINNER, BCOLUMNS]
            b_sum = tl.dot(b_grad.to(b_weight.dtype), b_weight, b_sum, input_precision="ieee")
            p_weight_tile += BINNER * stride_weight
    # After the product: what is loaded before it would keep its registers all along.
    b_scale = tl.load(p_scale).to(tl.float32)
    b_preactivation = tl.load(p_preactivation + o_out, mask=m_out, other=0.0).to(tl.float32)  # [BROWS, BCOLUMNS]
    b_activated = _activate(b_preactivation, ACTIVATION)
    if p_scaled_activated is not None:
        tl.store(p_scaled_activated + o_out, (b_scale * b_activated).to(p_weight.dtype.element_ty), mask=m_out)
    if PRODUCT:
        if p_scale_sums is not None:
            tl.store(p_scale_sums + i_r.to(tl.int64) * T + o_t, tl.sum(b_sum * b_activated, 1), mask=m_t)
        if p_grad_preactivation is not None:
            b_sum *= b_scale * _slope(b_preactivation, ACTIVATION)
            b_rounded = b_sum.to(p_weight.dtype.element_ty)
            tl.store(p_grad_preactivation + o_out, b_rounded, mask=m_out)
            if p_row_sums is not None:
                b_along = tl.load(p_along + o_r, mask=m_r, other=0.0)[None, :]
                b_offset = tl.load(p_offset + o_r, mask=m_r, other=0.0)[None, :]
                b_sum = b_rounded.to(tl.float32)
                p_row = p_row_sums + i_r.to(tl.int64) * 2 * T + o_t
                tl.store(p_row, tl.sum(b_sum * b_along, 1), mask=m_t)
                tl.store(p_row + T, tl.sum(b_sum * (b_preactivation - b_offset), 1), mask=m_t)


@triton.jit
def backward_input_kernel(
    p_grad,  # (T, d)
    p_x,  # (T, d)
    p_norm_weight,  # (d,) or None: no LayerNorm
    p_norm_bias,  # (d,) or None
    p_mean,  # (T,)
    p_rstd,  # (T,)
    p_grad_preactivation,  # (T, r) or None
    p_weight,  # (r, d), of the down-projection
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
    BROWS: tl.constexpr,
    BCOLUMNS: tl.constexpr,
    BINNER: tl.constexpr,
    GROUP: tl.constexpr,
):
    """The gradient of x, LayerNorm's backward in the epilogue of the product with Wd; sums over T by tile."""
    i_t, i_d = _own_tile(T, d, BROWS, BCOLUMNS, GROUP)
    o_t = (i_t * BROWS + tl.arange(0, BROWS)).to(tl.int64)
    o_d = i_d * BCOLUMNS + tl.arange(0, BCOLUMNS)
    o_r = tl.arange(0, BINNER)
    m_t = o_t < T
    m_d = o_d < d
    o_out = o_t[:, None] * d + o_d[None, :]
    m_out = m_t[:, None] & m_d[None, :]
    b_sum = tl.zeros([BROWS, BCOLUMNS], dtype=tl.float32)
    if PRODUCT:
        p_grad_preactivation_tile = p_grad_preactivation + o_t[:, None] * r + o_r[None, :]
        p_weight_tile = p_weight + o_r.to(tl.int64)[:, None] * stride_weight + o_d[None, :]
        for i_r in range(0, r, BINNER):
            m_r = i_r + o_r < r
            b_grad_preactivation = tl.load(
                p_grad_preactivation_tile + i_r, mask=m_t[:, None] & m_r[None, :], other=0.0
            )  # [BROWS, BINNER]
            b_weight = tl.load(p_weight_tile, mask=m_r[:, None] & m_d[None, :], other=0.0)  # [BINNER, BCOLUMNS]
            b_sum = tl.dot(b_grad_preactivation, b_weight, b_sum, input_precision="ieee")
            p_weight_tile += BINNER * stride_weight
    if p_norm_weight is not None:
        b_x = tl.load(p_x + o_t[:, None] * stride_x + o_d[None, :], mask=m_out, other=0.0).to(tl.float32)
        b_mean = tl.load(p_mean + o_t, mask=m_t, other=0.0)[:, None]
        b_rstd = tl.load(p_rstd + o_t, mask=m_t, other=0.0)[:, None]
        b_standardized = (b_x - b_mean) * b_rstd  # [BROWS, BCOLUMNS]
        b_norm_weight = tl.load(p_norm_weight + o_d, mask=m_d, other=0.0).to(tl.float32)[None, :]
        if p_normalized is not None:
            b_normalized = b_standardized * b_norm_weight
            if p_norm_bias is not None:
                b_normalized += tl.load(p_norm_bias + o_d, mask=m_d, other=0.0).to(tl.float32)[None, :]
            tl.store(p_normalized + o_out, b_normalized.to(p_normalized.dtype.element_ty), mask=m_out)
        if p_norm_weight_sums is not None:
            b_columns = tl.sum(b_sum * b_standardized, 0)  # rows beyond T: both factors are 0
            tl.store(p_norm_weight_sums + i_t.to(tl.int64) * d + o_d, b_columns, mask=m_d)
        if p_norm_bias_sums is not None:
            tl.store(p_norm_bias_sums + i_t.to(tl.int64) * d + o_d, tl.sum(b_sum, 0), mask=m_d)
    if p_grad_x is not None:
        if p_norm_weight is not None:
            b_row = tl.zeros([BROWS], dtype=tl.float32)
            b_other = tl.zeros([BROWS], dtype=tl.float32)
            p_row = p_row_sums + o_t
            for _ in range(n_sums):
                b_row += tl.load(p_row, mask=m_t, other=0.0)
                b_other += tl.load(p_row + T, mask=m_t, other=0.0)
                p_row += 2 * T
            b_sum = b_sum * b_norm_weight - (b_row / d)[:, None] - b_standardized * (b_other / d)[:, None]
            b_sum = b_rstd * b_sum
        b_grad = tl.load(p_grad + o_t[:, None] * stride_grad + o_d[None, :], mask=m_out, other=0.0).to(tl.float32)
        tl.store(p_grad_x + o_out, (b_grad + b_sum).to(p_grad_x.dtype.element_ty), mask=m_out)
