"""Forests of segments, who sees whom in them by brute force, and plain attention over them.

Nothing here uses the tables of layouts.
"""

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from lynx_kernels import PackedLayout


@dataclass(frozen=True)
class Forest:
    """The arguments of ``PackedLayout.from_segments``."""

    lengths: tuple[int, ...]
    parents: tuple[int, ...]
    full: tuple[bool, ...] = ()  # none
    window: int | None = None
    chunk: int | None = None

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths)

    def layout(self) -> PackedLayout:
        local = {"window": self.window, "chunk": self.chunk}
        return PackedLayout.from_segments(self.lengths, self.parents, full=self.full or None, **local)

    def path(self, segment: int) -> list[int]:
        """The segment and its ancestors."""
        return [] if segment < 0 else [segment, *self.path(self.parents[segment])]

    def tokens(self) -> list[tuple[int, int]]:
        """Segment and position of each token."""
        return [
            (segment, sum(self.lengths[each] for each in self.path(segment)[1:]) + place)
            for segment, length in enumerate(self.lengths)
            for place in range(length)
        ]

    def visible(self) -> Tensor:
        """(T, T) bool, ``[query, key]``."""
        tokens = self.tokens()
        return torch.tensor([[self._sees(q, k) for k in tokens] for q in tokens], dtype=torch.bool).reshape(
            len(tokens), len(tokens)
        )

    def _sees(self, query: tuple[int, int], key: tuple[int, int]) -> bool:
        (segment, place), (of_key, before) = query, key
        if segment == of_key and self.full and self.full[segment]:
            return True
        if of_key not in self.path(segment) or before > place:
            return False
        if self.window is not None:
            return place - before < self.window
        return self.chunk is None or place // self.chunk == before // self.chunk


def random_forest(seed: int, most: int = 96) -> Forest:
    """A forest of up to ``most`` tokens: chains, brothers, empty segments, full ones; with a window, a chunk or none."""
    rng = random.Random(seed)
    lengths: list[int] = []
    parents: list[int] = []
    largest = rng.choice([3, 12, 40])
    for segment in range(rng.randint(1, rng.choice([2, 5, 12]))):
        path = [-1]
        above = segment - 1
        while above >= 0:
            path.append(above)
            above = parents[above]
        length = rng.choice([0, 1, 2, *[rng.randint(1, largest)] * 4])
        if sum(lengths) + length > most:
            break
        parents.append(rng.choice([*path, *path[1:2] * 2]))
        lengths.append(length)
    share = rng.choice([0.0, 0.0, 0.4, 1.0])
    full = [rng.random() < share for _ in lengths]
    local = rng.choice(["window", "chunk", None])
    extent = rng.choice([1, 2, 5, 16, 17, 33, 200])
    window, chunk = (extent if local == kind else None for kind in ("window", "chunk"))
    return Forest(tuple(lengths), tuple(parents), tuple(full), window, chunk)


def plain_attention(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, visible: Tensor, scale: float | None, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """Output and LSE in the dtype of the inputs: q (T, H, D), k (T, Hkv, D), v (T, Hkv, Dv), sinks (H,)."""
    k, v = (each.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for each in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * (q.shape[2] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible, float("-inf"))
    if sinks is not None:
        column = sinks.to(scores.dtype)[:, None, None].expand(-1, scores.shape[1], 1)
        scores = torch.cat([scores, column], -1)
    weights = scores.softmax(-1)[..., : visible.shape[1]]
    return torch.einsum("hqk,khd->qhd", weights, v), scores.logsumexp(-1).T
