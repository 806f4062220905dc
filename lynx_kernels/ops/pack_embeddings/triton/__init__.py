"""pack_embeddings in Triton: one launch forward, two for the gradient of the vision rows.

A program moves one row, so thousands of them keep enough bytes on their way to fill the memory's bandwidth. The
gradient finds the first and last use of every vision row, then adds up what stands between them: no floating-point
atomics, so it is reproducible. A table that trains takes PyTorch's own gradient.
"""

import torch
import triton
from torch import Tensor

from lynx_kernels.ops.pack_embeddings.call import PackEmbeddingsCall
from lynx_kernels.ops.pack_embeddings.rows import backward_by, dense
from lynx_kernels.ops.pack_embeddings.triton import bwd, fwd

# None of these is measured: no GPU yet. 4096 columns in 16 bits are 8 KiB, 64 bytes a thread of 4 warps.
_COLUMNS = 4096
_WARPS = 4
_SUM_COLUMNS = 2048  # 4096 sums in fp32 are 32 registers a thread: 72 in all, and half the threads
_SCAN = 128  # rows looked at at once for uses of a vision row
_FIND = 1024


def _columns(width: int, most: int) -> int:
    return min(triton.next_power_of_2(width), most)


def forward(call: PackEmbeddingsCall) -> Tensor:
    """Return the packed rows (T, d) in the dtype of the table."""
    token_ids, embedding, vision, vision_index = call
    (num_embeddings, width), rows = embedding.shape, token_ids.shape[0]
    out = embedding.new_empty((rows, width))
    if out.numel() == 0:
        return out
    embedding, vision, columns = dense(embedding), dense(vision), _columns(width, _COLUMNS)
    with torch.cuda.device_of(embedding):  # Triton launches on the current device, whatever its arguments are on
        # Without `debug` Triton drops assertions.
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
