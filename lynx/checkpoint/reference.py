"""The checkpoints of the released model (arXiv 2307.02469): reading and writing them."""

import json
import logging
import math
import re
from collections.abc import Callable, Mapping
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lynx.checkpoint import files, keys, names, shapes
from lynx.checkpoint.folder import refuse_another_model, save
from lynx.config import LynxConfig
from lynx.media import tower
from lynx.model import LynxForConditionalGeneration
from lynx.presets import on_meta
from lynx.processor import LynxProcessor

logger = logging.getLogger(__name__)

_FREQUENCIES = ".self_attn.rotary_emb.inv_freq"
_TABLES = ("LLM.model.embed_tokens.weight", "LLM.lm_head.weight")
_POSITIONS = "vision_encoder.pos_embed"
_RELEASE = {
    "fusion": "prefix", "bridge": "resampler", "prefix_is_causal": True, "resampler_concatenates_latents": False,
    "adapter_activation": "silu",
}  # fmt: skip


def load_reference(
    lynx_state_dict: Mapping[str, Any],
    *,
    vision_state_dict: Mapping[str, Any] | None = None,
    llm_state_dict: Mapping[str, Any] | None = None,
    config: LynxConfig | Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    copy: bool = True,
) -> LynxForConditionalGeneration:
    """The model with the release's weights. They all fit, or an error names all that do not.

    If two of the dicts hold the same weight, that of ``lynx_state_dict`` is used, as in the release. Widths, depths,
    the frequency of the adapters and the like come from the weights. What the weights do not show (head counts,
    epsilons, token ids) is as in the release, unless ``config`` says otherwise. The position embedding is resized
    bicubically for another ``image_size``. Tables of 32000 rows, or of one row less than ``vocab_size``, get one more
    row, the mean of the others, for the [PAD] that the release adds to the tokenizer.

    Args:
        lynx_state_dict: the content of ``finetune_lynx.pt``; it may stand under "model", and keys may have a prefix.
        vision_state_dict: of EVA ViT-g, original or split, where ``lynx_state_dict`` lacks it.
        llm_state_dict: of a Llama of transformers, where ``lynx_state_dict`` lacks it.
        config: a ``LynxConfig``, or the fields to override, for instance
            ``{"text_config": {"num_attention_heads": 4}, "max_frames": 5}``.
        dtype: of all parameters; by default the smallest that can hold the dtypes of all tensors.
        copy: if False, the model shares the memory of tensors that already have the dtype. Huge files then do not need
            twice their size, but a change of the model changes the tensors.

    Raises:
        ValueError: keys are missing or unknown, or shapes are not those of the configuration; a number is not finite;
            the weights are of another model; the configuration contradicts itself. Shapes are checked before memory is
            used.
    """
    state = keys.of_language_model(llm_state_dict) if llm_state_dict is not None else {}
    if vision_state_dict is not None:
        state.update(keys.of_vision(vision_state_dict))
    state.update(keys.of_lynx(lynx_state_dict))
    _check_sections(state)
    if not isinstance(config, LynxConfig):
        config = shapes.configuration(state, config or {})
    if config.tie_word_embeddings:
        raise ValueError("tie_word_embeddings is True, but the release has two tables; set it to False")
    frequencies = {key: state.pop(key) for key in list(state) if key.endswith(_FREQUENCIES)}
    if vision_state_dict is not None:
        _drop_last_blocks(state, config)
    model = on_meta(config)
    expected = export_reference(model)
    problems = [*_misfits(state, expected), *_other_frequencies(frequencies, model)]
    if problems:
        raise ValueError("\n  ".join(["the weights do not fit the configuration:", *problems]))
    bad = [key for key in _progress(state, "checking") if not state[key].isfinite().all()]
    if bad:
        raise ValueError(f"the weights have numbers that are not finite (NaN or infinity): {', '.join(bad)}")
    dtype = dtype or reduce(torch.promote_types, (tensor.dtype for tensor in state.values()))
    take = _taker(state, expected, dtype, copy)
    ours = {name: names.from_reference(name, take) for name in _progress(model.state_dict(), "converting")}
    model.load_state_dict(ours, assign=True)
    return model.eval()


