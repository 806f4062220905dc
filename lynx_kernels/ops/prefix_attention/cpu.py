"""prefix_attention on CPUs, in the C++ of csrc/attention_common."""

from typing import Any

from torch import Tensor

from lynx_kernels.backends import cpu as cpu_backend
from lynx_kernels.ops.attention_common import cpu as common
from lynx_kernels.ops.attention_common.reference import sinks_backward
from lynx_kernels.ops.prefix_attention.call import PrefixAttentionBackwardCall, PrefixAttentionCall


def _layout(call: PrefixAttentionCall | PrefixAttentionBackwardCall) -> Any:
    """The compiled module's object for the layout. It keeps nothing of the tables."""
    tables = [each.contiguous() for each in (call.runs, call.tokens, call.key_runs[:, None])]
    views = [(table.data_ptr(), *table.shape) for table in tables]
    return cpu_backend.module.packed_layout(*views, call.window or 0, call.chunk or 0)


def forward(call: PrefixAttentionCall) -> tuple[Tensor, Tensor]:
    """Return the output (T, H, Dv) and the LSE (T, H)."""
    return common.forward(_layout(call), call, call.softcap, call.sinks)


def backward(call: PrefixAttentionBackwardCall) -> tuple[Tensor, ...]:
    """Return the gradients of q, k, v and, if there are sinks, of the sinks."""
    inputs = call.q, call.k, call.v
    dtype = common.common_dtype(*inputs)
    gradients = tuple(each.new_empty(each.shape, dtype=dtype) for each in inputs)
    return (
        *common.backward(_layout(call), call, gradients, call.softcap),
        sinks_backward(call.grad, call.grad_lse, call.out, call.lse, call.sinks),
    )
