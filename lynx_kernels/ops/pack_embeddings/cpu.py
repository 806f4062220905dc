"""pack_embeddings on CPUs, in the C++ of csrc/embeddings: this file allocates and hands over addresses.

Rows may stand anywhere, as long as their columns stand side by side. Nothing is converted or copied but what the result
takes: rows of the table's own dtype go over byte by byte.
"""

import torch
from torch import Tensor

from lynx_kernels.backends import cpu as cpu_backend
from lynx_kernels.ops.pack_embeddings.rows import dense

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # in the order of lynx::Dtype


def unsupported_reason(token_ids: Tensor, embedding: Tensor, vision: Tensor, vision_index: Tensor) -> str | None:
    """Why this implementation cannot run the call, or None."""
    if embedding.device.type != "cpu":
        return f"runs on CPUs, embedding is on {embedding.device}"
    if cpu_backend.MISSING is not None:
        return cpu_backend.MISSING
    for name, tensor in (("embedding", embedding), ("vision", vision)):
        if tensor.dtype not in _DTYPES:
            return f"adds up in fp32, {name} is {tensor.dtype}"
    return None


def _view(tensor: Tensor) -> tuple[int, int, int, int]:
    """Rows as the compiled module takes them."""
    return tensor.data_ptr(), _DTYPES.index(tensor.dtype), tensor.shape[0], tensor.stride(0)


def forward(
    token_ids: Tensor,  # (T,)
    embedding: Tensor,  # (V, d)
    vision: Tensor,  # (M, d)
    vision_index: Tensor,  # (T,)
) -> Tensor:
    """Return the packed rows (T, d) in the dtype of the table."""
    token_ids, vision_index = token_ids.contiguous(), vision_index.contiguous()
    embedding, vision = dense(embedding), dense(vision)
    rows, width = token_ids.shape[0], embedding.shape[1]
    out = embedding.new_empty((rows, width))
    cpu_backend.module.pack_embeddings(
        token_ids.data_ptr(), vision_index.data_ptr(), rows, _view(embedding), _view(vision), _view(out), width,
        torch.get_num_threads(),
    )  # fmt: skip
    return out


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
    grad, token_ids, vision_index = dense(grad), token_ids.contiguous(), vision_index.contiguous()
    rows, width = grad.shape
    gradients = []
    for of_table, size, dtype in ((True, num_embeddings, grad.dtype), (False, num_vision, vision_dtype)):
        if not needs[0 if of_table else 1]:
            continue
        out = grad.new_empty((size, width), dtype=dtype)
        cpu_backend.module.sum_gradients(
            token_ids.data_ptr(), vision_index.data_ptr(), rows, of_table, _view(grad), _view(out), width,
            torch.get_num_threads(),
        )  # fmt: skip
        gradients.append(out)
    return gradients
