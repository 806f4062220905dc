"""Questions whose answers are known, from any data that is trained on too, Open-VQA's annotations included."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lynx.data.records import Messages, Record, RecordError, text_of
from lynx.data.source import open_source

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Question:
    """A question to ask.

    Attributes:
        messages: the conversation that ends with it, as ``LynxProcessor.encode`` takes it.
        truths: right answers; to give one of them is enough.
        kind: the group it is counted in: the record's ``type``, or its ``class`` as in Open-VQA, or "all".
    """

    messages: Messages
    truths: list[str]
    kind: str = "all"

    @property
    def text(self) -> str:
        """The question itself, without images and earlier rounds."""
        return text_of(self.messages[-1])


def read(
    path: str | Path, root: str | Path | None = None, *, encode: Callable[[Messages], Any] | None = None
) -> tuple[list[Question], list[str]]:
    """The last question of every conversation, and where and why records cannot be used, which is logged too.

    All images, and a frame of every video, are decoded once: what is missing or damaged is known before the first
    question is asked.

    Args:
        path: the data, as of ``lynx.data.source.open_source``.
        root: the folder that the paths of media are relative to and may not leave; the file's own by default.
        encode: the ``encode`` of a ``LynxProcessor``, for example; a record that it refuses is skipped too.

    Returns:
        The questions; and for each record that was skipped its file, line and reason.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: none of its records can be used, or it is not data.
        ModuleNotFoundError: it names a video, and PyAV is not installed; or as of ``open_source``.
    """
    path = Path(path)
    source = open_source(path, root=None if root is None else Path(root), check=True)
    questions: list[Question] = []
    skipped: list[str] = []
    for index in tqdm(range(len(source)), desc=f"reading {path.name}", unit="record", delay=2):
        try:
            found = _questions(source[index])
            if encode is not None:
                for each in found:
                    encode(each.messages)
        except (ValueError, OSError) as error:  # a RecordError, or what encode says
            skipped.append(f"{source.where(index)}: {error}")
        else:
            questions += found
    if not questions:
        first = f"; the first one: {skipped[0]}" if skipped else ""
        raise ValueError(f"{path}: none of its {len(skipped)} records can be used{first}")
    for reason in skipped:
        logger.warning("record skipped: %s", reason)
    return questions, skipped


def _questions(record: Record) -> list[Question]:
    if any(parent >= 0 for parent in record.parents):
        raise RecordError("its conversations continue each other; to evaluate, write each in full")
    first, *others = record.conversations
    content = first[0]["content"]
    media = [part for part in content if part["type"] != "text"] if isinstance(content, list) else []
    found = []
    for *messages, answer in (first, *(_about(media, other) for other in others)):
        if not text_of(messages[-1]).strip():
            raise RecordError("the question is empty")
        found.append(Question(messages, answer["choices"] if "choices" in answer else [text_of(answer)], record.kind))
    return found


def _about(media: list[dict[str, Any]], conversation: Messages) -> Messages:
    """A conversation with the media that stand in the first one of its record."""
    question, *rest = conversation
    content = question["content"]
    text = [{"type": "text", "text": content}] if isinstance(content, str) else content
    return [{**question, "content": [*media, *text]}, *rest]
