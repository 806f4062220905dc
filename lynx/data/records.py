"""Records to train on: what every source makes of a line or a row, and the checks on the way.

A record is one or several conversations about the same images, videos or neither. It is written in one of two ways.
In transformers' messages format, images by path inside a root folder, or in base64, bare or as a data URL:

    {"messages": [{"role": "user", "content": [{"type": "image", "path": "cat.png"},
                                               {"type": "text", "text": "What is this?"}]},
                  {"role": "assistant", "content": "A cat."}]}
    {"media": [{"type": "image", "path": "cat.png"}], "branches": [[{"role": "user", ...}, ...], ...]}

A video is ``{"type": "video", "path": "clip.mp4"}``, or has a list of images there, its frames. Or as an annotation,
the format of Lynx's released evaluation files:

    {"image": "cat.png", "question": "What is this?", "answer": ["a cat", "cat"]}
    {"video": "clip.mp4", "questions": [{"question": "Who?", "answer": "a cat"}, ...]}

The image of an annotation may be base64 as well, or a JSON file that holds base64; a list of base64 is a video's
frames. Of several right answers one is drawn each time. Where a task's prompts ask, the question may be missing. A
record's own ``task`` goes before that of its source.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image

from lynx.media.images import ImageError, decode_base64, load_image
from lynx.media.videos import is_video_file, load_video

Messages = list[dict[str, Any]]

MAX_RECORD = 2**26  # bytes of a line: a file of another kind may have no line ends at all
_MAX_STORED = 2**29  # bytes of a JSON file of frames that a record names


class RecordError(ValueError):
    """A record cannot be used; the message says why."""


@dataclass(frozen=True)
class Record:
    """One or several conversations about the same media.

    Attributes:
        conversations: messages as ``LynxProcessor.encode`` takes them, paths checked; the media stand in the first.
            Instead of ``content`` an answer may have ``choices``, right answers of which one is to be drawn. A
            question may be empty, for a prompt to ask.
        task: the name of the prompts that put its questions; None leaves them as they are.
    """

    conversations: list[Messages]
    task: str | None = None


class MediaFolder:
    """The folder that the paths of images and videos are relative to, and that they may not leave.

    Args:
        root: the folder. None where records hold their images themselves: every path is refused.
        check: decode every image, and a frame of every video, when it is first named.
    """

    def __init__(self, root: str | Path | None, *, check: bool = False):
        self._named = None if root is None else Path(root)
        self.root = None if root is None else Path(root).resolve()
        self._check, self._checked = check, set[tuple[Path, bool]]()

    def messages(self, messages: Any) -> Messages:
        """Messages with their media resolved.

        Raises:
            RecordError: they are not messages of user and assistant in turn, or a part of them cannot be used.
        """
        if not isinstance(messages, list):
            raise RecordError(f"messages must be a list, got {type(messages).__name__}")
        roles = [message.get("role") if isinstance(message, dict) else None for message in messages]
        if not roles or roles != ["user", "assistant"] * (len(roles) // 2):
            raise RecordError(f"roles are {roles}, expected user and assistant in turn, ending with assistant")
        return [{**message, "content": self._content(message)} for message in messages]

    def _content(self, message: dict[str, Any]) -> str | list[dict[str, Any]]:
        content = message.get("content")
        return content if isinstance(content, str) else self.parts(content)

    def parts(self, content: Any) -> list[dict[str, Any]]:
        """Content parts with their media resolved; RecordError as in ``messages``."""
        if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
            raise RecordError(f"content is neither text nor a list of parts: {content!r}")
        return [self._part(part) for part in content]

    def _part(self, part: dict[str, Any]) -> dict[str, Any]:
        kind, path = part.get("type"), part.get("path")
        if kind == "text" and isinstance(part.get("text"), str):
            return part
        if kind == "image" and part.get("base64") is not None:  # rows of a table have every key, None where it lacks
            return {"type": "image", "image": self.decode(part["base64"])}
        if kind == "image":
            return {"type": "image", "image": self.resolve(path)}
        if kind == "video" and isinstance(path, list):
            return {"type": "video", "video": [self.resolve(frame) for frame in path]}
        if kind == "video":
            return {"type": "video", "video": self.resolve(path, is_video=True)}
        raise RecordError(f"a content part is not a text, an image or a video: {part}")

    def decode(self, text: Any) -> bytes:
        """The bytes of an image in base64; RecordError where it is not base64."""
        data = decode_base64(text) if isinstance(text, str) else None
        if data is None:
            raise RecordError("an image in base64 is not valid base64")
        if self._check:
            _check(data)
        return data

    def resolve(self, path: Any, *, is_video: bool = False) -> str:
        """The path of a file inside the root, links followed; absolute only if the root was named so.

        Raises:
            RecordError: it leaves the root or is not a file, or it cannot be decoded where files are checked.
        """
        kind = "video" if is_video else "image"
        if not isinstance(path, str) or not path:
            raise RecordError(f"the path of an image or a video is {path!r}, expected text")
        if self.root is None or self._named is None:
            raise RecordError(f"the path {path!r} needs a root folder that it is in; name one with root=FOLDER")
        try:
            resolved = (self.root / path).resolve()
            is_file = resolved.is_file()
        except (OSError, ValueError, RuntimeError) as error:  # too long a name, a NUL in it, links in a circle
            raise RecordError(f"the path {path!r} cannot be followed: {error}") from error
        if not resolved.is_relative_to(self.root):
            raise RecordError(f"the path {path!r} leaves the root folder {self._named}")
        inside = self._named / resolved.relative_to(self.root)  # as the root was named: reports then move with a run
        if not is_file:
            raise RecordError(f"no such {kind}: {inside}")
        if self._check and (resolved, is_video) not in self._checked:
            _check(inside, is_video=is_video)
            self._checked.add((resolved, is_video))
        return str(inside)


def _check(source: Path | bytes, *, is_video: bool = False) -> None:
    try:
        if is_video:
            load_video(source, 1)
        else:
            load_image(source)
    except ImageError as error:
        raise RecordError(str(error)) from error


def check_length(size: int, limit: int | None = None) -> None:
    """Raise RecordError for more bytes than a record may have, ``MAX_RECORD``, or another limit; before reading."""
    limit = MAX_RECORD if limit is None else limit
    if size > limit:
        raise RecordError(f"the record has {size} bytes, more than {limit}, the most that is read as one record")


def lines_of(file: BinaryIO) -> Iterator[tuple[bytes, int]]:
    """The lines of a file and their lengths in bytes; of a line longer than ``MAX_RECORD`` only the beginning."""
    while line := file.readline(MAX_RECORD + 1):
        size, rest = len(line), line
        while len(rest) > MAX_RECORD and not rest.endswith(b"\n"):
            rest = file.readline(MAX_RECORD + 1)
            size += len(rest)
        yield line, size


def parse_line(line: bytes) -> dict[str, Any]:
    """The JSON object on a line; RecordError where there is another thing."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:  # of the syntax, the encoding, or the nesting
        raise RecordError(f"not JSON: {error}") from error
    if not isinstance(record, dict):
        raise RecordError(f"the line must be a JSON object, got {type(record).__name__}")
    return record


