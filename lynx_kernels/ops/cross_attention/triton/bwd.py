"""The backward kernels of cross_attention. attention_common/triton/bwd.py has the equations."""

import triton
import triton.language as tl

from lynx_kernels.ops.attention_common.triton.bwd import bwd_dkdv_queries, bwd_dq_tile
from lynx_kernels.ops.attention_common.triton.tiles import LOG2E, cut, load_rows, store_rows, zero_rows
from lynx_kernels.ops.cross_attention.triton.tiles import tile_of_queries


@triton.jit
def cross_attention_bwd_dq_kernel(
    p_grad,  # (Q, H, D)
    p_q,  # (Q, H, D)
    p_k,  # (K, Hkv, D)
    p_v,  # (K, Hkv, D)
    p_lse_delta,  # (2, H, Q)
    p_segments,  # the layout's table
    p_grad_q,  # (num_splits, Q, H, D)
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
    UNIT: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    REST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dQ of one tile of queries and one head over one split of their keys, as in the forward."""
    i_first, i_end, i_keys, i_keys_end = tile_of_queries(p_segments, n_segments, BLOCK_M, BLOCK_N)
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
    scale_log2 = scale * LOG2E
    i_rest = i_keys + (i_keys_end - i_keys) // BLOCK_N * BLOCK_N  # the keys from here on need a mask
    for i in range(i_keys, i_rest, BLOCK_N):
        i_key = tl.cast(i, tl.int64)
        b_grad_q, b_grad_q_rest = bwd_dq_tile(
            b_q, b_q_rest, b_grad, b_grad_rest, b_lse, b_delta, b_grad_q, b_grad_q_rest,
            p_k + i_key * stride_k, p_v + i_key * stride_v, stride_k, stride_v, BLOCK_N, None, scale_log2,
            False, D, BD, REST, D, BD, REST, BLOCK_N,
        )  # fmt: skip
    for i in range(i_rest, i_keys_end, BLOCK_N):
        i_key = tl.cast(i, tl.int64)
        n_keys = i_keys_end - i
        b_grad_q, b_grad_q_rest = bwd_dq_tile(
            b_q, b_q_rest, b_grad, b_grad_rest, b_lse, b_delta, b_grad_q, b_grad_q_rest,
            p_k + i_key * stride_k, p_v + i_key * stride_v, stride_k, stride_v, n_keys,
            n_keys + tl.zeros([BLOCK_M], dtype=tl.int32), scale_log2,
            True, D, BD, REST, D, BD, REST, BLOCK_N,
        )  # fmt: skip
    i_row = (tl.program_id(2).to(tl.int64) * n_queries + i_first) * n_heads + i_h
    store_rows(p_grad_q + i_row * D, n_heads * D, n_rows, b_grad_q * scale, b_grad_q_rest * scale, D, BD, REST, BLOCK_M)


@triton.jit
def cross_attention_bwd_dkdv_kernel(
    p_grad,  # (Q, H, D)
    p_q,  # (Q, H, D)
    p_k,  # (K, Hkv, D)
    p_v,  # (K, Hkv, D)
    p_lse_delta,  # (2, H, Q)
    p_segments,  # the layout's table
    p_tile_offsets,  # its inverse table
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
    n_queries,
    n_keys,
    n_shared,  # H / Hkv
    scale,
    KEY_TILE: tl.constexpr,  # keys per tile of the inverse table
    UNIT: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    REST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dK and dV of one tile of keys and one key head, from each segment that sees a key of the inverse table's tile."""
    i_first = tl.program_id(0) * BLOCK_N
    i_kv_head = tl.program_id(1).to(tl.int64)
    n_kv_heads = tl.num_programs(1)
    n_rows = n_keys - i_first
    p_k += i_first.to(tl.int64) * (stride_k * UNIT) + i_kv_head * stride_k_head * UNIT
    p_v += i_first.to(tl.int64) * (stride_v * UNIT) + i_kv_head * stride_v_head * UNIT
    stride_q = stride_q * UNIT
    stride_q_head = tl.cast(stride_q_head, tl.int64) * UNIT
    stride_grad = stride_grad * UNIT
    stride_grad_head = tl.cast(stride_grad_head, tl.int64) * UNIT
    b_k, b_k_rest = load_rows(p_k, stride_k * UNIT, n_rows, True, D, BD, REST, BLOCK_N)
    b_v, b_v_rest = load_rows(p_v, stride_v * UNIT, n_rows, True, D, BD, REST, BLOCK_N)
    b_grad_k, b_grad_k_rest = zero_rows(BD, REST, BLOCK_N)
    b_grad_v, b_grad_v_rest = zero_rows(BD, REST, BLOCK_N)
    o_k = i_first + tl.arange(0, BLOCK_N)
    i_tile = i_first // KEY_TILE
    for i in range(tl.load(p_tile_offsets + i_tile), tl.load(p_tile_offsets + i_tile + 1)):
        p_row = p_segments + tl.load(p_tile_segments + i).to(tl.int64) * 3
        i_q_first = tl.load(p_row)
        i_q_last = tl.load(p_row + 3)
        i_seen = tl.load(p_row + 1)
        i_seen_end = tl.load(p_row + 2)
        # A key outside the span is seen by no query, not even by those beyond i_q_last in the last tile.
        o_first = tl.where((i_seen <= o_k) & (o_k < i_seen_end), i_q_first, i_q_last + BLOCK_M)
        is_whole = (i_seen <= i_first) & (i_first + BLOCK_N <= i_seen_end)
        i_whole = tl.where(is_whole, i_q_first, i_q_last)
        b_grad_k, b_grad_k_rest, b_grad_v, b_grad_v_rest = bwd_dkdv_queries(
            b_k, b_k_rest, b_v, b_v_rest, b_grad_k, b_grad_k_rest, b_grad_v, b_grad_v_rest,
            p_q, p_grad, p_lse_delta, stride_q, stride_q_head, stride_grad, stride_grad_head,
            i_q_first, i_q_last, cut(i_q_first, i_whole, i_q_last, i_q_last, BLOCK_M), o_first, None,
            i_kv_head, n_shared, n_kv_heads * n_shared, n_queries, scale * LOG2E, None,
            True, D, BD, REST, D, BD, REST, BLOCK_M,
        )  # fmt: skip
    i_row = i_first.to(tl.int64) * n_kv_heads + i_kv_head
    b_grad_k *= scale
    b_grad_k_rest *= scale
    store_rows(p_grad_k + i_row * D, n_kv_heads * D, n_rows, b_grad_k, b_grad_k_rest, D, BD, REST, BLOCK_N)
    store_rows(p_grad_v + i_row * D, n_kv_heads * D, n_rows, b_grad_v, b_grad_v_rest, D, BD, REST, BLOCK_N)
