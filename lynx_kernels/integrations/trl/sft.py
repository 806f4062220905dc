"""Supervised fine-tuning on packed rows, with dialogs and annotations that share an image as branches."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from trl import SFTTrainer
from trl.trainer.utils import pad

from lynx_kernels.integrations.collator import IGNORE, PackedCollator
from lynx_kernels.integrations.trl.branches import pack_rows
from lynx_kernels.integrations.trl.install import install
from lynx_kernels.integrations.trl.packs import Packs

logger = logging.getLogger("lynx_kernels")
BRANCHES = "branches"
Weights = Literal["tokens", "sqrt", "equal"]
_FACTORS: dict[str, Callable[[Tensor], Tensor]] = {  # of each of n tokens
    "sqrt": lambda count: count.rsqrt(),
    "equal": lambda count: 1 / count,
}


class PackedSFTTrainer(SFTTrainer):
    """TRL's ``SFTTrainer`` on packed rows: no padding, images and videos too, and what samples share computed once.

    It takes the arguments and the data of TRL's trainer, and its losses are TRL's. The mean is over the tokens of all
    micro-batches and ranks for every model; TRL's is one of their means for Qwen-VL, which has a loss of its own. A
    sample with images may have a column ``branches``: a list of further samples, which have its columns but for those
    that they bring, such as ``{"messages": ...}`` for another dialog about the image, or ``{"completion": ...}`` for
    another annotation. In any case, samples of a batch that have the same images share what they begin with.

    Args:
        token_budget: fill rows up to so many tokens (``PackPlanner``), instead of ``per_device_train_batch_size``
            samples. Each rank then runs through its own part of the samples again and again, so ``max_steps`` has to
            say when to stop. Samples beyond the budget are skipped, logged and counted.
        branch_weights: what each of the n supervised tokens of a dialog counts in training: ``"tokens"``: 1;
            ``"sqrt"``: 1 / sqrt(n), Molmo's rule; ``"equal"``: 1 / n.

    Samples that cannot be read are skipped and logged by number.

    Raises:
        ValueError: as ``SharedPrefixGRPOTrainer``; losses and metrics that need all logits; TRL's own packing.
    """

    _tag_names = ("trl", "sft", "lynx-kernels")
    data_collator: Any
    _signature_columns: list[str]

    def __init__(
        self, *args: Any, token_budget: int | None = None, branch_weights: Weights = "tokens", **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self._refuse(token_budget, branch_weights)
        collator = install(self, outputs=("log_probs", "entropy", "is_top1"))
        padding = self._tokenizer.pad_token_id
        self.data_collator = CollatorOfDialogs(self.data_collator, collator, padding, branch_weights)
        self.token_budget, self.branch_weights = token_budget, branch_weights
        # Of the model's own loss, which is not called. So the mean is over the tokens of all micro-batches and ranks.
        self.model_accepts_loss_kwargs = True

    def _refuse(self, token_budget: int | None, branch_weights: str) -> None:
        name = type(self).__name__
        if branch_weights not in ("tokens", *_FACTORS):
            raise ValueError(f"branch_weights is {branch_weights!r}, must be 'tokens', 'sqrt' or 'equal'")
        if token_budget is not None and self.args.max_steps <= 0:
            raise ValueError(f"{name}: with token_budget, max_steps says when to stop; set it")
        if self.args.packing or self.padding_free:
            raise ValueError(f"{name} packs rows itself; leave out packing and padding_free")
        if self.compute_loss_func is not None or self.label_smoother is not None or self.compute_metrics is not None:
            raise ValueError(
                f"{name} makes no logits, which compute_loss_func, label_smoothing_factor and compute_metrics need"
            )
        if branch_weights != "tokens" and self.args.loss_type != "nll":
            raise ValueError(
                f"{name}: loss_type={self.args.loss_type!r} weighs tokens itself; leave out branch_weights"
            )
        if not self._is_vision_dataset and BRANCHES in (self.train_dataset.column_names or ()):
            raise ValueError(
                f"{name}: samples without images need no column {BRANCHES!r}: give each dialog a row; those of a batch "
                f"share what they begin with"
            )

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns = [*self._signature_columns, BRANCHES]

    def get_train_dataloader(self) -> DataLoader:
        """TRL's, or one of ``Packs`` if there is a token budget."""
        if self.token_budget is None:
            loader: DataLoader = super().get_train_dataloader()
            return loader
        packs = Packs(
            self._remove_unused_columns(self.train_dataset, description="training"),
            self.data_collator,
            token_budget=self.token_budget,
            seed=self.args.seed if self.args.data_seed is None else self.args.data_seed,
            rank=self.accelerator.process_index,
            ranks=self.accelerator.num_processes,
        )
        return DataLoader(
            packs,
            batch_size=None,
            num_workers=self.args.dataloader_num_workers,
            persistent_workers=self.args.dataloader_persistent_workers,
            prefetch_factor=self.args.dataloader_prefetch_factor,
        )

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        inputs = super()._prepare_inputs(inputs)
        return {**inputs, BRANCHES: inputs[BRANCHES].to(self.args.device)}

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        """The sum of the weights, where there are any, in place of the number of supervised tokens."""
        count = super()._get_num_items_in_batch(batch_samples, device)
        if count is None or self.branch_weights == "tokens":
            return count
        total = sum(batch[BRANCHES].weights.sum() for batch in batch_samples).to(device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            total = self.accelerator.gather(total).sum()
        return total


class CollatorOfDialogs:
    """TRL's collator, asked for one sample at a time; its rows (B, L), and beside them their branches."""

    def __init__(
        self,
        collate: Callable[[list[Any]], dict[str, Any]],
        collator: PackedCollator,
        padding: int,
        branch_weights: Weights = "tokens",
    ) -> None:
        self.collate, self.collator, self.padding, self.branch_weights = collate, collator, padding, branch_weights

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        return self.join([self.rows(sample, number) for number, sample in enumerate(samples)])

    def rows(self, sample: Mapping[str, Any], number: int) -> list[dict[str, Any]]:
        """The inputs of the model for each dialog of a sample; none, and a line in the log, if it cannot be read."""
        alone = {name: value for name, value in sample.items() if name != BRANCHES}
        others = [
            {name: value for name, value in branch.items() if value is not None}
            for branch in sample.get(BRANCHES) or ()
        ]
        try:
            return [dict(self.collate([{**alone, **other}])) for other in ({}, *others)]
        except (OSError, SyntaxError, ValueError) as error:  # Pillow's, of broken files
            logger.warning("sample %d of the batch is skipped: %s: %s", number, type(error).__name__, error)
            return []

    def join(self, samples: Sequence[Sequence[dict[str, Any]]]) -> dict[str, Any]:
        """The batch of the rows of samples.

        Raises:
            ValueError: there are none.
        """
        rows = [row for sample in samples for row in sample]
        if not rows:
            raise ValueError(f"none of the {len(samples)} samples of a batch could be read; the log says why")
        values = {"input_ids": self.padding, "attention_mask": 0, "labels": IGNORE}
        batch = {name: pad([row[name][0] for row in rows], padding_value=value) for name, value in values.items()}
        branches = pack_rows(rows, self.collator, batch["input_ids"].shape[1])
        if self.branch_weights != "tokens":
            row = branches.entries // branches.shape[1]
            count = row.bincount(minlength=len(rows)).float()
            branches = replace(branches, weights=_FACTORS[self.branch_weights](count)[row])
        return {**batch, BRANCHES: branches}
