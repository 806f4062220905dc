"""The definitions of the three attentions, in plain PyTorch: one equation, three ways to say who sees whom.

    S = scale * Q K^T where the query sees the key, -inf elsewhere
    LSE = log sum_k exp(S)        P = exp(S - LSE)        out = P V

Everything is computed in at least fp32 (fp64 for fp64). A query that sees no key has output 0, LSE -inf and gradient 0.
Blocks of one shape are computed together. The loops over shapes read the layout's table on the host, which costs a
device a wait; the kernels do not.
Shapes: H query heads share Hkv key heads in groups of H / Hkv; D is the head dimension.
"""

from itertools import pairwise

import torch
from torch import Tensor

from lynx_kernels.backends.dtypes import acc_dtype
from lynx_kernels.layout import key_intervals

_MAX_CELLS = 2**18  # pairs of query and key, a head, that are computed at once: bounds the memory


def _grouped(tensor: Tensor, num_kv_heads: int) -> Tensor:
    """(..., Q, H, D) -> (..., Q, Hkv, H / Hkv, D) in the wide dtype."""
    return tensor.to(acc_dtype(tensor.dtype)).unflatten(-2, (num_kv_heads, -1))


def _scores(q: Tensor, k: Tensor, visible: Tensor, scale: float) -> Tensor:
    """(..., Hkv, H / Hkv, Q, K): S of the equation above."""
    scores = scale * torch.einsum("...qhgd,...khd->...hgqk", _grouped(q, k.shape[-2]), k.to(acc_dtype(k.dtype)))
    return scores.masked_fill(~visible[..., None, None, :, :], float("-inf"))


