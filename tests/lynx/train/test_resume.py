"""Killed anywhere and resumed, a run is the run that was never killed: the same samples, the same bits."""

import json
import os
import random
import shutil
import signal
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import get_worker_info

from lynx.train import checkpoints, recipe, run, trainer
from lynx.train.log import read_log
from tests.lynx import processes
from tests.lynx.small import write_records

STEPS, EVERY = 7, 2
CHANGES = {
    "steps": STEPS, "save_every": EVERY, "log_every": 1, "token_budget": 130, "tokens_per_step": 260, "seed": 3,
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_records(tmp_path_factory.mktemp("data"), 24)


def go(changes, kill=None):
    """A run in a process of its own, which ends itself at ``kill``: (what, its number, the signal).

    What happens is a ``"step"``, or a ``"write"``: anything that saving does to the disk. A file that is being written
    is then half there. ``consumed-RANK`` in the output folder gets a line for every pack.
    """
    path = Path(changes["output"], f"consumed-{os.environ.get('RANK', 0)}")
    os.setpgid(0, 0)  # a group of its own, workers included, which SIGTERM goes to as a scheduler sends it
    see = trainer.LynxTrainer._see

    def note(self, batch):
        with path.open("a") as file:
            drawn = [torch.rand(()).item(), random.random(), float(np.random.rand())]  # as dropout might
            file.write(json.dumps([self.state.global_step, batch["input_ids"].flatten().tolist(), drawn]) + "\n")
        see(self, batch)

    trainer.LynxTrainer._see = note
    if kill is not None:
        what, number, by = kill
        left = iter(range(number, -1, -1))

        def happens(path=None):
            if next(left, -1) == 0:
                if path is not None:
                    Path(path).write_bytes(b"half of a file")
                os.killpg(0, by) if by == signal.SIGTERM else os.kill(os.getpid(), by)

        if what == "step":
            before(trainer.LynxTrainer, "training_step", lambda *_, **__: happens())
        else:
            before(torch, "save", lambda value, path: happens(path))
            before(trainer, "save_file", lambda value, path: happens(path))
            before(Path, "rename", lambda *_: happens())
            before(checkpoints, "_flush", lambda *_: happens())
            before(shutil, "rmtree", lambda *_, **__: happens())
    run.run(recipe.load("tiny", changes))


def before(owner, name, function, set_to=setattr):
    """Call ``function`` with the arguments of each call of ``owner.name`` first, in the main process."""
    original = getattr(owner, name)

    def wrapped(*args, **kwargs):
        if get_worker_info() is None:
            function(*args, **kwargs)
        return original(*args, **kwargs)

    set_to(owner, name, wrapped)


def changes_for(data, output, **more):
    output.mkdir(exist_ok=True)
    return {**CHANGES, "data": str(data), "output": str(output), **more}


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """The output folder of a run that nothing happens to."""
    output = tmp_path_factory.mktemp("whole") / "out"
    assert processes.exit_code(go, changes_for(data, output)) == 0
    return output


def consumed(output):
    """The packs of each step and what was drawn beside them, as they were consumed the last time."""
    steps: dict[int, list] = {}
    ranks = sorted(output.glob("consumed-*"))
    for path in ranks:
        of_rank: dict[int, list] = {}
        for line in path.read_text().splitlines():
            step, *pack = json.loads(line)
            of_rank.setdefault(step, []).append(pack)
        for step, packs in of_rank.items():  # two packs a step
            steps.setdefault(step, []).extend(packs[-2 // len(ranks) :])
    return steps


def check_same(output, whole):
    assert consumed(output) == consumed(whole)
    ours, theirs = load_file(output / "model.safetensors"), load_file(whole / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    ours, theirs = ([entry for entry in read_log(each / "log.jsonl") if "loss" in entry] for each in (output, whole))
    assert [entry["step"] for entry in ours] == list(range(1, STEPS + 1))
    for name in ("loss", "grad_norm", "learning_rate", "samples/train", "supervised_share/train"):
        assert [entry[name] for entry in ours] == [entry[name] for entry in theirs], name


def test_the_whole_run_learns_from_different_packs(whole):
    packs = [tuple(tokens) for packs in consumed(whole).values() for tokens, _ in packs]
    assert len(packs) == 2 * STEPS
    assert len(set(packs)) == 2 * STEPS
    losses = [entry["loss"] for entry in read_log(whole / "log.jsonl") if "loss" in entry]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("workers", [0, 2])
def test_killed_and_resumed_it_is_the_same_run(workers, data, whole, tmp_path):
    """Killed at random steps and at random moments of saving, until it comes through."""
    draw = random.Random(f"workers {workers}")
    changes = changes_for(data, tmp_path / "out", workers=workers)
    folder = tmp_path / "out" / "checkpoints" / "train"
    good = None
    for attempt in range(3):
        what = "step" if attempt % 2 == 0 else "write"
        kill = (what, draw.randrange(3, 8) if what == "step" else draw.randrange(30), signal.SIGKILL)
        code = processes.exit_code(go, changes, kill)
        assert code in (0, -signal.SIGKILL), f"{kill}: {code}"
        newest = checkpoints.latest(folder)
        assert good is None or (newest is not None and checkpoints.step_of(newest) >= checkpoints.step_of(good))
        good = newest
        if code == 0:
            break
    else:
        assert processes.exit_code(go, changes) == 0
    assert attempt >= 2, "it came through too soon"
    check_same(tmp_path / "out", whole)


@pytest.mark.parametrize("number", [0, 3, 9, 18, 20])
def test_killed_while_saving_the_last_checkpoint_stays(number, data, whole, tmp_path):
    """At several of the things that saving does to the disk: before, between and after the files, and at the rename."""
    changes = changes_for(data, tmp_path / "out")
    folder = tmp_path / "out" / "checkpoints" / "train"
    assert processes.exit_code(go, changes, ("step", 2 * EVERY, signal.SIGKILL)) == -signal.SIGKILL
    assert checkpoints.step_of(checkpoints.latest(folder)) == EVERY
    code = processes.exit_code(go, changes, ("write", number, signal.SIGKILL))
    assert checkpoints.step_of(checkpoints.latest(folder)) >= EVERY
    if code:
        assert processes.exit_code(go, changes) == 0
    check_same(tmp_path / "out", whole)


def test_sigterm_saves_and_ends(data, whole, tmp_path):
    changes = changes_for(data, tmp_path / "out", workers=2)
    assert processes.exit_code(go, changes, ("step", 5, signal.SIGTERM)) == 0
    newest = checkpoints.latest(tmp_path / "out" / "checkpoints" / "train")
    assert checkpoints.step_of(newest) == 3, "after the step that was running, not the next regular one"
    assert not (tmp_path / "out" / "config.json").exists(), "an unfinished run has no model"
    assert processes.exit_code(go, changes) == 0
    check_same(tmp_path / "out", whole)


def test_a_checkpoint_gets_its_name_when_all_of_it_is_on_the_disk(tmp_path, monkeypatch):
    """Whatever a power cut leaves: every file and folder of it is flushed, then it is renamed, then that is flushed."""
    happened: list[tuple[str, str]] = []

    def inside(path):
        return str(Path(path).relative_to(tmp_path))

    before(checkpoints, "_flush", lambda path: happened.append(("flush", inside(path))), monkeypatch.setattr)
    before(Path, "rename", lambda path, to: happened.append(("rename", inside(to))), monkeypatch.setattr)
    for step in (2, 4, 10):
        written = checkpoints.start(tmp_path) / "checkpoint-1"
        (written / "inner").mkdir(parents=True)
        for name in ("a", "inner/b"):
            (written / name).write_text(f"{name} of {step}")
        happened.clear()
        checkpoints.publish(written, tmp_path, step, 2)
        named = happened.index(("rename", f"checkpoint-{step}"))
        first = {("flush", inside(written / name)) for name in ("", "a", "inner", "inner/b", "manifest.json")}
        assert set(happened[:named]) == first
        assert happened[named + 1] == ("flush", ".")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-4"]
    assert checkpoints.latest(tmp_path) == tmp_path / "checkpoint-10"
    (checkpoints.start(tmp_path) / "checkpoint-1").mkdir()
    checkpoints.publish(checkpoints.unfinished_of(tmp_path) / "checkpoint-1", tmp_path, 12, None)
    assert len(list(tmp_path.iterdir())) == 3, "None keeps all"


def test_a_broken_checkpoint_is_passed_over(data, whole, tmp_path, caplog):
    shutil.copytree(whole, tmp_path / "out")
    changes = changes_for(data, tmp_path / "out")
    folder = tmp_path / "out" / "checkpoints" / "train"
    (tmp_path / "out" / "config.json").unlink()
    newest = checkpoints.latest(folder)
    assert checkpoints.step_of(newest) == STEPS
    with (newest / "optimizer.pt").open("r+b") as file:
        file.truncate(100)
    assert checkpoints.step_of(checkpoints.latest(folder)) == STEPS - 1
    assert "optimizer.pt has 100 bytes" in caplog.text
    assert processes.exit_code(go, changes) == 0
    check_same(tmp_path / "out", whole)


def test_a_finished_stage_only_saves_its_model(data, whole, tmp_path):
    """Killed between the last checkpoint and the model."""
    shutil.copytree(whole, tmp_path / "out")
    (tmp_path / "out" / "config.json").unlink()
    run.run(recipe.load("tiny", changes_for(data, tmp_path / "out")))
    check_same(tmp_path / "out", whole)


def test_changed_data_are_refused_and_moved_ones_are_not(data, whole, tmp_path):
    """As many records of as many bytes, but one says something else; then the same ones, in another folder."""
    shutil.copytree(data.parent, tmp_path / "moved")
    shutil.copytree(whole, tmp_path / "out")
    moved, text = tmp_path / "moved" / data.name, data.read_text()
    for content, refused in ((text.replace("please", "kindly", 1), True), (text, False)):
        (tmp_path / "out" / "config.json").unlink(missing_ok=True)
        moved.write_text(content)
        changed = pytest.raises(ValueError, match=r"train: as many records as .* but not the same ones")
        with changed if refused else nullcontext():
            run.run(recipe.load("tiny", changes_for(moved, tmp_path / "out")))
    check_same(tmp_path / "out", whole)


def test_another_recipe_is_refused_in_the_same_folder(data, whole):
    changes = {**changes_for(data, whole), "learning_rate": 1e-3, "betas": [0.9, 0.9], "seed": 4, "log_every": 3}
    different = (
        r"different in seed \(was 3, now 4\), train.betas, train.learning_rate \(was 0.002, now 0.001\)\. Choose"
    )
    with pytest.raises(recipe.RecipeError, match=different):
        run.run(recipe.load("tiny", changes))
