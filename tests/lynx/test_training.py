"""Training, evaluation and the command, end to end on a few pictures."""

import json
from functools import partial

import pytest
import torch
from PIL import Image

from lynx import checkpoint, cli
from lynx.data import digits
from lynx.data.jsonl import JsonlDataset
from lynx.eval import accuracy, pictures
from lynx.train.run import train
from tests.lynx.clips import frame, write_clip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """One picture of each of two digits, asked about in one way: a model can learn it by heart."""
    folder = tmp_path_factory.mktemp("data")
    digits.write(folder, rows=8, test_rows=8)
    lines = [
        {
            "type": kind,
            "messages": [
                {"role": "user", "content": [{"type": "image", "path": f"pictures/{n:04d}.png"}, question]},
                {"role": "assistant", "content": answer},
            ],
        }
        for n in (0, 1)
        for kind, question, answer in (
            ("digit", {"type": "text", "text": "Which digit?"}, str(n)),
            ("parity", {"type": "text", "text": "Odd or even?"}, "odd" if n % 2 else "even"),
        )
    ]
    path = folder / "few.jsonl"
    path.write_text("\n".join(map(json.dumps, [*lines, {"messages": "broken"}])))
    return path


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    return folder, train(data, folder, steps=60, batch_size=4, learning_rate=3e-3)


def test_it_learns(data, trained):
    folder, trainer = trained
    losses = [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.1 * losses[0]
    answered = accuracy.answer_records(*checkpoint.load(folder), JsonlDataset(data).records, batch_size=3)
    assert [(each.prediction, each.truth) for each in answered if not each.is_right] == []
    assert accuracy.scores(answered) == {"digit": accuracy.Score(2, 1.0, 0.5), "parity": accuracy.Score(2, 1.0, 0.5)}


def test_scores_count_right_answers_and_the_commonest_truth():
    answered = [
        accuracy.Answered({"type": kind}, "?", prediction, truth)
        for kind, prediction, truth in (
            ("a", "Seven", "seven "), ("a", "7", "seven"), ("a", "", "six"), ("b", "no", "yes"), ("a", "six", "six"),
            ("a", "six", "seven"),
        )
    ]  # fmt: skip
    assert accuracy.scores(answered) == {"a": accuracy.Score(5, 2 / 5, 3 / 5), "b": accuracy.Score(1, 0.0, 1.0)}
    assert "40.0%           60.0%" in accuracy.table(accuracy.scores(answered))


def test_progress_tells_loss_and_supervised_tokens(data, trained, capfd, tmp_path):
    _, trainer = trained
    entry = trainer.state.log_history[0]
    assert entry["supervised_tokens_per_second"] > 0
    train(data, tmp_path, steps=2, batch_size=4)
    out, shown = capfd.readouterr()
    assert "{'loss'" not in out + shown, "one bar, and not Trainer's own reports beside it"
    assert "2/2" in shown
    assert "supervised tokens/s" in shown
    assert "loss " in shown


def test_supervised_tokens_are_counted(data, tmp_path, monkeypatch):
    """Four records of two supervised tokens each, the answer and EOS, in each of three steps of a second each."""
    clock = iter(range(1000))
    monkeypatch.setattr("lynx.train.trainer.time.perf_counter", lambda: float(next(clock)))
    trainer = train(data, tmp_path, steps=3, batch_size=4)
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    learned = [
        sum(label != -100 for label in trainer.processing_class.encode(record["messages"]).labels)
        for record in JsonlDataset(data).records
    ]
    assert [entry["supervised_tokens_per_second"] for entry in entries] == [sum(learned)] * 3


def test_the_same_seed_gives_the_same_model(data, trained, tmp_path):
    def weights(name, seed):
        train(data, tmp_path / name, steps=5, batch_size=2, seed=seed)
        return checkpoint.load(tmp_path / name)[0].state_dict()

    first, second, other = weights("first", 1), weights("second", 1), weights("other", 2)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_training_goes_on_from_a_folder(data, trained, tmp_path):
    folder, _ = trained
    trainer = train(data, tmp_path, start=folder, steps=1, batch_size=4, learning_rate=1e-6)
    assert float(trainer.state.log_history[0]["loss"]) < 0.2


def test_ask(data, trained, capsys):
    folder, _ = trained
    for picture, digit in (("0000.png", "0"), ("0001.png", "1")):
        assert cli.main(["ask", str(folder), str(data.parent / "pictures" / picture), "Which digit?"]) == 0
        assert capsys.readouterr().out.strip() == digit
    clip = write_clip(data.parent / "clip.mp4", [frame(number) for number in range(9)])
    assert cli.main(["ask", str(folder), str(clip), "Which digit?"]) == 0
    assert capsys.readouterr().out.strip()


def test_evaluate(data, trained, capsys, tmp_path):
    folder, _ = trained
    sheet = tmp_path / "sheet.png"
    assert cli.main(["evaluate", str(folder), str(data), "--sheet", str(sheet)]) == 0
    assert "digit" in (out := capsys.readouterr().out)
    assert "100.0%" in out
    assert Image.open(sheet).size[0] > 500


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ask", "{model}", "{folder}/nothing.png", "What?"], "nothing.png: no such file"),
        (["ask", "{model}", "{folder}/few.jsonl", "What?"], "few.jsonl: not an image"),
        (["ask", "{model}", "{folder}/nothing.mp4", "What?"], "nothing.mp4: no such file"),
        (["ask", "{model}", "{folder}/pictures/0000.png", " "], "empty text"),
        (["ask", "{folder}/none", "{folder}/pictures/0000.png", "What?"], "no such model folder"),
        (["ask", "{model}", *["{folder}/pictures/0000.png"] * 6, "What?"], "6 frames, expected 1 to 5"),
        (["ask", "{model}", "{folder}/pictures/0000.png", "\udcff"], "no valid Unicode"),
        (["train", "{folder}/none.jsonl", "{folder}/out"], "none.jsonl"),
        (["evaluate", "{folder}", "{folder}/few.jsonl"], "not a whole model folder"),
    ],
)
def test_the_command_says_what_is_wrong(data, trained, capsys, arguments, message):
    arguments = [each.format(model=trained[0], folder=data.parent) for each in arguments]
    assert cli.main(arguments) == 2
    printed = capsys.readouterr().err.strip().splitlines()[-1]
    assert printed.startswith(f"lynx {arguments[0]}: ")
    assert message in printed


