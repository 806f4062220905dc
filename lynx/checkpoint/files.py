"""Weights in files: torch's, read without running anything in them, and safetensors, one file or many."""

import json
import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

_IN_FOLDERS = (
    "model.safetensors.index.json", "model.safetensors", "pytorch_model.bin.index.json", "pytorch_model.bin",
)  # fmt: skip


def read(path: str | Path) -> dict[str, Any]:
    """What a checkpoint holds, its tensors mapped from the file, so that memory is not spent until they are used.

    Args:
        path: a safetensors file (by its name), any other of ``torch.save``, or a folder of transformers with one of
            them or with shards and their index.

    Raises:
        FileNotFoundError: no such file or folder, or no weights in the folder.
        ValueError: a file cannot be read, is truncated, holds something else than a dict, or more than tensors and
            plain values: such a pickle could run code and is refused.
    """
    path = Path(path)
    if path.is_dir():
        return _read_folder(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file or folder of weights")
    if path.suffix == ".safetensors":
        try:
            return dict(load_file(path))
        except SafetensorError as error:
            raise ValueError(f"{path} cannot be read, truncated perhaps: {error}") from error
    with path.open("rb") as file:
        is_zip = file.read(2) == b"PK"  # what torch.save wrote before 1.6 is no archive and cannot be mapped
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is refused: it is no checkpoint, or holds more than tensors and plain values, so that reading it "
            "could run code. If you trust where it is from, save its tensors alone in a file of their own. "
            f"({_first_line(error)})"
        ) from error
    except OSError:
        raise
    except Exception as error:  # of a damaged file torch's unpickler raises almost anything
        raise ValueError(f"{path} cannot be read, truncated perhaps: {_first_line(error)}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected a dict of tensors")
    return content


def _read_folder(folder: Path) -> dict[str, Any]:
    found = next((folder / name for name in _IN_FOLDERS if (folder / name).is_file()), None)
    if found is None:
        raise FileNotFoundError(f"{folder} has no weights: none of {', '.join(_IN_FOLDERS)}")
    if found.suffix != ".json":
        return read(found)
    try:
        shards = sorted(set(json.loads(found.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{found} is no index of shards, truncated perhaps: {error}") from error
    content: dict[str, Any] = {}
    for shard in shards:
        if Path(shard).name != shard or not (folder / shard).is_file():
            raise FileNotFoundError(f"{found} names {shard}, which is no file of the folder")
        content.update(read(folder / shard))
    return content


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
