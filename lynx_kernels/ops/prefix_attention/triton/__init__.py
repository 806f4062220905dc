"""prefix_attention in Triton: one launch forward, three backward. attention_common/triton has what is not its own."""

import math

import torch
from torch import Tensor

from lynx_kernels.ops.attention_common.triton.bwd import preprocess
from lynx_kernels.ops.attention_common.triton.launches import (
    Launch,
    choose_launches,
    compute_dtype,
    constants,
    exponent,
    readable,
    strides_of,
)
from lynx_kernels.ops.prefix_attention.call import PrefixAttentionBackwardCall, PrefixAttentionCall
from lynx_kernels.ops.prefix_attention.triton import bwd, fwd

_Call = PrefixAttentionCall | PrefixAttentionBackwardCall


def _grid(tokens: int, starts: Tensor, block: int, heads: int) -> tuple[int, int]:
    """The grid over tiles that start at the rows of a table, whose last row only closes it, and over heads."""
    return tokens // block + starts.shape[0] - 1, heads


def _locality(call: _Call) -> tuple[str | None, int]:
    """LOCAL and extent of the kernels. An extent of T tokens or more leaves out nothing."""
    kind, extent = ("window", call.window) if call.window is not None else ("chunk", call.chunk)
    return (None, 0) if extent is None else (kind, min(extent, call.q.shape[0]))


def _launches(call: _Call, compute: torch.dtype) -> tuple[Launch, Launch, Launch]:
    tokens, _, head_dim = call.q.shape
    return choose_launches(head_dim, compute, tokens, call.runs.shape[0] - 1, False)


def forward(call: PrefixAttentionCall) -> tuple[Tensor, Tensor]:
    """Return the output (T, H, Dv) and the LSE (T, H)."""
    (tokens, heads, head_dim), (_, kv_heads, value_dim) = call.q.shape, call.v.shape
    out, lse = call.q.new_empty(tokens, heads, value_dim), call.q.new_empty(tokens, heads, dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    compute = compute_dtype(*call.floats)
    q, k, v = (readable(each, compute) for each in call.floats)
    strides, unit = strides_of(q, k, v)
    launch, _, _ = _launches(call, compute)
    runs, num_ranges, (local, extent) = call.runs.contiguous(), call.runs.shape[1] // 3, _locality(call)
    scale, inner = exponent(call.scale), None
    if call.softcap is not None:
        scale, inner = exponent(call.softcap), call.scale / call.softcap
    with torch.cuda.device_of(q):  # Triton launches on the current device, not on that of the arguments
        fwd.prefix_attention_fwd_kernel[_grid(tokens, runs, launch.block_m, heads)](
            q, k, v, None if call.sinks is None else call.sinks.contiguous(), runs, call.tokens.contiguous(),
            out, lse, *strides, runs.shape[0] - 1, num_ranges, tokens, heads // kv_heads, extent, scale, inner,
            NEGATIVE=call.scale < 0 and inner is None, LOCAL=local, RANGES=min(num_ranges, 3),
            **constants(launch, unit, head_dim, value_dim),
        )  # fmt: skip
    return out, lse


def backward(call: PrefixAttentionBackwardCall) -> tuple[Tensor, ...]:
    """Return the gradients of q, k, v and, if there are sinks, of the sinks; else (0,) for these."""
    (tokens, heads, head_dim), (_, kv_heads, value_dim) = call.q.shape, call.v.shape
    grad_q, grad_k, grad_v = (each.new_empty(each.shape) for each in (call.q, call.k, call.v))
    if call.q.numel() == 0:
        return grad_q, grad_k, grad_v, call.lse.new_zeros(0) if call.sinks is None else torch.zeros_like(call.sinks)
    compute = compute_dtype(call.q, call.k, call.v)
    grad = torch.zeros_like(call.out) if call.grad is None else call.grad
    grad, q, k, v = (readable(each, compute) for each in (grad, call.q, call.k, call.v))
    strides, unit = strides_of(grad, q, k, v)
    _, dq_launch, dkdv_launch = _launches(call, compute)
    num_ranges, (local, extent) = call.runs.shape[1] // 3, _locality(call)
    runs, token_table, key_runs = (each.contiguous() for each in (call.runs, call.tokens, call.key_runs))
    outer, inner = call.scale, None
    if call.softcap is not None:
        outer, inner = call.softcap, call.scale / call.softcap
    scales = call.scale, outer * math.log2(math.e), inner
    with torch.cuda.device_of(q):
        lse_delta = preprocess(grad, call.out, call.lse, call.grad_lse)
        bwd.prefix_attention_bwd_dq_kernel[_grid(tokens, runs, dq_launch.block_m, heads)](
            grad, q, k, v, lse_delta, runs, token_table, grad_q, *strides,
            runs.shape[0] - 1, num_ranges, tokens, heads // kv_heads, extent, *scales,
            LOCAL=local, RANGES=min(num_ranges, 3), **constants(dq_launch, unit, head_dim, value_dim),
        )  # fmt: skip
        bwd.prefix_attention_bwd_dkdv_kernel[_grid(tokens, key_runs, dkdv_launch.block_n, kv_heads)](
            grad, q, k, v, lse_delta, runs, token_table, key_runs, grad_k, grad_v, *strides,
            runs.shape[0] - 1, num_ranges, key_runs.shape[0] - 1, tokens, heads // kv_heads, extent, *scales,
            LOCAL=local, **constants(dkdv_launch, unit, head_dim, value_dim),
        )  # fmt: skip
    return grad_q, grad_k, grad_v, _grad_of_sinks(call, lse_delta[1])


def _grad_of_sinks(call: PrefixAttentionBackwardCall, delta: Tensor) -> Tensor:
    """``-sum_q exp(sink - LSE) * delta``, given delta (H, T), in PyTorch's order, which is the same in every run."""
    if call.sinks is None:
        return call.lse.new_zeros(0)
    weights = torch.exp(call.sinks.float() - call.lse)  # (T, H)
    return -(weights * delta.T).sum(0).to(call.sinks.dtype)
