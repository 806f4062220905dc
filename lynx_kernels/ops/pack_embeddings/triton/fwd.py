"""The forward kernel: a program copies one row, or BD columns of it."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["n_embeddings", "n_vision"])
def pack_embeddings_fwd_kernel(
    p_token_ids,  # (T,)
    p_vision_index,  # (T,)
    p_embedding,  # (V, d)
    p_vision,  # (M, d)
    p_out,  # (T, d)
    stride_embedding,
    stride_vision,
    n_embeddings,
    n_vision,
    D: tl.constexpr,
    BD: tl.constexpr,
):
    """Copy BD columns of one row."""
    i_row = tl.program_id(0).to(tl.int64)
    o_d = tl.program_id(1) * BD + tl.arange(0, BD)
    m_d = o_d < D
    i_vision = tl.load(p_vision_index + i_row).to(tl.int64)
    if i_vision >= 0:
        tl.device_assert(i_vision < n_vision, "pack_embeddings: vision_index has a value out of range")
        b_row = tl.load(p_vision + i_vision * stride_vision + o_d, mask=m_d).to(p_out.dtype.element_ty)  # [BD]
    else:
        i_token = tl.load(p_token_ids + i_row)
        m_token = (i_token >= 0) & (i_token < n_embeddings)
        tl.device_assert(m_token, "pack_embeddings: token_ids has a value out of range")
        b_row = tl.load(p_embedding + i_token * stride_embedding + o_d, mask=m_d)
    tl.store(p_out + i_row * D + o_d, b_row, mask=m_d)
