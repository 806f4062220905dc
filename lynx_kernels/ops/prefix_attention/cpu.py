"""prefix_attention on CPUs, in the C++ of csrc/attention_common."""

from typing import Any

from torch import Tensor

from lynx_kernels.backends import cpu as cpu_backend
from lynx_kernels.ops.attention_common import cpu as common
from lynx_kernels.ops.prefix_attention.call import PrefixAttentionBackwardCall, PrefixAttentionCall


def _layout(call: PrefixAttentionCall | PrefixAttentionBackwardCall) -> Any:
    segments = call.segments.contiguous()
    return cpu_backend.module.packed_layout(
        segments.data_ptr(), segments.shape[0], call.q.shape[0], call.root_is_causal
    )  # fmt: skip


def forward(call: PrefixAttentionCall) -> tuple[Tensor, Tensor]:
    """Return the output (T, H, D) and the LSE (T, H)."""
    return common.forward(_layout(call), call)


def backward(call: PrefixAttentionBackwardCall) -> tuple[Tensor, ...]:
    """Return the gradients of q, k and v."""
    inputs = call.q, call.k, call.v
    dtype = common.common_dtype(*inputs)
    return common.backward(_layout(call), call, tuple(each.new_empty(each.shape, dtype=dtype) for each in inputs))
