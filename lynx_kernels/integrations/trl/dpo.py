"""DPO with chosen and rejected as branches of their prompt."""

from collections.abc import Callable
from typing import Any

import torch
from trl import DPOTrainer
from trl.trainer.utils import pad

from lynx_kernels.integrations.collator import IGNORE, PackedCollator
from lynx_kernels.integrations.trl.branches import pack_rows
from lynx_kernels.integrations.trl.install import install

_REFERENCES = ("ref_chosen_logps", "ref_rejected_logps")


class SharedPrefixDPOTrainer(DPOTrainer):
    """TRL's ``DPOTrainer``, in which a prompt and its images run through the model once for chosen and rejected.

    It takes the arguments of TRL's trainer. Policy and reference run the kernels (``apply``). All loss types and
    divergences are TRL's; log-probabilities come from ``token_log_probs``. With ``precompute_ref_log_probs`` TRL
    computes the reference's itself, of padded rows.

    Raises:
        ValueError: as ``SharedPrefixGRPOTrainer``.
    """

    _tag_names = ("trl", "dpo", "lynx-kernels")
    data_collator: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        weighted = ("log_sum_sq_probs",) if self.use_weighting else ()
        collator = install(self, outputs=("log_probs", "entropy", "mean_logits", "is_top1", *weighted))
        self.data_collator = CollatorOfPairs(self.data_collator, collator, self._tokenizer)


class CollatorOfPairs:
    """TRL's collator, asked for one pair at a time; its rows (2 B, L), chosen first, and beside them their branches."""

    def __init__(
        self, collate: Callable[[list[Any]], dict[str, Any]], collator: PackedCollator, tokenizer: Any
    ) -> None:
        self.collate, self.collator, self.tokenizer = collate, collator, tokenizer

    def __call__(self, examples: list[Any]) -> dict[str, Any]:
        pairs = [self.collate([example]) for example in examples]
        rows = [_row(pair, member) for member in (0, 1) for pair in pairs]
        values = {"input_ids": self.tokenizer.pad_token_id, "attention_mask": 0, "completion_mask": 0}
        batch = {name: pad([row[name][0] for row in rows], padding_value=value) for name, value in values.items()}
        for row in rows:
            row["labels"] = row["input_ids"].masked_fill(row.pop("completion_mask") == 0, IGNORE)
        references = {name: torch.cat([pair[name] for pair in pairs]) for name in _REFERENCES if name in pairs[0]}
        return {**batch, **references, "branches": pack_rows(rows, self.collator, batch["input_ids"].shape[1])}


def _row(pair: dict[str, Any], member: int) -> dict[str, Any]:
    """The inputs of chosen (0) or rejected (1) alone. Media stand there for both, in this order."""
    return {name: value.chunk(2)[member] for name, value in pair.items() if name not in _REFERENCES}
