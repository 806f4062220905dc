"""Model folders: everything that ``from_pretrained`` needs, complete or an error."""

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from lynx.checkpoint import files
from lynx.config import LynxConfig
from lynx.media import tower
from lynx.model import LynxForConditionalGeneration
from lynx.presets import on_meta
from lynx.processor import LynxProcessor

_FILES = {
    "config.json": "the model's configuration",
    "processor_config.json": "the processor's settings",
    "tokenizer.json": "the tokenizer",
    "tokenizer_config.json": "the tokenizer's settings",
}
_INDEX = "model.safetensors.index.json"
_UNFINISHED = ".saving-"
_WEIGHTS = ("model.safetensors", _INDEX)


def save(
    folder: str | Path,
    model: LynxForConditionalGeneration,
    processor: LynxProcessor | None,
    *,
    state_dict: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write a folder that ``load``, ``AutoModel`` and ``AutoProcessor`` read; weights as safetensors.

    Without a processor only ``from_pretrained`` reads the folder; ``load`` says what is missing. ``state_dict`` holds
    the weights of a model whose own are spread over several processes.

    Files are moved into place when they are complete. A model that was there is removed before the new files move in,
    and config.json comes last. So whenever this is interrupted, ``load`` finds the old model or the new one, or refuses
    the folder. What an interrupted save left is removed.

    Raises:
        FileExistsError: ``folder`` is a file, or holds a model that is not a Lynx model.
    """
    folder = Path(folder)
    refuse_another_model(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(f"{_UNFINISHED}*"):
        shutil.rmtree(left)
    with tempfile.TemporaryDirectory(prefix=_UNFINISHED, dir=folder) as unfinished:
        model.save_pretrained(unfinished, state_dict=state_dict)
        if processor is not None:
            processor.save_pretrained(unfinished)
        for stale in (*(folder / name for name in _FILES), *folder.glob("model*.safetensors*")):
            stale.unlink(missing_ok=True)
        for path in sorted(Path(unfinished).iterdir(), key=lambda path: path.name == "config.json"):
            path.replace(folder / path.name)


def refuse_another_model(folder: str | Path) -> None:
    """Raise FileExistsError where saving a model would destroy one that is not a Lynx model."""
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file; give a folder to save the model in")
    if (folder / "config.json").is_file():
        try:
            model_type = _read_json(folder / "config.json").get("model_type")
        except ValueError:
            return  # interrupted while it was written
        if model_type != LynxConfig.model_type:
            raise FileExistsError(
                f"{folder} holds a model of model_type {model_type!r}, which would be lost; save to another folder"
            )


def load(folder: str | Path, *, dtype: torch.dtype | None = None) -> tuple[LynxForConditionalGeneration, LynxProcessor]:
    """Read a model and its processor from a folder, complete or not at all.

    Args:
        folder: what ``save`` wrote.
        dtype: of the parameters. If None, each keeps the dtype in which it was saved; ``from_pretrained`` would round
            parts that were trained in fp32 to the bf16 of the decoder around them.

    Raises:
        FileNotFoundError: the folder or some of its files are missing; the message names all of these.
        ValueError: the configuration or the weights cannot be read, or are of another model; a parameter is missing, is
            not expected, or has another shape.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such model folder")
    missing = [f"{name} ({what})" for name, what in _FILES.items() if not (folder / name).is_file()]
    if not any((folder / name).is_file() for name in _WEIGHTS):
        missing.append(f"{_WEIGHTS[0]} (the weights)")
    if missing:
        raise FileNotFoundError(f"{folder} is not a complete model folder; it lacks {', '.join(missing)}")
    contents = {name: _read_json(folder / name) for name in (*_FILES, _INDEX) if (folder / name).is_file()}
    model_type = contents["config.json"].get("model_type")
    if model_type != LynxConfig.model_type:
        raise ValueError(f"{folder} holds a model of model_type {model_type!r}, expected {LynxConfig.model_type!r}")
    if _INDEX in contents:
        files.shards(folder / _INDEX, contents[_INDEX])
    with _errors_about(folder, "config.json"):
        config = LynxConfig.from_pretrained(folder)
    with _errors_about(folder, "processor_config.json or the tokenizer"):
        processor = LynxProcessor.from_pretrained(folder, local_files_only=True)
    with _errors_about(folder, "config.json"):
        _check_agreement(folder, config, processor)
    with _errors_about(folder, "config.json or the weights"):
        _check_shapes(folder, config)
        model, report = LynxForConditionalGeneration.from_pretrained(
            folder,
            config=config,
            dtype=dtype or "auto",
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are reported below, with the rest
            use_safetensors=True,
            local_files_only=True,
        )
    if found := problems(report, "missing_keys", "unexpected_keys", "mismatched_keys"):
        raise ValueError(f"{folder}: the weights do not fit config.json; {found}")
    if dtype is None:
        _restore_dtypes(folder, model)
    return model.eval(), processor


def problems(report: dict[str, Any], *kinds: str) -> str:
    """Some kinds of keys in the report of ``from_pretrained(output_loading_info=True)``, in words; or an empty text."""
    words = {
        "missing_keys": "missing:",
        "unexpected_keys": "unexpected:",
        "mismatched_keys": "of another shape (saved, expected):",
    }
    return "; ".join(f"{words[kind]} {', '.join(map(str, sorted(report[kind])))}" for kind in kinds if report.get(kind))


def _restore_dtypes(folder: Path, model: LynxForConditionalGeneration) -> None:
    """Read again the parameters that were saved in another dtype than the one transformers gives to all of them."""
    saved = files.read(folder)  # mapped, not read
    for name, parameter in model.named_parameters():
        if name in saved and saved[name].dtype != parameter.dtype:  # a tied weight is saved once
            parameter.data = saved[name].clone()


@contextmanager
def _errors_about(folder: Path, what: str) -> Iterator[None]:
    """Turn the exceptions that transformers raises for damaged or handmade files into ValueError."""
    try:
        yield
    except SafetensorError as error:
        raise ValueError(
            f"{folder}: the weights ({_WEIGHTS[0]}) cannot be read; they may be truncated: {error}"
        ) from error
    except (OSError, ValueError):
        raise
    except Exception as error:
        raise ValueError(f"{folder}: {what} cannot be used: {type(error).__name__}: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON; it may be truncated: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected an object")
    return content


def _check_shapes(folder: Path, config: LynxConfig) -> None:
    """Raise ValueError, before memory is used, where the saved weights have other shapes than config.json says."""
    expected = {name: list(tensor.shape) for name, tensor in on_meta(config).state_dict().items()}
    wrong = []
    for path in sorted(folder.glob("model*.safetensors")):
        with safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (no dict)
        saved = {name: each.get_shape() for name, each in slices.items()}
        kinds = {name: each.get_dtype() for name, each in slices.items()}
        if other := [f"{name} {kind}" for name, kind in kinds.items() if kind not in files.FLOATING]:
            raise ValueError(
                f"{folder}: the weights are not floating point (expected {', '.join(files.FLOATING)}): "
                f"{', '.join(other)}; a quantised model cannot be read"
            )
        wrong += [
            f"{name} {saved[name]}, {expected[name]}"
            for name in saved
            if saved[name] != expected.get(name, saved[name])
        ]
    if wrong:
        raise ValueError(
            f"{folder}: the weights do not fit config.json; of another shape (saved, expected): {'; '.join(wrong)}"
        )


def _check_agreement(folder: Path, config: LynxConfig, processor: LynxProcessor) -> None:
    """Raise ValueError for a processor whose batches do not fit the model."""
    vision_config = config.vision_config
    expected = {
        "image_token_id": (processor.image_token_id, config.image_token_id),
        "num_latents": (processor.num_latents, config.num_latents),
        "fusion": (processor.fusion, config.fusion),
        "bridge": (processor.bridge, config.bridge),
        "prefix_is_causal": (processor.prefix_is_causal, config.prefix_is_causal),
        "sees_media": (processor.sees_media, config.sees_media),
        "max_frames": (processor.max_frames, config.max_frames),
        "tokens_per_frame": (processor.tokens_per_frame, tower.tokens_per_frame(vision_config)),
        "size": (processor.image_processor.size, vision_config.image_size),
    }
    for name, (has, wants) in expected.items():
        if has != wants:
            raise ValueError(f"{folder}: the processor has {name}={has}, but the model needs {wants}")
