"""Callbacks of a run: a bar, logs, and an end after SIGTERM."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lynx.train.log import append_entry, drop_entries_after

# The numbers first: what does not fit the terminal is cut off at the end.
_BAR = "{desc} {n_fmt}/{total_fmt} [{elapsed}<{remaining}]{postfix} {bar}"


class ProgressBar(TrainerCallback):
    """A bar over the steps of a stage, with the newest numbers behind it."""

    def __init__(self, stage: str) -> None:
        self.stage = stage
        self.bar: tqdm | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            self.bar = tqdm(
                total=state.max_steps, initial=state.global_step, desc=self.stage, dynamic_ncols=True, bar_format=_BAR
            )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if self.bar is not None and logs and "loss" in logs:
            self.bar.set_postfix_str(
                f"loss {float(logs['loss']):.4f}, {logs['supervised_tokens_per_second']:.0f} supervised tokens/s, "
                f"MFU {logs['mfu']:.1%}, packs {logs['pack_utilization']:.0%} full, data wait {logs['data_wait']:.0%}"
            )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the bar's line, after an error too: what is printed next has a line of its own."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None


class JsonLog(TrainerCallback):
    """Appends every entry of the log to a file, with the stage's name and the time.

    Steps that a crash took back are made again: their old entries are dropped when the run goes on.
    """

    def __init__(self, path: Path, stage: str) -> None:
        self.path, self.stage = path, stage

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero and self.path.exists():
            drop_entries_after(self.path, self.stage, state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if state.is_world_process_zero and logs:
            entry = {"stage": self.stage, "step": state.global_step, "time": round(time.time(), 3), **logs}
            append_entry(self.path, entry)


class TensorBoardLog(TrainerCallback):
    """Writes the numbers of every entry of the log for TensorBoard; needs the package tensorboard.

    All resumptions of a stage write into one folder: steps that a crash took back are purged from the curves.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.writer: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(self.folder), purge_step=state.global_step + 1)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if self.writer is not None:
            for name, value in (logs or {}).items():
                self.writer.add_scalar(name, value, state.global_step)
            self.writer.flush()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.writer is not None:
            self.writer.close()
            self.writer = None


class Terminated(TrainerCallback):
    """After SIGTERM: the running step ends, a checkpoint is written, training stops. On all ranks together.

    Attributes:
        seen: whether this process has got the signal.
        stopped: whether training was stopped for it.
    """

    def __init__(self) -> None:
        self.seen = self.stopped = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take note of the signal, which would otherwise end the process."""
        before = signal.signal(signal.SIGTERM, self._see)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def _see(self, *_: Any) -> None:
        self.seen = True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        seen = self.seen
        if args.world_size > 1:  # ranks get it at different steps; the exchange is small beside a step
            flag = torch.tensor(int(seen), device=args.device)
            torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
            seen = bool(flag)
        if seen:
            self.stopped = control.should_save = control.should_training_stop = True


def ignore_sigterm(_: int = 0) -> None:
    """For processes that load data: a signal to the whole group must not take them from a run that wants to save."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