def export_reference(model: LynxForConditionalGeneration) -> dict[str, Tensor]:
    """The model's weights with the keys and shapes of the release's checkpoints; they share the model's memory.

    The bias of the vision tower's keys is left out. The release does not have it, and it does not change the output.

    Raises:
        ValueError: the model has parts that the release does not have.
    """
    unlike = [
        f"{name}={getattr(model.config, name)!r}"
        for name, value in _RELEASE.items()
        if getattr(model.config, name) != value
    ]
    if not tower.takes_patches(model.config.vision_config):
        unlike.append(f"vision_config.model_type={model.config.vision_config.model_type!r}")
    if unlike:
        raise ValueError(f"the release's format cannot hold a model with {', '.join(unlike)}")
    state: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        state.update(names.to_reference(name, tensor))
    return state


def convert(
    checkpoint: str | Path,
    output: str | Path,
    *,
    vision: str | Path | None = None,
    language_model: str | Path | None = None,
    tokenizer: str | Path | None = None,
    config: str | Path | None = None,
    image_size: int | None = None,
    dtype: torch.dtype | None = None,
) -> LynxForConditionalGeneration:
    """Make a model folder from the release's checkpoint files.

    Args:
        checkpoint: ``finetune_lynx.pt`` or another file in its layout.
        output: the folder.
        vision: EVA's checkpoint, where ``checkpoint`` lacks the vision tower.
        language_model: Vicuna's folder or file, where ``checkpoint`` lacks it.
        tokenizer: a folder with Vicuna's tokenizer, to which [PAD] is added if it has no pad token. Without it the
            folder gets a model but no processor, and a warning says what is missing.
        config: a JSON file with the fields to override, as for ``load_reference``.
        image_size: the resolution in pixels; by default that of the position embedding.
        dtype: of the parameters, as for ``load_reference``.

    Raises:
        FileNotFoundError, ValueError: a file is missing or cannot be used.
        FileExistsError: ``output`` is a file, or holds a model that is not a Lynx model, such as Vicuna.
    """
    refuse_another_model(output)
    overrides = _read_overrides(config)
    text = overrides.setdefault("text_config", {})
    if image_size is not None:
        overrides.setdefault("vision_config", {})["image_size"] = image_size
    vocabulary = None if tokenizer is None else _tokenizer(tokenizer)
    if vocabulary is not None:
        if vocabulary.pad_token is None:
            vocabulary.add_special_tokens({"pad_token": "[PAD]"})
            text.setdefault("vocab_size", len(vocabulary))
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            text.setdefault(name, getattr(vocabulary, name))
    model = load_reference(
        files.read(checkpoint),
        vision_state_dict=None if vision is None else files.read(vision),
        llm_state_dict=None if language_model is None else files.read(language_model),
        config=overrides,
        dtype=dtype,
        copy=False,
    )
    processor = None
    if vocabulary is None:
        logger.warning(
            "no tokenizer was given: %s has a model that from_pretrained reads, but not the processor and the "
            "tokenizer that lynx ask needs; give the folder of Vicuna's tokenizer",
            output,
        )
    else:
        rows = model.config.text_config.vocab_size
        if len(vocabulary) > rows:
            raise ValueError(f"{tokenizer} has {len(vocabulary)} tokens, but the model has embeddings for {rows}")
        processor = LynxProcessor.for_model(model.config, vocabulary)
    save(output, model, processor)
    return model


