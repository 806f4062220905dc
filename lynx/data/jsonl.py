"""Training records in a JSONL file: one conversation a line, pictures by path inside a root folder.

    {"messages": [{"role": "user", "content": [{"type": "image", "path": "cat.png"},
                                               {"type": "text", "text": "What is this?"}]},
                  {"role": "assistant", "content": "A cat."}]}

A video is ``{"type": "video", "path": "clip.mp4"}``, or has a list of pictures there, its frames. A picture may also
stand in the record itself: ``{"type": "image", "base64": ...}``, bare or as a data URL. A record's ``type`` names the
group its answers are counted in; any other field is kept and ignored.
"""

import json
import logging
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset
from tqdm import tqdm

from lynx.images import ImageError, decode_base64, load_image
from lynx.videos import load_video

logger = logging.getLogger(__name__)


class RecordError(ValueError):
    """A record cannot be used; the message says which and why."""


class JsonlDataset(Dataset):
    """The usable records of a JSONL file, pictures as paths.

    Records that cannot be used are left out, each logged with its line and reason; ``skipped`` keeps them.

    Args:
        path: the JSONL file.
        root: the folder that picture paths are relative to and may not leave; the file's own folder by default.
        check_pictures: decode every picture, and a frame of every video file, once now, so that broken ones are known
            with their lines before a run starts. False for data sets too large for that.

    Attributes:
        records: the usable records, ``image`` and ``video`` parts holding absolute paths, or the bytes of base64.
        skipped: ``(line number, reason)`` of the others.

    Raises:
        FileNotFoundError: there is no such file.
        RecordError: no record in it is usable.
        ModuleNotFoundError: a video is to be checked, and PyAV is not installed.
    """

    def __init__(self, path: str | Path, root: str | Path | None = None, *, check_pictures: bool = True):
        self.path = Path(path)
        self._check_pictures, self._checked = check_pictures, set[tuple[Path, bool]]()
        self.root = Path(root if root is not None else self.path.parent).resolve()
        self.records: list[dict[str, Any]] = []
        self.skipped: list[tuple[int, str]] = []
        with self.path.open("rb") as file:
            for number, line in enumerate(tqdm(file, desc=f"reading {self.path.name}", unit="record"), start=1):
                if not line.strip():
                    continue
                try:
                    self.records.append(self._read(line))
                except RecordError as error:
                    self.skipped.append((number, str(error)))
                    logger.warning("%s:%d: record skipped: %s", self.path, number, error)
        if self.skipped:
            logger.warning(
                "%s: %d of %d records skipped", self.path, len(self.skipped), len(self.skipped) + len(self.records)
            )
        if not self.records:
            raise RecordError(f"{self.path} holds no usable record ({len(self.skipped)} skipped)")

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.records[index]

    def _read(self, line: bytes) -> dict[str, Any]:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:  # of the syntax, the encoding, or the nesting
            raise RecordError(f"not JSON: {error}") from error
        if not isinstance(record, dict) or not isinstance(record.get("messages"), list):
            raise RecordError("no list of messages")
        messages = record["messages"]
        roles = [message.get("role") if isinstance(message, dict) else None for message in messages]
        if not roles or roles != ["user", "assistant"] * (len(roles) // 2):
            raise RecordError(f"roles are {roles}, expected user and assistant in turn, ending with assistant")
        return {**record, "messages": [{**message, "content": self._content(message)} for message in messages]}

    def _content(self, message: dict[str, Any]) -> str | list[dict[str, Any]]:
        content = message.get("content")
        if isinstance(content, str):
            return content
        if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
            raise RecordError(f"content is neither text nor a list of parts: {content!r}")
        return [self._part(part) for part in content]

    def _part(self, part: dict[str, Any]) -> dict[str, Any]:
        kind, path = part.get("type"), part.get("path")
        if kind == "text" and isinstance(part.get("text"), str):
            return part
        if kind == "image" and "base64" in part:
            return {"type": "image", "image": self._decode(part["base64"])}
        if kind == "image":
            return {"type": "image", "image": self._resolve(path)}
        if kind == "video" and isinstance(path, list):
            return {"type": "video", "video": [self._resolve(frame) for frame in path]}
        if kind == "video":
            return {"type": "video", "video": self._resolve(path, is_video=True)}
        raise RecordError(f"a content part is no text, image or video: {part}")

    def _decode(self, text: Any) -> bytes:
        data = decode_base64(text) if isinstance(text, str) else None
        if data is None:
            raise RecordError("a picture's base64 is none")
        if self._check_pictures:
            _check(data)
        return data

    def _resolve(self, path: Any, *, is_video: bool = False) -> str:
        if not isinstance(path, str) or not path:
            raise RecordError(f"a picture's path is missing or no text: {path!r}")
        try:
            resolved = (self.root / path).resolve()
            is_file = resolved.is_file()
        except (OSError, ValueError, RuntimeError) as error:  # too long a name, a NUL in it, links in a circle
            raise RecordError(f"the path {path!r} cannot be followed: {error}") from error
        if not resolved.is_relative_to(self.root):
            raise RecordError(f"the path {path!r} leaves the root folder {self.root}")
        if not is_file:
            raise RecordError(f"no such {'video' if is_video else 'picture'}: {resolved}")
        if self._check_pictures and (resolved, is_video) not in self._checked:
            _check(resolved, is_video=is_video)
            self._checked.add((resolved, is_video))
        return str(resolved)


def _check(source: Path | bytes, *, is_video: bool = False) -> None:
    try:
        if is_video:
            load_video(source, 1)
        else:
            load_image(source)
    except ImageError as error:
        raise RecordError(str(error)) from error


def text_of(message: dict[str, Any]) -> str:
    """The text of a message, its pictures left out."""
    content = message["content"]
    return content if isinstance(content, str) else "".join(p["text"] for p in content if p["type"] == "text")
