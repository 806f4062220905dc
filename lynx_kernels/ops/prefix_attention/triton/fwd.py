"""The forward kernel of prefix_attention. attention_common/triton/tiles.py explains the names."""

import triton
import triton.language as tl

from lynx_kernels.ops.attention_common.triton.fwd import attend
from lynx_kernels.ops.attention_common.triton.tiles import LN2, LOG2E, load_rows, store_rows, zero_rows
from lynx_kernels.ops.prefix_attention.triton.ranges import (
    masked_tile,
    number_of_masked_tiles,
    pair_of_ranges,
    sight_of_queries,
    tile_of_queries,
    unmasked_key,
    unmasked_keys,
)


@triton.jit(do_not_specialize=["n_runs", "n_ranges", "extent"])
def prefix_attention_fwd_kernel(
    p_q,  # (T, H, D)
    p_k,  # (T, Hkv, D)
    p_v,  # (T, Hkv, Dv)
    p_sinks,  # (H,) or None
    p_runs,  # the layout's tables
    p_tokens,
    p_out,  # (T, H, Dv)
    p_lse,  # (T, H)
    stride_q,
    stride_q_head,
    stride_k,
    stride_k_head,
    stride_v,
    stride_v_head,
    n_runs,
    n_ranges,  # of a run, its own included
    n_tokens,
    n_shared,  # H / Hkv
    extent,  # of the window or chunk
    scale,  # of scores or, with a soft cap, of their tanh; times log2(e), > 0
    inner,  # with a soft cap, the scale inside the tanh, else None
    NEGATIVE: tl.constexpr,  # whether the true scale is negative, without a soft cap
    LOCAL: tl.constexpr,
    RANGES: tl.constexpr,  # the most ranges of a run: 1, 2, or 3 for more
    UNIT: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    REST: tl.constexpr,
    DV: tl.constexpr,
    BDV: tl.constexpr,
    RESTV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The output of one tile of queries and one head."""
    i_first, i_end, p_run = tile_of_queries(p_runs, n_runs, n_ranges, BLOCK_M)
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
    b_out, b_out_rest = zero_rows(BDV, RESTV, BLOCK_M)
    b_max = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    b_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    sight = sight_of_queries(p_tokens, n_tokens, p_run, i_first, i_end, extent, LOCAL, BLOCK_M)
    n_pairs = 1 if RANGES <= 2 else n_ranges - 1
    for i_pair in range(n_pairs):
        earlier, own = pair_of_ranges(i_pair, n_pairs, p_run, sight, LOCAL, RANGES, BLOCK_N)
        i_keys, i_keys_end, i_split, i_shift = unmasked_keys(earlier, own, RANGES, BLOCK_N)
        for i in range(i_keys, i_keys_end, BLOCK_N):
            i_key = unmasked_key(i, i_split, i_shift, RANGES)
            b_out, b_out_rest, b_max, b_sum = attend(
                b_q, b_q_rest, b_out, b_out_rest, b_max, b_sum,
                p_k + i_key * stride_k, p_v + i_key * stride_v, stride_k, stride_v, BLOCK_N, None, scale,
                False, D, BD, REST, DV, BDV, RESTV, BLOCK_N, None, inner,
            )  # fmt: skip
    for i_pair in range(n_pairs):
        earlier, own = pair_of_ranges(i_pair, n_pairs, p_run, sight, LOCAL, RANGES, BLOCK_N)
        for i in range(number_of_masked_tiles(earlier, own, RANGES)):
            i_key, n_keys, o_seen, o_unseen = masked_tile(i, earlier, own, sight, RANGES, BLOCK_N)
            b_out, b_out_rest, b_max, b_sum = attend(
                b_q, b_q_rest, b_out, b_out_rest, b_max, b_sum,
                p_k + i_key * stride_k, p_v + i_key * stride_v, stride_k, stride_v, n_keys, o_seen, scale,
                True, D, BD, REST, DV, BDV, RESTV, BLOCK_N, None if LOCAL is None else o_unseen, inner,
            )  # fmt: skip

    if p_sinks is not None:  # one more key, without a value
        b_sink = tl.load(p_sinks + i_h).to(tl.float32) * LOG2E
        b_new_max = tl.maximum(b_max, b_sink)
        b_rescale = tl.exp2(b_max - b_new_max)
        b_sum = b_sum * b_rescale + tl.exp2(b_sink - b_new_max)
        b_out = b_out * b_rescale[:, None]
        b_out_rest = b_out_rest * b_rescale[:, None]
        b_max = b_new_max
    b_inverse = 1 / b_sum[:, None]
    i_row = i_first.to(tl.int64) * n_heads + i_h
    b_out = b_out * b_inverse
    b_out_rest = b_out_rest * b_inverse
    store_rows(p_out + i_row * DV, n_heads * DV, n_rows, b_out, b_out_rest, DV, BDV, RESTV, BLOCK_M)
    o_q = tl.arange(0, BLOCK_M)
    tl.store(p_lse + i_row + o_q * n_heads, (b_max + tl.log2(b_sum)) * LN2, mask=o_q < n_rows)
