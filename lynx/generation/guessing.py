"""Assisted decoding: tokens that an assistant or the prompt itself suggests, read several at once and kept if right.

What guesses sees the text alone. So any assistant of transformers will do, and what it guesses changes the speed only.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin
from transformers.generation.candidate_generator import CandidateGenerator

from lynx.fusion import FUSIONS

# What a Lynx model is called with, and other models do not know.
_OURS = {
    "inputs_embeds",
    "max_supervised",
    "num_items_in_batch",
    *(name for each in FUSIONS.values() for name in each.inputs),
}


class GuessingGeneration(GenerationMixin):
    """A base of the model, before ``GenerationMixin``, which transformers looks for among the model's bases."""

    def _get_candidate_generator(
        self, *, input_ids: Tensor, inputs_tensor: Tensor, model_kwargs: dict[str, Any], **kwargs: Any
    ) -> CandidateGenerator:
        text = self._text_of(input_ids)
        model_kwargs = {name: value for name, value in model_kwargs.items() if name not in _OURS}
        guesser = super()._get_candidate_generator(
            input_ids=text, inputs_tensor=text, model_kwargs=model_kwargs, **kwargs
        )
        return _TextGuesser(guesser, self)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        *args: Any,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """As transformers', which reads the embeddings of the prompt alone: those of guessed tokens follow them."""
        if inputs_embeds is not None and is_first_iteration:
            guessed = input_ids[:, inputs_embeds.shape[1] :]
            if guessed.shape[1] > 0:
                guessed = guessed.to(inputs_embeds.device)
                inputs_embeds = torch.cat([inputs_embeds, self.fusion.embed(self, guessed, None)], 1)
        return super().prepare_inputs_for_generation(
            input_ids, *args, inputs_embeds=inputs_embeds, is_first_iteration=is_first_iteration, **kwargs
        )

    def _text_of(self, input_ids: Tensor) -> Tensor:
        """The ids with a token of the vocabulary in the place of each image's."""
        return torch.where(input_ids == self.config.image_token_id, self.config.pad_token_id or 0, input_ids)


class _TextGuesser(CandidateGenerator):
    """Shows the text alone to what guesses, and puts its guesses after the row as it is."""

    def __init__(self, guesser: CandidateGenerator, model: GuessingGeneration):
        self._guesser, self._model = guesser, model

    def get_candidates(self, input_ids: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        found, scores = self._guesser.get_candidates(self._model._text_of(input_ids), **kwargs)
        return torch.cat([input_ids, found[:, input_ids.shape[1] :].to(input_ids.device)], 1), scores

    def update_candidate_strategy(self, input_ids: Tensor, scores: Tensor, num_matches: int) -> None:
        self._guesser.update_candidate_strategy(self._model._text_of(input_ids), scores, num_matches)
