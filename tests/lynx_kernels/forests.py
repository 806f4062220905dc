"""Random forests of segments and, from their lists alone, who sees whom: nothing of the layouts' tables."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from lynx_kernels import PackedLayout


@dataclass(frozen=True)
class Forest:
    """The arguments of ``PackedLayout.from_segments``."""

    lengths: list[int]
    parents: list[int]
    full: list[bool]
    window: int | None = None
    chunk: int | None = None

    def layout(self, device: torch.device | str | None = None) -> PackedLayout:
        options = {"full": self.full, "window": self.window, "chunk": self.chunk}
        return PackedLayout.from_segments(self.lengths, self.parents, **options, device=device)

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths)

    def ancestors(self, segment: int) -> list[int]:
        """The ancestors of a segment, from its parent up."""
        found = []
        while (segment := self.parents[segment]) >= 0:
            found.append(segment)
        return found

    def tokens(self) -> list[tuple[int, int, int]]:
        """For every token: its segment, its place in it, and its place on the path."""
        found = []
        for segment, length in enumerate(self.lengths):
            before = sum(self.lengths[each] for each in self.ancestors(segment))
            found += [(segment, place, before + place) for place in range(length)]
        return found

    def visible(self) -> Tensor:
        """(T, T) bool, ``[query, key]``."""
        tokens = self.tokens()
        seen = torch.zeros(len(tokens), len(tokens), dtype=torch.bool)
        for query, (segment, place, position) in enumerate(tokens):
            ancestors = set(self.ancestors(segment))
            for key, (key_segment, key_place, key_position) in enumerate(tokens):
                is_own = key_segment == segment
                if is_own and self.full[segment]:
                    seen[query, key] = True
                elif key_segment in ancestors or (is_own and key_place <= place):
                    near = self.window is None or position - key_position < self.window
                    same = self.chunk is None or position // self.chunk == key_position // self.chunk
                    seen[query, key] = near and same
        return seen

    def predictors(self) -> list[int]:
        """The row before each token on its path, -1 if there is none or it sees the token."""
        tokens, found = self.tokens(), []
        start_of = {segment: row for row, (segment, place, _) in enumerate(tokens) if place == 0}
        for row, (segment, place, _) in enumerate(tokens):
            if place > 0:
                found.append(-1 if self.full[segment] else row - 1)
            else:
                above = [each for each in self.ancestors(segment) if self.lengths[each] > 0]
                found.append(start_of[above[0]] + self.lengths[above[0]] - 1 if above else -1)
        return found


@st.composite
def forests(draw, max_segments: int = 8, local: bool = True) -> Forest:
    parents: list[int] = []
    for segment in range(draw(st.integers(0, max_segments))):
        path, each = [-1], segment - 1
        while each >= 0:
            path.append(each)
            each = parents[each]
        parents.append(draw(st.sampled_from(path)))
    count = len(parents)
    sizes = draw(st.lists(st.integers(0, 7), min_size=count, max_size=count))
    full = draw(st.lists(st.booleans(), min_size=count, max_size=count))
    kind = draw(st.sampled_from(["", "", "window", "chunk"])) if local else ""
    return Forest(sizes, parents, full, **({kind: draw(st.integers(1, 12))} if kind else {}))


def random_forest(rng: random.Random, lengths: Sequence[int] = (0, 0, 1, 2, 3, 5, 7, 9), local: bool = True) -> Forest:
    """Like ``forests``, drawn quickly. ``lengths``: what a segment's length is drawn from."""
    parents: list[int] = []
    for segment in range(rng.randint(1, 9)):
        path, each = [-1], segment - 1
        while each >= 0:
            path.append(each)
            each = parents[each]
        parents.append(rng.choice(path + path[1:2] * 2))  # chains are what deep forests are made of
    sizes = [rng.choice(lengths) for _ in parents]
    full = [rng.random() < 0.35 for _ in parents]
    reach = rng.choice([1, 2, 3, 5, 8, 2 * max(lengths)])
    kind = rng.choice(["", "window", "chunk"]) if local else ""
    return Forest(sizes, parents, full, **({kind: reach} if kind else {}))
