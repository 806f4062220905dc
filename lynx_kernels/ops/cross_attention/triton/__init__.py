"""cross_attention in Triton. Forward takes one launch, or two if few queries split their keys; backward takes three.

attention_common/triton has what is not its own.
"""

import torch
import triton
from torch import Tensor

from lynx_kernels.layout import KEY_TILE
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
from lynx_kernels.ops.attention_common.triton.splits import choose_num_splits, combine
from lynx_kernels.ops.cross_attention.call import CrossAttentionBackwardCall, CrossAttentionCall
from lynx_kernels.ops.cross_attention.triton import bwd, fwd

_Call = CrossAttentionCall | CrossAttentionBackwardCall


def _launches(call: _Call, compute: torch.dtype) -> tuple[Launch, Launch, Launch]:
    queries, _, head_dim = call.q.shape
    return choose_launches(head_dim, compute, queries, call.segments.shape[0] - 1, True)


def _grid(call: _Call, launch: Launch) -> tuple[int, int, int]:
    """The grid over query tiles, heads, and splits of the keys."""
    (queries, heads, _), block = call.q.shape, launch.block_m
    splits = choose_num_splits(triton.cdiv(queries, block) * heads, call.k.shape[0], launch.block_n)
    return queries // block + call.segments.shape[0] - 1, heads, splits


def forward(call: CrossAttentionCall) -> tuple[Tensor, Tensor]:
    """Return the output (Q, H, D) and the LSE (Q, H)."""
    (queries, heads, head_dim), kv_heads, segments = call.q.shape, call.k.shape[1], call.segments.contiguous()
    out, lse = call.q.new_empty(call.q.shape), call.q.new_empty(queries, heads, dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    compute = compute_dtype(*call.floats)
    q, k, v = (readable(each, compute) for each in call.floats)
    strides, unit = strides_of(q, k, v)
    launch, _, _ = _launches(call, compute)
    grid = *_, num_splits = _grid(call, launch)
    outs, lses = out, lse
    if num_splits > 1:
        outs, lses = (each.new_empty(num_splits, *each.shape, dtype=torch.float32) for each in (out, lse))
    with torch.cuda.device_of(q):  # Triton launches on the current device, not on that of the arguments
        fwd.cross_attention_fwd_kernel[grid](
            q, k, v, segments, outs, lses, *strides,
            segments.shape[0] - 1, queries, heads // kv_heads, exponent(call.scale),
            NEGATIVE=call.scale < 0, **constants(launch, unit, head_dim),
        )  # fmt: skip
        if num_splits > 1:
            combine(outs, lses, out, lse)
    return out, lse


def backward(call: CrossAttentionBackwardCall) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v."""
    (queries, heads, head_dim), (keys, kv_heads, _) = call.q.shape, call.k.shape
    grad_q, grad_k, grad_v = (each.new_empty(each.shape) for each in (call.q, call.k, call.v))
    if call.q.numel() == 0:
        return grad_q, grad_k.zero_(), grad_v.zero_()
    compute = compute_dtype(call.q, call.k, call.v)
    grad = torch.zeros_like(call.out) if call.grad is None else call.grad
    grad, q, k, v = (readable(each, compute) for each in (grad, call.q, call.k, call.v))
    strides, unit = strides_of(grad, q, k, v)
    segments, inverse = call.segments.contiguous(), [call.tile_offsets.contiguous(), call.tile_segments.contiguous()]
    _, dq_launch, dkdv_launch = _launches(call, compute)
    grid = *_, num_splits = _grid(call, dq_launch)
    grads_q = grad_q.new_empty(num_splits, *grad_q.shape, dtype=torch.float32) if num_splits > 1 else grad_q
    with torch.cuda.device_of(q):
        lse_delta = preprocess(grad, call.out, call.lse, call.grad_lse)
        bwd.cross_attention_bwd_dq_kernel[grid](
            grad, q, k, v, lse_delta, segments, grads_q, *strides,
            segments.shape[0] - 1, queries, heads // kv_heads, call.scale, **constants(dq_launch, unit, head_dim),
        )  # fmt: skip
        bwd.cross_attention_bwd_dkdv_kernel[triton.cdiv(keys, dkdv_launch.block_n), kv_heads](
            grad, q, k, v, lse_delta, segments, *inverse, grad_k, grad_v, *strides,
            queries, keys, heads // kv_heads, call.scale,
            KEY_TILE=KEY_TILE, **constants(dkdv_launch, unit, head_dim),
        )  # fmt: skip
    return grads_q.sum(0).to(grad_q.dtype) if num_splits > 1 else grad_q, grad_k, grad_v
