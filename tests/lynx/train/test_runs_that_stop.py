"""Runs that should stop do, in a sentence, and leave what was good as it was."""

import errno
import math
import multiprocessing
import os
import re
import shutil
import signal
import sys
import time
from collections import Counter
from dataclasses import fields, replace

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import Trainer

from lynx import checkpoint, cli
from lynx.data.collator import Collator
from lynx.data.conversation import IGNORED
from lynx.train import callbacks, recipe, run, trainer
from lynx.train.finite import NotFiniteError
from lynx.train.lock import locked
from lynx.train.log import read_log
from lynx.train.trainer import LynxTrainer
from tests.lynx import processes
from tests.lynx.small import write_records

MINIMAL = {
    "model": "tiny", "output": "out", "data": "data.jsonl", "precision": "fp32", "token_budget": 130,
    "stages": [{"name": "train", "trainable": ["adapters"], "steps": 3, "learning_rate": 1e-3}],
}  # fmt: skip
FLOATS = [each.name for each in fields(recipe.Stage) if each.type is float]
INTEGERS = [each.name for kind in (recipe.Stage, recipe.Recipe) for each in fields(kind) if "int" in str(each.type)]

# Numbers in recipes


@pytest.mark.parametrize("value", [".inf", "-.inf", ".nan", "inf", "nan", "1e999", "1" + "0" * 400])
@pytest.mark.parametrize("key", FLOATS)
def test_numbers_that_are_not_finite(key, value):
    with pytest.raises(recipe.RecipeError, match=f"stage train: {key} is .*, expected a finite number"):
        recipe.load(MINIMAL, [f"{key}={value}"])


@pytest.mark.parametrize("value", ["[.nan, 0.9]", "[0.9, .inf]", f"[0.9, 1{'0' * 400}]"])
def test_a_list_of_numbers_that_are_not_finite(value):
    with pytest.raises(recipe.RecipeError, match=r"betas is .*, expected a list of a finite number"):
        recipe.load(MINIMAL, [f"betas={value}"])


@pytest.mark.parametrize("value", [".inf", ".nan", "9" * 30, "-" + "9" * 30])
@pytest.mark.parametrize("key", INTEGERS)
def test_integers_out_of_range(key, value):
    with pytest.raises(recipe.RecipeError, match=f"{key} is "):
        recipe.load(MINIMAL, [f"{key}={value}"])


def test_every_kind_of_number_was_tried():
    assert {"learning_rate", "warmup_from", "weight_decay", "epsilon", "max_grad_norm"} <= set(FLOATS)
    assert {"steps", "resolution", "tokens_per_step", "workers", "seed", "max_skipped"} <= set(INTEGERS)


# Losses that are not finite


@pytest.fixture
def data(tmp_path):
    return write_records(tmp_path, 12)


def load(data, output, **changes):
    """A run of a few steps with a checkpoint after each second one."""
    values = {
        "data": str(data), "output": str(output), "token_budget": 130, "steps": 6, "save_every": 2, "log_every": 1,
    }  # fmt: skip
    return recipe.load("tiny", values | changes)


def spoil(monkeypatch, what, step, value):
    """Make the loss, the gradients, the weights or the optimizer's state of one step this value."""
    training_step = LynxTrainer.training_step
    spoiled = Trainer.training_step

    def before_watching(self, model, *args, **kwargs):
        loss = spoiled(self, model, *args, **kwargs)
        return loss * value if what == "loss" and self.state.global_step + 1 == step else loss

    def after(self, model, *args, **kwargs):
        loss = training_step(self, model, *args, **kwargs)
        if self.state.global_step + 1 == step:
            parameter = next(each for each in model.parameters() if each.requires_grad)
            if what == "gradients":
                parameter.grad.view(-1)[-1] = value
            elif what == "weights":
                parameter.data.view(-1)[-1] = value
            elif what == "state":
                self.optimizer.state[parameter]["exp_avg_sq"].view(-1)[-1] = value
        return loss

    monkeypatch.setattr(Trainer, "training_step", before_watching)
    monkeypatch.setattr(LynxTrainer, "training_step", after)


def is_good(checkpoint):
    weights = load_file(checkpoint / "trained.safetensors")
    states = torch.load(checkpoint / "optimizer.pt", weights_only=True)["state"].values()
    tensors = [*weights.values(), *(each for state in states for each in state.values())]
    return all(each.isfinite().all() for each in tensors)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("log_every", [1, 1000])
