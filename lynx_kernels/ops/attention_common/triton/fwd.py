"""The forward kernel of prefix and cross attention in Triton. tiles.py explains the names.

One program computes the output of one query tile and one head. First it visits the unmasked key tiles, which all its
queries see. Then it visits the masked ones: at most one at the end of the root, and those on the diagonal.
"""

import triton
import triton.language as tl

from lynx_kernels.ops.attention_common.triton.tiles import (
    add_weighted_rows,
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

_LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def attend(
    b_q, b_q_rest, b_out, b_out_rest, b_max, b_sum,
    p_k, p_v, stride_k, stride_v, n_keys, o_seen, scale,
    MASKED: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, REST: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Online softmax over one tile of n_keys keys, in base 2. Each query sees the first o_seen of them."""
    b_k, b_k_rest = load_rows(p_k, stride_k, n_keys, MASKED, D, BD, REST, BLOCK_N)
    b_scores = products_of_rows(b_q, b_q_rest, b_k, b_k_rest, REST)  # [BLOCK_M, BLOCK_N]
    if MASKED:
        b_scores = tl.where(tl.arange(0, BLOCK_N)[None, :] < o_seen[:, None], b_scores, float("-inf"))
    # Every query sees the first key of its first tile, so the maximum is finite from then on.
    b_new_max = tl.maximum(b_max, tl.max(b_scores, 1) * scale)
    b_p = tl.exp2(b_scores * scale - b_new_max[:, None])
    b_rescale = tl.exp2(b_max - b_new_max)
    b_sum = b_sum * b_rescale + tl.sum(b_p, 1)
    b_out = b_out * b_rescale[:, None]
    b_out_rest = b_out_rest * b_rescale[:, None]
    b_v, b_v_rest = load_rows(p_v, stride_v, n_keys, MASKED, D, BD, REST, BLOCK_N)
    b_out, b_out_rest = add_weighted_rows(b_out, b_out_rest, b_p, b_v, b_v_rest, REST)
    return b_out, b_out_rest, b_new_max, b_sum


@triton.jit(repr=named("fwd"))
def attention_fwd_kernel(
    p_q,  # (T, H, D)
    p_k,  # (K, Hkv, D)
    p_v,  # (K, Hkv, D)
    p_segments,  # the layout's table
    p_out,  # (num_splits, T, H, D); num_splits > 1 only for spans
    p_lse,  # (num_splits, T, H)
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
    SPANS: tl.constexpr,  # whether the table belongs to a SpanLayout
    ROOT_IS_CAUSAL: tl.constexpr,
    UNIT: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    REST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    i_first, i_end, ranges = tile_of_queries(p_segments, n_segments, SPANS, ROOT_IS_CAUSAL, BLOCK_M, BLOCK_N)
    if i_first >= i_end:
        return
    i_h = tl.program_id(1)
    n_heads = tl.num_programs(1)
    p_q += i_first.to(tl.int64) * (stride_q * UNIT) + i_h.to(tl.int64) * stride_q_head * UNIT
    i_kv_head = (i_h // n_shared).to(tl.int64)
    p_k += i_kv_head * stride_k_head * UNIT
    p_v += i_kv_head * stride_v_head * UNIT
    stride_k = stride_k * UNIT
    stride_v = stride_v * UNIT

    b_q, b_q_rest = load_rows(p_q, stride_q * UNIT, i_end - i_first, True, D, BD, REST, BLOCK_M)
    if NEGATIVE:  # so that the maximum of the products gives the maximum of the scores
        b_q = -b_q
        if REST > 0:
            b_q_rest = -b_q_rest
    b_out, b_out_rest = zero_rows(BD, REST, BLOCK_M)
    b_max = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    b_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    o_q = i_first + tl.arange(0, BLOCK_M)
    n_unmasked, n_masked, counts = tiles_of_keys(i_first, ranges, BLOCK_N)
    for i in range(n_unmasked):
        i_key = unmasked_tile(i, ranges, counts, BLOCK_N)
        b_out, b_out_rest, b_max, b_sum = attend(
            b_q, b_q_rest, b_out, b_out_rest, b_max, b_sum,
            p_k + i_key * stride_k, p_v + i_key * stride_v, stride_k, stride_v, BLOCK_N, o_q, scale,
            False, D, BD, REST, BLOCK_N,
        )  # fmt: skip
    for i in range(n_masked):
        i_key, n_keys, o_seen = masked_tile(i, o_q, ranges, counts, BLOCK_N)
        b_out, b_out_rest, b_max, b_sum = attend(
            b_q, b_q_rest, b_out, b_out_rest, b_max, b_sum,
            p_k + i_key * stride_k, p_v + i_key * stride_v, stride_k, stride_v, n_keys, o_seen, scale,
            True, D, BD, REST, BLOCK_N,
        )  # fmt: skip

    # Without keys the denominator is 0 and the maximum is -inf: output 0, LSE -inf.
    b_inverse = 1 / tl.where(b_sum == 0, 1.0, b_sum)[:, None]
    i_row = (tl.program_id(2).to(tl.int64) * n_queries + i_first) * n_heads + i_h
    store_rows(
        p_out + i_row * D, n_heads * D, i_end - i_first, b_out * b_inverse, b_out_rest * b_inverse, D, BD, REST, BLOCK_M
    )
    b_lse = (b_max + tl.log2(b_sum)) * _LN2
    tl.store(p_lse + i_row + tl.arange(0, BLOCK_M) * n_heads, b_lse, mask=o_q < i_end)
