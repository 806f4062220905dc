"""The Trainer of transformers for Lynx: packed rows, exact resumption, and the numbers that a person wants to see."""

import logging
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainingArguments

from lynx.data.conversation import IGNORED
from lynx.data.skipped import SkippedRecords
from lynx.model import LynxForConditionalGeneration
from lynx.train import checkpoints, flops, param_groups
from lynx.train.callbacks import ProgressBar, Terminated, ignore_sigterm
from lynx.train.finite import FiniteWatch
from lynx.train.recipe import Stage
from lynx.train.schedule import scheduler
from lynx.train.throughput import Window
from lynx_kernels import PackedLayout, SpanLayout

logger = logging.getLogger(__name__)

_WEIGHTS, _DATA = "trained.safetensors", "data.pt"
_LAYOUTS = (PackedLayout, SpanLayout)
_IN_VAIN = 300  # records without a supervised token between them, of all ranks: a run that learns nothing


class Sampler(Protocol):
    """What ``LynxTrainer`` asks of a batch sampler; ``lynx.data.stream.PackSampler`` is one."""

    def __iter__(self) -> Iterator[Any]: ...

    def state_after(self, num_steps: int) -> Any:
        """What ``load_state_dict`` needs to go on behind the first ``num_steps`` packs of this rank."""

    def load_state_dict(self, state: Any) -> None:
        """Go on from a state that ``state_after`` gave."""