def test_a_loss_that_is_not_finite_stops_the_run(data, tmp_path, monkeypatch, value, log_every):
    """With its step and records, whether or not this step is logged; the checkpoint before it stays, and is named."""
    spoil(monkeypatch, "loss", 3, value)
    output = tmp_path / "out"
    with pytest.raises(NotFiniteError) as error:
        run.run(load(data, output, log_every=log_every))
    assert re.search(
        rf"stage train: the loss is {value}, that of step 3, from the records .*jsonl:\d+", str(error.value)
    )
    last = output / "checkpoints/train/checkpoint-2"
    assert f"the last good checkpoint is {last}" in str(error.value)
    assert [path.name for path in last.parent.glob("checkpoint-*")] == ["checkpoint-2"]
    assert is_good(last)
    assert not (output / "config.json").exists(), "no model of such a run"
    assert all(entry["step"] < 3 for entry in read_log(output / "log.jsonl"))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("gradients", "the norm of the gradients is (nan|inf), that of step 3"),
        ("weights", "(the weights .* are|the loss is).* of step [34]"),
        ("state", "(the optimizer's state is|the weights .* are|the loss is).* of step [34]"),
    ],
)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nothing_that_is_not_finite_is_saved(data, tmp_path, monkeypatch, what, message, value):
    spoil(monkeypatch, what, 3, value)
    with pytest.raises(NotFiniteError, match=message):
        run.run(load(data, tmp_path / "out"))
    saved = list((tmp_path / "out/checkpoints/train").glob("checkpoint-*"))
    assert [path.name for path in saved] == ["checkpoint-2"]
    assert is_good(saved[0])


def test_the_command_says_it_in_one_sentence(data, tmp_path, monkeypatch, capsys):
    spoil(monkeypatch, "loss", 1, math.nan)
    changes = [f"data={data}", f"output={tmp_path / 'out'}", "token_budget=130", "steps=2"]
    assert cli.main(["train", "tiny", *changes]) == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lynx train:")]
    assert "the loss is nan, that of step 1, from the records" in line
    assert "there is no checkpoint yet" in line


# Two runs in one folder


def in_this_folder(output):
    """Hold the folder as a run does that has a worker, until the parent ends this process."""
    with locked(output):
        if not (worker := os.fork()):
            time.sleep(600)
        (output / "worker").write_text(str(worker))
        (output / "worker").rename(output / "held")
        time.sleep(600)


@pytest.fixture
def holder(tmp_path):
    process = multiprocessing.get_context("forkserver").Process(target=in_this_folder, args=(tmp_path / "out",))
    process.start()
    deadline = time.monotonic() + 120
    while not (tmp_path / "out/held").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    yield process
    process.kill()
    process.join()
    os.kill(int((tmp_path / "out/held").read_text()), signal.SIGKILL)


@pytest.mark.parametrize("fresh", [False, True])
def test_a_second_run_is_refused(data, tmp_path, holder, fresh):
    """It is told which process holds the folder. When that is killed, the next run starts, though a worker lives."""
    changed = load(data, tmp_path / "out", steps=1)
    with pytest.raises(
        recipe.RecipeError, match=f"another run trains into this folder, process {holder.pid} on .*kill"
    ):
        run.run(changed, fresh=fresh)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [".lock", "held"]
    holder.kill()
    holder.join()
    assert run.run(changed, fresh=fresh) == tmp_path / "out"
    assert not (tmp_path / "out/.lock").exists()


# Starts that fail


BAD_STARTS = {
    "data": ({"data": "nowhere.jsonl"}, "nowhere.jsonl"),
    "model": ({"model": "nowhere"}, "neither a folder nor a preset"),
    "prompts": ({"prompts": "nowhere.yaml"}, "nowhere.yaml"),
    "tokens per step": ({"tokens_per_step": 131}, "not a multiple"),
    "resolution": ({"resolution": 13}, "resolution"),
    "parameters": ({"trainable": ["cross_attention"]}, "no cross_attention"),
    "options": ({"model_options.max_frames": -1}, "max_frames"),
}


@pytest.mark.parametrize(("changes", "message"), BAD_STARTS.values(), ids=BAD_STARTS)
def test_a_start_that_fails_claims_no_folder(data, tmp_path, changes, message):
    """The folder is not made; or it holds what was in it, though the start was to be a fresh one."""
    output = tmp_path / "a/b"
    with pytest.raises((ValueError, OSError), match=message):
        run.run(load(**{"data": data, "output": output} | changes))
    assert not output.parent.exists()
    output.mkdir(parents=True)
    for name in ("recipe.yaml", "config.json", "log.jsonl", "skipped.jsonl"):
        (output / name).write_text("{}\n")
    with pytest.raises((ValueError, OSError), match=message):
        run.run(load(**{"data": data, "output": output} | changes), fresh=True)
    assert sorted(path.name for path in output.iterdir()) == [
        "config.json",
        "log.jsonl",
        "recipe.yaml",
        "skipped.jsonl",
    ]


# Nothing to learn


def broken(data):
    """All images of the records, and so all records but those without."""
    for path in data.parent.glob("*.png"):
        path.write_bytes(path.read_bytes()[:40])
    lines = [line for line in data.read_text().splitlines() if ".png" in line]
    data.write_text("".join(f"{line}\n" for line in lines))
    return len(lines)


