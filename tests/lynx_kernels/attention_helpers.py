"""Dense masks and plain attention, with which the tests of layouts and attention compare.

Nothing here uses the tables of layouts. Masks come from the lists that layouts are built from.
"""

from collections.abc import Callable, Sequence

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

Groups = Sequence[tuple[int, Sequence[int]]]
Device = torch.device | str

GROUPS = st.lists(st.tuples(st.integers(0, 5), st.lists(st.integers(0, 4), max_size=3)), max_size=5)
EXAMPLES = settings(derandomize=True, deadline=None, max_examples=100)
FEW_EXAMPLES = settings(EXAMPLES, max_examples=40)


@st.composite
def spans(draw, max_keys: int = 12):
    """Arguments of ``SpanLayout.from_spans``: query lengths, key spans, the number of keys."""
    num_keys = draw(st.integers(0, max_keys))
    bounds = st.tuples(st.integers(0, num_keys), st.integers(0, num_keys)).map(sorted).map(tuple)
    segments = draw(st.lists(st.tuples(st.integers(0, 4), bounds), max_size=6))
    return [length for length, _ in segments], [span for _, span in segments], num_keys


def tokens_of(groups: Groups) -> list[tuple[int, int, int]]:
    """For every token: its group, its segment in the group (0: the root, 1: the first branch), its place in that."""
    return [
        (group, part, place)
        for group, (root_length, branch_lengths) in enumerate(groups)
        for part, length in enumerate([root_length, *branch_lengths])
        for place in range(length)
    ]


def packed_visible(groups: Groups, root_is_causal: bool) -> Tensor:
    """(T, T) bool, ``[query, key]``, of a packed layout."""
    group, part, place = torch.tensor(tokens_of(groups), dtype=torch.int32).reshape(-1, 3).T  # (T,) each
    in_group = group[:, None] == group
    in_part = part[:, None] == part
    not_later = place[:, None] >= place
    to_root = part == 0  # of keys
    sees_own = in_part & (not_later if root_is_causal else not_later | to_root)
    return in_group & (sees_own | (to_root & ~in_part))


def span_visible(query_lengths: Sequence[int], key_spans: Sequence[tuple[int, int]], num_keys: int) -> Tensor:
    """(Q, K) bool of a span layout."""
    spans = torch.tensor(key_spans, dtype=torch.int32).reshape(-1, 2)
    start, end = spans.repeat_interleave(torch.tensor(query_lengths, dtype=torch.int64), 0)[..., None].unbind(1)
    key = torch.arange(num_keys)
    return (start <= key) & (key < end)


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Plain softmax attention in the dtype of the inputs: q (Q, H, D), k and v (K, Hkv, D or Dv), visible (Q, K)."""
    copies = q.shape[1] // k.shape[1]
    k, v = (each.repeat_interleave(copies, dim=1) for each in (k, v))
    scale = q.shape[2] ** -0.5 if scale is None else scale
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    sees_nothing = ~visible.any(1)
    scores = scores.masked_fill(~(visible | sees_nothing[:, None]), float("-inf"))
    if sinks is not None:  # a key without a value; here every query sees a key
        scores = torch.cat([scores, sinks.to(scores.dtype)[:, None, None].expand(-1, len(q), 1)], 2)
        weights = scores.softmax(-1)[..., :-1] * visible
        return torch.einsum("hqk,khd->qhd", weights, v), scores.logsumexp(-1).T
    weights = scores.softmax(-1) * visible
    lse = scores.logsumexp(-1).masked_fill(sees_nothing, float("-inf")) if k.shape[0] else scores.sum(-1) - torch.inf
    return torch.einsum("hqk,khd->qhd", weights, v), lse.T


def dense_decode(
    q, shared_k, shared_v, branch_k, branch_v, ranges, branch_lengths, scale=None, window=None, chunk=None, **scores
) -> tuple[Tensor, Tensor]:
    """Decoding by plain attention, one branch at a time, over the keys of its path side by side."""
    outputs = []
    for branch, length in enumerate(branch_lengths.tolist()):
        k, v = (
            torch.cat([*(shared[start:end] for start, end in ranges[branch].tolist()), own[branch, :length]])
            for shared, own in ((shared_k, branch_k), (shared_v, branch_v))
        )
        places = range(len(k) - q.shape[1], len(k))  # of the queries
        visible = [
            [
                key <= place
                and (window is None or key > place - window)
                and (chunk is None or key // chunk == place // chunk)
                for key in range(len(k))
            ]
            for place in places
        ]
        outputs.append(dense_attention(q[branch], k, v, torch.tensor(visible, device=q.device), scale, **scores))
    out, lse = zip(*outputs, strict=True)
    return torch.stack(out), torch.stack(lse)


def random(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0, device: Device = "cpu") -> Tensor:
    """Normally distributed values. They are the same for every dtype (except rounding) and device."""
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def run(function: Callable, inputs: Sequence[Tensor], grads: Sequence[Tensor]) -> list[Tensor]:
    """The outputs of ``function(*inputs)``, then the gradient of each input, given ``grads`` of the outputs."""
    leaves = [each.detach().requires_grad_() for each in inputs]
    outputs = function(*leaves)
    grads = [grad.to(output.dtype) for grad, output in zip(grads, outputs, strict=True)]
    return [*(output.detach() for output in outputs), *torch.autograd.grad(outputs, leaves, grads)]
