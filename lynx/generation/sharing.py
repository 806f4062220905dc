"""transformers' ``generate`` over a cache in which rows share roots, for decoders with our attention."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, GenerationMixin
from transformers.masking_utils import create_masks_for_generate
from transformers.modeling_outputs import CausalLMOutputWithPast

from lynx.fusion import fusion_of
from lynx.generation.cache import SharedRootCache, StaticTensors
from lynx.generation.options import is_set, option
from lynx_kernels.integrations import transformers as attention_integration
from lynx_kernels.layout import require

# Options of generate that read several tokens at once, ask for what is not computed, or contradict the cache.
_NEED_ANOTHER_CACHE = (
    "past_key_values", "position_ids", "assistant_model", "prompt_lookup_num_tokens", "prefill_chunk_size",
    "custom_generate", "output_hidden_states", "output_attentions", "is_assistant",
)  # fmt: skip


class SharedRootGeneration(GenerationMixin):
    """A base of the model, before ``GenerationMixin``, which transformers looks for among the model's bases."""

    static_tensors: StaticTensors  # for caches of static shapes; the model makes it

    def forward_shared(
        self,
        cache: SharedRootCache,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Read the cache's prompt, or the next tokens of each row; masks and positions are those of the cache.

        Raises:
            ValueError: there are pads among the next tokens, or more is asked for than logits.
        """
        for name in ("output_attentions", "output_hidden_states"):
            if kwargs.get(name):
                raise ValueError(f"{name} with a SharedRootCache, which reads rows that share roots; use another cache")
        if self._compiles(cache):
            step = self.get_compiled_call(self.generation_config.compile_config)
            return step(input_ids=input_ids, inputs_embeds=inputs_embeds, past_key_values=cache)
        rows, length = (input_ids if inputs_embeds is None else inputs_embeds).shape[:2]  # type: ignore[union-attr]
        if cache.prompt is not None:
            options = cache.read(rows, length)
        else:
            if attention_mask is not None and length > 1:
                message = "attention_mask has pads among the next tokens, of which a SharedRootCache knows nothing"
                require(attention_mask[:, -length:].all(), message)
            options = {
                "inputs_embeds": self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
            }
            options |= cache.advance(length)
        hidden = self.get_decoder()(past_key_values=cache, use_cache=True, **options, **kwargs).last_hidden_state
        if "layout" not in options:
            return CausalLMOutputWithPast(logits=self.project(hidden), past_key_values=cache)
        logits = self.project(hidden[0, cache.last_tokens])[:, None]
        return CausalLMOutputWithPast(
            logits=logits.repeat_interleave(rows // len(logits), 0),  # the beams of a row begin with the same logits
            past_key_values=cache,
        )

    def _compiles(self, cache: SharedRootCache) -> bool:
        """Whether to compile a step here: transformers compiles the steps of sampling, but not those of beam search."""
        is_step = cache.is_compileable and cache.prompt is None
        return is_step and self.device.type == "cuda" and not torch.compiler.is_compiling()

    def shares_roots(self, options: dict[str, Any]) -> bool:
        """Whether ``generate`` with these options can use a ``SharedRootCache``."""
        implementation = self.get_decoder().config._attn_implementation
        if not fusion_of(self.config).shares_roots or implementation != attention_integration.NAME:
            return False
        if any(is_set(self, options, name) for name in _NEED_ANOTHER_CACHE):
            return False
        kind = option(self, options, "cache_implementation")
        return kind in (None, "static") and option(self, options, "use_cache") is not False

    def check_continued(self, cache: Cache, input_ids: Tensor | None, options: dict[str, Any]) -> None:
        """Raise ValueError unless ``generate`` with these options goes on from all tokens that a cache holds."""
        if not isinstance(cache, SharedRootCache) or cache.prompt is not None:
            return
        tokens = options["inputs_embeds"] if input_ids is None else input_ids
        repeats = max(option(self, options, name) or 1 for name in ("num_beams", "num_return_sequences"))
        if cache.batch_size != len(tokens) * repeats:
            raise ValueError(
                f"generate: past_key_values holds {cache.batch_size} rows, but {len(tokens)} prompts with {repeats} "
                f"beams or answers each need {len(tokens) * repeats}"
            )
        mask = options.get("attention_mask")
        mask = torch.ones(tokens.shape[:2], dtype=torch.bool) if mask is None else mask.cpu() != 0
        held = cache.lengths.cpu()
        new = mask.shape[1] - cache.get_seq_length()
        if not bool((mask.sum(1).repeat_interleave(repeats) - held == new).all() and mask[:, -new:].all()):
            raise ValueError(
                f"generate: past_key_values holds rows of {held.tolist()} tokens, and the attention_mask has rows of "
                f"{mask.sum(1).tolist()} in {mask.shape[1]} columns: every row must go on by the same number of "
                "tokens, and no column may be pads alone; or else pass past_key_values=DynamicCache() and whole rows"
            )

    def with_shared_roots(self, input_ids: Tensor | None, options: dict[str, Any]) -> dict[str, Any]:
        """The options of ``generate``, with a cache for the left-padded prompt if roots and branches are known."""
        embeds, mask = options.get("inputs_embeds"), options.get("attention_mask")
        is_causal, prefixes = self.config.prefix_is_causal, options.get("prefix_lengths")
        if (input_ids is None and embeds is None) or (prefixes is None and not is_causal):
            return options  # it is not known which embeddings are vision tokens
        if mask is None and input_ids is not None and bool((input_ids == self.config.pad_token_id).any()):
            return options  # transformers guesses whether they are pads
        if embeds is None:
            embeds = self.embed(input_ids)
        mask = torch.ones(embeds.shape[:2], device=embeds.device) if mask is None else mask
        if mask.shape != embeds.shape[:2]:
            raise ValueError(f"attention_mask has shape {tuple(mask.shape)}, the batch {tuple(embeds.shape[:2])}")
        mask = mask.to(embeds.device, torch.bool)
        lengths = mask.sum(1).tolist()
        groups = [(length, [0]) for length in lengths]  # all beams share the whole prompt
        if prefixes is not None and not is_causal:
            groups = [(prefix, [length - prefix]) for prefix, length in zip(prefixes.tolist(), lengths, strict=True)]
        cache = self.shared_cache(embeds[mask][None], groups, options, prompt_length=embeds.shape[1])
        others = {name: value for name, value in options.items() if name != "prefix_lengths"}
        return {**others, "cache_implementation": None, "past_key_values": cache}

    def shared_cache(
        self,
        prompt: Tensor,
        groups: Sequence[tuple[int, Sequence[int]]],
        options: dict[str, Any],
        *,
        prompt_length: int = 1,
    ) -> SharedRootCache:
        """A ``SharedRootCache`` for ``generate`` with these options; the other arguments are those of its class."""
        is_static = option(self, options, "cache_implementation") == "static"
        max_new_tokens = option(self, options, "max_new_tokens")
        if is_static and max_new_tokens is None:
            raise ValueError("cache_implementation='static' needs max_new_tokens, which says how much room to make")
        return SharedRootCache(
            prompt,
            groups,
            num_layers=len(self.get_decoder().layers),
            root_is_causal=self.config.prefix_is_causal,
            prompt_length=prompt_length,
            max_new_tokens=max_new_tokens if is_static else None,
            static_tensors=self.static_tensors,
        )

    def create_masks_for_generate(
        self, *, past_key_values: Cache | None = None, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> Any:
        """transformers calls this before each step over a cache of static shapes; our cache needs no mask."""
        if isinstance(past_key_values, SharedRootCache):
            return None
        return create_masks_for_generate(past_key_values=past_key_values, attention_mask=attention_mask, **kwargs)
