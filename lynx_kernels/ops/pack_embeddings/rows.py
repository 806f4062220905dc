"""Rows of an embedding table: what several implementations do with them."""

from collections.abc import Callable

import torch
from torch import Tensor

from lynx_kernels.backends.dtypes import acc_dtype
from lynx_kernels.ops.pack_embeddings.call import PackEmbeddingsBackwardCall


def dense(tensor: Tensor) -> Tensor:
    """The same values, those of a row side by side, or loads are no vectors."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def sum_rows(grad: Tensor, index: Tensor, used: Tensor, size: int) -> Tensor:
    """Return (size, d) in at least fp32: row i is the sum of ``grad[used & (index == i)]``.

    It is an embedding's gradient, with rows that are not used as its padding: a row past the end. On a GPU it sorts
    the index and adds up parts of long runs side by side, without atomics, so that sums are reproducible and the rows
    of a frequent token do not wait for each other. It rounds to the dtype of what it is given in between, so that is
    made wide first; where a table trains it is fp32 already, and nothing is copied.
    """
    index = torch.where(used, index, size)
    return torch.ops.aten.embedding_dense_backward(grad.to(acc_dtype(grad.dtype)), index, size + 1, size, False)[:size]


def backward_by(
    vision_gradient: Callable[[Tensor, Tensor, int, torch.dtype], Tensor],
) -> Callable[[PackEmbeddingsBackwardCall], list[Tensor]]:
    """The backward of an implementation: the table's gradient is PyTorch's own, that of the vision rows (M, d) is
    ``vision_gradient(grad, vision_index, num_vision, dtype)``."""

    def backward(call: PackEmbeddingsBackwardCall) -> list[Tensor]:
        """Return the gradients (V, d) and (M, d) that ``needs`` asks for; the rest is not computed."""
        needs_embedding, needs_vision = call.needs
        gradients = []
        if needs_embedding:
            gradients.append(
                sum_rows(call.grad, call.token_ids, call.vision_index < 0, call.num_embeddings).to(call.grad.dtype)
            )
        if needs_vision:
            gradients.append(vision_gradient(call.grad, call.vision_index, call.num_vision, call.vision_dtype))
        return gradients

    return backward
