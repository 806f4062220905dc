"""The definition of pack_embeddings, in plain PyTorch.

    row t = vision[vision_index[t]] where vision_index[t] >= 0, else embedding[token_ids[t]]

Shapes: T rows, V tokens in the table, M vision rows, width d.
"""

import torch
from torch import Tensor

from lynx_kernels.embeddings.rows import sum_rows


def forward(
    token_ids: Tensor,  # (T,)
    embedding: Tensor,  # (V, d)
    vision: Tensor,  # (M, d)
    vision_index: Tensor,  # (T,)
) -> Tensor:
    """Return the packed rows (T, d) in the dtype of the table."""
    is_vision = vision_index >= 0
    _check("token_ids", token_ids, embedding.shape[0], ~is_vision)
    _check("vision_index", vision_index, vision.shape[0], is_vision)
    text = _rows(embedding, token_ids)  # (T, d)
    return torch.where(is_vision[:, None], _rows(vision, vision_index).to(text.dtype), text)


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
    is_vision = vision_index >= 0
    gradients = []
    if needs_embedding:
        gradients.append(sum_rows(grad, token_ids, ~is_vision, num_embeddings).to(grad.dtype))
    if needs_vision:
        gradients.append(sum_rows(grad, vision_index.long(), is_vision, num_vision).to(vision_dtype))
    return gradients


def _host_may_read(tensor: Tensor) -> bool:
    return tensor.is_cpu  # reading a value from a device would stall it


def _check(name: str, index: Tensor, size: int, used: Tensor) -> None:
    wrong = used & ((index < 0) | (index >= size))
    if not _host_may_read(wrong):
        torch._assert_async(~wrong.any(), f"pack_embeddings: {name} has a value outside [0, {size})")
    elif wrong.any():
        row = int(wrong.nonzero()[0])
        raise IndexError(f"pack_embeddings: {name}[{row}] is {int(index[row])}, outside [0, {size})")


def _rows(table: Tensor, index: Tensor) -> Tensor:
    # Rows that the other source fills may hold any index, and need none to exist.
    if table.shape[0] == 0:
        return table.new_zeros(index.shape[0], table.shape[1])
    return table.index_select(0, index.clamp(0, table.shape[0] - 1))
