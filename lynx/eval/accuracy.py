"""Answers to held-out questions, and how many are right."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from lynx.data.records import text_of
from lynx.generation import answer
from lynx.model import LynxForConditionalGeneration
from lynx.processor import LynxProcessor


@dataclass(frozen=True)
class Answered:
    """A record's last question with what the model said to it and what is true."""

    record: dict[str, Any]
    question: str
    prediction: str
    truth: str

    @property
    def is_right(self) -> bool:
        """Whether prediction and truth are the same words, case and outer blanks aside."""
        return self.prediction.strip().lower() == self.truth.strip().lower()


def answer_records(
    model: LynxForConditionalGeneration,
    processor: LynxProcessor,
    records: Sequence[dict[str, Any]],
    *,
    batch_size: int = 64,
    max_new_tokens: int = 16,
    **options,
) -> list[Answered]:
    """Ask the last question of every record, its earlier rounds as history.

    Args:
        records: conversations that end with an answer, the truth.
        batch_size: questions at once.
        max_new_tokens: of an answer.
        options: any of transformers' ``generate``; greedy by default.
    """
    answered = []
    model.eval()
    for start in tqdm(range(0, len(records), batch_size), desc="answering", unit="batch"):
        chunk = records[start : start + batch_size]
        samples = [processor.encode(record["messages"][:-1]) for record in chunk]
        predictions = answer(model, processor, samples, max_new_tokens=max_new_tokens, **options)
        for record, prediction in zip(chunk, predictions, strict=True):
            question, truth = (text_of(message) for message in record["messages"][-2:])
            answered.append(Answered(record, question, prediction, truth))
    return answered


@dataclass(frozen=True)
class Score:
    """The share of right answers to one type of question, beside that of always giving the commonest truth."""

    questions: int
    accuracy: float
    majority: float


def scores(answered: Sequence[Answered]) -> dict[str, Score]:
    """The score of each question type (the records' ``type``), in the order they first appear."""
    by_type: dict[str, list[Answered]] = {}
    for each in answered:
        by_type.setdefault(str(each.record.get("type", "all")), []).append(each)
    result = {}
    for kind, group in by_type.items():
        right = sum(each.is_right for each in group)
        [(_, commonest)] = Counter(each.truth.strip().lower() for each in group).most_common(1)
        result[kind] = Score(len(group), right / len(group), commonest / len(group))
    return result


def table(by_type: dict[str, Score]) -> str:
    """The scores as lines of text."""
    width = max(map(len, by_type), default=0)
    lines = [f"{'question type':<{max(width, 13)}}  questions  accuracy  majority class"]
    for kind, score in by_type.items():
        lines.append(f"{kind:<{max(width, 13)}}  {score.questions:9d}  {score.accuracy:8.1%}  {score.majority:14.1%}")
    return "\n".join(lines)
