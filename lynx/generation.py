"""Answers to questions about pictures."""

from collections.abc import Sequence

from lynx.model import LynxForConditionalGeneration
from lynx.processor import LynxProcessor, Sample


def answer(
    model: LynxForConditionalGeneration,
    processor: LynxProcessor,
    samples: Sequence[Sample],
    *,
    max_new_tokens: int = 64,
    **options,
) -> list[str]:
    """The model's answer to each conversation that ends with a question.

    Args:
        samples: what ``processor.encode`` made of the conversations.
        max_new_tokens: at most this many for an answer.
        options: any of transformers' ``generate``: ``num_beams``, ``do_sample``, ...
    """
    batch = processor.pad(samples)
    del batch["labels"], batch["max_supervised"]
    batch = batch.to(model.device)
    tokens = model.generate(**batch, max_new_tokens=max_new_tokens, **options)
    return [processor.answer_of(row) for row in tokens[:, batch["input_ids"].shape[1] :]]
