"""The decoding kernel. attention_common/triton/tiles.py explains the names."""

import triton
import triton.language as tl

from lynx_kernels.ops.attention_common.triton.fwd import attend
from lynx_kernels.ops.attention_common.triton.tiles import LN2, zero_rows


@triton.jit
def _branches_of_root(
    p_branch_to_root, i_root, i_branch, o_slot, n_branches, BLOCK_M: tl.constexpr, SCAN: tl.constexpr
):  # fmt: skip
    """The branches of a root from i_branch on, by slot, [BLOCK_M]; and how many of its branches are before i_branch.

    A slot without a branch gets n_branches.
    """
    n_before = i_branch * 0
    n_since = i_branch * 0
    b_branch = tl.zeros([BLOCK_M], dtype=tl.int32) + n_branches
    for i_first in range(0, n_branches, SCAN):
        o_branch = i_first + tl.arange(0, SCAN)
        b_root = tl.load(p_branch_to_root + o_branch, mask=o_branch < n_branches, other=-1).to(tl.int32)
        m_since = (b_root == i_root) & (o_branch >= i_branch)
        b_slot = n_since + tl.cumsum(m_since.to(tl.int32), 0) - 1
        m_slot = m_since[None, :] & (b_slot[None, :] == o_slot[:, None])  # [BLOCK_M, SCAN]
        b_branch = tl.minimum(b_branch, tl.min(tl.where(m_slot, o_branch[None, :], n_branches), 1))
        n_before += tl.sum(((b_root == i_root) & (o_branch < i_branch)).to(tl.int32), 0)
        n_since += tl.sum(m_since.to(tl.int32), 0)
    return b_branch, n_before


