"""pack_embeddings in Triton: one launch forward, two for the gradient of the vision rows.

A program copies one row. Thousands of programs keep enough bytes in flight to use the full memory bandwidth. The
gradient finds the first and last use of every vision row, then sums over the uses between them. It uses no
floating-point atomics, so it is reproducible. The gradient of a table that trains is PyTorch's own.
"""

import torch
import triton
from torch import Tensor

from lynx_kernels.ops.pack_embeddings.call import PackEmbeddingsCall
from lynx_kernels.ops.pack_embeddings.rows import backward_by, dense
from lynx_kernels.ops.pack_embeddings.triton import bwd, fwd

# None of these is measured, because no GPU was available. 4096 columns of 2 bytes are 8 KiB, 64 bytes per thread of 4
# warps.
_COLUMNS = 4096
_WARPS = 4
_SUM_COLUMNS = 2048  # 4096 would take 32 registers per thread for fp32 sums: 72 in total, which halves the occupancy
_SCAN = 128  # rows scanned at once for uses of a vision row
_FIND = 1024


def _columns(width: int, most: int) -> int:
    return min(triton.next_power_of_2(width), most)


def forward(call: PackEmbeddingsCall) -> Tensor:
    """Return the packed rows (T, d) in the dtype of embedding."""
    token_ids, embedding, vision, vision_index = call
    (num_embeddings, width), rows = embedding.shape, token_ids.shape[0]
    out = embedding.new_empty((rows, width))
    if out.numel() == 0:
        return out
    embedding, vision, columns = dense(embedding), dense(vision), _columns(width, _COLUMNS)
    with torch.cuda.device_of(embedding):  # Triton launches on the current device, not on that of the arguments
        # Without debug=True Triton removes device assertions.
        fwd.pack_embeddings_fwd_kernel[(rows, triton.cdiv(width, columns))](
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
            bwd.pack_embeddings_bwd_find_kernel[(triton.cdiv(rows, _FIND),)](
                vision_index, uses, rows, num_vision, BT=_FIND
            )
        bwd.pack_embeddings_bwd_sum_kernel[(num_vision, triton.cdiv(width, columns))](
            grad, vision_index, uses, out, grad.stride(0), rows, num_vision,
            D=width, BD=columns, BT=_SCAN, num_warps=_WARPS,
        )  # fmt: skip
    return out


backward = backward_by(_vision_gradient)
