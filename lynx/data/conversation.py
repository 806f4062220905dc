"""Conversations in transformers' messages format, as the tokens of a row and the labels to learn."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from lynx.media.images import ImageSource
from lynx.media.videos import VideoSource

PROMPT = "User: {question}\nBot:"
IGNORED = -100


@dataclass(frozen=True)
class Sample:
    """One conversation, ready to be packed or padded with others.

    Attributes:
        media: the items in their order: the frames of a video, the one frame of an image, or a video file.
        is_video: whether each item is a video, whose frames have positions.
        token_ids: of the text; with prefix fusion the vision tokens of all media come before it in the row.
        labels: the token ids to learn, -100 at the others.
        places: for cross-attention, how many tokens come before each item; None if all items come first.
        branch_lengths: the lengths of the texts where there are several about the same media; else empty.
        branch_parents: for each of these texts the number of the one that it continues, -1 for none.
    """

    media: list[list[ImageSource] | VideoSource]
    is_video: list[bool]
    token_ids: list[int]
    labels: list[int]
    places: list[int] | None = None
    branch_lengths: tuple[int, ...] = ()
    branch_parents: tuple[int, ...] = ()

    @property
    def num_supervised(self) -> int:
        """How many tokens are supervised."""
        return sum(label != IGNORED for label in self.labels)

    def label_weights(self) -> list[float]:
        """Of each token ``1 / sqrt(n)``, where n tokens of its text are supervised: Molmo's rule, by which an answer
        ten times as long weighs three times as much."""
        weights: list[float] = []
        for length in self.branch_lengths or (len(self.labels),):
            labels = self.labels[len(weights) : len(weights) + length]
            supervised = sum(label != IGNORED for label in labels)
            weights += [max(supervised, 1) ** -0.5] * length
        return weights


class ConversationEncoder:
    """Turns conversations into samples: ``BOS User: question\\nBot: answer EOS``.

    Args:
        tokenizer: a fast one, with BOS and EOS tokens.
        max_frames: how many frames a video may have.
        lowercase: whether text is lower-cased.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, max_frames: int, lowercase: bool):
        self.tokenizer, self.max_frames, self.lowercase = tokenizer, max_frames, lowercase

    def encode(self, messages: Sequence[dict[str, Any]]) -> Sample:
        """One conversation; arguments and errors as of ``LynxProcessor.encode``."""
        return self._encode(messages, 0)

    def _encode(self, messages: Sequence[dict[str, Any]], before_it: int) -> Sample:
        """A conversation, or messages that continue one of ``before_it`` messages."""
        media: list[list[ImageSource] | VideoSource] = []
        is_video = []
        token_ids, labels = ([], []) if before_it else ([self.tokenizer.bos_token_id], [IGNORED])
        places: list[int] = []
        marks: list[int] = []  # places of media in the text that is not tokenised yet
        if not messages:
            raise ValueError("the conversation is empty: it has no messages")
        prompt = ""
        for turn, message in enumerate(messages, before_it):
            if not isinstance(message, dict):
                raise ValueError(f"message {turn} is a {type(message).__name__}, expected a dict with role and content")
            expected = "assistant" if turn % 2 else "user"
            if message.get("role") != expected:
                raise ValueError(f"message {turn} has role {message.get('role')!r}, expected {expected!r}")
            text, before = "", []
            for part in _parts(message.get("content"), turn):
                if part.get("type") == "text" and isinstance(part.get("text"), str):
                    text += part["text"]
                elif part.get("type") == "image" and "image" in part:
                    media.append([part["image"]])
                    is_video.append(False)
                    before.append(text)
                elif part.get("type") == "video" and "video" in part:
                    media.append(self._frames(part["video"], turn))
                    is_video.append(True)
                    before.append(text)
                else:
                    raise ValueError(f"message {turn} has a content part that is not a text, image or video: {part}")
            text = self._normalise(text).strip()
            if not text:
                raise ValueError(f"message {turn} ({expected}) has an empty text")
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise ValueError(f"message {turn} ({expected}) is not valid Unicode: {error}") from error
            offsets = [min(len(self._normalise(each).lstrip()), len(text)) for each in before]
            if expected == "user":
                head = ("\n" if turn else "") + PROMPT.partition("{question}")[0]
                prompt = ("\n" if turn else "") + PROMPT.format(question=text)
                marks = [len(head) + offset if offset else 0 for offset in offsets]
            else:
                marks += [len(prompt) + (1 + offset if offset else 0) for offset in offsets]
                self._append(token_ids, labels, prompt, " " + text, marks, places)
        if expected == "user":
            self._append(token_ids, labels, prompt, None, marks, places)
        return Sample(media, is_video, token_ids, labels, places)

    def encode_branches(
        self, conversations: Sequence[Sequence[dict[str, Any]]], parents: Sequence[int] | None = None
    ) -> Sample:
        """Several conversations about the same media; arguments and errors as of ``LynxProcessor.encode_branches``."""
        if not conversations:
            raise ValueError("there are no conversations")
        parents = tuple(parents or [-1] * len(conversations))
        if len(parents) != len(conversations):
            raise ValueError(f"{len(conversations)} conversations but {len(parents)} parents")
        texts: list[Sample] = []
        ends: list[int] = []  # how many messages there are up to the end of each
        for number, (messages, parent) in enumerate(zip(conversations, parents, strict=True)):
            if not -1 <= parent < number:
                raise ValueError(f"conversation {number} has parent {parent}, expected an earlier one, or -1 for none")
            before_it = ends[parent] if parent >= 0 else 0
            texts.append(self._encode(messages, before_it))
            ends.append(before_it + len(messages))
        first, *others = texts
        if not others:
            return first
        if any(other.media for other in others):
            raise ValueError("only the first conversation may have media; the others are about the same media")
        return replace(
            first,
            token_ids=[token for each in texts for token in each.token_ids],
            labels=[label for each in texts for label in each.labels],
            branch_lengths=tuple(len(each.token_ids) for each in texts),
            branch_parents=parents,
        )

    def _frames(self, frames: Any, turn: int) -> list[ImageSource] | VideoSource:
        if isinstance(frames, VideoSource):
            return frames
        if not isinstance(frames, Sequence):
            raise ValueError(f"message {turn}: a video must be a list of frames or a file, got {type(frames).__name__}")
        if not 1 <= len(frames) <= self.max_frames:
            raise ValueError(f"message {turn}: a video has {len(frames)} frames, expected 1 to {self.max_frames}")
        return list(frames)

    def _append(
        self,
        token_ids: list[int],
        labels: list[int],
        prompt: str,
        answer: str | None,
        marks: list[int],
        places: list[int],
    ) -> None:
        # Tokenised in one piece, so that training and generation cut the text at the same places. Offsets tell which
        # tokens belong to the answer.
        encoding = self.tokenizer(
            prompt + (answer or ""),
            add_special_tokens=False,
            split_special_tokens=True,  # a "</s>" in a message is text, not the end
            return_offsets_mapping=True,
        )
        ids = encoding["input_ids"]
        ends = [end for _, end in encoding["offset_mapping"]]
        # A token that is cut by an item's place comes after it.
        places += [len(token_ids) + sum(end <= mark for end in ends) for mark in marks]
        token_ids += ids
        if answer is None:
            labels += [IGNORED] * len(ids)
            return
        in_answer = [end > len(prompt) for end in ends]
        labels += [token if learn else IGNORED for token, learn in zip(ids, in_answer, strict=True)]
        token_ids.append(self.tokenizer.eos_token_id)
        labels.append(self.tokenizer.eos_token_id)

    def _normalise(self, text: str) -> str:
        return text.lower() if self.lowercase else text


def _parts(content: Any, turn: int) -> list[dict[str, Any]]:
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if isinstance(content, Sequence) and all(isinstance(part, dict) for part in content):
        return list(content)
    raise ValueError(f"message {turn} has content of type {type(content).__name__}, expected text or a list of parts")
