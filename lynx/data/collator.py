"""Samples to training batches."""

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from torch.utils.data import get_worker_info
from transformers import BatchFeature

from lynx.data.broken import Broken
from lynx.data.stream import Encoded
from lynx.processor import IGNORED, LynxProcessor, Sample

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Report:
    """What is in a batch, or in several together.

    Attributes:
        samples: how many, by data set.
        supervised_tokens: likewise.
        tokens: of the language model's rows.
        budget: how many would fit.
        broken: the records that were left out.
    """

    samples: Counter[str] = field(default_factory=Counter)
    supervised_tokens: Counter[str] = field(default_factory=Counter)
    tokens: int = 0
    budget: int = 0
    broken: list[Broken] = field(default_factory=list)

    def __add__(self, other: "Report") -> "Report":
        return Report(
            self.samples + other.samples,
            self.supervised_tokens + other.supervised_tokens,
            self.tokens + other.tokens,
            self.budget + other.budget,
            self.broken + other.broken,
        )

    @property
    def fill(self) -> float:
        """The part of the budget that is tokens."""
        return self.tokens / self.budget if self.budget else 0.0

    @property
    def supervised_shares(self) -> dict[str, float]:
        """The part of the supervised tokens that each data set gave."""
        total = sum(self.supervised_tokens.values())
        return {name: count / total for name, count in self.supervised_tokens.items()}


class Collator:
    """Packs what ``PackDataset`` gives into one row, with a ``report`` beside it that the model does not take.

    A pack of no samples, because all were broken or none was left for this rank, becomes a row of BOS and EOS of which
    nothing is supervised: its loss is 0 and so are its gradients, but the step is a step like any other.

    Args:
        processor: of the model that is trained.
        token_budget: what the packs were planned for, to know how full they are.
        always_vision: put a picture into batches that have none, which nothing sees: the same layers then run, and take
            part in the reduction of gradients, on every rank.
    """

    def __init__(self, processor: LynxProcessor, token_budget: int, *, always_vision: bool = False):
        self.processor, self.token_budget, self.always_vision = processor, token_budget, always_vision

    def __call__(self, items: Sequence[Encoded | Broken]) -> BatchFeature:
        """A batch as ``LynxProcessor.pack`` makes it, and its ``report``, a ``Report``."""
        encoded = [item for item in items if not isinstance(item, Broken)]
        samples = [item.sample for item in encoded]
        if not samples:
            tokenizer = self.processor.tokenizer
            samples = [Sample([], [], [tokenizer.bos_token_id, tokenizer.eos_token_id], [IGNORED, IGNORED])]
        generators = [item.generator for item in encoded] or None
        batch = self.processor.pack(samples, generator=generators, always_vision=self.always_vision)
        supervised: Counter[str] = Counter()
        for item in encoded:
            supervised[item.dataset] += sum(label != IGNORED for label in item.sample.labels)
        batch["report"] = Report(
            samples=Counter(item.dataset for item in encoded),
            supervised_tokens=supervised,
            tokens=batch["input_ids"].numel() if encoded else 0,
            budget=self.token_budget,
            broken=[item for item in items if isinstance(item, Broken)],
        )
        return batch


class RecordCollator:
    """Packs records of a ``JsonlDataset`` into one row; one that cannot be used is logged, counted and left out.

    Args:
        processor: of the model that is trained.
        seed: of the random crops and of the frames taken from video files, which differ between DataLoader workers;
            None for the centre crop and the middles, as in evaluation.

    Attributes:
        skipped: how many records were left out so far.
    """

    def __init__(self, processor: LynxProcessor, *, seed: int | None = None):
        self.processor = processor
        self.seed = seed
        self.generator: np.random.Generator | None = None
        self.skipped = 0

    def __call__(self, records: Sequence[dict[str, Any]]) -> BatchFeature:
        """One packed training batch, as ``LynxProcessor.pack`` makes it.

        Raises:
            ValueError: no record can be used.
        """
        if self.seed is not None and self.generator is None:  # made here, in the worker that draws
            worker = get_worker_info()
            self.generator = np.random.default_rng([self.seed, 0 if worker is None else worker.id])
        samples = []
        for record in records:
            try:
                samples.append(self._sample(record))
            except ValueError as error:
                self.skipped += 1
                logger.warning("record skipped (%d so far): %s", self.skipped, error)
        if not samples:
            raise ValueError(f"none of the {len(records)} records of this batch can be used; the log says why")
        return self.processor.pack(samples, generator=self.generator)

    def _sample(self, record: dict[str, Any]) -> Sample:
        sample = self.processor.encode(record["messages"])
        media: list[Any] = [self.processor.load_frames(item, generator=self.generator) for item in sample.media]
        return replace(sample, media=media)