def attend(
    q: Tensor,  # (..., Q, H, D)
    k: Tensor,  # (..., K, Hkv, D)
    v: Tensor,  # (..., K, Hkv, D)
    visible: Tensor,  # (..., Q, K) bool
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Return the output (..., Q, H, D) in the dtype of q, and the LSE (..., Q, H) in the wide dtype."""
    scores = _scores(q, k, visible, scale)
    lse = scores.logsumexp(-1)  # (..., Hkv, H / Hkv, Q)
    weights = torch.exp(scores - lse.masked_fill(lse.isneginf(), 0)[..., None])
    out = torch.einsum("...hgqk,...khd->...qhgd", weights, v.to(weights.dtype))
    return out.flatten(-3, -2).to(q.dtype).contiguous(), lse.movedim(-1, -3).flatten(-2).contiguous()


def attend_backward(
    grad: Tensor | None,  # (..., Q, H, D)
    grad_lse: Tensor | None,  # (..., Q, H)
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v in the wide dtype.

    dV = P^T dO        dS = P * (dO V^T - (rowsum(dO * O) - dLSE))        dQ = scale dS K        dK = scale dS^T Q
    """
    num_kv_heads = k.shape[-2]
    grad = torch.zeros_like(out) if grad is None else grad
    delta = (grad.to(lse.dtype) * out.to(lse.dtype)).sum(-1)  # (..., Q, H)
    if grad_lse is not None:
        delta = delta - grad_lse.to(lse.dtype)
    lse, delta = (x.unflatten(-1, (num_kv_heads, -1)).movedim(-3, -1)[..., None] for x in (lse, delta))
    grad = _grouped(grad, num_kv_heads)
    weights = torch.exp(_scores(q, k, visible, scale) - lse.masked_fill(lse.isneginf(), 0))  # (..., Hkv, H/Hkv, Q, K)
    grad_v = torch.einsum("...hgqk,...qhgd->...khd", weights, grad)
    grad_weights = torch.einsum("...qhgd,...khd->...hgqk", grad, v.to(grad.dtype))
    grad_scores = scale * weights * (grad_weights - delta)
    grad_q = torch.einsum("...hgqk,...khd->...qhgd", grad_scores, k.to(grad.dtype)).flatten(-3, -2)
    grad_k = torch.einsum("...hgqk,...qhgd->...khd", grad_scores, _grouped(q, num_kv_heads))
    return grad_q, grad_k, grad_v


def _part(tensor: Tensor | None, rows: Tensor) -> Tensor | None:
    return None if tensor is None else tensor[rows]


def _batches(starts_by_shape: dict[tuple[int, int], list], device: torch.device):
    """Yield the shape (queries, keys) and the starts of blocks of one shape, as many as a batch may hold."""
    for (queries, keys), starts in starts_by_shape.items():
        for batch in torch.tensor(starts, device=device).split(max(1, _MAX_CELLS // max(1, queries * keys))):
            yield queries, keys, batch


def _groups(segments: Tensor, num_tokens: int, root_is_causal: bool):
    """Yield the groups of a packed layout, n of one length L at once: their rows (n, L), who sees whom (n, L, L)."""
    first, last = key_intervals(segments, num_tokens, root_is_causal)
    starts: dict[tuple[int, int], list[int]] = {}
    for start, end in sorted({(start, end) for _, start, _, end in segments.tolist() if end > start}):
        starts.setdefault((end - start, end - start), []).append(start)
    for length, _, batch in _batches(starts, segments.device):
        rows = batch[:, None] + torch.arange(length, device=segments.device)
        query = rows[:, :, None]
        yield rows, (first[rows][:, None] <= query) & (query < last[rows][:, None])


def prefix_attention(
    q: Tensor,  # (T, H, D)
    k: Tensor,  # (T, Hkv, D)
    v: Tensor,  # (T, Hkv, D)
    segments: Tensor,  # PackedLayout.segments
    root_is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Return the output (T, H, D) and the LSE (T, H)."""
    out, lse = q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=acc_dtype(q.dtype))
    for rows, visible in _groups(segments, q.shape[0], root_is_causal):
        out[rows], lse[rows] = attend(q[rows], k[rows], v[rows], visible, scale)
    return out, lse


def prefix_attention_backward(
    grad: Tensor | None,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Tensor,
    root_is_causal: bool,
    scale: float,
) -> tuple[Tensor, ...]:
    """Return the gradients of q, k and v."""
    gradients = tuple(x.new_empty(x.shape) for x in (q, k, v))
    for rows, visible in _groups(segments, q.shape[0], root_is_causal):
        results = _part(grad, rows), _part(grad_lse, rows), out[rows], lse[rows]
        parts = attend_backward(*results, q[rows], k[rows], v[rows], visible, scale)
        for gradient, part in zip(gradients, parts, strict=True):
            gradient[rows] = part.to(gradient.dtype)
    return gradients


def _spans(segments: Tensor):
    """Yield the segments of a span layout, n of one shape at once: queries (n, Q), keys (n, K), who sees whom: all."""
    starts: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for (query, key, key_end), (query_end, *_) in pairwise(segments.tolist()):
        starts.setdefault((query_end - query, key_end - key), []).append((query, key))
    for num_queries, num_keys, batch in _batches(starts, segments.device):
        queries = batch[:, :1] + torch.arange(num_queries, device=segments.device)
        keys = batch[:, 1:] + torch.arange(num_keys, device=segments.device)
        yield queries, keys, segments.new_ones((len(batch), num_queries, num_keys), dtype=torch.bool)


def cross_attention(
    q: Tensor,  # (Q, H, D)
    k: Tensor,  # (K, Hkv, D)
    v: Tensor,  # (K, Hkv, D)
    segments: Tensor,  # SpanLayout.segments
    tile_offsets: Tensor,  # not needed here: SpanLayout's inverse, for gradients of keys
    tile_segments: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Return the output (Q, H, D) and the LSE (Q, H)."""
    out, lse = q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=acc_dtype(q.dtype))
    for queries, keys, visible in _spans(segments):
        out[queries], lse[queries] = attend(q[queries], k[keys], v[keys], visible, scale)
    return out, lse


def cross_attention_backward(
    grad: Tensor | None,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Tensor,
    tile_offsets: Tensor,
    tile_segments: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v; keys seen by several segments sum theirs, keys seen by none get 0."""
    grad_q = q.new_empty(q.shape)
    grad_k, grad_v = (x.new_zeros(x.shape, dtype=acc_dtype(x.dtype)) for x in (k, v))
    for queries, keys, visible in _spans(segments):
        results = _part(grad, queries), _part(grad_lse, queries), out[queries], lse[queries]
        part_q, part_k, part_v = attend_backward(*results, q[queries], k[keys], v[keys], visible, scale)
        grad_q[queries] = part_q.to(q.dtype)
        grad_k.index_add_(0, keys.flatten(), part_k.flatten(0, 1))
        grad_v.index_add_(0, keys.flatten(), part_v.flatten(0, 1))
    return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype)


def _decode_view(
    root_k, root_v, branch_k, branch_v, branch_to_root, root_lengths, branch_lengths, num_queries
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values (B, Lr + Lb, Hkv, D) of every branch with its root's copied, and who sees whom (B, Q, Lr + Lb).

    The queries of a branch are its last tokens: query i of Q sees all but the Q - 1 - i newest of its keys. What stands
    behind the lengths is 0 here, whatever the caches hold there, NaN included.
    """
    device = root_k.device
    in_root = torch.arange(root_k.shape[1], device=device) < root_lengths[branch_to_root, None]  # (B, Lr)
    seen = branch_lengths[:, None] - torch.arange(num_queries - 1, -1, -1, device=device)  # (B, Q)
    in_branch = torch.arange(branch_k.shape[1], device=device) < seen[:, :, None]  # (B, Q, Lb)
    is_filled = torch.arange(branch_k.shape[1], device=device) < branch_lengths[:, None]  # (B, Lb)
    unread = ~torch.cat([in_root, is_filled], 1)[..., None, None]  # (B, Lr + Lb, 1, 1)
    keys = torch.cat([root_k[branch_to_root], branch_k], 1).masked_fill(unread, 0)
    values = torch.cat([root_v[branch_to_root], branch_v], 1).masked_fill(unread, 0)
    return keys, values, torch.cat([in_root[:, None].expand(-1, num_queries, -1), in_branch], 2)


def prefix_attention_decode(
    q: Tensor,  # (B, Q, H, D)
    root_k: Tensor,  # (R, Lr, Hkv, D)
    root_v: Tensor,
    branch_k: Tensor,  # (B, Lb, Hkv, D)
    branch_v: Tensor,
    branch_to_root: Tensor,  # (B,) int
    root_lengths: Tensor,  # (R,) int
    branch_lengths: Tensor,  # (B,) int
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Return the output (B, Q, H, D) and the LSE (B, Q, H)."""
    cache = (root_k, root_v, branch_k, branch_v, branch_to_root, root_lengths, branch_lengths)
    return attend(q, *_decode_view(*cache, q.shape[1]), scale)


def prefix_attention_decode_backward(
    grad: Tensor | None,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    root_k: Tensor,
    root_v: Tensor,
    branch_k: Tensor,
    branch_v: Tensor,
    branch_to_root: Tensor,
    root_lengths: Tensor,
    branch_lengths: Tensor,
    scale: float,
) -> tuple[Tensor, ...]:
    """Return the gradients of q and of the four caches; a root's keys sum those of its branches."""
    cache = (root_k, root_v, branch_k, branch_v, branch_to_root, root_lengths, branch_lengths)
    keys, values, visible = _decode_view(*cache, q.shape[1])
    grad_q, grad_keys, grad_values = attend_backward(grad, grad_lse, out, lse, q, keys, values, visible, scale)
    split = [root_k.shape[1], branch_k.shape[1]]
    (to_root_k, to_branch_k), (to_root_v, to_branch_v) = grad_keys.split(split, 1), grad_values.split(split, 1)
    grad_root_k = to_root_k.new_zeros(root_k.shape).index_add_(0, branch_to_root, to_root_k)
    grad_root_v = to_root_v.new_zeros(root_v.shape).index_add_(0, branch_to_root, to_root_v)
    gradients = (grad_q, grad_root_k, grad_root_v, to_branch_k, to_branch_v)
    inputs = (q, root_k, root_v, branch_k, branch_v)
    return tuple(gradient.to(x.dtype).contiguous() for gradient, x in zip(gradients, inputs, strict=True))
