"""Records to train on, whatever shape they were written in, and what is wrong with those that cannot be used.

``lynx.data.shapes`` makes a ``Record`` of a mapping.
"""

import json
from dataclasses import dataclass
from typing import Any

Messages = list[dict[str, Any]]

MAX_RECORD = 2**26  # bytes of one: a file of another kind may have no line ends at all


class RecordError(ValueError):
    """A record cannot be used; the message says why."""


@dataclass(frozen=True)
class Record:
    """One or several conversations about the same images, videos or neither.

    Attributes:
        conversations: messages as ``LynxProcessor.encode`` takes them, paths checked; the media stand in the first.
            Instead of ``content`` an answer may have ``choices``, right answers of which one is to be drawn. A
            question may be empty, for a prompt to ask.
        parents: for each conversation the earlier one that it continues, -1 for none; empty where none does.
        task: the name of the prompts that put its questions; None leaves them as they are.
        kind: the group that its answers are counted in: its ``type``, or its ``class`` as in Open-VQA, or "all".
    """

    conversations: list[Messages]
    task: str | None = None
    kind: str = "all"
    parents: tuple[int, ...] = ()


def check_length(size: int, limit: int | None = None) -> None:
    """Raise RecordError for more bytes than a record may have, ``MAX_RECORD``, or another limit; before reading."""
    limit = MAX_RECORD if limit is None else limit
    if size > limit:
        raise RecordError(f"the record has {size} bytes, more than {limit}, the most that is read as one record")


def parse_line(line: bytes) -> dict[str, Any]:
    """The JSON object on a line, or in any other bytes; RecordError where there is another thing."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:  # of the syntax, the encoding, or the nesting
        raise RecordError(f"not JSON: {error}") from error
    if not isinstance(record, dict):
        raise RecordError(f"a record must be a JSON object, got {type(record).__name__}")
    return record


def text_of(message: dict[str, Any]) -> str:
    """The text of a message, its images and videos left out."""
    content = message["content"]
    return content if isinstance(content, str) else "".join(p["text"] for p in content if p["type"] == "text")
