"""Weights in files: torch's, read without running anything in them, and safetensors, one file or many."""

import json
import pickle
import re
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
        named = re.search(r"GLOBAL (\S+)", str(error))  # the rest of torch's message advises to read it unsafely
        raise ValueError(
            f"{path} is refused: it is no checkpoint, or holds more than tensors and plain values, so that reading it "
            "could run code. If you trust where it is from, save its tensors alone in a file of their own."
            + (f" (It asks for {named[1]}.)" if named else "")
        ) from error
    except OSError:
        raise
    except Exception as error:  # of a damaged file torch's unpickler raises almost anything
        first_line, *_ = str(error).splitlines() or [""]  # those after it trace torch's C++
        raise ValueError(f"{path} cannot be read, truncated perhaps: {type(error).__name__} {first_line}") from error
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
        index = json.loads(found.read_text())
    except ValueError as error:
        raise ValueError(f"{found} is no index of shards, truncated perhaps: {error}") from error
    content: dict[str, Any] = {}
    for shard in shards(found, index):
        content.update(read(shard))
    return content


def shards(path: Path, index: Any) -> list[Path]:
    """The files that an index of shards, the JSON of ``path``, names.

    Raises:
        ValueError: it is no such index.
        FileNotFoundError: one of them is missing, or outside the index's folder.
    """
    names = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise ValueError(f"{path} is no index of shards: it has no weight_map from weights to names of files")
    for name in names.values():
        if Path(name).name != name or not (path.parent / name).is_file():
            raise FileNotFoundError(f"{path} names {name}, which is no file of the folder")
    return sorted({path.parent / name for name in names.values()})