@pytest.mark.parametrize("arguments", [["train", "a", "b", "--steps", "0"], ["ask", "a", "b", "c", "--beams", "-1"]])
def test_counts_below_one_are_refused(arguments, capsys):
    with pytest.raises(SystemExit):
        cli.main(arguments)
    assert "is not at least 1" in capsys.readouterr().err


def test_demo(tmp_path, capsys, monkeypatch):
    """The demo itself, cut short: every step of it runs, and it says that so short a training is not enough."""
    monkeypatch.setattr("lynx.demo.STEPS", 2)
    monkeypatch.setattr("lynx.demo.digits.write", partial(digits.write, rows=64, test_rows=16))
    assert cli.main(["demo", "--folder", str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert "which digit" in out
    assert "learned less than it should have: which digit" in err
    for name in ("answers.png", "loss.png"):
        Image.open(tmp_path / name).load()
    checkpoint.load(tmp_path / "model")


def test_pictures_are_drawn(trained, tmp_path):
    messages = [{"role": "user", "content": "Two?"}, {"role": "assistant", "content": "2"}]
    answered = [
        accuracy.Answered({"messages": messages}, "Two or $x $a_{$?", prediction, "2") for prediction in ("2", "", "3")
    ]
    pictures.answer_sheet(answered, tmp_path / "answers.png", columns=2)
    pictures.loss_curve(trained[1].state.log_history, tmp_path / "loss.png")
    for name in ("answers.png", "loss.png"):
        Image.open(tmp_path / name).load()
