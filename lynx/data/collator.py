"""Records to training batches."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch.utils.data import get_worker_info
from transformers import BatchFeature

from lynx.processor import LynxProcessor, Sample

logger = logging.getLogger(__name__)


class Collator:
    """Packs records into one row; a record that cannot be used is logged, counted and left out.

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
