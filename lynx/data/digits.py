"""Questions about real handwritten digits: the 1797 labelled 8 x 8 images that come with scikit-learn.

Several question types, each in several phrasings, about single images, about videos of two to four images, and about no
image at all. A fifth of the images is held out: no training record shows them.
"""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

PHRASINGS = {
    "which digit": [
        "Which digit is this?",
        "What digit is in the picture?",
        "Read the handwritten digit.",
        "What number do you see?",
        "Name the digit shown here.",
    ],
    "digit as word": [
        "Write the digit in the picture as a word.",
        "Spell the digit you see.",
        "Which digit is this? Answer with a word.",
    ],
    "odd or even": [
        "Is this digit odd or even?",
        "Odd or even?",
        "Is the number in the picture even or odd?",
        "Tell me the parity of this digit.",
    ],
    "larger than": [
        "Is this digit larger than {n}? Please answer yes or no.",
        "Is the number in the picture greater than {n}?",
        "Does the picture show a digit above {n}?",
    ],
    "digits in order": [
        "Which digits does the video show, in order?",
        "Read the digits of the video one after another.",
        "List the digits in the order they appear.",
    ],
    "how many frames": [
        "How many digits does the video show?",
        "How many pictures are in the video?",
        "Count the digits in this video.",
    ],
    "last digit": [
        "Which digit comes last in the video?",
        "What is the last digit shown?",
        "Name the final digit of the video.",
    ],
    "addition": [
        "What is {a} plus {b}?",
        "Add {a} and {b}.",
        "{a} + {b} = ?",
    ],
}
VIDEO_TYPES = ("digits in order", "how many frames", "last digit")
TEXT_TYPES = ("addition",)


def write(folder: str | Path, *, rows: int = 16000, test_rows: int = 2872, seed: int = 0) -> tuple[Path, Path]:
    """Write the images and two JSONL files, for ``lynx.data.jsonl``.

    Args:
        folder: where to write; made if it is not there.
        rows, test_rows: records in the two files, split evenly over the question types. Each type goes through all
            images of its file before any comes again: 2872 test rows ask every type about all 359 held-out images.
        seed: of the split and of the questions.

    Returns:
        The paths of the two files: training, held out.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed.
    """
    from sklearn.datasets import load_digits  # an extra of the demo, not needed to train on other data

    folder = Path(folder)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    digits = load_digits()
    paths = [f"images/{index:04d}.png" for index in range(len(digits.target))]
    for path, image in zip(paths, digits.images, strict=True):
        grey = (image * (255 / 16)).round().astype(np.uint8)
        Image.fromarray(grey).convert("RGB").save(folder / path)
    order = np.random.default_rng(seed).permutation(len(paths))
    held_out = len(paths) // 5
    files = []
    for split, (name, shown, count) in enumerate(
        (("train.jsonl", order[held_out:], rows), ("test.jsonl", order[:held_out], test_rows))
    ):
        draw = _Questions(paths, digits.target, shown, np.random.default_rng([seed, split]))
        kinds = list(PHRASINGS)
        with (folder / name).open("w") as file:
            for row in range(count):
                file.write(json.dumps(draw.record(kinds[row % len(kinds)])) + "\n")
        files.append(folder / name)
    return files[0], files[1]


class _Questions:
    """Draws records about some of the images.

    Args:
        paths, labels: of all images.
        shown: the numbers of those to draw from.
        random: what draws.
    """

    def __init__(self, paths: list[str], labels: np.ndarray, shown: np.ndarray, random: np.random.Generator):
        self.paths, self.labels, self.shown, self.random = paths, labels, shown, random
        self.decks: dict[str, list[int]] = {kind: [] for kind in PHRASINGS}
        self.media: dict[str, Callable[[str], tuple[list[dict], list[int]]]] = {
            **dict.fromkeys(PHRASINGS, self._image),
            **dict.fromkeys(VIDEO_TYPES, self._video),
            **dict.fromkeys(TEXT_TYPES, lambda kind: ([], [])),
        }

    def record(self, kind: str) -> dict:
        media, digits = self.media[kind](kind)
        question = PHRASINGS[kind][self.random.integers(len(PHRASINGS[kind]))]
        question, answer = self._fill(kind, question, digits)
        content = [*media, {"type": "text", "text": question}]
        return {
            "type": kind,
            "messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}],
        }

    def _fill(self, kind: str, question: str, digits: list[int]) -> tuple[str, str]:
        if kind == "which digit" or kind == "last digit":
            return question, str(digits[-1])
        if kind == "digit as word":
            return question, _WORDS[digits[0]]
        if kind == "odd or even":
            return question, "odd" if digits[0] % 2 else "even"
        if kind == "larger than":  # than a middling number, which alone hardly tells the answer
            n = self.random.integers(3, 6)
            return question.format(n=n), "yes" if digits[0] > n else "no"
        if kind == "digits in order":
            return question, " ".join(map(str, digits))
        if kind == "how many frames":
            return question, str(len(digits))
        a, b = self.random.integers(0, 10, size=2)
        return question.format(a=a, b=b), str(a + b)

    def _draw(self, kind: str) -> int:
        if not self.decks[kind]:
            self.decks[kind] = self.random.permutation(self.shown).tolist()
        return self.decks[kind].pop()

    def _image(self, kind: str) -> tuple[list[dict], list[int]]:
        image = self._draw(kind)
        return [{"type": "image", "path": self.paths[image]}], [int(self.labels[image])]

    def _video(self, kind: str) -> tuple[list[dict], list[int]]:
        frames = [self._draw(kind) for _ in range(self.random.integers(2, 5))]
        path = [self.paths[frame] for frame in frames]
        return [{"type": "video", "path": path}], [int(self.labels[frame]) for frame in frames]
