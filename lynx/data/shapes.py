"""The shapes that records have, and what each becomes. docs/data.md shows one of each.

A record is one or several conversations about the same images, videos or neither. Which shape it has follows from its
keys. Any other key is ignored.
"""

import logging
import multiprocessing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from lynx.data.media_folder import MediaFolder
from lynx.data.messages import Part, messages_of, names_media, parts_of, place
from lynx.data.records import Messages, Record, RecordError

logger = logging.getLogger(__name__)


class Shape(NamedTuple):
    """One way to write a record.

    Attributes:
        name: to call it by.
        keys: of each group of keys a record has one.
        read: makes the conversations of it.
        tasks: of a record that does not ask: whose prompts ask about an image, and about a video.
        parents: gives ``Record.parents``, where conversations may continue each other.
    """

    name: str
    keys: tuple[tuple[str, ...], ...]
    read: Callable[[Mapping[str, Any], MediaFolder], list[Messages]]
    tasks: tuple[str, str] | None = None
    parents: Callable[[Mapping[str, Any]], tuple[int, ...]] | None = None


_IMAGES, _VIDEOS = ("image", "images", "file_name"), ("video", "videos")
_CAPTIONS = ("caption", "text")


def shape_of(record: Mapping[str, Any]) -> Shape:
    """The shape of a record; RecordError where it has none."""
    for shape in SHAPES:
        if all(any(record.get(key) is not None for key in keys) for keys in shape.keys):
            return shape
    raise RecordError(
        "a record needs messages, conversations, branches, a prompt and a completion, a question and an answer, or an "
        f"image and a caption; this one has {'no answer' if 'question' in record else 'none of these'}: its keys are "
        f"{[*record]}"
    )


def parse(record: Mapping[str, Any], folder: MediaFolder, *, task: str | None = None) -> Record:
    """A record in any of the shapes.

    Args:
        record: the mapping. Media may also be bytes, PIL images or the dicts of ``datasets``.
        folder: where its media are.
        task: that of its source; the record's own goes before it.

    Raises:
        RecordError: it cannot be used.
    """
    shape = shape_of(record)
    task = task if record.get("task") is None else record["task"]
    if task is not None and not isinstance(task, str):
        raise RecordError(f"task is {task!r}, expected a name")
    if task is None and shape.tasks is not None:
        task = shape.tasks[any(record.get(key) is not None for key in _VIDEOS)]
    kind = record.get("type", record.get("class", "all"))
    conversations = shape.read(record, folder)
    return Record(conversations, task, str(kind), () if shape.parents is None else shape.parents(record))


class RecordReader:
    """Makes the records of one source. Where one has another shape than the first one, the log says so, once.

    Args:
        folder: where the media are.
        task: of the source.
    """

    def __init__(self, folder: MediaFolder, task: str | None):
        self.folder, self.task = folder, task
        self._first: tuple[str, str] | None = None  # the name of its shape, and where it is
        self._is_told = False

    def read(self, record: Mapping[str, Any], where: Callable[[], str], folder: MediaFolder | None = None) -> Record:
        """A record; RecordError as of ``parse``.

        Args:
            record: the mapping.
            where: says where it stands.
            folder: takes the place of the source's, for this record.
        """
        shape = shape_of(record).name
        if self._first is None:
            self._first = shape, where()
        # Workers read what the main process has read, which has told of it.
        elif shape != self._first[0] and not self._is_told and multiprocessing.parent_process() is None:
            self._is_told = True
            logger.warning(
                "%s: a record with %s, where the first one, %s, has %s; all are read, each by its own keys",
                where(), shape, self._first[1], self._first[0],
            )  # fmt: skip
        return parse(record, folder or self.folder, task=self.task)


def has_media(record: Mapping[str, Any]) -> bool:
    """Whether a record says which images or videos it is about."""
    keys = (*_IMAGES, *_VIDEOS, "media")
    return any(record.get(key) is not None for key in keys) or any(
        names_media(record.get(key)) for key in ("messages", "conversations", "prompt")
    )


def _media(record: Mapping[str, Any], folder: MediaFolder) -> list[Part]:
    """The images and videos that a record names beside its text."""
    found: list[Part] = []
    for keys, read in ((_IMAGES, _images), (_VIDEOS, _videos)):
        given = [key for key in keys if record.get(key) is not None]
        if len(given) > 1:
            raise RecordError(f"it has {' and '.join(given)}; one of them says what it is about")
        if given:
            found += read(given[0], record[given[0]], folder)
    return found


def _images(key: str, value: Any, folder: MediaFolder) -> list[Part]:
    if isinstance(value, str) and value.endswith(".json"):
        value = folder.stored(value)
        if isinstance(value, list):  # the frames of a video
            return _videos("video", value, folder)
    return [{"type": "image", "image": folder.source(each)} for each in (value if isinstance(value, list) else [value])]


def _videos(key: str, value: Any, folder: MediaFolder) -> list[Part]:
    """A list under "video" is the frames of one, under "videos" one video each."""
    videos = value if key == "videos" and isinstance(value, list) else [value]
    found: list[Part] = []
    for each in videos:
        each = folder.stored(each) if isinstance(each, str) and each.endswith(".json") else each
        found.append({"type": "video", "video": folder.source(each, is_video=True)})
    return found


def _messages(record: Mapping[str, Any], folder: MediaFolder) -> list[Messages]:
    turns = record["messages"] if record.get("messages") is not None else record["conversations"]
    return [place(messages_of(turns, folder), _media(record, folder))]


