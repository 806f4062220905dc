"""Which options of transformers' ``generate`` a Lynx model has. The others are refused by name.

Everything is transformers' own: what it does with ``input_ids`` and ``inputs_embeds`` of a prompt is what a Lynx model
does. Refused is what would read the prompt a second time from its ids alone, which know nothing of images, what reads
layers that a Lynx model does not have, and what is no longer in transformers itself.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor
from transformers import Cache, GenerationConfig, SynthIDTextWatermarkingConfig

from lynx.data.conversation import IGNORED

_ON_THE_HUB = "its code is no longer in transformers, but may be passed as custom_generate"
_NO_LAYERS = "it drafts with layers that a Lynx model does not have"
_FROM_IDS = "transformers reads it of input_ids alone, and ignores it where there are embeddings"


class _Refused(NamedTuple):
    why: str
    asks: Callable[[Any], bool] = lambda value: True  # whether a value that is not None or False asks for something


_REFUSED = {
    "assistant_early_exit": _Refused(_NO_LAYERS),
    "speculation_type": _Refused(_NO_LAYERS),
    "token_healing": _Refused("it writes the prompt's ids anew, but the prompt is already read from its embeddings"),
    "use_mtp": _Refused(_NO_LAYERS),
    "cache_implementation": _Refused(
        "it is continuous batching, which reads input_ids alone", lambda value: value == "paged"
    ),
}
_REFUSED_UNLESS_CUSTOM = {
    "constraints": _Refused(_ON_THE_HUB),
    "diversity_penalty": _Refused(_ON_THE_HUB, lambda value: value != 0),
    "dola_layers": _Refused(_ON_THE_HUB),
    "force_words_ids": _Refused(_ON_THE_HUB),
    "num_beam_groups": _Refused(_ON_THE_HUB, lambda value: value != 1),
    "penalty_alpha": _Refused(_ON_THE_HUB, lambda value: value != 0),
}
_REFUSED_ON_CPU = {
    "cache_implementation": _Refused(
        "it moves keys and values between a GPU and the CPU", lambda value: str(value).startswith("offloaded")
    ),
}
_REFUSED_WITH_EMBEDDINGS = {
    "assistant_ensemble_weight": _Refused("it mixes in the scores of an assistant that sees no images"),
    "encoder_no_repeat_ngram_size": _Refused(_FROM_IDS, lambda value: value != 0),
    "encoder_repetition_penalty": _Refused(_FROM_IDS, lambda value: value != 1),
    "is_assistant": _Refused("an assistant is given ids alone"),
    "prefill_chunk_size": _Refused("transformers cuts input_ids into chunks, but not the embeddings"),
}
_REFUSED_WITH_MEDIA = {
    "prefill_chunk_size": _Refused("which media a chunk sees is not known to the next one"),
}
# Processors of logits that remember their calls, as if each were about one more token that stays.
_REFUSED_WITH_GUESSES = {
    "guidance_scale": _Refused("it cannot take back the guessed tokens that turn out wrong", lambda value: value != 1),
    "watermarking_config": _Refused(
        "SynthID cannot take back the guessed tokens that turn out wrong",
        lambda value: isinstance(value, SynthIDTextWatermarkingConfig),
    ),
}


def option(model: Any, options: Mapping[str, Any], name: str) -> Any:
    """The value that ``generate`` gives an option: the caller's, or else a ``generation_config``'s; None for neither.

    Args:
        model: whose own ``generation_config`` comes last.
        options: of the call.
        name: of the option.
    """
    if name in options:
        return options[name]
    configs: tuple[GenerationConfig | None, ...] = (options.get("generation_config"), model.generation_config)
    values = (getattr(config, name, None) for config in configs)
    return next((value for value in values if value is not None), None)


def is_set(model: Any, options: Mapping[str, Any], name: str) -> bool:
    """Whether an option is given, neither as None nor as False."""
    value = option(model, options, name)
    return value is not None and value is not False


def guesses(model: Any, options: Mapping[str, Any]) -> bool:
    """Whether several tokens are guessed, by an assistant or from the prompt, and read at once."""
    return any(is_set(model, options, name) for name in ("assistant_model", "prompt_lookup_num_tokens"))


def check(model: Any, input_ids: Tensor | None, options: Mapping[str, Any]) -> None:
    """Raise ValueError for an option, or for two together, that a Lynx model cannot keep; the message names them.

    Args:
        model: that generates.
        input_ids: (B, L); None where the caller passed embeddings alone.
        options: of ``generate``, the images already embedded or in ``media``.
    """
    embeds, cache = options.get("inputs_embeds"), options.get("past_key_values")
    labels = options.get("labels")
    if labels is not None and (labels != IGNORED).any():
        raise ValueError(
            "generate: labels name answers, so the rows hold them already; pass questions alone. This is what "
            "Seq2SeqTrainer's predict_with_generate needs, too: its loss is that of the same rows"
        )
    _refuse(model, options, _REFUSED, "")
    if model.device.type == "cpu":
        _refuse(model, options, _REFUSED_ON_CPU, " on a CPU")
    if options.get("custom_generate") is None:
        _refuse(model, options, _REFUSED_UNLESS_CUSTOM, "")
    if embeds is not None:
        _refuse(model, options, _REFUSED_WITH_EMBEDDINGS, " with images or inputs_embeds")
        if input_ids is not None and input_ids.shape != embeds.shape[:2]:
            raise ValueError(
                f"generate: input_ids are {tuple(input_ids.shape)}, but inputs_embeds have {tuple(embeds.shape[:2])} "
                "tokens; pass ids of the same tokens, or no ids"
            )
    if options.get("media") is not None:
        _refuse(model, options, _REFUSED_WITH_MEDIA, " with images")
    held = int(cache.get_seq_length()) if isinstance(cache, Cache) else 0
    if getattr(cache, "holds_beams", False):
        raise ValueError(
            "generate: past_key_values is left of a beam search, and holds its beams rather than the texts that it "
            "returned; leave it out"
        )
    if held > 0:
        _check_new_tokens(held, embeds if input_ids is None else input_ids, options.get("attention_mask"))
    if not guesses(model, options):
        return
    _refuse(model, options, _REFUSED_WITH_GUESSES, " with an assistant or prompt lookup")
    if input_ids is None and embeds is not None:
        raise ValueError("generate: guesses are made from ids; pass input_ids of the same tokens beside inputs_embeds")
    if held > 0:
        raise ValueError(
            "generate: past_key_values with an assistant or prompt lookup: transformers would read the prompt again "
            "after the tokens that the cache holds; leave one of them out"
        )


def _check_new_tokens(held: int, tokens: Tensor | None, mask: Tensor | None) -> None:
    """Raise ValueError unless the batch is the whole rows, or what is new beside the mask of the whole rows."""
    columns = 1 if tokens is None else tokens.shape[1]
    whole = columns if mask is None else mask.shape[1]
    if whole <= held or columns not in (whole, whole - held):
        raise ValueError(
            f"generate: past_key_values holds {held} tokens of each row, and the batch has {columns} in rows of "
            f"{whole}; pass the whole rows, or the new tokens with the attention_mask of the whole rows"
        )


def _refuse(model: Any, options: Mapping[str, Any], refused: Mapping[str, _Refused], where: str) -> None:
    for name, (why, asks) in refused.items():
        if is_set(model, options, name) and asks(value := option(model, options, name)):
            raise ValueError(f"generate: {name}={value!r} is not supported{where}: {why}; leave it out")
