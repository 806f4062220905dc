"""GRPO with the completions of a prompt as branches of it."""

import logging
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from trl import GRPOTrainer
from trl.trainer.utils import (
    FusedCausalLMOutput,
    split_pixel_values_by_grid,
    split_tensor_dict,
    unsplit_pixel_values_by_grid,
)

from lynx_kernels.integrations.trl.branches import pack_rows
from lynx_kernels.integrations.trl.install import install

logger = logging.getLogger("lynx_kernels")


class SharedPrefixGRPOTrainer(GRPOTrainer):
    """TRL's ``GRPOTrainer``, in which a prompt and its images run through the model once for all its completions.

    It takes the arguments of TRL's trainer. Policy and reference run the kernels (``apply``). All loss types, clipping,
    importance sampling, tools, environments and vLLM are TRL's; log-probabilities and entropies come from
    ``token_log_probs``. Rows share what they begin with, of whichever prompts they are, if their images are the same.

    Rewards that are not finite are no rewards, as None is for TRL, and are counted as ``rewards/not_finite``. Empty
    completions of a ``rollout_func`` are rewarded and train nothing, and are counted as ``completions/empty``.

    Raises:
        ValueError: names what cannot be right: an entropy bonus (entropies carry no gradient here), a router's
            auxiliary loss, prompt learning, adapters on the head, rows cut between ranks.
    """

    _tag_names = ("trl", "grpo", "lynx-kernels")
    _buffered_inputs: list[dict[str, Any]] | None
    rollout_func: Any
    log_multimodal: bool

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self._entropy_bonus_enabled:
            raise ValueError(
                f"{type(self).__name__}: token_log_probs returns entropies without gradients, which an entropy bonus "
                f"needs; set entropy_coef=0 and leave out use_adaptive_entropy"
            )
        if self.rollout_func is not None:
            self.rollout_func = partial(self._checked_rollout, self.rollout_func)
        if self.log_multimodal and self.accelerator.num_processes > 1:
            # TRL gathers images from the ranks that have some, which then wait for the others without end.
            self.log_multimodal = False
            if self.log_completions:
                logger.warning("images of prompts are not logged on several ranks: some may have none")
        self._collator = install(self, outputs=("log_probs", "entropy"), temperature=self.temperature)

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **media: Any,
    ) -> tuple[Tensor, Tensor | None, None]:
        """TRL's, with rows packed. Its own code cuts the batch into the inputs of single rows."""
        rows: list[Mapping[str, Any]] = []

        def keep(labels: Tensor, fused_lm_head: bool, **inputs: Any) -> FusedCausalLMOutput:
            rows.append({**inputs, "labels": labels})
            return FusedCausalLMOutput(log_probs=labels[:, 1:])

        device = input_ids.device
        on_host = {
            name: each.cpu() if isinstance(each, Tensor) and name != "pixel_values" else each
            for name, each in media.items()
        }
        super()._get_per_token_logps_and_entropies(
            keep, input_ids.cpu(), attention_mask.cpu(), logits_to_keep, batch_size=1, **on_host
        )
        found = []
        batch_size = batch_size or len(rows)
        for start in range(0, len(rows), batch_size):
            branches = pack_rows(rows[start : start + batch_size], self._collator).to(device)
            with self.accelerator.autocast():
                found.append(model(branches=branches, entropy=compute_entropy))
            if torch.is_grad_enabled():
                self._metrics["train"]["tokens_per_packed_token"].append(
                    int(attention_mask[start : start + batch_size].sum()) / branches.num_tokens
                )
        log_probs = torch.cat([each.log_probs[:, -logits_to_keep:] for each in found])
        entropies = torch.cat([each.entropy[:, -logits_to_keep:] for each in found]) if compute_entropy else None
        return log_probs, entropies, None

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        """TRL's, but completions of a prompt stay together where it shuffles a generation batch and cuts it."""
        if not self.model.training:
            return super()._prepare_inputs(generation_batch)
        steps = self.args.steps_per_generation
        if self._step % (steps * self.num_iterations) == 0 or self._buffered_inputs is None:
            batch = split_pixel_values_by_grid(self._generate_and_score_completions(generation_batch))
            batch = _shuffled_by_group(batch, self.num_generations)
            self._buffered_inputs = [unsplit_pixel_values_by_grid(each) for each in split_tensor_dict(batch, steps)]
        return self._buffered_inputs[self._step % steps]

    def _checked_rollout(self, rollout: Any, prompts: list[Any], trainer: Any) -> dict[str, Any]:
        """What a ``rollout_func`` returns. TRL cannot take empty completions: they get an end that trains nothing."""
        found = dict(rollout(prompts, trainer))
        completions = found.get("completion_ids", [])
        empty = [number for number, each in enumerate(completions) if not len(each)]
        self._metrics["train" if self.model.training else "eval"]["completions/empty"].append(len(empty))
        if empty:
            logger.warning("completions %s of a batch are empty: they are rewarded, and train nothing", empty)
            found.setdefault("env_mask", [[1] * len(each) for each in completions])
            for name, filler in (("completion_ids", self.eos_token_ids[0]), ("logprobs", 0.0), ("env_mask", 0)):
                if found[name] is not None:
                    found[name] = [[filler] if number in empty else each for number, each in enumerate(found[name])]
        return found

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Tensor:
        """TRL's. A reward of nan or inf would spoil its whole group, so it is none, and counted."""
        rewards: Tensor = super()._calculate_rewards(*args, **kwargs)
        mode = "train" if self.model.training else "eval"
        infinite = int(rewards.isinf().sum())
        if infinite:
            logger.warning("%d rewards of a batch are infinite, which are taken for none", infinite)
        self._metrics[mode]["rewards/not_finite"].append(int((~rewards.isfinite()).sum()))
        return torch.where(rewards.isinf(), torch.nan, rewards)


def _shuffled_by_group(batch: dict[str, Any], group_size: int) -> dict[str, Any]:
    """A batch whose rows are shuffled as TRL would, but so that the rows of a group follow each other.

    On ranks that hold parts of groups, these stay together.
    """
    permutation = torch.randperm(len(batch["prompt_ids"])).tolist()
    place: dict[int, int] = {}  # of groups
    for row in permutation:
        place.setdefault(row // group_size, len(place))
    order = sorted(permutation, key=lambda row: place[row // group_size])

    def permuted(value: Any) -> Any:
        if value is None or (isinstance(value, Tensor) and not value.dim()):
            return value
        return (
            value[torch.tensor(order, device=value.device)] if isinstance(value, Tensor) else [value[i] for i in order]
        )

    return {name: permuted(value) for name, value in batch.items()}
