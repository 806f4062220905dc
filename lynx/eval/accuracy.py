"""Answers to held-out questions, and how many are right."""

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lynx.eval.judge import Judge, same_words
from lynx.eval.questions import Question
from lynx.generation.answers import answer
from lynx.model import LynxForConditionalGeneration
from lynx.processor import LynxProcessor

_NORMAL_95 = 1.959964  # two-sided


@dataclass(frozen=True)
class Answered:
    """A question, what the model said to it, and whether that is right; None before it is judged."""

    question: Question
    prediction: str
    is_right: bool | None


def answer_questions(
    model: LynxForConditionalGeneration,
    processor: LynxProcessor,
    questions: Sequence[Question],
    *,
    judge: Judge = same_words,
    preset: str | None = None,
    batch_size: int = 64,
    answers: str | Path | None = None,
    **options: Any,
) -> list[Answered]:
    """Ask every question, then have the predictions judged.

    Args:
        preset, options: as for ``lynx.generation.answers.generate_answers``; by default greedy, 64 new tokens at most.
        batch_size: questions at once.
        answers: a file for the answers as they come, before they are judged, as ``write`` writes them: a judge may fail
            hours later.
    """
    predictions: list[str] = []
    model.eval()
    for start in tqdm(range(0, len(questions), batch_size), desc="answering", unit="batch"):
        samples = [processor.encode(each.messages) for each in questions[start : start + batch_size]]
        predictions += answer(model, processor, samples, preset=preset, **options)
        if answers is not None:
            write([Answered(*each, None) for each in zip(questions, predictions, strict=False)], answers)
    cases = list(zip(questions, predictions, strict=True))
    return [Answered(*case, is_right) for case, is_right in zip(cases, judge(cases), strict=True)]


@dataclass(frozen=True)
class Score:
    """How many of some questions were answered right, and how many would be by always giving the commonest truth."""

    questions: int
    right: int
    commonest: int

    @property
    def accuracy(self) -> float:
        """The share of right answers."""
        return self.right / self.questions

    @property
    def majority(self) -> float:
        """The share of the commonest truth."""
        return self.commonest / self.questions

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of the accuracy (E. B. Wilson, JASA 22, 1927), which holds for few questions too."""
        n, share, z2 = self.questions, self.accuracy, _NORMAL_95**2
        centre = (share + z2 / (2 * n)) / (1 + z2 / n)
        half = _NORMAL_95 * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n)) / (1 + z2 / n)
        return max(0.0, centre - half), min(1.0, centre + half)


def scores(answered: Sequence[Answered]) -> dict[str, Score]:
    """The score of each kind of question, in the order they first appear."""
    by_kind: dict[str, list[Answered]] = {}
    for each in answered:
        by_kind.setdefault(each.question.kind, []).append(each)
    result = {}
    for kind, group in by_kind.items():
        [(_, commonest)] = Counter(each.question.truths[0].strip().lower() for each in group).most_common(1)
        result[kind] = Score(len(group), sum(bool(each.is_right) for each in group), commonest)
    return result


def table(by_kind: dict[str, Score]) -> str:
    """The scores as lines of text, and where there are several kinds, those of all questions below."""
    rows = dict(by_kind)
    if len(by_kind) > 1:
        columns = zip(*((each.questions, each.right, each.commonest) for each in by_kind.values()), strict=True)
        rows["overall"] = Score(*map(sum, columns))
    width = max(13, *map(len, rows), 0)
    lines = [f"{'question type':<{width}}  right / questions  accuracy  95 % interval    majority class"]
    for kind, score in rows.items():
        low, high = score.interval
        lines.append(
            f"{kind:<{width}}  {score.right:5d} / {score.questions:<9d}  {score.accuracy:8.1%}  "
            f"{low:6.1%} - {high:6.1%}  {score.majority:14.1%}"
        )
    return "\n".join(lines)


def write(answered: Sequence[Answered], path: str | Path) -> None:
    """A JSONL file of every question with its answers, to judge elsewhere or to compare two models on."""
    lines = (
        {
            "type": each.question.kind,
            "question": each.question.text,
            "answer": each.question.truths,
            "prediction": each.prediction,
            "right": each.is_right,
        }
        for each in answered
    )
    Path(path).write_text("".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in lines), encoding="utf-8")
