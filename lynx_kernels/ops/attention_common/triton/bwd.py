"""The parts that all backward kernels of attention share. tiles.py explains the names.

    P = exp(S - LSE)    dV = P^T dO    dS = P * (dO V^T - delta)    dQ = scale dS K    dK = scale dS^T Q

delta is rowsum(dO * O) - dLSE. With a soft cap c, dS is multiplied by 1 - (S / c)^2. The dQ kernels visit keys like the
forward. The dK/dV kernels visit the queries that see their keys. They compute scores transposed, S^T = K Q^T, because
Triton before 3.7.1 miscompiles a transposed accumulator as an operand of a product on Hopper. Each program writes its
own outputs: no atomics, two runs agree bit by bit.
"""

import triton
import triton.language as tl
from torch import Tensor

from lynx_kernels.ops.attention_common.triton.launches import strides_of
from lynx_kernels.ops.attention_common.triton.tiles import (
    LOG2E,
    add_weighted_rows,
    capped,
    load_rows,
    products_of_rows,
)

_PREPROCESS_ROWS = 32


def preprocess(grad: Tensor, out: Tensor, lse: Tensor, grad_lse: Tensor | None) -> Tensor:
    """(2, H, T) fp32: LSE times log2(e), and delta. grad and out are (T, H, Dv), lse and grad_lse (T, H)."""
    queries, heads, head_dim = out.shape
    lse_delta = lse.new_empty(2, heads, queries)
    strides, unit = strides_of(grad)
    attention_bwd_preprocess_kernel[(triton.cdiv(queries, _PREPROCESS_ROWS), heads)](
        grad, out.contiguous(), lse.contiguous(), None if grad_lse is None else grad_lse.contiguous(), lse_delta,
        *strides, queries,
        UNIT=unit, D=head_dim, BD=triton.next_power_of_2(head_dim), BLOCK_M=_PREPROCESS_ROWS,
    )  # fmt: skip
    return lse_delta


