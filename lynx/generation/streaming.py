"""Printing answers on the terminal while they are generated."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import TextStreamer
from transformers.generation.streamers import BaseStreamer

from lynx.processor import LynxProcessor


class AnswerStreamer(BaseStreamer):
    """Prints answers one after another, token by token; for ``generate(streamer=...)`` with one beam.

    All answers are generated at once, but a terminal has one end. The first unfinished answer grows there. Those after
    it wait, and are printed as far as they have come when it is their turn.

    Args:
        processor: of the model that answers.
        titles: a line to print before each answer; no lines if None.
    """

    def __init__(self, processor: LynxProcessor, titles: Sequence[str] | None = None):
        self._tokenizer = processor.tokenizer
        self._titles = titles
        self._answers: list[list[int]] = []  # their tokens
        self._turn = 0  # the number of the answer at the end of the terminal
        self._printer: _Printer | None = None  # of that answer
        self._printed = 0  # how many of its tokens are printed

    def put(self, value: Tensor) -> None:
        """Take the prompt (rows, L), then the next token of every row, (rows,)."""
        if value.dim() > 1:
            self._answers = [[] for _ in value]
            return
        for answer, token in zip(self._answers, value.tolist(), strict=True):
            if not self._is_finished(answer):
                answer.append(token)
        self._print(until_end=False)

    def end(self) -> None:
        """Print the rest."""
        self._print(until_end=True)

    def _is_finished(self, answer: list[int]) -> bool:
        return bool(answer) and answer[-1] == self._tokenizer.eos_token_id

    def _print(self, *, until_end: bool) -> None:
        while self._turn < len(self._answers):
            answer = self._answers[self._turn]
            if self._printer is None:
                if self._titles is not None:
                    print(self._titles[self._turn])
                self._printer, self._printed = _Printer(self._tokenizer, skip_special_tokens=True), 0
            for token in answer[self._printed :]:
                self._printer.put(torch.tensor([token]))
            self._printed = len(answer)
            if not until_end and not self._is_finished(answer):
                return
            self._printer.end()
            self._printer, self._turn = None, self._turn + 1


class _Printer(TextStreamer):
    """Prints one answer word by word, without the space before it."""

    has_begun = False

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        text = text if self.has_begun else text.lstrip()
        self.has_begun = self.has_begun or bool(text)
        super().on_finalized_text(text, stream_end)
