"""Decoding on CPUs, in the C++ of csrc/prefix_attention_decode: this file allocates and hands over addresses.

The caches are read where they stand, with any strides but of the head dimension; only where dtypes differ are they
converted first. Roots and branches are cut into parts by their lengths alone: the number of threads changes nothing.
"""

import torch
from torch import Tensor

from lynx_kernels.backends import cpu as cpu_backend
from lynx_kernels.ops.attention_common.cpu import common_dtype, prepare
from lynx_kernels.ops.prefix_attention_decode.call import DecodeCall


def _cache(tensor: Tensor) -> tuple[int, int, int, int]:
    """(entries, rows, heads, head dimension) as the compiled module takes it."""
    entry, row, head, _ = tensor.stride()
    return tensor.data_ptr(), entry, row, head


def _index(tensor: Tensor) -> tuple[int, bool]:
    return tensor.data_ptr(), tensor.dtype == torch.int64


def forward(call: DecodeCall) -> tuple[Tensor, Tensor]:
    """Return the output (B, Q, H, D) and the LSE (B, Q, H)."""
    q, root_k, branch_k = call.q, call.root_k, call.branch_k
    (branches, queries, heads, head_dim), (roots, root_room, kv_heads, _) = q.shape, root_k.shape
    dtype = common_dtype(*call.floats)
    # Not new_empty, which takes twice as long: generation comes here for every layer and token.
    out = torch.empty(q.shape, dtype=dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    if out.numel() > 0:
        # Kept while their addresses are in use.
        readable = [prepare(each, dtype) for each in call.floats]
        indices = [each.contiguous() for each in call.indices.values()]
        cpu_backend.module.attention_decode(
            (branches, roots, queries), (root_room, branch_k.shape[1]), (heads, kv_heads, head_dim), call.scale,
            dtype == torch.bfloat16, *map(_cache, readable), *map(_index, indices), out.data_ptr(), lse.data_ptr(),
            torch.get_num_threads(),
        )  # fmt: skip
    return out if out.dtype == q.dtype else out.to(q.dtype), lse
