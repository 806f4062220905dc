"""The gradient of the vision rows: find the uses of each, then sum over them."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["n_rows", "n_vision"])
def pack_embeddings_bwd_find_kernel(
    p_vision_index,  # (T,)
    p_uses,  # (2, M), initialised to 0
    n_rows,
    n_vision,
    BT: tl.constexpr,
):
    """Find the first and last row to which each vision row was copied, as T - first and last + 1; 0 if unused.

    These are integers, so the order of the atomics does not change the result.
    """
    o_row = tl.program_id(0) * BT + tl.arange(0, BT)
    b_vision = tl.load(p_vision_index + o_row, mask=o_row < n_rows, other=-1)  # [BT]
    m_use = (b_vision >= 0) & (b_vision < n_vision)
    tl.atomic_max(p_uses + b_vision, n_rows - o_row, mask=m_use, sem="relaxed")
    tl.atomic_max(p_uses + n_vision + b_vision, o_row + 1, mask=m_use, sem="relaxed")


@triton.jit(do_not_specialize=["n_rows", "n_vision"])
def pack_embeddings_bwd_sum_kernel(
    p_grad,  # (T, d)
    p_vision_index,  # (T,)
    p_uses,  # (2, M) from pack_embeddings_bwd_find_kernel
    p_out,  # (M, d)
    stride_grad,
    n_rows,
    n_vision,
    D: tl.constexpr,
    BD: tl.constexpr,
    BT: tl.constexpr,
):
    """BD columns of the gradient of one vision row: the sum over its uses, in order."""
    i_vision = tl.program_id(0)
    o_d = tl.program_id(1) * BD + tl.arange(0, BD)
    m_d = o_d < D
    i_first = n_rows - tl.load(p_uses + i_vision)
    i_last = tl.load(p_uses + n_vision + i_vision) - 1
    b_sum = tl.zeros([BD], dtype=tl.float32)
    for i_start in range(i_first, i_last + 1, BT):
        o_row = i_start + tl.arange(0, BT)
        m_use = tl.load(p_vision_index + o_row, mask=o_row <= i_last, other=-1) == i_vision  # [BT]
        for _ in range(tl.sum(m_use.to(tl.int32), 0)):
            i_row = tl.min(tl.where(m_use, o_row, n_rows), 0)
            b_sum += tl.load(p_grad + i_row.to(tl.int64) * stride_grad + o_d, mask=m_d, other=0.0).to(tl.float32)
            m_use = m_use & (o_row > i_row)
    tl.store(p_out + i_vision.to(tl.int64) * D + o_d, b_sum.to(p_out.dtype.element_ty), mask=m_d)
