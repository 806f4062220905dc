"""Prompts: how the questions of a task are put, drawn anew for every sample (arXiv 2307.02469, section 2.3)."""

import json
import zlib
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Self

import numpy as np

from lynx import yaml_text
from lynx.data.records import Messages, Record, RecordError
from lynx.media.regular import refuse_other_than_file

_QUESTION = "{question}"


class Prompts:
    """Several prompts for each task.

    A prompt with ``{question}`` in it puts a record's question; the others ask where a record has no question. One of
    those that fit is drawn for a conversation. Anything else in a prompt stands for itself.

    Args:
        tasks: the prompts of each task, by its name.

    Raises:
        ValueError: a task has no prompts, one of them is not text or is empty, or names the question twice.
    """

    def __init__(self, tasks: Mapping[str, Sequence[str]]):
        if not isinstance(tasks, Mapping):
            raise ValueError(f"prompts must be a mapping from tasks to lists of prompts, got {type(tasks).__name__}")
        for task, prompts in tasks.items():
            if not isinstance(prompts, list | tuple) or not prompts:
                raise ValueError(f"prompts of task {task!r}: {prompts!r}, expected a list of at least one")
            for prompt in prompts:
                if not isinstance(prompt, str) or not prompt.strip():
                    raise ValueError(f"prompts of task {task!r}: {prompt!r} is not text, or is empty")
                if prompt.count(_QUESTION) > 1:
                    raise ValueError(f"prompts of task {task!r}: {prompt!r} has {_QUESTION} more than once")
        self.tasks = {task: tuple(prompts) for task, prompts in tasks.items()}

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """From a YAML or JSON file: a mapping from tasks to lists of prompts."""
        path = Path(path)
        refuse_other_than_file(path)
        try:
            return cls._of(path.read_text(encoding="utf-8"), is_json=path.suffix == ".json")
        except (ValueError, RecursionError) as error:  # of JSON's nesting
            raise ValueError(f"{path}: {error}") from error

    @classmethod
    def default(cls) -> Self:
        """The prompts that come with this package, for the tasks of the paper's data."""
        return cls._of(resources.files("lynx.data").joinpath("prompts.yaml").read_text(encoding="utf-8"))

    @classmethod
    def _of(cls, text: str, *, is_json: bool = False) -> Self:
        return cls(json.loads(text) if is_json else yaml_text.read(text))

    @property
    def fingerprint(self) -> str:
        """Tells these prompts from others."""
        return f"{zlib.crc32(repr(sorted(self.tasks.items())).encode()):08x}"

    def phrase(self, record: Record, generator: np.random.Generator) -> list[Messages]:
        """The record's conversations; prompts are drawn and put its questions, answers are drawn from their choices.

        Prompts open conversations: what continues another one is left as it is.

        Raises:
            RecordError: the task is unknown, or none of its prompts fits a question.
        """
        parents = record.parents or (-1,) * len(record.conversations)
        return [
            self._conversation(messages, record.task if parent < 0 else None, generator)
            for messages, parent in zip(record.conversations, parents, strict=True)
        ]

    def _conversation(self, messages: Messages, task: str | None, generator: np.random.Generator) -> Messages:
        prompt = None if task is None else self._draw(task, _has_text(messages[0]), generator)
        phrased = []
        for turn, message in enumerate(messages):
            if "choices" in message:
                choices = message["choices"]
                message = {"role": message["role"], "content": choices[generator.integers(len(choices))]}
            elif message["role"] == "user" and prompt is not None and (turn == 0 or _QUESTION in prompt):
                message = {**message, "content": _put(message["content"], prompt)}
            phrased.append(message)
        return phrased

    def _draw(self, task: str, has_question: bool, generator: np.random.Generator) -> str:
        if task not in self.tasks:
            raise RecordError(f"there are no prompts for task {task!r}; there are some for {sorted(self.tasks)}")
        fitting = [prompt for prompt in self.tasks[task] if (_QUESTION in prompt) == has_question]
        if not fitting:
            lacks = "with {question}, and this record has one" if has_question else "for a record without a question"
            raise RecordError(f"task {task!r} has no prompt {lacks}")
        return fitting[generator.integers(len(fitting))]


def _parts(content: Any) -> list[dict[str, Any]]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else list(content)


def _has_text(message: dict[str, Any]) -> bool:
    return any(part["type"] == "text" and part["text"].strip() for part in _parts(message["content"]))


def _put(content: Any, prompt: str) -> list[dict[str, Any]]:
    """The content with the prompt around its text; where media stand between its words, they stay there."""
    parts = _parts(content)
    if _QUESTION not in prompt:
        return [*(part for part in parts if part["type"] != "text"), {"type": "text", "text": prompt}]
    places = [place for place, part in enumerate(parts) if part["type"] == "text" and part["text"].strip()]
    if not places:  # a later turn that says nothing; the processor names it
        return parts
    before, after = prompt.split(_QUESTION)
    first, last = places[0], places[-1]
    parts[first] = {"type": "text", "text": before + parts[first]["text"].lstrip()}
    parts[last] = {"type": "text", "text": parts[last]["text"].rstrip() + after}
    return parts