class _Branch(NamedTuple):
    """Messages of a record, and the earlier branch that they continue, -1 for none."""

    turns: Any
    parent: int
    forks: bool


def _walk(branches: Any, parent: int = -1, found: list[_Branch] | None = None) -> list[_Branch]:
    """All branches, depth first: lists of messages, or mappings of messages and the branches that continue them."""
    found = [] if found is None else found
    if not isinstance(branches, list) or not branches:
        raise RecordError("branches is not a list of conversations, or is empty")
    for branch in branches:
        turns, below = branch, None
        if isinstance(branch, Mapping):
            turns, below = branch.get("messages", branch.get("conversations")), branch.get("branches")
            if turns is None:
                raise RecordError(f"a branch needs messages; one has {[*branch]}")
        number = len(found)
        found.append(_Branch(turns, parent, below is not None))
        if below is not None:
            if _depth(found) > _MOST_LEVELS:
                raise RecordError(f"branches nest more than {_MOST_LEVELS} levels deep")
            _walk(below, number, found)
    return found


_MOST_LEVELS = 100


def _depth(branches: list[_Branch]) -> int:
    """The levels above and at the last branch."""
    depth, parent = 1, branches[-1].parent
    while parent >= 0:
        depth, parent = depth + 1, branches[parent].parent
    return depth


def _read(branches: list[_Branch], folder: MediaFolder) -> list[Messages]:
    conversations: list[Messages] = []
    for turns, parent, forks in branches:
        after = conversations[parent][-1]["role"] if parent >= 0 else "assistant"
        conversations.append(messages_of(turns, folder, after=after, goes_on=forks))
    return conversations


def _root(record: Mapping[str, Any]) -> list[Any]:
    """What stands above all branches of a record: its messages, if it has some."""
    has_messages = any(record.get(key) is not None for key in ("messages", "conversations"))
    return [record] if has_messages else record["branches"]


def _parents(record: Mapping[str, Any]) -> tuple[int, ...]:
    return tuple(branch.parent for branch in _walk(_root(record)))


def _forking(record: Mapping[str, Any], folder: MediaFolder) -> list[Messages]:
    return _about(_media(record, folder), _read(_walk(_root(record)), folder))


def _branches(record: Mapping[str, Any], folder: MediaFolder) -> list[Messages]:
    branches = _walk(record["branches"])
    media = parts_of(record["media"], folder) if record.get("media") is not None else _media(record, folder)
    if not all(part["type"] in part for part in media):
        raise RecordError(f"media holds what is not an image or a video, or a part that names none: {record['media']}")
    return _about(media, _read(branches, folder))


def _prompted(record: Mapping[str, Any], folder: MediaFolder) -> list[Messages]:
    prompt, completion = record["prompt"], record["completion"]
    turns: list[Any] = []
    for value, role in ((prompt, "user"), (completion, "assistant")):
        turns += value if isinstance(value, Sequence) and not isinstance(value, str) else [
            {"role": role, "content": value}
        ]  # fmt: skip
    return [place(messages_of(turns, folder), _media(record, folder))]


def _questions(record: Mapping[str, Any], folder: MediaFolder) -> list[Messages]:
    pairs = record["questions"] if record.get("questions") is not None else [record]
    if not isinstance(pairs, list) or not pairs or not all(isinstance(pair, Mapping) for pair in pairs):
        raise RecordError("questions is not a list of questions with answers, or is empty")
    if not all("answer" in pair for pair in pairs):
        raise RecordError("a question has no answer")
    return _about(_media(record, folder), [_pair(pair.get("question", ""), pair["answer"]) for pair in pairs])


def _caption(record: Mapping[str, Any], folder: MediaFolder) -> list[Messages]:
    caption = next(record[key] for key in _CAPTIONS if record.get(key) is not None)
    return _about(_media(record, folder), [_pair("", caption)])


def _about(media: Sequence[Part], conversations: list[Messages]) -> list[Messages]:
    """The conversations, with the media in the first one."""
    first, *others = conversations
    return [place(first, media), *(place(each, ()) for each in others)]


def _pair(question: Any, answer: Any) -> Messages:
    question = "" if question is None else question
    answers = answer if isinstance(answer, list) else [answer]
    if not isinstance(question, str):
        raise RecordError(f"question is {question!r}, expected text")
    if not answers or not all(isinstance(each, str) and each.strip() for each in answers):
        raise RecordError(f"answer is {answer!r}, expected text or a list of texts, none of them empty")
    return [{"role": "user", "content": question}, {"role": "assistant", "choices": answers}]


SHAPES = (
    Shape("messages with branches", (("messages", "conversations"), ("branches",)), _forking, parents=_parents),
    Shape("messages", (("messages",),), _messages),
    Shape("branches", (("branches",),), _branches, parents=_parents),
    Shape("conversations", (("conversations",),), _messages),
    Shape("a prompt and a completion", (("prompt",), ("completion",)), _prompted),
    Shape("a question and an answer", (("answer",),), _questions),
    Shape("questions", (("questions",),), _questions),
    Shape("a caption", (_CAPTIONS, (*_IMAGES, *_VIDEOS)), _caption, ("caption", "video caption")),
)
# The keys that mean something, for tables, whose columns are chosen once.
FIELDS = (
    "messages", "branches", "media", "conversations", "prompt", "completion", "question", "answer", "questions",
    *_CAPTIONS, *_IMAGES, *_VIDEOS, "task", "type", "class",
)  # fmt: skip