def parse(record: Mapping[str, Any], folder: MediaFolder, *, task: str | None = None) -> Record:
    """A record in either format.

    Args:
        record: as the head of this file shows. Media may also be bytes, PIL images or the dicts of ``datasets``.
        folder: where its media are.
        task: that of its source.

    Raises:
        RecordError: it cannot be used.
    """
    task = record.get("task", task)
    if task is not None and not isinstance(task, str):
        raise RecordError(f"task is {task!r}, expected a name")
    if "messages" in record:
        return Record([folder.messages(record["messages"])], task)
    if "branches" in record:
        branches = record["branches"]
        if not isinstance(branches, list) or not branches:
            raise RecordError("branches is not a list of conversations, or is empty")
        return Record(_about(folder.parts(record.get("media", [])), [folder.messages(each) for each in branches]), task)
    pairs = record.get("questions", [record])
    if not isinstance(pairs, list) or not pairs or not all(isinstance(pair, Mapping) for pair in pairs):
        raise RecordError("questions is not a list of questions with answers, or is empty")
    if not all("answer" in pair for pair in pairs):
        raise RecordError("a record needs messages, branches, or a question with an answer; this one has no answer")
    media: list[dict[str, Any]] = []
    if record.get("image") is not None:
        media.append(_image(record["image"], folder))
    if record.get("video") is not None:
        media.append(_video(record["video"], folder))
    return Record(_about(media, [_pair(pair) for pair in pairs]), task)


def _about(media: list[dict[str, Any]], conversations: list[Messages]) -> list[Messages]:
    """The conversations, the media before the first question."""
    if media:
        (question, *rest), *others = conversations
        content = question["content"]
        text = [{"type": "text", "text": content}] if isinstance(content, str) else content
        conversations = [[{**question, "content": [*media, *text]}, *rest], *others]
    return conversations


def _pair(pair: Mapping[str, Any]) -> Messages:
    question, answer = pair.get("question", ""), pair["answer"]
    answers = answer if isinstance(answer, list) else [answer]
    if not isinstance(question, str):
        raise RecordError(f"question is {question!r}, expected text")
    if not answers or not all(isinstance(each, str) and each.strip() for each in answers):
        raise RecordError(f"answer is {answer!r}, expected text or a list of texts, none of them empty")
    return [{"role": "user", "content": question}, {"role": "assistant", "choices": answers}]


def _image(value: Any, folder: MediaFolder) -> dict[str, Any]:
    if isinstance(value, str) and value.endswith(".json"):
        value = _stored(value, folder)
        if isinstance(value, list):
            return _video(value, folder)
    return {"type": "image", "image": _source(value, folder)}


def _video(value: Any, folder: MediaFolder) -> dict[str, Any]:
    if isinstance(value, str) and value.endswith(".json"):
        value = _stored(value, folder)
    if isinstance(value, list):
        return {"type": "video", "video": [_source(frame, folder) for frame in value]}
    return {"type": "video", "video": _source(value, folder, is_video=True)}


def _stored(path: str, folder: MediaFolder) -> Any:
    try:
        file = Path(folder.resolve(path))
        check_length(file.stat().st_size, _MAX_STORED)
        return json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise error if isinstance(error, RecordError) else RecordError(f"{path}: not JSON: {error}") from error


def _source(value: Any, folder: MediaFolder, *, is_video: bool = False) -> str | bytes | Image.Image:
    """What ``load_image`` or ``load_video`` reads."""
    if isinstance(value, Mapping):  # as datasets holds what it has not decoded
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes | Image.Image):
        return value
    looks_like_data = isinstance(value, str) and not is_video_file(value) and decode_base64(value) is not None
    if not looks_like_data:
        return folder.resolve(value, is_video=is_video)
    try:
        return folder.resolve(value, is_video=is_video)  # a name such as "cat1" might be base64, too
    except RecordError:
        return folder.decode(value)


def text_of(message: dict[str, Any]) -> str:
    """The text of a message, its images and videos left out."""
    content = message["content"]
    return content if isinstance(content, str) else "".join(p["text"] for p in content if p["type"] == "text")
