"""Model folders: everything ``from_pretrained`` needs, whole or an error."""

import json
import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoProcessor

from lynx.config import LynxConfig
from lynx.model import LynxForConditionalGeneration
from lynx.processor import LynxProcessor

_FILES = {
    "config.json": "the model's configuration",
    "processor_config.json": "the processor's settings",
    "tokenizer.json": "the tokenizer",
    "tokenizer_config.json": "the tokenizer's settings",
}
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")


def save(folder: str | Path, model: LynxForConditionalGeneration, processor: LynxProcessor) -> None:
    """Write a folder that ``load``, ``AutoModel`` and ``AutoProcessor`` read; weights as safetensors.

    Files come to their place whole, the configuration last: a folder cut off before that is one that ``load`` refuses.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as unfinished:
        model.save_pretrained(unfinished)
        processor.save_pretrained(unfinished)
        for path in sorted(Path(unfinished).iterdir(), key=lambda path: path.name == "config.json"):
            path.replace(folder / path.name)


def load(folder: str | Path, *, dtype: torch.dtype | None = None) -> tuple[LynxForConditionalGeneration, LynxProcessor]:
    """Read a model and its processor from a folder, all of it or nothing.

    Args:
        folder: what ``save`` wrote.
        dtype: of the parameters; as they were saved if None.

    Raises:
        FileNotFoundError: the folder or one of its files is missing; the message names them all.
        ValueError: the configuration or the weights cannot be read or are of another model; the weights lack a
            parameter, have one too many, or one of another shape.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such model folder")
    missing = [f"{name} ({what})" for name, what in _FILES.items() if not (folder / name).is_file()]
    if not any((folder / name).is_file() for name in _WEIGHTS):
        missing.append(f"{_WEIGHTS[0]} (the weights)")
    if missing:
        raise FileNotFoundError(f"{folder} is not a whole model folder, it lacks: {', '.join(missing)}")
    config = _config(folder)
    try:
        model, report = LynxForConditionalGeneration.from_pretrained(
            folder,
            config=config,
            dtype=dtype or "auto",
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are reported below, with the rest
            use_safetensors=True,
            local_files_only=True,
        )
    except SafetensorError as error:
        raise ValueError(f"{folder}: the weights ({_WEIGHTS[0]}) cannot be read, truncated perhaps: {error}") from error
    problems = [
        f"{what} {', '.join(map(str, sorted(report[key])))}"
        for key, what in {
            "missing_keys": "missing:",
            "unexpected_keys": "unexpected:",
            "mismatched_keys": "of another shape (saved, expected):",
        }.items()
        if report.get(key)
    ]
    if problems:
        raise ValueError(f"{folder}: the weights do not fit config.json; {'; '.join(problems)}")
    return model.eval(), AutoProcessor.from_pretrained(folder, local_files_only=True)


def _config(folder: Path) -> LynxConfig:
    try:
        model_type = json.loads((folder / "config.json").read_text()).get("model_type")
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'} is not JSON: {error}") from error
    if model_type != LynxConfig.model_type:
        raise ValueError(f"{folder} holds a model of model_type {model_type!r}, expected {LynxConfig.model_type!r}")
    return LynxConfig.from_pretrained(folder)
