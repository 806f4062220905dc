"""The decoding kernel. attention_common/triton/tiles.py explains the names."""

import triton
import triton.language as tl

from lynx_kernels.ops.attention_common.triton.fwd import attend
from lynx_kernels.ops.attention_common.triton.tiles import LN2, LOG2E, zero_rows


@triton.jit
def _readers_of_range(
    p_ranges, n_ranges, i_start, i_end, i_branch, o_slot, n_branches, BLOCK_M: tl.constexpr, SCAN: tl.constexpr
):  # fmt: skip
    """The branches from i_branch on that read the same range, by slot, [BLOCK_M]; and how many of those stand before.

    p_ranges points to the range of branch 0. A slot without a branch gets n_branches.
    """
    n_before = i_branch * 0
    n_since = i_branch * 0
    b_branch = tl.zeros([BLOCK_M], dtype=tl.int32) + n_branches
    for i_first in range(0, n_branches, SCAN):
        o_branch = i_first + tl.arange(0, SCAN)
        p_range = p_ranges + o_branch * (2 * n_ranges)
        m_branch = o_branch < n_branches
        b_start = tl.load(p_range, mask=m_branch, other=-1).to(tl.int32)
        b_end = tl.load(p_range + 1, mask=m_branch, other=-1).to(tl.int32)
        m_same = (b_start == i_start) & (b_end == i_end)
        m_since = m_same & (o_branch >= i_branch)
        b_slot = n_since + tl.cumsum(m_since.to(tl.int32), 0) - 1
        m_slot = m_since[None, :] & (b_slot[None, :] == o_slot[:, None])  # [BLOCK_M, SCAN]
        b_branch = tl.minimum(b_branch, tl.min(tl.where(m_slot, o_branch[None, :], n_branches), 1))
        n_before += tl.sum((m_same & (o_branch < i_branch)).to(tl.int32), 0)
        n_since += tl.sum(m_since.to(tl.int32), 0)
    return b_branch, n_before


@triton.jit
def _unseen(
    p_ranges, p_branch_lengths, b_branch, m_row, o_query, n_ranges, i_range, n_queries, extent, LOCAL: tl.constexpr
):  # fmt: skip
    """How many keys of range i_range of its branch lie before the window or chunk of each row's query.

    For i_range = n_ranges, of the branch's own keys. May be negative, or more than there are.
    """
    b_place = tl.load(p_branch_lengths + b_branch, mask=m_row, other=0).to(tl.int32) - n_queries + o_query
    b_offset = b_place * 0
    for i in range(n_ranges):
        p_range = p_ranges + (b_branch * n_ranges + i) * 2
        b_start = tl.load(p_range, mask=m_row, other=0).to(tl.int32)
        b_length = tl.load(p_range + 1, mask=m_row, other=0).to(tl.int32) - b_start
        b_place += b_length
        b_offset += tl.where(i < i_range, b_length, 0)
    b_floor = b_place - extent + 1 if LOCAL == "window" else b_place // extent * extent
    return b_floor - b_offset


