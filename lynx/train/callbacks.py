"""What a person sees of a run: a bar, and a log as JSON lines."""

import json
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import TrainerCallback

# The numbers first: what does not fit the terminal is cut off at the end.
_BAR = "{desc} {n_fmt}/{total_fmt} [{elapsed}<{remaining}]{postfix} {bar}"


@dataclass
class Window:
    """What happened on this rank since the last entry of the log.

    Attributes:
        since: when that was, by ``time.perf_counter``.
        supervised, tokens, capacity: tokens that were learned from, tokens in packs, and what the packs had room for.
        flops: operations of the model's products.
        waited: seconds that the loop waited for data.
    """

    since: float = field(default_factory=time.perf_counter)
    supervised: int = 0
    tokens: int = 0
    capacity: int = 0
    flops: float = 0.0
    waited: float = 0.0

    def totals(self) -> torch.Tensor:
        """(5,) fp64, to be summed over the ranks and given to ``rates``."""
        return torch.tensor([self.supervised, self.tokens, self.capacity, self.flops, self.waited], dtype=torch.float64)

    @staticmethod
    def rates(totals: torch.Tensor, seconds: float, ranks: int, peak: float) -> dict[str, float]:
        """For the log, of all ranks together.

        Args:
            totals: the sum of all ranks' ``totals()``.
            seconds: since the last entry.
            ranks: how many there are.
            peak: operations a second that one of them could do.
        """
        supervised, tokens, capacity, flops, waited = totals.tolist()
        return {
            "supervised_tokens_per_second": round(supervised / seconds, 1),
            "tokens_per_second": round(tokens / seconds, 1),
            "mfu": round(flops / (seconds * ranks * peak), 4),
            "fill": round(tokens / capacity, 4) if capacity else 0.0,
            "data_wait": round(waited / (seconds * ranks), 4),
        }


class ProgressBar(TrainerCallback):
    """A bar over the steps of a stage, with the newest numbers behind it."""

    def __init__(self, stage: str) -> None:
        self.stage = stage
        self.bar: tqdm | None = None

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        if state.is_world_process_zero:
            self.bar = tqdm(
                total=state.max_steps, initial=state.global_step, desc=self.stage, dynamic_ncols=True, bar_format=_BAR
            )

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if self.bar is not None and logs and "loss" in logs:
            self.bar.set_postfix_str(
                f"loss {float(logs['loss']):.4f}, {logs['supervised_tokens_per_second']:.0f} supervised tokens/s, "
                f"MFU {logs['mfu']:.1%}, fill {logs['fill']:.0%}, data wait {logs['data_wait']:.0%}"
            )

    def on_train_end(self, args, state, control, **kwargs) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None


class JsonLog(TrainerCallback):
    """Appends every entry of the log to a file, one JSON object a line, with the stage's name and the time.

    Steps that a crash took back are made again: their old entries are dropped when the run goes on.
    """

    def __init__(self, path: Path, stage: str) -> None:
        self.path, self.stage = path, stage

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        if state.is_world_process_zero and self.path.exists():
            kept = [
                entry
                for entry in read_log(self.path)
                if entry.get("stage") != self.stage or entry.get("step", 0) <= state.global_step
            ]
            unfinished = self.path.with_name(f".{self.path.name}")
            unfinished.write_text("".join(f"{json.dumps(entry)}\n" for entry in kept))
            unfinished.replace(self.path)

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if state.is_world_process_zero and logs:
            entry = {"stage": self.stage, "step": state.global_step, "time": round(time.time(), 3), **logs}
            with self.path.open("a") as file:
                file.write(f"{json.dumps(entry)}\n")


class TensorBoardLog(TrainerCallback):
    """Writes the numbers of every entry of the log for TensorBoard, which the package tensorboard must be there for.

    One folder of a stage for all its resumptions: steps that a crash took back are purged from the curves.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.writer: Any = None

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        if state.is_world_process_zero:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(self.folder), purge_step=state.global_step + 1)

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if self.writer is not None:
            for name, value in (logs or {}).items():
                self.writer.add_scalar(name, value, state.global_step)
            self.writer.flush()

    def on_train_end(self, args, state, control, **kwargs) -> None:
        if self.writer is not None:
            self.writer.close()
            self.writer = None


def read_log(path: Path) -> list[dict[str, Any]]:
    """The entries of a log; a last line that a crash cut off is left out."""
    entries = []
    for line in path.read_text().splitlines():
        try:
            entries.append(json.loads(line))
        except ValueError:
            continue
    return entries


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
        """Take the signal instead of dying of it."""
        before = signal.signal(signal.SIGTERM, self._see)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def _see(self, *_: Any) -> None:
        self.seen = True

    def on_step_end(self, args, state, control, **kwargs) -> None:
        seen = self.seen
        if args.world_size > 1:  # ranks get it at different steps; one small exchange a step of seconds
            flag = torch.tensor(int(seen), device=args.device)
            torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
            seen = bool(flag)
        if seen:
            self.stopped = control.should_save = control.should_training_stop = True


def ignore_sigterm(_: int = 0) -> None:
    """For processes that load data: a signal to the whole group must not take them from a run that wants to save."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
