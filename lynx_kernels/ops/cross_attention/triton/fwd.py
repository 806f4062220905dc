"""The forward kernel of cross_attention. attention_common/triton/tiles.py explains the names."""

import triton
import triton.language as tl

from lynx_kernels.ops.attention_common.triton.fwd import attend
from lynx_kernels.ops.attention_common.triton.tiles import LN2, load_rows, store_rows, zero_rows
from lynx_kernels.ops.cross_attention.triton.tiles import tile_of_queries


@triton.jit
def cross_attention_fwd_kernel(
    p_q,  # (Q, H, D)
    p_k,  # (K, Hkv, D)
    p_v,  # (K, Hkv, D)
    p_segments,  # the layout's table
    p_out,  # (num_splits, Q, H, D)
    p_lse,  # (num_splits, Q, H)
    stride_q,
    stride_q_head,
    stride_k,
    stride_k_head,
    stride_v,
    stride_v_head,
    n_segments,
    n_queries,
    n_shared,  # H / Hkv
    scale,  # times log2(e), > 0
    NEGATIVE: tl.constexpr,  # whether the true scale is negative
    UNIT: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    REST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The output of one tile of queries and one head over one split of their keys, of which only the last tile needs a
    mask."""
    i_first, i_end, i_keys, i_keys_end = tile_of_queries(p_segments, n_segments, BLOCK_M, BLOCK_N)
    if i_first >= i_end:
        return
    i_h = tl.program_id(1)
    n_heads = tl.num_programs(1)
    n_rows = i_end - i_first
    p_q += i_first.to(tl.int64) * (stride_q * UNIT) + i_h.to(tl.int64) * stride_q_head * UNIT
    i_kv_head = (i_h // n_shared).to(tl.int64)
    p_k += i_kv_head * stride_k_head * UNIT
    p_v += i_kv_head * stride_v_head * UNIT
    stride_k = stride_k * UNIT
    stride_v = stride_v * UNIT

    b_q, b_q_rest = load_rows(p_q, stride_q * UNIT, n_rows, True, D, BD, REST, BLOCK_M)
    if NEGATIVE:  # so that the maximum of the products gives the maximum of the scores
        b_q = -b_q
        if REST > 0:
            b_q_rest = -b_q_rest
    b_out, b_out_rest = zero_rows(BD, REST, BLOCK_M)
    b_max = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    b_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    i_rest = i_keys + (i_keys_end - i_keys) // BLOCK_N * BLOCK_N  # the keys from here on need a mask
    for i in range(i_keys, i_rest, BLOCK_N):
        i_key = tl.cast(i, tl.int64)
        b_out, b_out_rest, b_max, b_sum = attend(
            b_q, b_q_rest, b_out, b_out_rest, b_max, b_sum,
            p_k + i_key * stride_k, p_v + i_key * stride_v, stride_k, stride_v, BLOCK_N, None, scale,
            False, D, BD, REST, D, BD, REST, BLOCK_N,
        )  # fmt: skip
    for i in range(i_rest, i_keys_end, BLOCK_N):
        i_key = tl.cast(i, tl.int64)
        n_keys = i_keys_end - i
        b_out, b_out_rest, b_max, b_sum = attend(
            b_q, b_q_rest, b_out, b_out_rest, b_max, b_sum,
            p_k + i_key * stride_k, p_v + i_key * stride_v, stride_k, stride_v, n_keys,
            n_keys + tl.zeros([BLOCK_M], dtype=tl.int32), scale,
            True, D, BD, REST, D, BD, REST, BLOCK_N,
        )  # fmt: skip

    # Without keys the denominator is 0 and the maximum is -inf: output 0, LSE -inf.
    b_inverse = 1 / tl.where(b_sum == 0, 1.0, b_sum)[:, None]
    i_row = (tl.program_id(2).to(tl.int64) * n_queries + i_first) * n_heads + i_h
    b_out = b_out * b_inverse
    b_out_rest = b_out_rest * b_inverse
    store_rows(p_out + i_row * D, n_heads * D, n_rows, b_out, b_out_rest, D, BD, REST, BLOCK_M)
    o_q = tl.arange(0, BLOCK_M)
    tl.store(p_lse + i_row + o_q * n_heads, (b_max + tl.log2(b_sum)) * LN2, mask=o_q < n_rows)
