"""A data stream of fixed packs: which records stand in which pack is said, not planned."""

from collections.abc import Sequence

import numpy as np
from torch.utils.data import Dataset

from lynx.train.recipe import Stage
from tests.lynx.conftest import conversation


class FixedPacks:
    """Yields packs, lists of record numbers, those of one rank, again and again."""

    def __init__(self, packs: Sequence[Sequence[int]], ranks: int = 1, rank: int = 0):
        self.packs, self.ranks, self.rank, self.first = packs, ranks, rank, 0

    def __iter__(self):
        step = self.first
        while True:
            yield list(self.packs[(step * self.ranks + self.rank) % len(self.packs)])
            step += 1

    def state_after(self, num_steps: int):
        return {"first": num_steps}

    def load_state_dict(self, state) -> None:
        self.first = state["first"]


class Records(Dataset):
    """Samples, encoded once."""

    def __init__(self, processor, number: int, *, with_text_only: bool = True):
        draw = np.random.default_rng(5)
        self.samples = []
        for index in range(number):
            image = draw.integers(0, 256, (9, 11, 3), dtype=np.uint8)
            question = "Which digit is this? " * int(draw.integers(1, 3))
            answer = " ".join("seven" for _ in range(int(draw.integers(1, 6))))
            images = [] if with_text_only and index % 4 == 3 else [image]
            self.samples.append(processor.encode(conversation(question, answer, images=images)))

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int):
        return self.samples[index]


def stage(**options) -> Stage:
    """A short stage that trains the resampler and the adapters."""
    defaults = {
        "name": "test",
        "trainable": ("resampler", "frame_positions", "adapters"),
        "steps": 4,
        "learning_rate": 1e-2,
    }
    return Stage(**{**defaults, "max_grad_norm": 0.0, **options})