@triton.jit
def attention_bwd_preprocess_kernel(
    p_grad,  # (T, H, Dv)
    p_out,  # (T, H, Dv)
    p_lse,  # (T, H)
    p_grad_lse,  # (T, H) or None
    p_lse_delta,  # (2, H, T)
    stride_grad,
    stride_grad_head,
    n_queries,
    UNIT: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """LSE and delta of each query, stored so that the values of neighbouring tokens are contiguous."""
    i_first = tl.program_id(0).to(tl.int64) * BLOCK_M
    i_h = tl.program_id(1)
    n_heads = tl.num_programs(1)
    o_q = i_first + tl.arange(0, BLOCK_M)
    o_d = tl.arange(0, BD)
    m_q = o_q < n_queries
    m_tile = m_q[:, None] & (o_d[None, :] < D)
    o_row = o_q * n_heads + i_h
    p_grad += i_h.to(tl.int64) * stride_grad_head * UNIT
    b_grad = tl.load(p_grad + o_q[:, None] * (stride_grad * UNIT) + o_d[None, :], mask=m_tile, other=0.0)
    b_out = tl.load(p_out + o_row[:, None] * D + o_d[None, :], mask=m_tile, other=0.0)
    b_delta = tl.sum(b_grad.to(tl.float32) * b_out.to(tl.float32), 1)
    if p_grad_lse is not None:
        b_delta -= tl.load(p_grad_lse + o_row, mask=m_q, other=0.0).to(tl.float32)
    b_lse = tl.load(p_lse + o_row, mask=m_q, other=0.0)
    p_lse_delta += i_h.to(tl.int64) * n_queries + o_q
    tl.store(p_lse_delta, b_lse * LOG2E, mask=m_q)
    tl.store(p_lse_delta + n_heads.to(tl.int64) * n_queries, b_delta, mask=m_q)


@triton.jit
def bwd_dq_tile(
    b_q, b_q_rest, b_grad, b_grad_rest, b_lse, b_delta, b_grad_q, b_grad_q_rest,
    p_k, p_v, stride_k, stride_v, n_keys, o_seen, scale,
    MASKED: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, REST: tl.constexpr,
    DV: tl.constexpr, BDV: tl.constexpr, RESTV: tl.constexpr, BLOCK_N: tl.constexpr,
    o_unseen=None, inner=None,
):  # fmt: skip
    """Add the contribution of one key tile to dQ / scale. Arguments as in ``fwd.attend``."""
    b_k, b_k_rest = load_rows(p_k, stride_k, n_keys, MASKED, D, BD, REST, BLOCK_N)
    b_scores = capped(products_of_rows(b_q, b_q_rest, b_k, b_k_rest, REST), inner)
    b_p = tl.exp2(b_scores * scale - b_lse[:, None])  # [BLOCK_M, BLOCK_N]
    if MASKED:
        o_key = tl.arange(0, BLOCK_N)[None, :]
        m_seen = o_key < o_seen[:, None]
        if o_unseen is not None:
            m_seen = m_seen & (o_key >= o_unseen[:, None])
        b_p = tl.where(m_seen, b_p, 0.0)
    b_v, b_v_rest = load_rows(p_v, stride_v, n_keys, MASKED, DV, BDV, RESTV, BLOCK_N)
    b_ds = b_p * (products_of_rows(b_grad, b_grad_rest, b_v, b_v_rest, RESTV) - b_delta[:, None])
    if inner is not None:
        b_ds = b_ds * (1 - b_scores * b_scores)
    return add_weighted_rows(b_grad_q, b_grad_q_rest, b_ds, b_k, b_k_rest, REST)


@triton.jit
def _bwd_dkdv_tile(
    b_k, b_k_rest, b_v, b_v_rest, b_grad_k, b_grad_k_rest, b_grad_v, b_grad_v_rest,
    p_q, p_grad, p_lse, p_delta, stride_q, stride_grad, n_queries, o_unseen, o_seen, scale, inner,
    MASKED: tl.constexpr, MASK_DS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, REST: tl.constexpr,
    DV: tl.constexpr, BDV: tl.constexpr, RESTV: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Add the contribution of one query tile to dK / scale and dV. The first o_unseen queries do not see the key.

    Unless o_seen is None, only the first o_seen do at all. Queries beyond n_queries contribute nothing: there q, dO,
    LSE and delta are 0, so P^T is 1 and dS^T is 0.
    """
    o_q = tl.arange(0, BLOCK_M)
    b_q, b_q_rest = load_rows(p_q, stride_q, n_queries, MASKED, D, BD, REST, BLOCK_M)
    if MASKED:
        b_lse = tl.load(p_lse + o_q, mask=o_q < n_queries, other=0.0)
        b_delta = tl.load(p_delta + o_q, mask=o_q < n_queries, other=0.0)
    else:
        b_lse = tl.load(p_lse + o_q)
        b_delta = tl.load(p_delta + o_q)
    b_scores = capped(products_of_rows(b_k, b_k_rest, b_q, b_q_rest, REST), inner)
    b_p = tl.exp2(b_scores * scale - b_lse[None, :])  # [BLOCK_N, BLOCK_M]
    if MASKED:
        m_seen = o_q[None, :] >= o_unseen[:, None]
        if o_seen is not None:
            m_seen = m_seen & (o_q[None, :] < o_seen[:, None])
        b_p = tl.where(m_seen, b_p, 0.0)
    b_grad, b_grad_rest = load_rows(p_grad, stride_grad, n_queries, MASKED, DV, BDV, RESTV, BLOCK_M)
    b_grad_v, b_grad_v_rest = add_weighted_rows(b_grad_v, b_grad_v_rest, b_p, b_grad, b_grad_rest, RESTV)
    b_ds = b_p * (products_of_rows(b_v, b_v_rest, b_grad, b_grad_rest, RESTV) - b_delta[None, :])
    if MASKED and MASK_DS:  # masked again: if a key that these queries do not see holds NaN or inf, 0 * NaN gives NaN
        b_ds = tl.where(m_seen, b_ds, 0.0)
    if inner is not None:
        b_ds = b_ds * (1 - b_scores * b_scores)
    b_grad_k, b_grad_k_rest = add_weighted_rows(b_grad_k, b_grad_k_rest, b_ds, b_q, b_q_rest, REST)
    return b_grad_k, b_grad_k_rest, b_grad_v, b_grad_v_rest


@triton.jit
def bwd_dkdv_queries(
    b_k, b_k_rest, b_v, b_v_rest, b_grad_k, b_grad_k_rest, b_grad_v, b_grad_v_rest,
    p_q, p_grad, p_lse_delta, stride_q, stride_q_head, stride_grad, stride_grad_head,
    i_first, i_end, counts, o_first, o_end, i_kv_head, n_shared, n_heads, n_queries, scale, inner,
    MASK_DS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, REST: tl.constexpr,
    DV: tl.constexpr, BDV: tl.constexpr, RESTV: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Add the contribution of the queries i_first <= q < i_end, over all heads that share the keys.

    A key is seen by those from o_first on, and unless o_end is None before o_end. ``counts`` is what ``cut`` returns
    for them. MASK_DS: whether the tile may hold keys that none of these queries sees, on no path.
    """
    n_front, n_unmasked, n_back = counts
    for i_shared in range(n_shared):
        i_h = i_kv_head * n_shared + i_shared
        p_q_head = p_q + i_h * stride_q_head
        p_grad_head = p_grad + i_h * stride_grad_head
        p_lse = p_lse_delta + i_h * n_queries
        p_delta = p_lse + n_heads.to(tl.int64) * n_queries
        for i in range(i_first + n_front * BLOCK_M, i_first + (n_front + n_unmasked) * BLOCK_M, BLOCK_M):
            i_q = tl.cast(i, tl.int64)
            b_grad_k, b_grad_k_rest, b_grad_v, b_grad_v_rest = _bwd_dkdv_tile(
                b_k, b_k_rest, b_v, b_v_rest, b_grad_k, b_grad_k_rest, b_grad_v, b_grad_v_rest,
                p_q_head + i_q * stride_q, p_grad_head + i_q * stride_grad, p_lse + i_q, p_delta + i_q,
                stride_q, stride_grad, BLOCK_M, o_first, None, scale, inner,
                False, MASK_DS, D, BD, REST, DV, BDV, RESTV, BLOCK_M,
            )  # fmt: skip
        for i in range(n_front + n_back):
            i_masked = i_first + tl.where(i < n_front, i, i + n_unmasked) * BLOCK_M
            n_left = i_end - i_masked
            o_unseen = o_first - i_masked
            o_seen = None
            if o_end is not None:
                o_seen = o_end - i_masked
            i_q = i_masked.to(tl.int64)
            b_grad_k, b_grad_k_rest, b_grad_v, b_grad_v_rest = _bwd_dkdv_tile(
                b_k, b_k_rest, b_v, b_v_rest, b_grad_k, b_grad_k_rest, b_grad_v, b_grad_v_rest,
                p_q_head + i_q * stride_q, p_grad_head + i_q * stride_grad, p_lse + i_q, p_delta + i_q,
                stride_q, stride_grad, n_left, o_unseen, o_seen, scale, inner,
                True, MASK_DS, D, BD, REST, DV, BDV, RESTV, BLOCK_M,
            )  # fmt: skip
    return b_grad_k, b_grad_k_rest, b_grad_v, b_grad_v_rest
