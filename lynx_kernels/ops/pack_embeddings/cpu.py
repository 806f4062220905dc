"""pack_embeddings on CPUs, in the C++ of csrc/pack_embeddings. This file allocates outputs and passes addresses.

Rows may have any stride; the columns of a row must be contiguous. Only rows that the result uses are copied. Rows in
the table's dtype are copied byte by byte, others are converted.
"""

import torch
from torch import Tensor

from lynx_kernels.backends import cpu as cpu_backend
from lynx_kernels.ops.pack_embeddings.call import PackEmbeddingsBackwardCall, PackEmbeddingsCall
from lynx_kernels.ops.pack_embeddings.rows import dense

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # in the order of lynx::Dtype


def unsupported_reason(call: PackEmbeddingsCall) -> str | None:
    """Why this implementation cannot run the call, or None."""
    if cpu_backend.MISSING is not None:
        return cpu_backend.MISSING
    for name, tensor in (("embedding", call.embedding), ("vision", call.vision)):
        if tensor.dtype not in _DTYPES:
            return f"it accumulates in fp32, and {name} is {tensor.dtype}"
    return None


def _view(tensor: Tensor) -> tuple[int, int, int, int]:
    """Address, dtype, number of rows and row stride, as the compiled module takes them."""
    return tensor.data_ptr(), _DTYPES.index(tensor.dtype), tensor.shape[0], tensor.stride(0)


def forward(call: PackEmbeddingsCall) -> Tensor:
    """Return the packed rows (T, d) in the dtype of embedding."""
    token_ids, vision_index = call.token_ids.contiguous(), call.vision_index.contiguous()
    embedding, vision = dense(call.embedding), dense(call.vision)
    rows, width = token_ids.shape[0], embedding.shape[1]
    out = embedding.new_empty((rows, width))
    cpu_backend.module.pack_embeddings(
        token_ids.data_ptr(), vision_index.data_ptr(), rows, _view(embedding), _view(vision), _view(out), width,
        torch.get_num_threads(),
    )  # fmt: skip
    return out


def backward(call: PackEmbeddingsBackwardCall) -> list[Tensor]:
    """Return the gradients (V, d) and (M, d) listed in ``needs``. The others are not computed."""
    grad, token_ids, vision_index = dense(call.grad), call.token_ids.contiguous(), call.vision_index.contiguous()
    rows, width = grad.shape
    gradients = []
    for of_table, size, dtype in ((True, call.num_embeddings, grad.dtype), (False, call.num_vision, call.vision_dtype)):
        if not call.needs[0 if of_table else 1]:
            continue
        out = grad.new_empty((size, width), dtype=dtype)
        cpu_backend.module.sum_gradients(
            token_ids.data_ptr(), vision_index.data_ptr(), rows, of_table, _view(grad), _view(out), width,
            torch.get_num_threads(),
        )  # fmt: skip
        gradients.append(out)
    return gradients
