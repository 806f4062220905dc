"""Answers to questions about images and videos, with the generation settings of the paper."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from lynx.data.conversation import Sample
from lynx.model import LynxForConditionalGeneration
from lynx.processor import LynxProcessor

# Table 6 of arXiv 2307.02469, as options of transformers' generate.
GENERATION_PRESETS: dict[str, dict[str, Any]] = {
    "open-vqa-image": {
        "max_new_tokens": 64, "num_beams": 5, "do_sample": False, "length_penalty": -2.0, "no_repeat_ngram_size": 2,
    },
    "open-vqa-video": {
        "max_new_tokens": 128, "num_beams": 3, "do_sample": False, "length_penalty": -1.0, "no_repeat_ngram_size": 3,
    },
    "owleval": {
        "max_new_tokens": 256, "num_beams": 3, "do_sample": True, "top_p": 0.9, "top_k": 3, "length_penalty": 1.0,
        "no_repeat_ngram_size": 3,
    },
    "description": {"max_new_tokens": 128, "num_beams": 1, "do_sample": True, "top_p": 0.9, "top_k": 3},
}  # fmt: skip
GENERATION_PRESETS["demo"] = GENERATION_PRESETS["owleval"]
_DEFAULTS: dict[str, Any] = {"max_new_tokens": 64}
DESCRIBE = "Describe the image in detail."


@dataclass(frozen=True)
class Answer:
    """An answer: the text, and its tokens with the EOS."""

    text: str
    token_ids: list[int]


def answer(
    model: LynxForConditionalGeneration,
    processor: LynxProcessor,
    samples: Sequence[Sample],
    *,
    preset: str | None = None,
    **options: Any,
) -> list[str]:
    """The texts that ``generate_answers`` returns."""
    return [each.text for each in generate_answers(model, processor, samples, preset=preset, **options)]


@torch.no_grad()
def generate_answers(
    model: LynxForConditionalGeneration,
    processor: LynxProcessor,
    samples: Sequence[Sample],
    *,
    preset: str | None = None,
    **options: Any,
) -> list[Answer]:
    """The model's answer to each conversation that ends with a question.

    Conversations about the same media are branches of one root. Their media are encoded and read once, and so is the
    text that all of them begin with. Media are the same if they are the same object, path or bytes.

    Args:
        samples: what ``processor.encode`` made of the conversations.
        preset: a name in ``GENERATION_PRESETS``. Without one, generation is greedy, with at most 64 new tokens.
        options: of transformers' ``generate``, which override the preset: ``num_beams``, ``do_sample``, ... A
            ``streamer`` gets the rows in the order of the samples. Where roots are shared (``model.shares_roots``),
            ``no_repeat_ngram_size`` and the like count the new tokens alone, as for every decoder that is given
            embeddings; elsewhere they count those of the question too.

    Raises:
        ValueError: ``preset`` is not a known name, or an option counts the tokens of the questions.
    """
    check_preset(preset)
    for name in ("max_length", "min_length"):
        if options.get(name) is not None:
            raise ValueError(f"{name} counts the tokens of a question too; pass {name[:3]}_new_tokens")
    if not samples:
        return []
    options = {**(_DEFAULTS if preset is None else GENERATION_PRESETS[preset]), **options}
    if model.shares_roots(options):
        groups = _by_media(samples)
        numbers = [i for group in groups for i in group]
        if options.get("streamer") is not None:
            options["streamer"] = _InOrder(options["streamer"], numbers)
        rows = _generate_shared(model, processor, [[samples[i] for i in group] for group in groups], options)
        rows = [rows[row] for row in _places(numbers, len(rows))]
    else:
        batch = processor.pad(samples).to(model.input_device)
        del batch["labels"], batch["max_supervised"]
        rows = model.generate(**batch, **options)[:, batch["input_ids"].shape[1] :].tolist()
    eos = processor.tokenizer.eos_token_id
    new = [row[: row.index(eos) + 1] if eos in row else row for row in rows]
    return [Answer(processor.answer_of(torch.tensor(ids, dtype=torch.int64)), ids) for ids in new]


def _places(numbers: Sequence[int], rows: int) -> list[int]:
    """The order in which the rows follow that of the samples.

    Args:
        numbers: the sample of each row, or of each group of rows where a sample has several answers.
        rows: how many rows there are.
    """
    repeats = rows // len(numbers)
    return sorted(range(rows), key=lambda row: numbers[row // repeats])


class _InOrder(BaseStreamer):
    """Hands a streamer the rows in the order of the samples."""

    def __init__(self, streamer: BaseStreamer, numbers: Sequence[int]):
        self._streamer, self._numbers = streamer, numbers
        self._order: list[int] = []

    def put(self, value: Tensor) -> None:
        if not self._order:  # the prompt comes first, which has all rows
            self._order = _places(self._numbers, len(value))
        self._streamer.put(value[self._order])

    def end(self) -> None:
        self._streamer.end()


def check_preset(name: str | None) -> None:
    """Raise ValueError unless ``name`` is in ``GENERATION_PRESETS`` or None."""
    if name is not None and name not in GENERATION_PRESETS:
        raise ValueError(f"preset={name!r} is not known; there are {', '.join(GENERATION_PRESETS)}")


def _generate_shared(
    model: LynxForConditionalGeneration,
    processor: LynxProcessor,
    groups: Sequence[Sequence[Sample]],
    options: dict[str, Any],
) -> list[list[int]]:
    """The new tokens of every sample, group after group; the samples of a group have the same media."""
    batch = processor.pad([group[0] for group in groups])
    image_token = model.config.image_token_id
    prefixes = (batch["input_ids"] == image_token).sum(1).tolist()
    packed: list[int] = []
    lengths = []
    for group, prefix in zip(groups, prefixes, strict=True):
        texts = [sample.token_ids for sample in group]
        common = _common(texts) if model.config.prefix_is_causal else 0  # a full root is vision tokens alone
        packed += [image_token] * prefix + texts[0][:common]
        packed += [token for text in texts for token in text[common:]]
        lengths.append((prefix + common, [len(text) - common for text in texts]))
    vision_tokens = None
    if "pixel_values" in batch:
        layout = batch["media_layout"].to(model.input_device) if "media_layout" in batch else None  # a resampler's
        pixels, positions = (batch[name].to(model.input_device) for name in ("pixel_values", "frame_positions"))
        vision_tokens = model.encode_media(pixels, positions, layout)
    prompt = model.embed(torch.tensor([packed], device=model.input_device), vision_tokens)
    cache = model.shared_cache(prompt, lengths, options)
    stand_ins = prompt[0, cache.last_tokens][:, None]  # a token for each row, for which the cache's prompt is read
    options = {**options, "cache_implementation": None}
    with warnings.catch_warnings():  # about n-grams, which the docstring of generate_answers explains
        warnings.filterwarnings("ignore", message="Passing `.*` with `inputs_embeds`")
        return model.generate(inputs_embeds=stand_ins, past_key_values=cache, **options).tolist()


def _common(texts: Sequence[Sequence[int]]) -> int:
    """How many tokens all texts have in common at their beginning."""
    agree = (len(set(tokens)) == 1 for tokens in zip(*texts, strict=False))
    return next((i for i, same in enumerate(agree) if not same), min(map(len, texts)))


def _by_media(samples: Sequence[Sample]) -> list[list[int]]:
    """The numbers of the samples in groups with the same media; a sample without media is a group of its own."""
    groups: dict[Any, list[int]] = {}
    for number, sample in enumerate(samples):
        key = (tuple(map(_identity, sample.media)), tuple(sample.is_video)) if sample.media else number
        groups.setdefault(key, []).append(number)
    return list(groups.values())


def _identity(source: Any) -> Any:
    if isinstance(source, list):
        return tuple(map(_identity, source))
    return id(source) if isinstance(source, Image.Image | np.ndarray) else source


def describe_first(
    model: LynxForConditionalGeneration,
    processor: LynxProcessor,
    conversations: Sequence[Sequence[dict[str, Any]]],
    **options: Any,
) -> list[list[dict[str, Any]]]:
    """The conversations after a round in which the model describes their media, which is the paper's strategy.

    The media are described once, however many conversations are about them. A conversation without media does not
    change, nor does one whose description is empty.

    Args:
        conversations: in transformers' messages format; the media of the first message are described.
        options: of ``generate_answers``, which override ``GENERATION_PRESETS["description"]``.
    """
    split = [_split(messages[0].get("content")) for messages in conversations]
    rounds = [[{"role": "user", "content": [*media, {"type": "text", "text": DESCRIBE}]}] for media, _ in split]
    samples = [processor.encode(each) for each in rounds]
    groups = [group for group in _by_media(samples) if samples[group[0]].media]
    heads = [samples[group[0]] for group in groups]
    described = [list(messages) for messages in conversations]
    for group, text in zip(groups, answer(model, processor, heads, preset="description", **options), strict=True):
        for number in group if text else ():
            first, *later = described[number]
            said = {"role": "assistant", "content": text}
            described[number] = [*rounds[number], said, {**first, "content": split[number][1]}, *later]
    return described


def _split(content: Any) -> tuple[list[Any], Any]:
    """The media of a message's content, and the rest of it."""
    if isinstance(content, str) or not isinstance(content, Sequence):
        return [], content
    is_text = [isinstance(part, dict) and part.get("type") == "text" for part in content]
    parts = list(zip(content, is_text, strict=True))
    return [part for part, text in parts if not text], [part for part, text in parts if text]
