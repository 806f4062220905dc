"""Conversations in the spellings that people have, as ours: who speaks, what content is, and where media stand in it.

A message has ``role`` and ``content``, or ``from`` and ``value``. Content is text, or a list of parts: texts, images,
videos. A part that names no image is a place for one; so is the mark ``<image>`` in a text. Images that a record names
beside its messages go to these places in their order; where there is none, before the first question. So do videos.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from lynx.data.media_folder import MediaFolder
from lynx.data.records import Messages, RecordError
from lynx.media.images import decode_base64

Part = dict[str, Any]

_ROLES = {
    "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant",
    "system": "system",
}  # fmt: skip
_TEXTS = ("text", "input_text", "output_text")
_KINDS = {"image": "image", "image_url": "image", "input_image": "image", "video": "video", "video_url": "video",
          "input_video": "video"}  # fmt: skip
_MARKS = {"image": "<image>", "video": "<video>"}
# Where a part may name its image or video. Rows of a table have every key, None where it lacks.
_SOURCES = ("base64", "path", "image", "image_url", "video", "video_url", "url", "bytes")


def messages_of(turns: Any, folder: MediaFolder, *, after: str = "assistant", goes_on: bool = False) -> Messages:
    """Messages of user and assistant in turn, the media that they name resolved; what the system says comes first.

    ``after`` is who spoke last before them, where they continue others. They end with the assistant, unless others
    continue them (``goes_on``).

    A part in which no image or video is named stays as a place for one, ``{"type": "image"}``.

    Raises:
        RecordError: they are not messages as above, do not take turns, or a part of them cannot be used.
    """
    if not isinstance(turns, Sequence) or isinstance(turns, str):
        raise RecordError(f"messages must be a list, got {type(turns).__name__}")
    messages = [_message(turn, folder) for turn in turns]
    system = messages.pop(0)["content"] if messages and messages[0]["role"] == "system" else ""
    roles = [message["role"] for message in messages]
    turn = ["user", "assistant"] if after == "assistant" else ["assistant", "user"]
    if not roles or roles != (turn * len(roles))[: len(roles)] or not (goes_on or roles[-1] == "assistant"):
        raise RecordError(
            f"roles are {roles}, expected {' and '.join(turn)} in turn, ending with assistant; a system's message may "
            "come before them"
        )
    if system:
        if not isinstance(system, str):
            system = "".join(part.get("text", "") for part in system)
        messages[0]["content"] = _with([{"type": "text", "text": f"{system.strip()}\n"}], messages[0]["content"])
    return messages


def _message(turn: Any, folder: MediaFolder) -> dict[str, Any]:
    if not isinstance(turn, Mapping):
        raise RecordError(f"a message must be a mapping with role and content, got {type(turn).__name__}")
    role, content = (_first(turn, keys) for keys in (("role", "from"), ("content", "value")))
    if role not in _ROLES:
        raise RecordError(f"a message is of {role!r}; known are {', '.join(_ROLES)}")
    if turn.get("tool_calls"):
        raise RecordError("a message calls tools, which the model does not learn here")
    return {"role": _ROLES[role], "content": content if isinstance(content, str) else parts_of(content, folder)}


def parts_of(content: Any, folder: MediaFolder) -> list[Part]:
    """Content parts, their media resolved; RecordError as in ``messages_of``."""
    if not isinstance(content, Sequence) or not all(isinstance(part, Mapping) for part in content):
        raise RecordError(f"content is neither text nor a list of parts: {content!r}")
    return [_part(part, folder) for part in content]


def _part(part: Mapping[str, Any], folder: MediaFolder) -> Part:
    kind = part.get("type")
    if kind in _TEXTS and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    if kind not in _KINDS:
        raise RecordError(f"a content part is not a text, an image or a video: {part}")
    kind = _KINDS[kind]
    value = _first(part, _SOURCES)
    if value is None:
        return {"type": kind, "index": part.get("index")}
    if part.get("base64") is not None:
        value = decode_base64(value) if isinstance(value, str) else None
        if value is None:
            raise RecordError(f"a part of the type {kind} is not valid base64")
    is_path = part.get("path") is not None
    return {"type": kind, kind: folder.source(value, is_video=kind == "video", is_path=is_path)}


def _first(mapping: Mapping[str, Any], keys: Sequence[str]) -> Any:
    return next((mapping[key] for key in keys if mapping.get(key) is not None), None)


def names_media(turns: Any) -> bool:
    """Whether a part of these messages, not yet read, says which image or video it is."""
    contents = [turn.get("content") for turn in turns if isinstance(turn, Mapping)] if isinstance(turns, list) else []
    parts = [part for content in contents if isinstance(content, list) for part in content]
    return any(isinstance(part, Mapping) and _first(part, _SOURCES) is not None for part in parts)


def place(messages: Messages, media: Sequence[Part]) -> Messages:
    """The messages with these images and videos in their places, or before the first question where there are none.

    Raises:
        RecordError: there are more places than media, or fewer.
    """
    for kind, mark in _MARKS.items():
        given = [part for part in media if part["type"] == kind]
        if given and not _places(messages, kind):
            messages = _changed(messages, partial(_at_marks, kind=kind, mark=mark))
        places = _places(messages, kind)
        if not places:
            continue
        numbers = [n if part["index"] is None else part["index"] for n, part in enumerate(places)]
        if {*numbers} != {*range(len(given))}:
            raise RecordError(f"places for {kind}s in its text: {len(places)}; {kind}s that it names: {len(given)}")
        filling = iter([given[number] for number in numbers])
        messages = _changed(messages, partial(_filled, kind=kind, filling=filling))
        media = [part for part in media if part["type"] != kind]
    if media:
        messages = [{**messages[0], "content": _with(media, messages[0]["content"])}, *messages[1:]]
    _refuse_marks(messages)
    return messages


def _changed(messages: Messages, change: Callable[[Any], Any]) -> Messages:
    """The messages, their content changed; answers that are to be drawn have none."""
    return [{**each, "content": change(each["content"])} if "content" in each else each for each in messages]


def _with(parts: Sequence[Part], content: Any) -> list[Part]:
    return [*parts, *([{"type": "text", "text": content}] if isinstance(content, str) else content)]


def _places(messages: Messages, kind: str) -> list[Part]:
    contents = [each.get("content") for each in messages]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    return [part for part in parts if part["type"] == kind and kind not in part]


def _filled(content: Any, kind: str, filling: Iterator[Part]) -> Any:
    if isinstance(content, str):
        return content
    return [next(filling) if part["type"] == kind and kind not in part else part for part in content]


def _at_marks(content: Any, kind: str, mark: str) -> Any:
    """The content with a place for an image or a video where the mark was."""
    if isinstance(content, list):
        return [inner for part in content for inner in (_split(part["text"], kind, mark) if "text" in part else [part])]
    return _split(content, kind, mark) if mark in content else content


def _split(text: str, kind: str, mark: str) -> list[Part]:
    # A mark on a line of its own takes the line with it.
    first, *rest = re.split(rf"(?:(?<=\n)|^){mark}\n|\n{mark}\Z|{mark}", text)
    parts = [{"type": "text", "text": first}]
    for each in rest:
        parts += [{"type": kind, "index": None}, {"type": "text", "text": each}]
    return [part for part in parts if part.get("text") != ""]


def _refuse_marks(messages: Messages) -> None:
    """Raise RecordError where a question begins or ends with a mark: an image was meant, and nothing names it."""
    for message in messages[::2]:
        content = message["content"]
        texts = [content] if isinstance(content, str) else [part["text"] for part in content if part["type"] == "text"]
        for mark in _MARKS.values():
            if any(text.strip().startswith(mark) or text.strip().endswith(mark) for text in texts):
                raise RecordError(f"a question has the mark {mark}, and the record does not name what stands there")