class LynxTrainer(Trainer):
    """Trains one stage of a recipe on packed batches.

    The loss of a step is the sum over the supervised tokens of its accumulated, distributed batch, divided by their
    number. Parameters that the stage freezes have no gradient and no optimizer state. A checkpoint holds the trained
    parameters, optimizer, schedule, random state and the sampler's state behind the last batch that was *consumed*,
    whatever was loaded ahead. Training that goes on from it is the same training, bit by bit on a CPU.

    Args:
        model: a ``LynxForConditionalGeneration``, made ready by ``lynx.train.param_groups.set_trainable``.
        args: as for Trainer; ``save_total_limit`` says how many checkpoints are kept, all if it is None.
        stage: what is to be done.
        sampler: yields this rank's packs, for ever; what it yields is given to ``train_dataset``.
        dtype: of autocast; None for none.
        terminated: stops the run after SIGTERM.
        skipped: where records that cannot be used are listed.
        kwargs: Trainer's ``train_dataset``, ``data_collator``, ``processing_class``, ``callbacks``. The log counts from
            the reports of ``lynx.data.collator.Collator``; training works with another collator too.

    Attributes:
        samples, supervised: samples and supervised tokens of every data set since the stage began, on this rank.
    """

    optimizer: torch.optim.Optimizer | None
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler | None

    def __init__(
        self,
        model: LynxForConditionalGeneration,
        args: TrainingArguments,
        *,
        stage: Stage,
        sampler: Sampler,
        dtype: torch.dtype | None = None,
        terminated: Terminated | None = None,
        skipped: SkippedRecords | None = None,
        **kwargs: Any,
    ):
        args.remove_unused_columns = False  # records are not the model's arguments; the collator makes those
        args.ignore_data_skip = True  # the sampler's state says where to go on
        self.stage, self.sampler = stage, sampler
        self.autocast_dtype = dtype
        super().__init__(model, args, **kwargs)
        for callback in (PrinterCallback, ProgressCallback):
            self.remove_callback(callback)
        if not args.disable_tqdm:
            self.add_callback(ProgressBar(stage.name))
        if terminated is not None:
            self.add_callback(terminated)
        self.skipped = skipped
        self.samples, self.supervised = Counter[str](), Counter[str]()
        self._step_flops = flops.StepFlops(model)
        self._peak, source = flops.peak(args.device, dtype or torch.float32)
        if args.process_index == 0:
            logger.info("100 %% MFU are %.4g TFLOP/s a device (%s)", self._peak / 1e12, source)
        self._window = Window()
        self._writing_to: Path | None = None
        self._finite = FiniteWatch(stage.name, Path(args.output_dir), args.device)
        self._drawn, self._last_skipped = 0, "none"
        self._records: deque[tuple[str, ...]] = deque()  # of the batches that wait for their steps

    # Data

    def get_train_dataloader(self) -> DataLoader:
        """The loader of this rank's packs. The sampler knows the ranks, accelerate must not divide once more."""
        workers = self.args.dataloader_num_workers
        return DataLoader(
            self.train_dataset,
            batch_sampler=self.sampler,  # type: ignore[arg-type]  # torch wants a class of its own, and uses iter
            collate_fn=self.data_collator,
            num_workers=workers,
            pin_memory=self.args.dataloader_pin_memory,
            # A worker watches its parent, and ends when this process was killed. Under a fork server, Python's default
            # from 3.14 on and that of its own children, the parent is the server: it and the workers would stay.
            multiprocessing_context="fork" if workers else None,
            worker_init_fn=ignore_sigterm if workers else None,
            generator=torch.Generator(),  # or every new loader draws from the generator that training draws from
        )

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """The batches of one step, and how many supervised tokens they have on all ranks."""
        if self.state.global_step >= self.state.max_steps:  # a finished stage was resumed: nothing is left to do
            self.control.should_training_stop = True
            return [], None
        began = time.perf_counter()
        batches = [batch for _, batch in zip(range(num_batches), epoch_iterator, strict=False)]
        self._window.waited += time.perf_counter() - began
        if len(batches) < num_batches:
            raise ValueError(f"the data ended at step {self.state.global_step} of {self.state.max_steps}")
        for batch in batches:
            self._see(batch)
        return batches, self._get_num_items_in_batch(batches, device)

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Any:
        """As Trainer's; where labels have weights, their sum."""
        if not batch_samples or "label_weights" not in batch_samples[0]:
            return super()._get_num_items_in_batch(batch_samples, device)
        total = sum((each["label_weights"] * (each["labels"] != IGNORED)).sum() for each in batch_samples)
        return self.accelerator.gather(total.to(device)).sum()

    def _see(self, batch: dict[str, Any]) -> None:
        report = batch.pop("report", None)
        self._records.append(getattr(report, "records", ()))
        if report is None:
            return
        self.samples += report.samples
        self.supervised += report.supervised_tokens
        self._drawn += report.samples.total() + len(report.skipped)
        for entry in report.skipped:
            self._last_skipped = f"{entry.path}: {entry.reason}"
        if self.skipped is not None:
            self.skipped.add(report.skipped)
        window = self._window
        window.supervised += report.supervised_tokens.total()
        window.tokens += report.tokens
        window.capacity += report.budget

    def floating_point_ops(self, inputs: Mapping[str, Any]) -> int:
        """Operations of the products that this batch takes, forward and backward."""
        count = self._step_flops(inputs)
        self._window.flops += count
        return count

    def _prepare_input(self, data: Any) -> Any:
        if isinstance(data, _LAYOUTS):
            return data.to(self.args.device, non_blocking=True)
        return super()._prepare_input(data)

    # One step

    def compute_loss(self, model: torch.nn.Module, inputs: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As Trainer's, under our own autocast: with accelerate's, its FSDP2 would raise frozen bf16 to fp32."""
        if self.autocast_dtype is None:
            return super().compute_loss(model, inputs, *args, **kwargs)
        with torch.autocast(self.args.device.type, self.autocast_dtype):
            return super().compute_loss(model, inputs, *args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As Trainer's; the loss is remembered, to be looked at when the device is waited for anyway."""
        loss = super().training_step(*args, **kwargs)
        records = self._records.popleft() if self._records else ()
        self._finite.see(self.state.global_step + 1, "the loss", loss, records)
        return loss

    def _maybe_log_save_evaluate(self, tr_loss: torch.Tensor, grad_norm: Any, *args: Any, **kwargs: Any) -> None:
        """As Trainer's. Numbers that are not finite and nothing to learn from are errors, before anything is saved."""
        step = self.state.global_step
        self._finite.see(step, "the norm of the gradients", grad_norm)
        if self.control.should_save and not self.is_sharded:
            states = self.optimizer.state.values() if self.optimizer is not None else ()
            self._finite.check(step, self.trained(), (each for state in states for each in state.values()))
        elif self.control.should_log or self.control.should_save or self._finite.is_due(step):
            self._finite.check(step)
        if self.control.should_log or self.control.should_save:
            self._check_supervision()
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, **kwargs)

    def _check_supervision(self) -> None:
        """Raise ValueError, on all ranks, where many records or a whole stage had no supervised token at all."""
        counts = torch.tensor([self.supervised.total(), self.samples.total(), self._drawn], device=self.args.device)
        supervised, used, drawn = self.accelerator.reduce(counts, "sum").tolist()
        # A collator that gives no reports leaves the counts at 0, and nothing is known.
        if supervised or not drawn or (drawn < _IN_VAIN and self.state.global_step < self.state.max_steps):
            return
        raise ValueError(
            f"stage {self.stage.name}: there is nothing to learn: of {drawn} records drawn in {self.state.global_step} "
            f"steps, {drawn - used} cannot be used and the others have no supervised token. The last one that cannot "
            f"be used: {self._last_skipped}"
        )

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW as the stage says, over the parameters that train."""
        if self.optimizer is None:
            stage = self.stage
            self.optimizer = torch.optim.AdamW(
                param_groups.optimizer_groups(self.model if model is None else model, stage.weight_decay),
                lr=stage.learning_rate,
                betas=(stage.betas[0], stage.betas[1]),
                eps=stage.epsilon,
            )
        return self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """Warm-up from the stage's start value, then its decay to 0."""
        if self.lr_scheduler is None:
            self.lr_scheduler = scheduler(optimizer or self.create_optimizer(), self.stage)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    # Log

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As Trainer's; entries of training also tell speed, use of packs and device, and what was trained on."""
        self.state.epoch = None  # a mixture has no epochs of its own
        logs.pop("train_samples_per_second", None)  # Trainer knows packs only, and not their number
        if "loss" in logs:
            window, self._window = self._window, Window()
            ranks = self.args.world_size
            totals = self.accelerator.reduce(window.totals().to(self.args.device), "sum").cpu()
            logs.update(Window.rates(totals, self._window.since - window.since, ranks, self._peak))
            logs.update(self._shares())
            if self.skipped is not None:
                logs.update(self.skipped.summary())
        super().log(logs, *args, **kwargs)

    def _shares(self) -> dict[str, Any]:
        """Of every data set the samples, the epochs, and its share of the supervised tokens, over all ranks."""
        counts = [(self.samples, self.supervised)]
        if self.args.world_size > 1:
            counts = counts * self.args.world_size
            torch.distributed.all_gather_object(counts, counts[0])
        samples = sum((each for each, _ in counts), Counter[str]())
        supervised = sum((each for _, each in counts), Counter[str]())
        total = max(1, supervised.total())
        sizes = getattr(self.train_dataset, "sizes", {})
        return {  # flat: TensorBoard takes numbers only
            **{f"samples/{name}": count for name, count in sorted(samples.items())},
            **{f"epochs/{name}": round(samples[name] / sizes[name], 4) for name in sorted(samples.keys() & sizes)},
            **{f"supervised_share/{name}": round(count / total, 4) for name, count in sorted(supervised.items())},
        }

    # Checkpoints

    @property
    def is_sharded(self) -> bool:
        """Whether parameters or their states are spread over the ranks; their backend then writes the checkpoints."""
        return self.is_fsdp_enabled or self.is_deepspeed_enabled

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._writing_to or self.args.output_dir)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        folder = Path(self.args.output_dir)
        self._writing_to = checkpoints.unfinished_of(folder)
        if self.args.should_save:
            checkpoints.start(folder)
        self.accelerator.wait_for_everyone()
        try:
            super()._save_checkpoint(model, trial)
            [written] = self._writing_to.glob("checkpoint-*")
            state = {
                "sampler": self.sampler.state_after(self.state.global_step * self.args.gradient_accumulation_steps),
                "samples": dict(self.samples),
                "supervised": dict(self.supervised),
            }
            torch.save(state, written / f"{self.args.process_index}-{_DATA}")
        finally:
            self._writing_to = None
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            checkpoints.publish(written, folder, self.state.global_step, self.args.save_total_limit)
        self.accelerator.wait_for_everyone()

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Saves the parameters that train: the others are where the stage got them from."""
        if self.is_sharded:
            super()._save(output_dir, state_dict)
        elif self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            save_file(self.trained(), folder / _WEIGHTS)

    def trained(self) -> dict[str, torch.Tensor]:
        """The parameters that train, by their names in the model."""
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        return {name: value.detach() for name, value in model.named_parameters() if value.requires_grad}

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        if self.is_sharded:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        saved, trained = load_file(Path(resume_from_checkpoint, _WEIGHTS)), self.trained()
        if saved.keys() != trained.keys():
            raise ValueError(
                f"{resume_from_checkpoint} holds {len(saved)} trained parameters, this stage trains {len(trained)}; "
                f"the first that only one of them has: {', '.join(sorted(saved.keys() ^ trained.keys())[:3])}"
            )
        for name, parameter in trained.items():
            parameter.copy_(saved[name])

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As Trainer's. ``resume_from_checkpoint=True`` takes the newest whole one, if there is one.

        Raises:
            ValueError: the checkpoint was written by another number of ranks.
        """
        checkpoint = Path(resume_from_checkpoint) if isinstance(resume_from_checkpoint, str) else None
        if resume_from_checkpoint is True:
            checkpoint = checkpoints.latest(Path(self.args.output_dir))
        if checkpoint is not None:
            self._load_data_state(checkpoint)
        self._window = Window()
        try:
            return super().train(None if checkpoint is None else str(checkpoint), *args, **kwargs)
        finally:
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, ProgressBar):
                    callback.close()

    def _load_data_state(self, checkpoint: Path) -> None:
        path = checkpoint / f"{self.args.process_index}-{_DATA}"
        ranks = len(list(checkpoint.glob(f"*-{_DATA}")))
        if ranks != self.args.world_size:
            raise ValueError(
                f"{checkpoint} was written by {ranks} ranks, this run has {self.args.world_size}. Packs are planned "
                f"for all ranks together, and each rank has random numbers of its own: go on with {ranks} ranks"
            )
        state = torch.load(path, weights_only=True)
        self.sampler.load_state_dict(state["sampler"])
        self.samples, self.supervised = Counter(state["samples"]), Counter(state["supervised"])
