"""The Trainer of transformers, telling what a person waits to see: loss and supervised tokens a second."""

import time
from typing import Any

import torch
from tqdm import tqdm
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainingArguments


class LynxTrainer(Trainer):
    """Trains a Lynx model on packed batches; all of Trainer's arguments.

    The loss of a step is the sum over the supervised tokens of its accumulated, distributed batch, divided by their
    number. Every log entry also has ``supervised_tokens_per_second``.
    """

    def __init__(self, model: torch.nn.Module, args: TrainingArguments, **kwargs: Any):
        args.remove_unused_columns = False  # records are not the model's arguments; the collator makes those
        super().__init__(model, args, **kwargs)
        for callback in (PrinterCallback, ProgressCallback):
            self.remove_callback(callback)
        if not args.disable_tqdm:
            self.add_callback(ProgressBar())
        self._supervised = torch.zeros((), dtype=torch.int64)
        self._since = time.perf_counter()

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """As Trainer's, counting the supervised tokens."""
        samples, num_items = super().get_batch_samples(*args, **kwargs)
        if num_items is not None:
            self._supervised = self._supervised + num_items
        return samples, num_items

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As Trainer's, with the supervised tokens a second since the last entry."""
        if "loss" in logs:
            now = time.perf_counter()
            logs["supervised_tokens_per_second"] = round(self._supervised.item() / (now - self._since), 1)
            self._supervised, self._since = torch.zeros_like(self._supervised), now
        super().log(logs, *args, **kwargs)


class ProgressBar(TrainerCallback):
    """A bar over the training steps with the newest loss and supervised tokens a second."""

    def __init__(self) -> None:
        self.bar: tqdm | None = None

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        if state.is_world_process_zero:
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc="training", unit="step")

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if self.bar is not None and logs and "loss" in logs:
            rate = logs["supervised_tokens_per_second"]
            self.bar.set_postfix_str(f"loss {float(logs['loss']):.4f}, {rate:.0f} supervised tokens/s")

    def on_train_end(self, args, state, control, **kwargs) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None
