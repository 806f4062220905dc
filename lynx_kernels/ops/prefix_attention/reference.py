"""The reference of prefix_attention, in plain PyTorch. attention_common/reference.py has the equation."""

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from lynx_kernels.backends.dtypes import acc_dtype
from lynx_kernels.layout.packed import visible
from lynx_kernels.layout.tables import check_packed
from lynx_kernels.ops.attention_common.reference import (
    attend,
    attend_backward,
    batches_of_shape,
    sinks_backward,
    take_rows,
)
from lynx_kernels.ops.prefix_attention.call import PrefixAttentionBackwardCall, PrefixAttentionCall


def _trees(call: PrefixAttentionCall | PrefixAttentionBackwardCall) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches of n trees of equal length L: their rows (n, L), and which query sees which key (n, L, L)."""
    check_packed(call.runs, call.tokens, call.key_runs)
    *runs, closing = call.runs.tolist()
    # A run that sees no other begins a tree. Ends of ranges stand in every third column; those of empty ones are 0.
    bounds = [start for start, _, _, *ranges in runs if not any(ranges[1::3])]
    starts: dict[tuple[int, int], list[int]] = {}
    for start, end in pairwise([*bounds, closing[0]]):
        if end > start:
            starts.setdefault((end - start, end - start), []).append(start)
    for length, _, batch in batches_of_shape(starts, call.q.device):
        rows = batch[:, None] + torch.arange(length, device=call.q.device)
        yield rows, visible(rows, call.tokens, call.runs, call.window, call.chunk)


def forward(call: PrefixAttentionCall) -> tuple[Tensor, Tensor]:
    """Return the output (T, H, Dv) and the LSE (T, H)."""
    q, k, v = call.floats
    out = q.new_empty(*q.shape[:2], v.shape[2])
    lse = q.new_empty(q.shape[:2], dtype=acc_dtype(q.dtype))
    for rows, seen in _trees(call):
        out[rows], lse[rows] = attend(q[rows], k[rows], v[rows], seen, call.scale, call.softcap, call.sinks)
    return out, lse


def backward(call: PrefixAttentionBackwardCall) -> tuple[Tensor, ...]:
    """Return the gradients of q, k, v and, if there are sinks, of the sinks."""
    grad, grad_lse, out, lse, q, k, v, sinks = call[:8]
    gradients = tuple(x.new_empty(x.shape) for x in (q, k, v))
    for rows, seen in _trees(call):
        results = take_rows(grad, rows), take_rows(grad_lse, rows), out[rows], lse[rows]
        batch = attend_backward(*results, q[rows], k[rows], v[rows], seen, call.scale, call.softcap)
        for gradient, batch_gradient in zip(gradients, batch, strict=True):
            gradient[rows] = batch_gradient.to(gradient.dtype)
    return *gradients, sinks_backward(grad, grad_lse, out, lse, sinks)
