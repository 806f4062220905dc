"""cross_attention on CPUs, in the C++ of csrc/attention_common. It tiles keys itself and needs no inverse table."""

from typing import Any

from torch import Tensor

from lynx_kernels.backends import cpu as cpu_backend
from lynx_kernels.ops.attention_common import cpu as common
from lynx_kernels.ops.cross_attention.call import CrossAttentionBackwardCall, CrossAttentionCall


def _layout(call: CrossAttentionCall | CrossAttentionBackwardCall) -> Any:
    segments = call.segments.contiguous()
    return cpu_backend.module.span_layout(
        segments.data_ptr(), segments.shape[0], call.q.shape[0], call.k.shape[0]
    )  # fmt: skip


def forward(call: CrossAttentionCall) -> tuple[Tensor, Tensor]:
    """Return the output (Q, H, D) and the LSE (Q, H)."""
    return common.forward(_layout(call), call)


def backward(call: CrossAttentionBackwardCall) -> tuple[Tensor, ...]:
    """Return the gradients of q, k and v: 0 for queries that see no key and for keys that no query sees."""
    inputs = call.q, call.k, call.v
    dtype = common.common_dtype(*inputs)
    return common.backward(_layout(call), call, tuple(each.new_zeros(each.shape, dtype=dtype) for each in inputs))