def _check_sections(state: Mapping[str, Tensor]) -> None:
    advice = {
        "vision_encoder.": "the vision tower: give EVA ViT-g's too (vision_state_dict, --vision)",
        "LLM.": "the language model: give Vicuna's too (llm_state_dict, --llm)",
        "bridge.": "the resampler",
    }
    there = [key for key in state if ".output_adapter." not in key]
    lacking = [
        f"{what} ({prefix}*)" for prefix, what in advice.items() if not any(key.startswith(prefix) for key in there)
    ]
    if lacking:
        raise ValueError(f"the weights lack {'; and '.join(lacking)}")


def _drop_last_blocks(state: dict[str, Tensor], config: LynxConfig) -> None:
    depth = config.vision_config.num_hidden_layers
    for key in list(state):
        block = re.match(r"vision_encoder\.blocks\.(\d+)\.", key)
        if block and int(block[1]) >= depth:
            logger.warning("the model has %d blocks of the vision tower: %s is left out", depth, key)
            del state[key]


def _misfits(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    problems = [f"missing: {key} {tuple(expected[key].shape)}" for key in expected if key not in state]
    for key, tensor in state.items():
        shape = tuple(tensor.shape)
        if key not in expected:
            problems.append(f"unexpected: {key} {shape}")
        elif not tensor.is_floating_point():
            problems.append(f"not floating-point: {key} is {tensor.dtype}")
        elif shape != (wanted := tuple(expected[key].shape)) and not _can_be_made(key, shape, wanted):
            problems.append(f"of another shape: {key} is {shape}, expected {wanted}")
    return problems


def _can_be_made(key: str, shape: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Whether a new row for [PAD], or another grid of positions, turns the one shape into the other."""
    if key in _TABLES:
        return shape == (wanted[0] - 1, wanted[1])
    if key == _POSITIONS and len(shape) == 3 and shape[::2] == wanted[::2]:
        return shape[1] > 1 and math.isqrt(shape[1] - 1) ** 2 == shape[1] - 1
    return False


def _other_frequencies(frequencies: Mapping[str, Tensor], model: LynxForConditionalGeneration) -> list[str]:
    """Rotary frequencies that differ from ours; they are not parameters, but older files hold them for every layer."""
    expected = model.get_decoder().rotary_emb.inv_freq
    return [
        f"another rotary embedding: {key} {tuple(tensor.shape)} is not what head_dim and rope_theta make "
        f"{tuple(expected.shape)}"
        for key, tensor in frequencies.items()
        if tensor.shape != expected.shape or not torch.allclose(tensor.float(), expected.float(), rtol=1e-2)
    ]


def _taker(
    state: Mapping[str, Tensor], expected: Mapping[str, Tensor], dtype: torch.dtype, copy: bool
) -> Callable[[str], Tensor]:
    def take(key: str) -> Tensor:
        tensor = state[key].detach()
        if tensor.shape != expected[key].shape:
            tensor = (
                _with_pad_row(tensor) if key in _TABLES else tower.resized_positions(tensor, expected[key].shape[1])
            )
        taken = tensor.to(dtype).contiguous()
        if tensor.dtype != dtype and not taken.isfinite().all():
            raise ValueError(f"{key} has numbers that are too large for {dtype}; choose another dtype")
        return taken.clone() if copy and taken.data_ptr() == state[key].data_ptr() else taken

    return take


def _with_pad_row(table: Tensor) -> Tensor:
    wide = torch.promote_types(table.dtype, torch.float32)
    return torch.cat([table, table.mean(0, keepdim=True, dtype=wide).to(table.dtype)])


def _progress(state: Mapping[str, Tensor], what: str) -> tqdm:
    return tqdm(state, desc=what, unit=" weights", disable=None, leave=False)


def _read_overrides(path: str | Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        overrides = json.loads(Path(path).read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(overrides, dict) or not all(
        isinstance(overrides.get(name, {}), dict) for name in ("text_config", "vision_config")
    ):
        raise ValueError(f"{path} must hold an object, and objects in its text_config and vision_config")
    return overrides


def _tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"{folder}: no such tokenizer folder")
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} has no tokenizer that transformers can read: {error}") from error
