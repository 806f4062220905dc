"""The backward kernels of prefix and cross attention in Triton. tiles.py explains the names.

    P = exp(S - LSE)    dV = P^T dO    dS = P * (dO V^T - delta)    dQ = scale dS K    dK = scale dS^T Q

delta is rowsum(dO * O) - dLSE. The dQ kernel visits keys like the forward. The dK/dV kernel visits the queries that see
its keys. It computes scores transposed, S^T = K Q^T, because Triton before 3.7.1 miscompiles a transposed accumulator
as an operand of a product on Hopper. Each program writes its own outputs: no atomics, two runs agree bit by bit.
"""

import triton
import triton.language as tl

from lynx_kernels.ops.attention_common.triton.tiles import (
    add_weighted_rows,
    find_segment,
    load_rows,
    masked_tile,
    named,
    products_of_rows,
    store_rows,
    tile_of_queries,
    tiles_of_keys,
    unmasked_tile,
    zero_rows,
)

_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def attention_bwd_preprocess_kernel(
    p_grad,  # (T, H, D)
    p_out,  # (T, H, D)
    p_lse,  # (T, H)
    p_grad_lse,  # (T, H) or None
    p_lse_delta,  # (2, H, T): LSE times log2(e), and delta
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
    tl.store(p_lse_delta, b_lse * _LOG2E, mask=m_q)
    tl.store(p_lse_delta + n_heads.to(tl.int64) * n_queries, b_delta, mask=m_q)


@triton.jit
def _bwd_dq_tile(
    b_q, b_q_rest, b_grad, b_grad_rest, b_lse, b_delta, b_grad_q, b_grad_q_rest,
    p_k, p_v, stride_k, stride_v, n_keys, o_seen, scale,
    MASKED: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, REST: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Add the contribution of one key tile to dQ / scale. Arguments as in ``fwd.attend``."""
    b_k, b_k_rest = load_rows(p_k, stride_k, n_keys, MASKED, D, BD, REST, BLOCK_N)
    b_p = tl.exp2(products_of_rows(b_q, b_q_rest, b_k, b_k_rest, REST) * scale - b_lse[:, None])  # [BLOCK_M, BLOCK_N]
    if MASKED:
        b_p = tl.where(tl.arange(0, BLOCK_N)[None, :] < o_seen[:, None], b_p, 0.0)
    b_v, b_v_rest = load_rows(p_v, stride_v, n_keys, MASKED, D, BD, REST, BLOCK_N)
    b_ds = b_p * (products_of_rows(b_grad, b_grad_rest, b_v, b_v_rest, REST) - b_delta[:, None])
    return add_weighted_rows(b_grad_q, b_grad_q_rest, b_ds, b_k, b_k_rest, REST)


@triton.jit(repr=named("bwd_dq"))
def attention_bwd_dq_kernel(
    p_grad,  # (T, H, D)
    p_q,  # (T, H, D)
    p_k,  # (K, Hkv, D)
    p_v,  # (K, Hkv, D)
    p_lse_delta,  # (2, H, T)
    p_segments,  # the layout's table
    p_grad_q,  # (num_splits, T, H, D); num_splits > 1 only for spans
    stride_grad,
    stride_grad_head,
    stride_q,
    stride_q_head,
    stride_k,
    stride_k_head,
    stride_v,
    stride_v_head,
    n_segments,
    n_queries,
    n_shared,  # H / Hkv
    scale,
    SPANS: tl.constexpr,
    ROOT_IS_CAUSAL: tl.constexpr,
    UNIT: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    REST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dQ of one query tile and one head, as in the forward."""
    i_first, i_end, ranges = tile_of_queries(p_segments, n_segments, SPANS, ROOT_IS_CAUSAL, BLOCK_M, BLOCK_N)
    if i_first >= i_end:
        return
    i_h = tl.program_id(1).to(tl.int64)
    n_heads = tl.num_programs(1)
    n_rows = i_end - i_first
    p_grad += i_first.to(tl.int64) * (stride_grad * UNIT) + i_h * stride_grad_head * UNIT
    p_q += i_first.to(tl.int64) * (stride_q * UNIT) + i_h * stride_q_head * UNIT
    p_k += i_h // n_shared * stride_k_head * UNIT
    p_v += i_h // n_shared * stride_v_head * UNIT
    stride_k = stride_k * UNIT
    stride_v = stride_v * UNIT
    o_q = i_first + tl.arange(0, BLOCK_M)
    p_lse_delta += i_h * n_queries + o_q

    b_q, b_q_rest = load_rows(p_q, stride_q * UNIT, n_rows, True, D, BD, REST, BLOCK_M)
    b_grad, b_grad_rest = load_rows(p_grad, stride_grad * UNIT, n_rows, True, D, BD, REST, BLOCK_M)
    b_lse = tl.load(p_lse_delta, mask=o_q < i_end, other=0.0)
    b_delta = tl.load(p_lse_delta + n_heads.to(tl.int64) * n_queries, mask=o_q < i_end, other=0.0)
    b_grad_q, b_grad_q_rest = zero_rows(BD, REST, BLOCK_M)
    scale_log2 = scale * _LOG2E
    n_unmasked, n_masked, counts = tiles_of_keys(i_first, ranges, BLOCK_N)
    for i in range(n_unmasked):
        i_key = unmasked_tile(i, ranges, counts, BLOCK_N)
        b_grad_q, b_grad_q_rest = _bwd_dq_tile(
            b_q, b_q_rest, b_grad, b_grad_rest, b_lse, b_delta, b_grad_q, b_grad_q_rest,
            p_k + i_key * stride_k, p_v + i_key * stride_v, stride_k, stride_v, BLOCK_N, o_q, scale_log2,
            False, D, BD, REST, BLOCK_N,
        )  # fmt: skip
    for i in range(n_masked):
        i_key, n_keys, o_seen = masked_tile(i, o_q, ranges, counts, BLOCK_N)
        b_grad_q, b_grad_q_rest = _bwd_dq_tile(
            b_q, b_q_rest, b_grad, b_grad_rest, b_lse, b_delta, b_grad_q, b_grad_q_rest,
            p_k + i_key * stride_k, p_v + i_key * stride_v, stride_k, stride_v, n_keys, o_seen, scale_log2,
            True, D, BD, REST, BLOCK_N,
        )  # fmt: skip
    i_row = (tl.program_id(2).to(tl.int64) * n_queries + i_first) * n_heads + i_h
    store_rows(p_grad_q + i_row * D, n_heads * D, n_rows, b_grad_q * scale, b_grad_q_rest * scale, D, BD, REST, BLOCK_M)


@triton.jit
def _bwd_dkdv_tile(
    b_k, b_k_rest, b_v, b_v_rest, b_grad_k, b_grad_k_rest, b_grad_v, b_grad_v_rest,
    p_q, p_grad, p_lse, p_delta, stride_q, stride_grad, n_queries, o_unseen, scale,
    SPANS: tl.constexpr, MASKED: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, REST: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Add the contribution of one query tile to dK / scale and dV. The first o_unseen queries do not see the key.

    Queries beyond n_queries contribute nothing: there q, dO, LSE and delta are 0, so P^T is 1 and dS^T is 0.
    """
    o_q = tl.arange(0, BLOCK_M)
    b_q, b_q_rest = load_rows(p_q, stride_q, n_queries, MASKED, D, BD, REST, BLOCK_M)
    if MASKED:
        b_lse = tl.load(p_lse + o_q, mask=o_q < n_queries, other=0.0)
        b_delta = tl.load(p_delta + o_q, mask=o_q < n_queries, other=0.0)
    else:
        b_lse = tl.load(p_lse + o_q)
        b_delta = tl.load(p_delta + o_q)
    b_p = tl.exp2(products_of_rows(b_k, b_k_rest, b_q, b_q_rest, REST) * scale - b_lse[None, :])  # [BLOCK_N, BLOCK_M]
    if MASKED:
        m_seen = o_q[None, :] >= o_unseen[:, None]
        b_p = tl.where(m_seen, b_p, 0.0)
    b_grad, b_grad_rest = load_rows(p_grad, stride_grad, n_queries, MASKED, D, BD, REST, BLOCK_M)
    b_grad_v, b_grad_v_rest = add_weighted_rows(b_grad_v, b_grad_v_rest, b_p, b_grad, b_grad_rest, REST)
    b_ds = b_p * (products_of_rows(b_v, b_v_rest, b_grad, b_grad_rest, REST) - b_delta[None, :])
    if MASKED and SPANS:  # masked again: if a key that these queries do not see holds NaN or inf, 0 * NaN gives NaN
        b_ds = tl.where(m_seen, b_ds, 0.0)
    b_grad_k, b_grad_k_rest = add_weighted_rows(b_grad_k, b_grad_k_rest, b_ds, b_q, b_q_rest, REST)
    return b_grad_k, b_grad_k_rest, b_grad_v, b_grad_v_rest


@triton.jit
def _bwd_dkdv_range(
    b_k, b_k_rest, b_v, b_v_rest, b_grad_k, b_grad_k_rest, b_grad_v, b_grad_v_rest,
    p_q, p_grad, p_lse_delta, stride_q, stride_q_head, stride_grad, stride_grad_head,
    i_first, i_last, n_masked, o_first, i_kv_head, n_shared, n_heads, n_queries, scale,
    SPANS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, REST: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Add the contribution of the queries i_first <= q < i_last, over all heads that share the keys.

    A key is not seen by queries before o_first. All of these are in the first n_masked tiles or beyond i_last.
    """
    n_unmasked = (i_last - i_first) // BLOCK_M
    n_tiles = tl.cdiv(i_last - i_first, BLOCK_M)
    n_masked = tl.minimum(n_masked, n_tiles)
    n_inner = tl.maximum(n_unmasked, n_masked)  # tiles n_masked .. n_inner - 1 need no mask
    for i_shared in range(n_shared):
        i_h = i_kv_head * n_shared + i_shared
        p_q_head = p_q + i_h * stride_q_head
        p_grad_head = p_grad + i_h * stride_grad_head
        p_lse = p_lse_delta + i_h * n_queries
        p_delta = p_lse + n_heads.to(tl.int64) * n_queries
        for i in range(n_masked, n_inner):
            i_q = (i_first + i * BLOCK_M).to(tl.int64)
            b_grad_k, b_grad_k_rest, b_grad_v, b_grad_v_rest = _bwd_dkdv_tile(
                b_k, b_k_rest, b_v, b_v_rest, b_grad_k, b_grad_k_rest, b_grad_v, b_grad_v_rest,
                p_q_head + i_q * stride_q, p_grad_head + i_q * stride_grad, p_lse + i_q, p_delta + i_q,
                stride_q, stride_grad, BLOCK_M, o_first, scale, SPANS, False, D, BD, REST, BLOCK_M,
            )  # fmt: skip
        for i in range(n_masked + n_tiles - n_inner):
            i_q = i_first + tl.where(i < n_masked, i, i - n_masked + n_inner) * BLOCK_M
            n_left = i_last - i_q
            o_unseen = o_first - i_q
            i_q = i_q.to(tl.int64)
            b_grad_k, b_grad_k_rest, b_grad_v, b_grad_v_rest = _bwd_dkdv_tile(
                b_k, b_k_rest, b_v, b_v_rest, b_grad_k, b_grad_k_rest, b_grad_v, b_grad_v_rest,
                p_q_head + i_q * stride_q, p_grad_head + i_q * stride_grad, p_lse + i_q, p_delta + i_q,
                stride_q, stride_grad, n_left, o_unseen, scale, SPANS, True, D, BD, REST, BLOCK_M,
            )  # fmt: skip
    return b_grad_k, b_grad_k_rest, b_grad_v, b_grad_v_rest


@triton.jit(repr=named("bwd_dkdv"))
def attention_bwd_dkdv_kernel(
    p_grad,  # (T, H, D)
    p_q,  # (T, H, D)
    p_k,  # (K, Hkv, D)
    p_v,  # (K, Hkv, D)
    p_lse_delta,  # (2, H, T)
    p_segments,  # the layout's table
    p_tile_offsets,  # SpanLayout's inverse table, or None
    p_tile_segments,
    p_grad_k,  # (K, Hkv, D)
    p_grad_v,  # (K, Hkv, D)
    stride_grad,
    stride_grad_head,
    stride_q,
    stride_q_head,
    stride_k,
    stride_k_head,
    stride_v,
    stride_v_head,
    n_segments,
    n_queries,
    n_keys,
    n_shared,  # H / Hkv
    scale,
    SPANS: tl.constexpr,
    ROOT_IS_CAUSAL: tl.constexpr,
    KEY_TILE: tl.constexpr,  # keys per tile of the inverse table
    UNIT: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    REST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dK and dV of one key tile and one key head.

    PackedLayout: the queries that see a key are one range; its first tiles hold the diagonal. SpanLayout: one range for
    each segment that sees a key of the tile.
    """
    i_kv_head = tl.program_id(1).to(tl.int64)
    n_kv_heads = tl.num_programs(1)
    if SPANS:
        i_first = tl.program_id(0) * BLOCK_N
        i_end = n_keys
    else:
        i_segment, i_block = find_segment(p_segments, n_segments, tl.program_id(0), 4, BLOCK_N)
        i_start = tl.load(p_segments + i_segment * 4)
        i_end = tl.load(p_segments + i_segment * 4 + 4)
        i_first = i_start + i_block * BLOCK_N
        if i_first >= i_end:
            return
    p_k += i_first.to(tl.int64) * (stride_k * UNIT) + i_kv_head * stride_k_head * UNIT
    p_v += i_first.to(tl.int64) * (stride_v * UNIT) + i_kv_head * stride_v_head * UNIT
    stride_q = stride_q * UNIT
    stride_q_head = tl.cast(stride_q_head, tl.int64) * UNIT
    stride_grad = stride_grad * UNIT
    stride_grad_head = tl.cast(stride_grad_head, tl.int64) * UNIT
    b_k, b_k_rest = load_rows(p_k, stride_k * UNIT, i_end - i_first, True, D, BD, REST, BLOCK_N)
    b_v, b_v_rest = load_rows(p_v, stride_v * UNIT, i_end - i_first, True, D, BD, REST, BLOCK_N)
    b_grad_k, b_grad_k_rest = zero_rows(BD, REST, BLOCK_N)
    b_grad_v, b_grad_v_rest = zero_rows(BD, REST, BLOCK_N)
    o_k = i_first + tl.arange(0, BLOCK_N)
    scale_log2 = scale * _LOG2E
    n_heads = n_kv_heads * n_shared
    if SPANS:
        i_tile = i_first // KEY_TILE
        for i in range(tl.load(p_tile_offsets + i_tile), tl.load(p_tile_offsets + i_tile + 1)):
            p_row = p_segments + tl.load(p_tile_segments + i) * 3
            i_q_first = tl.load(p_row)
            i_q_last = tl.load(p_row + 3)
            i_seen = tl.load(p_row + 1)
            i_seen_end = tl.load(p_row + 2)
            # A key outside the span is seen by no query, not even by those beyond i_q_last in the last tile.
            o_first = tl.where((i_seen <= o_k) & (o_k < i_seen_end), i_q_first, i_q_last + BLOCK_M)
            is_unmasked = (i_seen <= i_first) & (i_first + BLOCK_N <= i_seen_end)
            b_grad_k, b_grad_k_rest, b_grad_v, b_grad_v_rest = _bwd_dkdv_range(
                b_k, b_k_rest, b_v, b_v_rest, b_grad_k, b_grad_k_rest, b_grad_v, b_grad_v_rest,
                p_q, p_grad, p_lse_delta, stride_q, stride_q_head, stride_grad, stride_grad_head,
                i_q_first, i_q_last, tl.where(is_unmasked, 0, tl.cdiv(i_q_last - i_q_first, BLOCK_M)), o_first,
                i_kv_head, n_shared, n_heads, n_queries, scale_log2, SPANS, D, BD, REST, BLOCK_M,
            )  # fmt: skip
    else:
        i_root_end = tl.load(p_segments + i_segment * 4 + 2)
        i_q_last = tl.where(i_start < i_root_end, tl.load(p_segments + i_segment * 4 + 3), i_end)
        is_full = False if ROOT_IS_CAUSAL else i_start < i_root_end
        i_q_first = tl.where(is_full, i_start, i_first)
        b_grad_k, b_grad_k_rest, b_grad_v, b_grad_v_rest = _bwd_dkdv_range(
            b_k, b_k_rest, b_v, b_v_rest, b_grad_k, b_grad_k_rest, b_grad_v, b_grad_v_rest,
            p_q, p_grad, p_lse_delta, stride_q, stride_q_head, stride_grad, stride_grad_head,
            i_q_first, i_q_last, tl.where(is_full, 0, tl.cdiv(BLOCK_N, BLOCK_M)), tl.where(is_full, i_start, o_k),
            i_kv_head, n_shared, n_heads, n_queries, scale_log2, SPANS, D, BD, REST, BLOCK_M,
        )  # fmt: skip
    i_row = i_first.to(tl.int64) * n_kv_heads + i_kv_head
    n_rows = i_end - i_first
    b_grad_k *= scale
    b_grad_k_rest *= scale
    store_rows(p_grad_k + i_row * D, n_kv_heads * D, n_rows, b_grad_k, b_grad_k_rest, D, BD, REST, BLOCK_N)
    store_rows(p_grad_v + i_row * D, n_kv_heads * D, n_rows, b_grad_v, b_grad_v_rest, D, BD, REST, BLOCK_N)
