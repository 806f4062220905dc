"""pack_embeddings in the CUDA C++ of csrc/embeddings: one launch forward, two for the gradient of the vision rows.

Forward reads and writes each row once, in accesses of 16 bytes where rows allow them, and asserts on the device that
indices are in range. The gradient finds the first and last use of every vision row, then adds up what stands between
them: no floating-point atomics, so it is reproducible. A table that trains takes PyTorch's own gradient.
"""

import torch
from torch import Tensor

from lynx_kernels import cuda_runtime
from lynx_kernels.embeddings.rows import dense, sum_rows


def forward(
    token_ids: Tensor,  # (T,)
    embedding: Tensor,  # (V, d)
    vision: Tensor,  # (M, d)
    vision_index: Tensor,  # (T,)
) -> Tensor:
    """Return the packed rows (T, d) in the dtype of the table."""
    return cuda_runtime.kernels().pack_embeddings(
        token_ids.contiguous(), dense(embedding), dense(vision), vision_index.contiguous()
    )


def backward(
    grad: Tensor,  # (T, d), in the dtype of the table
    token_ids: Tensor,  # (T,)
    vision_index: Tensor,  # (T,)
    num_embeddings: int,
    num_vision: int,
    vision_dtype: torch.dtype,
    needs: list[bool],  # which of the table and the vision rows want a gradient
) -> list[Tensor]:
    """Return the gradients (V, d) and (M, d) that ``needs`` asks for; the rest is not computed."""
    needs_embedding, needs_vision = needs
    gradients = []
    if needs_embedding:
        gradients.append(sum_rows(grad, token_ids, vision_index < 0, num_embeddings).to(grad.dtype))
    if needs_vision:
        backward = cuda_runtime.kernels().pack_embeddings_backward
        gradients.append(backward(dense(grad), vision_index.contiguous(), num_vision, vision_dtype))
    return gradients
