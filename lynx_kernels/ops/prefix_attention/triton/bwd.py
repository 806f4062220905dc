"""The backward kernels of prefix_attention. attention_common/triton/bwd.py has the equations."""

import triton
import triton.language as tl

from lynx_kernels.ops.attention_common.triton.bwd import bwd_dkdv_queries, bwd_dq_tile
from lynx_kernels.ops.attention_common.triton.tiles import cut, find_block, load_rows, store_rows, zero_rows
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
def prefix_attention_bwd_dq_kernel(
    p_grad,  # (T, H, Dv)
    p_q,  # (T, H, D)
    p_k,  # (T, Hkv, D)
    p_v,  # (T, Hkv, Dv)
    p_lse_delta,  # (2, H, T)
    p_runs,  # the layout's tables
    p_tokens,
    p_grad_q,  # (T, H, D)
    stride_grad,
    stride_grad_head,
    stride_q,
    stride_q_head,
    stride_k,
    stride_k_head,
    stride_v,
    stride_v_head,
    n_runs,
    n_ranges,
    n_tokens,
    n_shared,  # H / Hkv
    extent,
    scale,
    scale_log2,  # of scores or, with a soft cap, of their tanh; times log2(e)
    inner,  # with a soft cap, the scale inside the tanh, else None
    LOCAL: tl.constexpr,
    RANGES: tl.constexpr,
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
    """dQ of one tile of queries and one head, as in the forward."""
    i_first, i_end, p_run = tile_of_queries(p_runs, n_runs, n_ranges, BLOCK_M)
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
    p_lse_delta += i_h * n_tokens + o_q

    b_q, b_q_rest = load_rows(p_q, stride_q * UNIT, n_rows, True, D, BD, REST, BLOCK_M)
    b_grad, b_grad_rest = load_rows(p_grad, stride_grad * UNIT, n_rows, True, DV, BDV, RESTV, BLOCK_M)
    b_lse = tl.load(p_lse_delta, mask=o_q < i_end, other=0.0)
    b_delta = tl.load(p_lse_delta + n_heads.to(tl.int64) * n_tokens, mask=o_q < i_end, other=0.0)
    b_grad_q, b_grad_q_rest = zero_rows(BD, REST, BLOCK_M)
    sight = sight_of_queries(p_tokens, n_tokens, p_run, i_first, i_end, extent, LOCAL, BLOCK_M)
    n_pairs = 1 if RANGES <= 2 else n_ranges - 1
    for i_pair in range(n_pairs):
        earlier, own = pair_of_ranges(i_pair, n_pairs, p_run, sight, LOCAL, RANGES, BLOCK_N)
        i_keys, i_keys_end, i_split, i_shift = unmasked_keys(earlier, own, RANGES, BLOCK_N)
        for i in range(i_keys, i_keys_end, BLOCK_N):
            i_key = unmasked_key(i, i_split, i_shift, RANGES)
            b_grad_q, b_grad_q_rest = bwd_dq_tile(
                b_q, b_q_rest, b_grad, b_grad_rest, b_lse, b_delta, b_grad_q, b_grad_q_rest,
                p_k + i_key * stride_k, p_v + i_key * stride_v, stride_k, stride_v, BLOCK_N, None, scale_log2,
                False, D, BD, REST, DV, BDV, RESTV, BLOCK_N, None, inner,
            )  # fmt: skip
    for i_pair in range(n_pairs):
        earlier, own = pair_of_ranges(i_pair, n_pairs, p_run, sight, LOCAL, RANGES, BLOCK_N)
        for i in range(number_of_masked_tiles(earlier, own, RANGES)):
            i_key, n_keys, o_seen, o_unseen = masked_tile(i, earlier, own, sight, RANGES, BLOCK_N)
            b_grad_q, b_grad_q_rest = bwd_dq_tile(
                b_q, b_q_rest, b_grad, b_grad_rest, b_lse, b_delta, b_grad_q, b_grad_q_rest,
                p_k + i_key * stride_k, p_v + i_key * stride_v, stride_k, stride_v, n_keys, o_seen, scale_log2,
                True, D, BD, REST, DV, BDV, RESTV, BLOCK_N, None if LOCAL is None else o_unseen, inner,
            )  # fmt: skip
    i_row = i_first.to(tl.int64) * n_heads + i_h
    store_rows(p_grad_q + i_row * D, n_heads * D, n_rows, b_grad_q * scale, b_grad_q_rest * scale, D, BD, REST, BLOCK_M)


@triton.jit
def _limit(i_pos, i_end_pos, extent, n_tokens, LOCAL: tl.constexpr):
    """The position at which queries see keys no more, given the keys' positions and the ends of their segments if full.

    At most n_tokens, so no sum is beyond 32 bits.
    """
    i_limit = i_pos if LOCAL == "window" else i_pos // extent * extent
    return tl.maximum(i_limit + tl.minimum(extent, n_tokens - i_limit), i_end_pos)


@triton.jit
def _run_of_token(p_runs, width, n_runs, i_token):
    """The last run that starts at or before the token. Empty runs with the same start come before it."""
    i_low = i_token * 0
    i_high = i_low + n_runs
    while i_high - i_low > 1:
        i_middle = (i_low + i_high) // 2
        is_after = tl.load(p_runs + i_middle.to(tl.int64) * width) > i_token
        i_low = tl.where(is_after, i_low, i_middle)
        i_high = tl.where(is_after, i_middle, i_high)
    return i_low


@triton.jit(do_not_specialize=["n_runs", "n_ranges", "n_key_runs", "extent"])
def prefix_attention_bwd_dkdv_kernel(
    p_grad,  # (T, H, Dv)
    p_q,  # (T, H, D)
    p_k,  # (T, Hkv, D)
    p_v,  # (T, Hkv, Dv)
    p_lse_delta,  # (2, H, T)
    p_runs,  # the layout's tables
    p_tokens,
    p_key_runs,
    p_grad_k,  # (T, Hkv, D)
    p_grad_v,  # (T, Hkv, Dv)
    stride_grad,
    stride_grad_head,
    stride_q,
    stride_q_head,
    stride_k,
    stride_k_head,
    stride_v,
    stride_v_head,
    n_runs,
    n_ranges,
    n_key_runs,
    n_tokens,
    n_shared,  # H / Hkv
    extent,
    scale,
    scale_log2,
    inner,
    LOCAL: tl.constexpr,
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
    """dK and dV of one tile of keys and one key head.

    The keys of a tile are of one run and have the same last query. So the queries that see any of them are one range,
    ``first <= q < last``. With a window or chunk they are a prefix of each run in that range; a run that starts beyond
    the keys' limit is left out together with its descendants.
    """
    i_kv_head = tl.program_id(1).to(tl.int64)
    n_kv_heads = tl.num_programs(1)
    i_key_run, i_block = find_block(p_key_runs, 1, n_key_runs, tl.program_id(0), BLOCK_N)
    i_first = tl.load(p_key_runs + i_key_run) + i_block * BLOCK_N
    i_end = tl.load(p_key_runs + i_key_run + 1)
    if i_first >= i_end:
        return
    n_rows = i_end - i_first
    p_k += i_first.to(tl.int64) * (stride_k * UNIT) + i_kv_head * stride_k_head * UNIT
    p_v += i_first.to(tl.int64) * (stride_v * UNIT) + i_kv_head * stride_v_head * UNIT
    stride_q = stride_q * UNIT
    stride_q_head = tl.cast(stride_q_head, tl.int64) * UNIT
    stride_grad = stride_grad * UNIT
    stride_grad_head = tl.cast(stride_grad_head, tl.int64) * UNIT
    b_k, b_k_rest = load_rows(p_k, stride_k * UNIT, n_rows, True, D, BD, REST, BLOCK_N)
    b_v, b_v_rest = load_rows(p_v, stride_v * UNIT, n_rows, True, DV, BDV, RESTV, BLOCK_N)
    b_grad_k, b_grad_k_rest = zero_rows(BD, REST, BLOCK_N)
    b_grad_v, b_grad_v_rest = zero_rows(BDV, RESTV, BLOCK_N)
    i_last = tl.minimum(i_first + BLOCK_N, i_end) - 1
    o_k = tl.minimum(i_first + tl.arange(0, BLOCK_N), i_last)  # rows behind the run are like its last
    o_first = tl.load(p_tokens + o_k)
    i_q_first = tl.load(p_tokens + i_first)
    i_q_whole = tl.load(p_tokens + i_last)
    p_see_end = p_tokens + tl.cast(n_tokens, tl.int64)
    i_q_last = tl.load(p_see_end + tl.cast(n_tokens, tl.int64) + i_first)
    n_heads = n_kv_heads * n_shared
    if LOCAL is None:
        b_grad_k, b_grad_k_rest, b_grad_v, b_grad_v_rest = bwd_dkdv_queries(
            b_k, b_k_rest, b_v, b_v_rest, b_grad_k, b_grad_k_rest, b_grad_v, b_grad_v_rest,
            p_q, p_grad, p_lse_delta, stride_q, stride_q_head, stride_grad, stride_grad_head,
            i_q_first, i_q_last, cut(i_q_first, i_q_whole, i_q_last, i_q_last, BLOCK_M), o_first, None,
            i_kv_head, n_shared, n_heads, n_tokens, scale_log2, inner,
            False, D, BD, REST, DV, BDV, RESTV, BLOCK_M,
        )  # fmt: skip
    else:
        width = n_ranges * 3
        i_run = _run_of_token(p_runs, width, n_runs, i_first)
        i_offset = tl.load(p_runs + i_run.to(tl.int64) * width + 1)
        o_limit = _limit(o_k - i_offset, tl.load(p_see_end + o_k) - i_offset, extent, n_tokens, LOCAL)
        i_limit_of_first = _limit(i_first - i_offset, tl.load(p_see_end + i_first) - i_offset, extent, n_tokens, LOCAL)
        i_limit_of_last = _limit(i_last - i_offset, tl.load(p_see_end + i_last) - i_offset, extent, n_tokens, LOCAL)
        i_start = i_q_first
        while i_start < i_q_last:
            p_run = p_runs + i_run.to(tl.int64) * width
            i_offset = tl.load(p_run + 1)
            # Where the queries of this run end that see each key, any key, and all.
            i_end_pos = tl.load(p_run + width) - i_offset
            o_span_end = tl.minimum(i_end_pos, o_limit) + i_offset
            i_span_end = tl.minimum(i_end_pos, i_limit_of_last) + i_offset
            i_whole_end = tl.minimum(i_end_pos, i_limit_of_first) + i_offset
            b_grad_k, b_grad_k_rest, b_grad_v, b_grad_v_rest = bwd_dkdv_queries(
                b_k, b_k_rest, b_v, b_v_rest, b_grad_k, b_grad_k_rest, b_grad_v, b_grad_v_rest,
                p_q, p_grad, p_lse_delta, stride_q, stride_q_head, stride_grad, stride_grad_head,
                i_start, i_span_end, cut(i_start, i_q_whole, i_whole_end, i_span_end, BLOCK_M),
                o_first, o_span_end,
                i_kv_head, n_shared, n_heads, n_tokens, scale_log2, inner,
                False, D, BD, REST, DV, BDV, RESTV, BLOCK_M,
            )  # fmt: skip
            i_run = tl.where(i_start < i_span_end, i_run + 1, tl.load(p_run + 2))
            i_start = tl.load(p_runs + i_run.to(tl.int64) * width)
    i_row = i_first.to(tl.int64) * n_kv_heads + i_kv_head
    b_grad_k *= scale
    b_grad_k_rest *= scale
    store_rows(p_grad_k + i_row * D, n_kv_heads * D, n_rows, b_grad_k, b_grad_k_rest, D, BD, REST, BLOCK_N)
    store_rows(p_grad_v + i_row * DV, n_kv_heads * DV, n_rows, b_grad_v, b_grad_v_rest, DV, BDV, RESTV, BLOCK_N)