@triton.jit
def prefix_attention_decode_fwd_kernel(
    p_q,  # (B, Q, H, D)
    p_root_k,  # (R, Lr, Hkv, D)
    p_root_v,
    p_branch_k,  # (B, Lb, Hkv, D)
    p_branch_v,
    p_branch_to_root,  # (B,)
    p_root_lengths,  # (R,)
    p_branch_lengths,  # (B,)
    p_out,  # (num_splits, B, Q, H, D)
    p_lse,  # (num_splits, B, Q, H)
    stride_root,
    stride_root_key,
    stride_root_head,
    stride_branch,
    stride_branch_key,
    stride_branch_head,
    n_branches,
    n_queries,
    n_shared,  # H / Hkv
    n_slots,  # branches of a root that share a tile
    n_root_splits,  # the first n_root_splits splits are of the root, the others of the branch
    scale,  # times log2(e), > 0
    NEGATIVE: tl.constexpr,  # whether the true scale is negative
    UNIT: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    REST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SCAN: tl.constexpr,
):
    """One tile of rows, one key head, one split of the keys.

    The rows of a branch are its queries times the heads that share the key head. For a split of a branch's keys, a tile
    holds rows of that branch. For a split of a root's keys, it holds rows of up to n_slots of its branches; the program
    of the first branch computes all of them.
    """
    i_kv_head = tl.program_id(1).to(tl.int64)
    i_split = tl.program_id(2)
    n_rows = n_queries * n_shared
    n_tiles = tl.cdiv(n_rows, BLOCK_M)
    i_branch = tl.program_id(0) // n_tiles
    o_row = tl.program_id(0) % n_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    o_slot = o_row // n_rows
    o_query = o_row % n_rows // n_shared
    is_root = i_split < n_root_splits
    i_root = tl.load(p_branch_to_root + i_branch).to(tl.int32)
    if is_root:
        b_branch, n_before = _branches_of_root(p_branch_to_root, i_root, i_branch, o_slot, n_branches, BLOCK_M, SCAN)
        i_first_key = (i_root.to(tl.int64) * stride_root + i_kv_head * stride_root_head) * UNIT
        p_k = p_root_k + i_first_key
        p_v = p_root_v + i_first_key
    else:
        b_branch = tl.where(o_slot == 0, i_branch, n_branches)
        n_before = i_branch * 0
        i_first_key = (i_branch.to(tl.int64) * stride_branch + i_kv_head * stride_branch_head) * UNIT
        p_k = p_branch_k + i_first_key
        p_v = p_branch_v + i_first_key
    if n_before % n_slots != 0:
        return
    stride_key = tl.where(is_root, stride_root_key, stride_branch_key) * UNIT
    n_keys = tl.where(is_root, tl.load(p_root_lengths + i_root), tl.load(p_branch_lengths + i_branch)).to(tl.int32)
    # Query i of Q does not see the Q - 1 - i newest keys of its branch. Only the keys that all queries see are split,
    # and the last split continues to the end. So every query sees the first key of every split, as attend() needs.
    o_seen = n_keys - tl.where(is_root, 0, n_queries - 1 - o_query)
    n_common = n_keys - tl.where(is_root, 0, n_queries - 1)
    n_splits = tl.where(is_root, n_root_splits, tl.num_programs(2) - n_root_splits)
    split_size = tl.cdiv(tl.cdiv(n_common, BLOCK_N), n_splits) * BLOCK_N
    i_first = tl.minimum(tl.where(is_root, i_split, i_split - n_root_splits) * split_size, n_common)
    i_end = tl.minimum(i_first + split_size, n_common)
    n_full = (i_end - i_first) // BLOCK_N
    i_end = tl.where((i_first < i_end) & (i_end == n_common), n_keys, i_end)

    m_row = (b_branch < n_branches) & (o_slot < n_slots)
    n_heads = tl.num_programs(1) * n_shared
    o_out = (b_branch.to(tl.int64) * n_queries + o_query) * n_heads + i_kv_head * n_shared + o_row % n_shared
    o_d = tl.arange(0, BD)
    o_rest = BD + tl.arange(0, REST if REST > 0 else 1)
    m_tile = m_row[:, None] & (o_d[None, :] < D)
    m_rest = m_row[:, None] & (o_rest[None, :] < D)
    b_q = tl.load(p_q + o_out[:, None] * D + o_d[None, :], mask=m_tile, other=0.0)
    b_q_rest = b_q
    if REST > 0:
        b_q_rest = tl.load(p_q + o_out[:, None] * D + o_rest[None, :], mask=m_rest, other=0.0)
    if NEGATIVE:
        b_q = -b_q
        b_q_rest = -b_q_rest
    b_out, b_out_rest = zero_rows(BD, REST, BLOCK_M)
    b_max = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    b_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    for i in range(n_full):
        o_key = (i_first + i * BLOCK_N).to(tl.int64) * stride_key
        b_out, b_out_rest, b_max, b_sum = attend(
            b_q, b_q_rest, b_out, b_out_rest, b_max, b_sum,
            p_k + o_key, p_v + o_key, stride_key, stride_key, BLOCK_N, o_seen, scale,
            False, D, BD, REST, D, BD, REST, BLOCK_N,
        )  # fmt: skip
    for i in range(n_full, tl.cdiv(i_end - i_first, BLOCK_N)):
        i_key = i_first + i * BLOCK_N
        o_key = i_key.to(tl.int64) * stride_key
        b_out, b_out_rest, b_max, b_sum = attend(
            b_q, b_q_rest, b_out, b_out_rest, b_max, b_sum,
            p_k + o_key, p_v + o_key, stride_key, stride_key, i_end - i_key, o_seen - i_key, scale,
            True, D, BD, REST, D, BD, REST, BLOCK_N,
        )  # fmt: skip

    b_inverse = 1 / tl.where(b_sum == 0, 1.0, b_sum)[:, None]
    o_out += i_split.to(tl.int64) * n_branches * n_queries * n_heads
    tl.store(p_out + o_out[:, None] * D + o_d[None, :], b_out * b_inverse, mask=m_tile)
    if REST > 0:
        tl.store(p_out + o_out[:, None] * D + o_rest[None, :], b_out_rest * b_inverse, mask=m_rest)
    tl.store(p_lse + o_out, (b_max + tl.log2(b_sum)) * LN2, mask=m_row)
