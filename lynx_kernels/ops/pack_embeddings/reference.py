"""The reference of pack_embeddings, in plain PyTorch.

    row t = vision[vision_index[t]] where vision_index[t] >= 0, else embedding[token_ids[t]]

Shapes: T rows, V tokens in the table, M vision rows, width d.
"""

import torch
from torch import Tensor

from lynx_kernels.ops.pack_embeddings.call import PackEmbeddingsCall
from lynx_kernels.ops.pack_embeddings.rows import backward_by, sum_rows


def forward(call: PackEmbeddingsCall) -> Tensor:
    """Return the packed rows (T, d) in the dtype of embedding."""
    token_ids, embedding, vision, vision_index = call
    is_vision = vision_index >= 0
    _check("token_ids", token_ids, embedding.shape[0], ~is_vision)
    _check("vision_index", vision_index, vision.shape[0], is_vision)
    text = _rows(embedding, token_ids)  # (T, d)
    return torch.where(is_vision[:, None], _rows(vision, vision_index).to(text.dtype), text)


def _vision_gradient(grad: Tensor, vision_index: Tensor, num_vision: int, dtype: torch.dtype) -> Tensor:
    return sum_rows(grad, vision_index.long(), vision_index >= 0, num_vision).to(dtype)


backward = backward_by(_vision_gradient)


def _host_may_read(tensor: Tensor) -> bool:
    return tensor.is_cpu  # reading a value from a GPU would synchronise it


def _check(name: str, index: Tensor, size: int, used: Tensor) -> None:
    wrong = used & ((index < 0) | (index >= size))
    if not _host_may_read(wrong):
        torch._assert_async(~wrong.any(), f"pack_embeddings: {name} has a value outside [0, {size})")
    elif wrong.any():
        row = int(wrong.nonzero()[0])
        raise IndexError(f"pack_embeddings: {name}[{row}] is {int(index[row])}, outside [0, {size})")


def _rows(table: Tensor, index: Tensor) -> Tensor:
    # Rows filled from the other source may have any index, and the table may be empty.
    if table.shape[0] == 0:
        return table.new_zeros(index.shape[0], table.shape[1])
    return table.index_select(0, index.clamp(0, table.shape[0] - 1))
