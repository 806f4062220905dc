"""pack_embeddings in Triton: one launch forward, two for the gradient of the vision rows.

A program moves one row, so thousands of them keep enough bytes on their way to fill the memory's bandwidth. The
gradient finds the first and last use of every vision row, then adds up what stands between them: no floating-point
atomics, so it is reproducible. A table that trains takes PyTorch's own gradient.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lynx_kernels.ops.pack_embeddings.rows import backward_by, dense

# None of these is measured: no GPU yet. 4096 columns in 16 bits are 8 KiB, 64 bytes a thread of 4 warps.
_COLUMNS = 4096
_WARPS = 4
_SUM_COLUMNS = 2048  # 4096 sums in fp32 are 32 registers a thread: 72 in all, and half the threads
_SCAN = 128  # rows looked at at once for uses of a vision row
_FIND = 1024


def _columns(width: int, most: int) -> int:
    return min(triton.next_power_of_2(width), most)


def forward(
    token_ids: Tensor,  # (T,)
    embedding: Tensor,  # (V, d)
    vision: Tensor,  # (M, d)
    vision_index: Tensor,  # (T,)
) -> Tensor:
    """Return the packed rows (T, d) in the dtype of the table."""
    (num_embeddings, width), rows = embedding.shape, token_ids.shape[0]
    out = embedding.new_empty((rows, width))
    if out.numel() == 0:
        return out
    embedding, vision, columns = dense(embedding), dense(vision), _columns(width, _COLUMNS)
    with torch.cuda.device_of(embedding):  # Triton launches on the current device, whatever its arguments are on
        # Without `debug` Triton drops assertions.
        pack_kernel[(rows, triton.cdiv(width, columns))](
            token_ids.contiguous(), vision_index.contiguous(), embedding, vision, out,
            embedding.stride(0), vision.stride(0), num_embeddings, vision.shape[0],
            D=width, BD=columns, num_warps=_WARPS, debug=True,
        )  # fmt: skip
    return out


def _vision_gradient(grad: Tensor, vision_index: Tensor, num_vision: int, dtype: torch.dtype) -> Tensor:
    grad, vision_index = dense(grad), vision_index.contiguous()
    rows, width = grad.shape
    out = grad.new_empty((num_vision, width), dtype=dtype)
    if out.numel() == 0:
        return out
    uses, columns = vision_index.new_zeros((2, num_vision)), _columns(width, _SUM_COLUMNS)
    with torch.cuda.device_of(grad):
        if rows > 0:
            find_kernel[(triton.cdiv(rows, _FIND),)](vision_index, uses, rows, num_vision, BT=_FIND)
        sum_kernel[(num_vision, triton.cdiv(width, columns))](
            grad, vision_index, uses, out, grad.stride(0), rows, num_vision,
            D=width, BD=columns, BT=_SCAN, num_warps=_WARPS,
        )  # fmt: skip
    return out


backward = backward_by(_vision_gradient)


@triton.jit(do_not_specialize=["n_embeddings", "n_vision"])
def pack_kernel(
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
    """One row, BD columns of it."""
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


@triton.jit(do_not_specialize=["n_rows", "n_vision"])
def find_kernel(
    p_vision_index,  # (T,)
    p_uses,  # (2, M), zeros before
    n_rows,
    n_vision,
    BT: tl.constexpr,
):
    """For each vision row the first and the last row it went to, as T - first and last + 1; an unused one keeps 0.

    Integers, so that the order in which atomics arrive changes nothing.
    """
    o_row = tl.program_id(0) * BT + tl.arange(0, BT)
    b_vision = tl.load(p_vision_index + o_row, mask=o_row < n_rows, other=-1)  # [BT]
    m_use = (b_vision >= 0) & (b_vision < n_vision)
    tl.atomic_max(p_uses + b_vision, n_rows - o_row, mask=m_use, sem="relaxed")
    tl.atomic_max(p_uses + n_vision + b_vision, o_row + 1, mask=m_use, sem="relaxed")


@triton.jit(do_not_specialize=["n_rows", "n_vision"])
def sum_kernel(
    p_grad,  # (T, d)
    p_vision_index,  # (T,)
    p_uses,  # (2, M) of find_kernel
    p_out,  # (M, d)
    stride_grad,
    n_rows,
    n_vision,
    D: tl.constexpr,
    BD: tl.constexpr,
    BT: tl.constexpr,
):
    """The gradient of one vision row, BD columns of it: the sum over its uses in their order."""
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