@triton.jit(do_not_specialize=["n_ranges", "n_range_splits", "n_shared_splits", "extent"])
def prefix_attention_decode_fwd_kernel(
    p_q,  # (B, Q, H, D)
    p_shared_k,  # (K, Hkv, D)
    p_shared_v,  # (K, Hkv, Dv)
    p_branch_k,  # (B, Lb, Hkv, D)
    p_branch_v,  # (B, Lb, Hkv, Dv)
    p_sinks,  # (H,) or None
    p_ranges,  # (B, P, 2)
    p_branch_lengths,  # (B,)
    p_out,  # (num_splits, B, Q, H, Dv)
    p_lse,  # (num_splits, B, Q, H)
    stride_shared_k,
    stride_shared_k_head,
    stride_shared_v,
    stride_shared_v_head,
    stride_branch_k,
    stride_branch_k_key,
    stride_branch_k_head,
    stride_branch_v,
    stride_branch_v_key,
    stride_branch_v_head,
    n_branches,
    n_queries,
    n_ranges,
    n_shared,  # H / Hkv
    n_slots,  # branches that share a tile of a range
    n_range_splits,  # of a range
    n_shared_splits,  # the first n_shared_splits splits are of the ranges, the others of the branch
    extent,  # of the window or chunk
    scale,  # of scores or, with a soft cap, of their tanh; times log2(e), > 0
    inner,  # with a soft cap, the scale inside the tanh, else None
    NEGATIVE: tl.constexpr,  # whether the true scale is negative, without a soft cap
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
    SCAN: tl.constexpr,
):
    """One tile of rows, one key head, one split of the keys.

    The rows of a branch are its queries times the heads that share the key head. For a split of a branch's keys, a tile
    holds rows of that branch. For a split of a range, it holds rows of up to n_slots branches that read the same range
    in the same place; the program of the first of them computes all.
    """
    i_kv_head = tl.program_id(1).to(tl.int64)
    i_split = tl.program_id(2)
    n_rows = n_queries * n_shared
    n_tiles = tl.cdiv(n_rows, BLOCK_M)
    i_branch = tl.program_id(0) // n_tiles
    o_row = tl.program_id(0) % n_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    o_slot = o_row // n_rows
    o_query = o_row % n_rows // n_shared
    is_shared = i_split < n_shared_splits
    i_range = tl.where(is_shared, i_split // n_range_splits, n_ranges)
    if is_shared:
        p_range = p_ranges + i_range * 2
        i_start = tl.load(p_range + i_branch * (2 * n_ranges)).to(tl.int32)
        n_keys = tl.load(p_range + i_branch * (2 * n_ranges) + 1).to(tl.int32) - i_start
        b_branch, n_before = _readers_of_range(
            p_range, n_ranges, i_start, i_start + n_keys, i_branch, o_slot, n_branches, BLOCK_M, SCAN
        )
        p_k = p_shared_k + (i_start.to(tl.int64) * stride_shared_k + i_kv_head * stride_shared_k_head) * UNIT
        p_v = p_shared_v + (i_start.to(tl.int64) * stride_shared_v + i_kv_head * stride_shared_v_head) * UNIT
    else:
        n_keys = tl.load(p_branch_lengths + i_branch).to(tl.int32)
        b_branch = tl.where(o_slot == 0, i_branch, n_branches)
        n_before = i_branch * 0
        p_k = p_branch_k + (i_branch.to(tl.int64) * stride_branch_k + i_kv_head * stride_branch_k_head) * UNIT
        p_v = p_branch_v + (i_branch.to(tl.int64) * stride_branch_v + i_kv_head * stride_branch_v_head) * UNIT
    if n_before % n_slots != 0:
        return
    stride_k = tl.where(is_shared, stride_shared_k, stride_branch_k_key) * UNIT
    stride_v = tl.where(is_shared, stride_shared_v, stride_branch_v_key) * UNIT
    m_row = (b_branch < n_branches) & (o_slot < n_slots)
    # Query i of Q does not see the Q - 1 - i newest keys of its branch. Only the keys that all queries see are split,
    # and the last split continues to the end. So without a window every query sees the first key of every split, as
    # attend() needs.
    o_seen = n_keys - tl.where(is_shared, 0, n_queries - 1 - o_query)
    n_common = n_keys - tl.where(is_shared, 0, n_queries - 1)
    i_low = n_keys * 0  # whole tiles before it are seen by no query
    o_unseen = None
    if LOCAL is not None:
        o_unseen = _unseen(
            p_ranges, p_branch_lengths, b_branch, m_row, o_query, n_ranges, i_range, n_queries, extent, LOCAL
        )
        i_low = tl.maximum(tl.minimum(tl.min(tl.where(m_row, o_unseen, n_keys), 0), n_common), 0) // BLOCK_N * BLOCK_N
    n_splits = tl.where(is_shared, n_range_splits, tl.num_programs(2) - n_shared_splits)
    split_size = tl.cdiv(tl.cdiv(n_common - i_low, BLOCK_N), n_splits) * BLOCK_N
    i_in_range = tl.where(is_shared, i_split % n_range_splits, i_split - n_shared_splits)
    i_first = tl.minimum(i_low + i_in_range * split_size, n_common)
    i_end = tl.minimum(i_first + split_size, n_common)
    n_unmasked = (i_end - i_first) // BLOCK_N if LOCAL is None else 0
    i_end = tl.where((i_first < i_end) & (i_end == n_common), n_keys, i_end)

    n_heads = tl.num_programs(1) * n_shared
    o_head = i_kv_head * n_shared + o_row % n_shared
    o_out = (b_branch.to(tl.int64) * n_queries + o_query) * n_heads + o_head
    o_d = tl.arange(0, BD)
    b_q = tl.load(p_q + o_out[:, None] * D + o_d[None, :], mask=m_row[:, None] & (o_d[None, :] < D), other=0.0)
    b_q_rest = b_q
    if REST > 0:
        o_rest = BD + tl.arange(0, REST)
        m_rest = m_row[:, None] & (o_rest[None, :] < D)
        b_q_rest = tl.load(p_q + o_out[:, None] * D + o_rest[None, :], mask=m_rest, other=0.0)
    if NEGATIVE:
        b_q = -b_q
        b_q_rest = -b_q_rest
    b_out, b_out_rest = zero_rows(BDV, RESTV, BLOCK_M)
    b_max = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    b_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    if p_sinks is not None:  # one more key, without a value, of the last split
        b_sink = tl.load(p_sinks + o_head, mask=m_row, other=0.0).to(tl.float32) * LOG2E
        is_last = i_split == tl.num_programs(2) - 1
        b_max = tl.where(is_last, b_sink, b_max)
        b_sum = tl.where(is_last, b_sum + 1, b_sum)
    for i in range(n_unmasked):
        i_key = (i_first + i * BLOCK_N).to(tl.int64)
        b_out, b_out_rest, b_max, b_sum = attend(
            b_q, b_q_rest, b_out, b_out_rest, b_max, b_sum,
            p_k + i_key * stride_k, p_v + i_key * stride_v, stride_k, stride_v, BLOCK_N, o_seen, scale,
            False, D, BD, REST, DV, BDV, RESTV, BLOCK_N, None, inner,
        )  # fmt: skip
    for i in range(n_unmasked, tl.cdiv(i_end - i_first, BLOCK_N)):
        i_key = i_first + i * BLOCK_N
        o_tile_unseen = None
        if LOCAL is not None:
            o_tile_unseen = o_unseen - i_key
        i_row = i_key.to(tl.int64)
        b_out, b_out_rest, b_max, b_sum = attend(
            b_q, b_q_rest, b_out, b_out_rest, b_max, b_sum,
            p_k + i_row * stride_k, p_v + i_row * stride_v, stride_k, stride_v, i_end - i_key, o_seen - i_key, scale,
            True, D, BD, REST, DV, BDV, RESTV, BLOCK_N, o_tile_unseen, inner,
        )  # fmt: skip

    b_inverse = 1 / tl.where(b_sum == 0, 1.0, b_sum)[:, None]
    o_out += i_split.to(tl.int64) * n_branches * n_queries * n_heads
    o_d = tl.arange(0, BDV)
    tl.store(p_out + o_out[:, None] * DV + o_d[None, :], b_out * b_inverse, mask=m_row[:, None] & (o_d[None, :] < DV))
    if RESTV > 0:
        o_rest = BDV + tl.arange(0, RESTV)
        m_rest = m_row[:, None] & (o_rest[None, :] < DV)
        tl.store(p_out + o_out[:, None] * DV + o_rest[None, :], b_out_rest * b_inverse, mask=m_rest)
    tl.store(p_lse + o_out, (b_max + tl.log2(b_sum)) * LN2, mask=m_row)
