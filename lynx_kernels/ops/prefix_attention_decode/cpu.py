"""Decoding on CPUs, in the C++ of csrc/prefix_attention_decode. This file allocates outputs and passes addresses.

The caches are read in place, with unit stride only along the head dimension. They are converted first only if dtypes
differ. Branches that read the same range read it together. Splits depend only on the lengths of a branch, so neither
the number of threads nor other branches change a result.
"""

import torch
from torch import Tensor

from lynx_kernels.backends import cpu as cpu_backend
from lynx_kernels.ops.attention_common.cpu import common_dtype, prepare
from lynx_kernels.ops.prefix_attention_decode.call import DecodeCall


def _view(tensor: Tensor) -> tuple[int, ...]:
    """Address and strides, but for the last, as the compiled module takes them."""
    return tensor.data_ptr(), *tensor.stride()[:-1]


def _index(tensor: Tensor) -> tuple[int, bool]:
    return tensor.data_ptr(), tensor.dtype == torch.int64


def forward(call: DecodeCall) -> tuple[Tensor, Tensor]:
    """Return the output (B, Q, H, Dv) and the LSE (B, Q, H)."""
    q, branch_k = call.q, call.branch_k
    (branches, queries, heads, head_dim), (num_shared, kv_heads, value_dim) = q.shape, call.shared_v.shape
    dtype = common_dtype(*call.floats)
    # new_empty takes twice as long, and generation runs this for every layer and token.
    out = torch.empty(branches, queries, heads, value_dim, dtype=dtype, device=q.device)
    lse = torch.empty(branches, queries, heads, dtype=torch.float32, device=q.device)
    if out.numel() > 0:
        # The lists keep copies alive while their addresses are in use.
        readable = [prepare(each, dtype) for each in call.floats]
        indices = [each.contiguous() for each in call.indices.values()]
        sinks = None if call.sinks is None else call.sinks.to(torch.float32).contiguous()
        cpu_backend.module.attention_decode(
            (branches, queries, call.ranges.shape[1]), (num_shared, branch_k.shape[1]),
            (heads, kv_heads, head_dim, value_dim), (call.window or 0, call.chunk or 0),
            (call.scale, call.softcap or 0.0, 0 if sinks is None else sinks.data_ptr()), dtype == torch.bfloat16,
            *map(_view, readable), *map(_index, indices), out.data_ptr(), lse.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
    return out if out.dtype == q.dtype else out.to(q.dtype), lse
