"""A training run from a JSONL file to a model folder."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments, set_seed

from lynx import checkpoint, recipes
from lynx.data.collator import RecordCollator
from lynx.data.jsonl import JsonlDataset
from lynx.data.records import text_of
from lynx.data.tokenizer import train_tokenizer
from lynx.model import LynxForConditionalGeneration
from lynx.processor import PROMPT, LynxProcessor
from lynx.train.trainer import LynxTrainer


def train(
    data: str | Path,
    output: str | Path,
    *,
    root: str | Path | None = None,
    start: str | Path | None = None,
    steps: int = 1000,
    batch_size: int = 64,
    learning_rate: float = 2e-3,
    seed: int = 0,
) -> LynxTrainer:
    """Train on the conversations of a JSONL file and save the model.

    Args:
        data: the file, in the format of ``lynx.data.jsonl``.
        output: the folder to save the model in.
        root: the folder that picture paths are relative to; the file's own by default.
        start: a model folder to go on from; without it a tiny model starts from nothing, and its tokenizer is learned
            from the data.
        steps: optimizer steps, the first twentieth of them warm-up, then a cosine decay to 0.
        batch_size: conversations packed into one row.
        learning_rate: its peak.
        seed: of everything that is drawn.

    Raises:
        ValueError: steps or batch_size below 1, or no record that can be used.

    Returns:
        The trainer, whose ``model``, ``processing_class`` and ``state.log_history`` tell the rest.
    """
    if steps < 1 or batch_size < 1:
        raise ValueError(f"steps and batch_size must be at least 1, got {steps} and {batch_size}")
    dataset = JsonlDataset(data, root)
    set_seed(seed)
    if start is not None:
        model, processor = checkpoint.load(start)
    else:
        tokenizer = train_tokenizer(_rendered(dataset.records))
        config = recipes.tiny(tokenizer)
        model, processor = LynxForConditionalGeneration(config), LynxProcessor.for_model(config, tokenizer)
    arguments = TrainingArguments(
        output_dir=str(output),
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, steps // 20),
        weight_decay=0.01,
        adam_beta2=0.95,  # runs of a few hundred steps want a second moment that forgets faster than 0.999
        logging_steps=max(1, min(20, steps // 20)),
        save_strategy="no",
        report_to=[],
        disable_tqdm=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        seed=seed,
    )
    trainer = LynxTrainer(
        model,
        arguments,
        train_dataset=dataset,
        data_collator=RecordCollator(processor, seed=seed),
        processing_class=processor,
    )
    trainer.train()
    checkpoint.save(output, model, processor)
    return trainer


def _rendered(records: list[dict[str, Any]]) -> Iterator[str]:
    """The texts as the processor will render them, for the tokenizer to learn from."""
    for record in records:
        for question, reply in zip(record["messages"][::2], record["messages"][1::2], strict=True):
            yield f"{PROMPT.format(question=text_of(question).lower())} {text_of(reply).lower()}"
