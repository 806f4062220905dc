"""pack_embeddings in the CUDA C++ of csrc/pack_embeddings: one launch forward, two for the gradient of the vision rows.

Forward reads and writes each row once, 16 bytes at a time where rows are aligned. It asserts on the device that indices
are in range. The gradient finds the first and last use of every vision row, then sums over the uses between them. It
uses no floating-point atomics, so it is reproducible. The gradient of a table that trains is PyTorch's own.
"""

import torch
from torch import Tensor

from lynx_kernels.backends import cuda as cuda_backend
from lynx_kernels.ops.pack_embeddings.call import PackEmbeddingsCall
from lynx_kernels.ops.pack_embeddings.rows import backward_by, dense


def forward(call: PackEmbeddingsCall) -> Tensor:
    """Return the packed rows (T, d) in the dtype of embedding."""
    return cuda_backend.kernels().pack_embeddings(
        call.token_ids.contiguous(), dense(call.embedding), dense(call.vision), call.vision_index.contiguous()
    )


def unsupported_reason(call: PackEmbeddingsCall) -> str | None:
    """Why this implementation cannot run the call, or None."""
    if torch.float64 in (call.embedding.dtype, call.vision.dtype):
        return "the CUDA kernels accumulate in fp32, and an argument is fp64"
    return cuda_backend.MISSING


def _vision_gradient(grad: Tensor, vision_index: Tensor, num_vision: int, dtype: torch.dtype) -> Tensor:
    return cuda_backend.kernels().pack_embeddings_backward(dense(grad), vision_index.contiguous(), num_vision, dtype)


backward = backward_by(_vision_gradient)