def test_a_stage_of_broken_images_fails(data, tmp_path):
    number = broken(data)
    with pytest.raises(ValueError, match=r"stage train: there is nothing to learn: of (\d+) .*, \1 .*\.png") as error:
        run.run(load(data, tmp_path / "out", save_every=1000))
    assert len((tmp_path / "out/skipped.jsonl").read_text().splitlines()) <= number
    assert "in 6 steps" in str(error.value)
    assert not list((tmp_path / "out").rglob("checkpoint-*"))
    assert not (tmp_path / "out/config.json").exists()


def test_a_long_stage_of_broken_images_fails_early(data, tmp_path):
    broken(data)
    with pytest.raises(ValueError, match=r"there is nothing to learn: of 3\d\d records drawn in"):
        run.run(load(data, tmp_path / "out", steps=100_000, log_every=1, save_every=1000))


def test_some_broken_images_are_no_reason(data, tmp_path):
    for path in list(data.parent.glob("*.png"))[1:]:
        path.write_bytes(b"")
    assert run.run(load(data, tmp_path / "out")) == tmp_path / "out"


def test_records_with_nothing_supervised_fail(data, tmp_path, monkeypatch):
    collate = Collator.__call__

    def unsupervised(self, items):
        batch = collate(self, items)
        batch["labels"] = torch.full_like(batch["labels"], IGNORED)
        batch["report"] = replace(batch["report"], supervised_tokens=Counter())
        return batch

    monkeypatch.setattr(Collator, "__call__", unsupervised)
    with pytest.raises(ValueError, match=r"nothing to learn: .* 0 cannot be used and the others have no supervised"):
        run.run(load(data, tmp_path / "out"))


# Workers that are killed, and full disks


def with_a_killed_worker(data, output, told):
    """The command, whose first worker is killed after step 3 while the other one holds the lock of their pipe."""
    see = LynxTrainer._see

    def kill(self, batch):
        see(self, batch)
        if self.state.global_step == 3:
            for worker in multiprocessing.active_children()[:1]:
                os.kill(worker.pid, signal.SIGKILL)
            for worker in multiprocessing.active_children()[1:]:
                os.kill(worker.pid, signal.SIGSTOP)  # as one that waits for ever: it cannot end itself

    LynxTrainer._see = kill
    changes = [f"data={data}", f"output={output}", "token_budget=130", "steps=1000", "save_every=2", "workers=2"]
    with told.open("w") as file:
        sys.stderr = file
        code = cli.main(["train", "tiny", *changes])
    sys.exit(code)


def test_a_killed_worker_ends_the_run(data, tmp_path):
    start = time.monotonic()
    assert processes.exit_code(with_a_killed_worker, data, tmp_path / "out", tmp_path / "told") == 2
    assert time.monotonic() - start < 90, "a minute, and the start"
    last = tmp_path / "out/checkpoints/train/checkpoint-2"
    [line] = [line for line in (tmp_path / "told").read_text().splitlines() if line.startswith("lynx train:")]
    assert "a process that loads data was killed" in line
    assert f"the last good checkpoint is {last}" in line
    assert is_good(last)


@pytest.mark.parametrize("owner", ["save_file", "torch", "log"])
def test_a_full_disk_is_told_in_a_sentence(data, tmp_path, monkeypatch, capsys, owner):
    """Whichever file does not fit. The checkpoint before it is whole, and the run goes on from there with more room."""
    full = {
        "save_file": SafetensorError("I/O error: No space left on device (os error 28)"),
        "torch": RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed\n frame #0"),
        "log": OSError(errno.ENOSPC, "No space left on device"),
    }[owner]
    where, name = {"save_file": (trainer, owner), "torch": (torch, "save"), "log": (callbacks, "append_entry")}[owner]
    original = getattr(where, name)

    def write(*args, **kwargs):
        if (tmp_path / "out/checkpoints/train/checkpoint-2").exists():
            raise full
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(where, name, write)
        patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))
        changes = [f"data={data}", f"output={tmp_path / 'out'}", "token_budget=130", "steps=6", "save_every=2"]
        assert cli.main(["train", "tiny", *changes]) == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lynx train:")]
    assert "the disk is full" in line
    last = tmp_path / "out/checkpoints/train/checkpoint-2"
    assert f"the last good checkpoint is {last}" in line
    assert is_good(last)
    assert cli.main(["train", "tiny", *changes]) == 0


# Models that are not finite


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("command", ["ask", "evaluate"])
def test_weights_that_are_not_finite_are_refused(data, tmp_path, processor, model, capsys, command, value):
    name, parameter = list(model.named_parameters())[7]
    with torch.no_grad():
        parameter.view(-1)[-1] = value
    checkpoint.save(tmp_path / "model", model, processor)
    rest = [str(data)] if command == "evaluate" else [str(next(tmp_path.glob("*.png"))), "Which colour?"]
    assert cli.main([command, str(tmp_path / "model"), *rest]) == 2
    told = capsys.readouterr()
    assert f"1 of the {parameter.numel()} values of {name} are NaN or infinite" in told.err
    assert not told.out
