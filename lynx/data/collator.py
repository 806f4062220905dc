"""Samples to training batches."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import BatchFeature

from lynx.data.conversation import IGNORED, Sample
from lynx.data.skipped import Skipped
from lynx.data.stream import Encoded
from lynx.processor import LynxProcessor


@dataclass(frozen=True)
class Report:
    """What is in a batch.

    Attributes:
        samples: how many, by data set.
        supervised_tokens: how many, by data set.
        tokens: how many the rows have that the language model reads.
        budget: how many would fit.
        skipped: the records that were left out.
        records: where those that were taken stand.
    """

    samples: Counter[str]
    supervised_tokens: Counter[str]
    tokens: int
    budget: int
    skipped: list[Skipped]
    records: tuple[str, ...] = ()


class Collator:
    """Packs what ``PackDataset`` gives into one row, with a ``report`` beside it that the model does not take.

    A pack may have no samples: all were skipped, or none was left for this rank. It becomes a row of BOS and EOS in
    which nothing is supervised. Its loss is 0 and so are its gradients, but the step is a step like any other.

    Args:
        processor: of the model that is trained.
        token_budget: what the packs were planned for, to know how full they are.
        always_vision: put an image into batches that have none. No token sees it, but the same layers then run, and
            take part in the reduction of gradients, on every rank.
        weighs_answers: as ``LynxProcessor.pack`` takes it.
    """

    def __init__(
        self,
        processor: LynxProcessor,
        token_budget: int,
        *,
        always_vision: bool = False,
        weighs_answers: bool = False,
    ):
        self.processor, self.token_budget, self.always_vision = processor, token_budget, always_vision
        self.weighs_answers = weighs_answers

    def __call__(self, items: Sequence[Encoded | Skipped]) -> BatchFeature:
        """A batch as ``LynxProcessor.pack`` makes it, and its ``report``, a ``Report``."""
        encoded = [item for item in items if not isinstance(item, Skipped)]
        samples = [item.sample for item in encoded]
        if not samples:
            tokenizer = self.processor.tokenizer
            samples = [Sample([], [], [tokenizer.bos_token_id, tokenizer.eos_token_id], [IGNORED, IGNORED])]
        generators = [item.generator for item in encoded] or None
        batch = self.processor.pack(
            samples, generator=generators, always_vision=self.always_vision, weighs_answers=self.weighs_answers
        )
        supervised: Counter[str] = Counter()
        for item in encoded:
            supervised[item.dataset] += item.sample.num_supervised
        batch["report"] = Report(
            samples=Counter(item.dataset for item in encoded),
            supervised_tokens=supervised,
            tokens=batch["input_ids"].numel() if encoded else 0,
            budget=self.token_budget,
            skipped=[item for item in items if isinstance(item, Skipped)],
            records=tuple(item.path for item in encoded if item.path),
        )
        return batch
