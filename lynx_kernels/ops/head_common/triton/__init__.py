"""Score one chunk in one Triton kernel: between the two products, the logits are read twice and their gradient written
once. PyTorch's composition passes over them about nine times.

A program handles one row and all entries that it predicts, so every sum has a fixed order.
"""

import torch
import triton
from torch import Tensor

from lynx_kernels.ops.head_common.chunked import Scoring
from lynx_kernels.ops.head_common.entries import Chunk
from lynx_kernels.ops.head_common.triton import fwd

# Not measured, because no GPU was available. 4096 logits in fp32 are 64 bytes for each thread of 8 warps.
_COLUMNS = 4096
_WARPS = 8


def score(scoring: Scoring, products: Tensor, chunk: Chunk) -> Tensor | None:
    """Write losses and entropies of the chunk's entries. Return the gradient of the products (n, V) if wanted."""
    call, (num_rows, vocabulary) = scoring.call, products.shape
    edges = None
    if chunk.at is not None:
        edges = torch.searchsorted(chunk.at, torch.arange(num_rows + 1, device=products.device))
    grad = None
    if scoring.grad_dtype is not None:
        is_alike = scoring.grad_dtype == products.dtype
        grad = products if is_alike else torch.empty_like(products, dtype=scoring.grad_dtype)
    bias = None if call.bias is None else call.bias.contiguous()
    with torch.cuda.device_of(products):  # Triton launches on the current device, not on that of the arguments
        fwd.head_fwd_kernel[(num_rows,)](
            products, bias, scoring.labels, scoring.factors, chunk.entries, edges, scoring.losses,
            scoring.entropies, grad, vocabulary, float(call.logit_scale), float(call.softcap or 1),
            1 / call.temperature, float(call.label_smoothing),
            HAS_SOFTCAP=call.softcap is not None, HAS_SMOOTHING=call.label_smoothing > 0,
            BLOCK_N=min(triton.next_power_of_2(vocabulary), _COLUMNS), num_warps=_WARPS,
        )  # fmt: skip
    return grad
