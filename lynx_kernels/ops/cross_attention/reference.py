"""The reference of cross_attention, in plain PyTorch. attention_common/reference.py has the equation."""

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from lynx_kernels.backends.dtypes import acc_dtype
from lynx_kernels.layout.tables import check_spans
from lynx_kernels.ops.attention_common.reference import attend, attend_backward, batches_of_shape, take_rows
from lynx_kernels.ops.cross_attention.call import CrossAttentionBackwardCall, CrossAttentionCall


def _spans(call: CrossAttentionCall | CrossAttentionBackwardCall) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield batches of n segments of equal shape: queries (n, Q), keys (n, K), and visibility (n, Q, K), all true."""
    segments = call.segments
    check_spans(segments, call.tile_offsets, call.tile_segments, call.q.shape[0], call.k.shape[0])
    starts: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for (query, key, key_end), (query_end, *_) in pairwise(segments.tolist()):
        starts.setdefault((query_end - query, key_end - key), []).append((query, key))
    for num_queries, num_keys, batch in batches_of_shape(starts, segments.device):
        queries = batch[:, :1] + torch.arange(num_queries, device=segments.device)
        keys = batch[:, 1:] + torch.arange(num_keys, device=segments.device)
        yield queries, keys, segments.new_ones((len(batch), num_queries, num_keys), dtype=torch.bool)


def forward(call: CrossAttentionCall) -> tuple[Tensor, Tensor]:
    """Return the output (Q, H, D) and the LSE (Q, H)."""
    q, k, v, _, _, _, scale = call
    out, lse = q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=acc_dtype(q.dtype))
    for queries, keys, visible in _spans(call):
        out[queries], lse[queries] = attend(q[queries], k[keys], v[keys], visible, scale)
    return out, lse


def backward(call: CrossAttentionBackwardCall) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v. A key sums over the segments that see it; a key that none sees gets 0."""
    grad, grad_lse, out, lse, q, k, v, _, _, _, scale = call
    grad_q = q.new_empty(q.shape)
    grad_k, grad_v = (x.new_zeros(x.shape, dtype=acc_dtype(x.dtype)) for x in (k, v))
    for queries, keys, visible in _spans(call):
        results = take_rows(grad, queries), take_rows(grad_lse, queries), out[queries], lse[queries]
        batch_q, batch_k, batch_v = attend_backward(*results, q[queries], k[keys], v[keys], visible, scale)
        grad_q[queries] = batch_q.to(q.dtype)
        grad_k.index_add_(0, keys.flatten(), batch_k.flatten(0, 1))
        grad_v.index_add_(0, keys.flatten(), batch_v.flatten(0, 1))
    return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype)
