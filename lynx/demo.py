"""The demo: a small Lynx learns to answer questions about real handwritten digits, in minutes, on a CPU.

It writes records as anyone's would be (``lynx.data.digits``), then trains, answers and draws through the very functions
that ``lynx train`` and ``lynx evaluate`` call.
"""

from pathlib import Path

from lynx import checkpoint
from lynx.data import digits
from lynx.eval import accuracy, questions, sheet
from lynx.train import curves, recipe
from lynx.train.folder import RunFolder
from lynx.train.run import run

STEPS = 540


def demo(folder: str | Path, *, seed: int = 0) -> dict[str, accuracy.Score]:
    """Run it. All that it makes lies in ``folder``: ``data/``, ``model/``, ``answers.png`` and ``loss.png``.

    Returns:
        The score of each question type on held-out images.
    """
    folder = Path(folder)
    training_data, test_data = digits.write(folder / "data", seed=seed)
    changes = {"data": str(training_data), "output": str(folder / "model"), "steps": STEPS, "seed": seed}
    run(recipe.load("tiny", changes), fresh=True)
    curves.draw(RunFolder(folder / "model").log, folder / "loss.png")
    model, processor = checkpoint.load(folder / "model")
    answered = accuracy.answer_questions(model, processor, questions.read(test_data)[0], max_new_tokens=16)
    by_type = accuracy.scores(answered)
    sheet.answer_sheet(answered[: 2 * len(by_type)], folder / "answers.png")
    print(f"\nHeld-out images:\n{accuracy.table(by_type)}\n")
    for what in ("answers.png", "loss.png", "model"):
        print(f"{folder / what}")
    return by_type
