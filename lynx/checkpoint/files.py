"""Weights in files, one or several: safetensors, and torch's, which are read without running code in them."""

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
FLOATING = ("F64", "F32", "F16", "BF16")  # safetensors' names of the dtypes of weights


def read(path: str | Path) -> dict[str, Any]:
    """The content of a checkpoint. Its tensors are mapped from the file and need no memory until they are used.

    Args:
        path: a file with the suffix .safetensors, any other file that ``torch.save`` wrote, or a folder of transformers
            with one such file or with shards and their index.

    Raises:
        FileNotFoundError: the file or folder is missing, or the folder has no weights.
        ValueError: a file cannot be read, is truncated, or does not hold a dict; or it holds more than tensors and
            plain values, and reading such a pickle could run code.
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
            raise ValueError(f"{path} cannot be read; it may be truncated: {error}") from error
    with path.open("rb") as file:
        is_zip = file.read(2) == b"PK"  # what torch.save wrote before 1.6 is not an archive and cannot be mapped
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))  # the rest of torch's message advises reading it unsafely
        raise ValueError(
            f"{path} is refused: it is not a checkpoint, or holds more than tensors and plain values, so reading it "
            "could run code. If you trust its source, load it with torch and save only its tensors to a new file."
            + (f" (It asks for {named[1]}.)" if named else "")
        ) from error
    except OSError:
        raise
    except Exception as error:  # torch's unpickler raises almost anything for a damaged file
        first_line, *_ = str(error).splitlines() or [""]  # the other lines trace torch's C++
        raise ValueError(f"{path} cannot be read; it may be truncated: {type(error).__name__} {first_line}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected a dict of tensors")
    return content


def _read_folder(folder: Path) -> dict[str, Any]:
    found = next((folder / name for name in _IN_FOLDERS if (folder / name).is_file()), None)
    if found is None:
        raise FileNotFoundError(f"{folder} has no weights; expected one of {', '.join(_IN_FOLDERS)}")
    if found.suffix != ".json":
        return read(found)
    try:
        index = json.loads(found.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{found} is not an index of shards; it may be truncated: {error}") from error
    content: dict[str, Any] = {}
    for shard in shards(found, index):
        content.update(read(shard))
    return content


def shards(path: Path, index: Any) -> list[Path]:
    """The files that an index of shards, the JSON of ``path``, names.

    Raises:
        ValueError: the content is not an index of shards.
        FileNotFoundError: one of the files is missing, or outside the folder of the index.
    """
    names = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise ValueError(f"{path} is not an index of shards: it has no weight_map from weights to names of files")
    for name in names.values():
        if Path(name).name != name or not (path.parent / name).is_file():
            raise FileNotFoundError(f"{path} names {name}, which is not a file in the folder")
    return sorted({path.parent / name for name in names.values()})
