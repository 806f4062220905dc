"""Online softmax over a tile of keys, which all forward kernels of attention share. tiles.py explains the names."""

import triton
import triton.language as tl

from lynx_kernels.ops.attention_common.triton.tiles import add_weighted_rows, capped, load_rows, products_of_rows


@triton.jit
def attend(
    b_q, b_q_rest, b_out, b_out_rest, b_max, b_sum,
    p_k, p_v, stride_k, stride_v, n_keys, o_seen, scale,
    MASKED: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, REST: tl.constexpr,
    DV: tl.constexpr, BDV: tl.constexpr, RESTV: tl.constexpr, BLOCK_N: tl.constexpr,
    o_unseen=None, inner=None,
):  # fmt: skip
    """Online softmax over one tile of n_keys keys, in base 2. Each query sees the first o_seen of them.

    With o_unseen it does not see the first o_unseen of those. ``inner`` as in ``capped``.
    """
    b_k, b_k_rest = load_rows(p_k, stride_k, n_keys, MASKED, D, BD, REST, BLOCK_N)
    b_scores = capped(products_of_rows(b_q, b_q_rest, b_k, b_k_rest, REST), inner)  # [BLOCK_M, BLOCK_N]
    if MASKED:
        o_key = tl.arange(0, BLOCK_N)[None, :]
        m_seen = o_key < o_seen[:, None]
        if o_unseen is not None:
            m_seen = m_seen & (o_key >= o_unseen[:, None])
        b_scores = tl.where(m_seen, b_scores, float("-inf"))
    b_new_max = tl.maximum(b_max, tl.max(b_scores, 1) * scale)
    b_shift = b_new_max
    if MASKED and o_unseen is not None:
        # Nothing seen so far. Elsewhere every query sees the first key of its first tile, so the maximum is finite.
        b_shift = tl.where(b_new_max == float("-inf"), 0.0, b_new_max)
    b_p = tl.exp2(b_scores * scale - b_shift[:, None])
    b_rescale = tl.exp2(b_max - b_shift)
    b_sum = b_sum * b_rescale + tl.sum(b_p, 1)
    b_out = b_out * b_rescale[:, None]
    b_out_rest = b_out_rest * b_rescale[:, None]
    b_v, b_v_rest = load_rows(p_v, stride_v, n_keys, MASKED, DV, BDV, RESTV, BLOCK_N)
    b_out, b_out_rest = add_weighted_rows(b_out, b_out_rest, b_p, b_v, b_v_rest, RESTV)
    return b_out, b_out_rest, b_new_max, b_sum
