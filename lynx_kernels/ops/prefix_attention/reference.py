"""The reference of prefix_attention, in plain PyTorch. attention_common/reference.py has the equation."""

from collections.abc import Iterator

import torch
from torch import Tensor

from lynx_kernels.backends.dtypes import acc_dtype
from lynx_kernels.layout import key_intervals
from lynx_kernels.ops.attention_common.reference import attend, attend_backward, batches_of_shape, take_rows
from lynx_kernels.ops.prefix_attention.call import PrefixAttentionBackwardCall, PrefixAttentionCall


def _groups(segments: Tensor, num_tokens: int, root_is_causal: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches of n groups of equal length L: their rows (n, L), and which query sees which key (n, L, L)."""
    first, last = key_intervals(segments, num_tokens, root_is_causal)
    starts: dict[tuple[int, int], list[int]] = {}
    for start, end in sorted({(start, end) for _, start, _, end in segments.tolist() if end > start}):
        starts.setdefault((end - start, end - start), []).append(start)
    for length, _, batch in batches_of_shape(starts, segments.device):
        rows = batch[:, None] + torch.arange(length, device=segments.device)
        query = rows[:, :, None]
        yield rows, (first[rows][:, None] <= query) & (query < last[rows][:, None])


def forward(call: PrefixAttentionCall) -> tuple[Tensor, Tensor]:
    """Return the output (T, H, D) and the LSE (T, H)."""
    q, k, v, segments, root_is_causal, scale = call
    out, lse = q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=acc_dtype(q.dtype))
    for rows, visible in _groups(segments, q.shape[0], root_is_causal):
        out[rows], lse[rows] = attend(q[rows], k[rows], v[rows], visible, scale)
    return out, lse


def backward(call: PrefixAttentionBackwardCall) -> tuple[Tensor, ...]:
    """Return the gradients of q, k and v."""
    grad, grad_lse, out, lse, q, k, v, segments, root_is_causal, scale = call
    gradients = tuple(x.new_empty(x.shape) for x in (q, k, v))
    for rows, visible in _groups(segments, q.shape[0], root_is_causal):
        results = take_rows(grad, rows), take_rows(grad_lse, rows), out[rows], lse[rows]
        batch = attend_backward(*results, q[rows], k[rows], v[rows], visible, scale)
        for gradient, batch_gradient in zip(gradients, batch, strict=True):
            gradient[rows] = batch_gradient.to(gradient.dtype)
    return gradients
