"""Functions on the rows of an embedding table, shared by the implementations."""

from collections.abc import Callable

import torch
from torch import Tensor

from lynx_kernels.backends.dtypes import acc_dtype
from lynx_kernels.ops.pack_embeddings.call import PackEmbeddingsBackwardCall


def dense(tensor: Tensor) -> Tensor:
    """The same values with contiguous columns, which vector loads need."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def sum_rows(grad: Tensor, index: Tensor, used: Tensor, size: int) -> Tensor:
    """Return (size, d) in at least fp32: row i is the sum of ``grad[used & (index == i)]``.

    This is the gradient of an embedding. Unused rows get a padding index past the end. On a GPU PyTorch sorts the index
    and sums chunks of long runs in parallel, without atomics. So sums are reproducible, and a frequent token is not a
    bottleneck. PyTorch rounds partial sums to the dtype of grad, so grad is converted to the accumulation dtype first.
    A table that trains is fp32 already, so then nothing is copied.
    """
    index = torch.where(used, index, size)
    return torch.ops.aten.embedding_dense_backward(grad.to(acc_dtype(grad.dtype)), index, size + 1, size, False)[:size]


def backward_by(
    vision_gradient: Callable[[Tensor, Tensor, int, torch.dtype], Tensor],
) -> Callable[[PackEmbeddingsBackwardCall], list[Tensor]]:
    """Make the backward of an implementation. The table's gradient is PyTorch's own; the gradient (M, d) of the vision
    rows is ``vision_gradient(grad, vision_index, num_vision, dtype)``."""

    def backward(call: PackEmbeddingsBackwardCall) -> list[Tensor]:
        """Return the gradients (V, d) and (M, d) listed in ``needs``. The others are not computed."""
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
