"""Pretrained parts of a model, from folders of transformers: a decoder with its tokenizer, and a vision tower."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from lynx import checkpoint
from lynx.media import tower
from lynx.train.recipe import RecipeError
from lynx_kernels.integrations import transformers as attention_integration

_Read = TypeVar("_Read")


def language_model(folder: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The decoder in fp32 and its tokenizer, to which [PAD] is added where it has no pad token.

    Tokens without a row in the embedding table get one, in the output head too, the mean of those of the other tokens,
    as in the release.

    Raises:
        RecipeError: there is no such folder, its decoder or tokenizer cannot be read, or it lacks weights.
    """
    where = f"language_model={folder}"
    _require_folder(where, folder)
    tokenizer = _read(f"{where}: the tokenizer", lambda: AutoTokenizer.from_pretrained(folder, local_files_only=True))
    decoder = _loaded(where, folder, AutoModelForCausalLM, attn_implementation=attention_integration.NAME)
    known = min(len(tokenizer), decoder.get_input_embeddings().weight.shape[0])
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    if len(tokenizer) > decoder.get_input_embeddings().weight.shape[0]:
        decoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    with torch.no_grad():
        for table in {decoder.get_input_embeddings().weight, decoder.get_output_embeddings().weight}:
            table[known : len(tokenizer)] = table[:known].mean(0)
    decoder.config.pad_token_id = tokenizer.pad_token_id
    return decoder, tokenizer


def vision_tower(folder: str) -> PreTrainedModel:
    """The vision tower in fp32: a vision model's folder, or that of a model that has one, such as CLIP's or BLIP-2's.

    Raises:
        RecipeError: there is no such folder, a vision model cannot be read from it, or it lacks weights.
    """
    where = f"vision_tower={folder}"
    _require_folder(where, folder)
    config = _read(where, lambda: AutoConfig.from_pretrained(folder, local_files_only=True))
    config = getattr(config, "vision_config", config)
    if not hasattr(config, "image_size"):
        raise RecipeError(f"{where} holds a {config.model_type}, which is not a vision model")
    with torch.device("meta"):
        built = tower.build(config)
    return _loaded(
        where,
        folder,
        type(built),
        config=config,
        attn_implementation=built.config._attn_implementation,
        key_mapping={r"^vision_model\.": ""} if tower.takes_patches(config) else None,  # of a whole BLIP-2
    )


def _loaded(where: str, folder: str, kind: Any, **options: Any) -> PreTrainedModel:
    """A model whose weights are all in the folder: transformers would draw those that are not."""
    _require_floating(where, Path(folder))
    model, report = _read(
        where,
        lambda: kind.from_pretrained(
            folder,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are reported, with the rest
            use_safetensors=True,
            local_files_only=True,
            **options,
        ),
    )
    if problems := checkpoint.problems(report, "missing_keys", "mismatched_keys"):
        raise RecipeError(f"{where}: the weights do not fit its config.json; {problems}")
    return model


def _require_floating(where: str, folder: Path) -> None:
    """Raise RecipeError for weights that are integers: transformers would take the numbers of a quantised model."""
    for path in sorted(folder.glob("*.safetensors")):
        with _read(where, lambda path=path: safe_open(path, "pt")) as file:  # type: ignore[misc]
            kinds = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118 (no dict)
        for name, kind in kinds.items():
            if name.endswith((".weight", ".bias")) and kind not in checkpoint.files.FLOATING:
                raise RecipeError(f"{where}: {name} is {kind}, not floating point; a quantised model cannot be read")


def _require_folder(where: str, folder: str) -> None:
    if not Path(folder).is_dir():  # transformers would take it for a name to look up
        raise RecipeError(f"{where}: no such folder")


def _read(where: str, read: Callable[[], _Read]) -> _Read:
    try:
        return read()
    except (OSError, ValueError, SafetensorError) as error:
        raise RecipeError(f"{where} cannot be read: {error}") from error
