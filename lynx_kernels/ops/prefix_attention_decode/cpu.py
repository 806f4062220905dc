"""Decoding on CPUs, in the C++ of csrc/prefix_attention_decode. This file allocates outputs and passes addresses.

The caches are read in place, with unit stride only along the head dimension. They are converted first only if dtypes
differ. Splits of roots and branches depend only on lengths, so the number of threads does not change the result.
"""

import torch
from torch import Tensor

from lynx_kernels.backends import cpu as cpu_backend
from lynx_kernels.ops.attention_common.cpu import common_dtype, prepare
from lynx_kernels.ops.prefix_attention_decode.call import DecodeCall


def _cache(tensor: Tensor) -> tuple[int, int, int, int]:
    """Address and strides of an (entries, rows, heads, head dimension) tensor, as the compiled module takes them."""
    entry, row, head, _ = tensor.stride()
    return tensor.data_ptr(), entry, row, head


def _index(tensor: Tensor) -> tuple[int, bool]:
    return tensor.data_ptr(), tensor.dtype == torch.int64


def forward(call: DecodeCall) -> tuple[Tensor, Tensor]:
    """Return the output (B, Q, H, D) and the LSE (B, Q, H)."""
    q, root_k, branch_k = call.q, call.root_k, call.branch_k
    (branches, queries, heads, head_dim), (roots, root_room, kv_heads, _) = q.shape, root_k.shape
    dtype = common_dtype(*call.floats)
    # new_empty takes twice as long, and generation runs this for every layer and token.
    out = torch.empty(q.shape, dtype=dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    if out.numel() > 0:
        # The lists keep copies alive while their addresses are in use.
        readable = [prepare(each, dtype) for each in call.floats]
        indices = [each.contiguous() for each in call.indices.values()]
        cpu_backend.module.attention_decode(
            (branches, roots, queries), (root_room, branch_k.shape[1]), (heads, kv_heads, head_dim), call.scale,
            dtype == torch.bfloat16, *map(_cache, readable), *map(_index, indices), out.data_ptr(), lse.data_ptr(),
            torch.get_num_threads(),
        )  # fmt: skip
    return out if out.dtype == q.dtype else out.to(q.dtype), lse
