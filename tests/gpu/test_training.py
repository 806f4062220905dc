"""Training with accelerate's FSDP2, one process per GPU, started as a user does. On a CPU it would silently be DDP."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lynx import checkpoint
from lynx.train import recipe, run
from lynx.train.log import read_log
from tests.lynx.small import write_records

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "lynx" / "train" / "launch"
CHANGES = {"steps": 6, "save_every": 3, "log_every": 1, "token_budget": 256, "precision": "bf16"}


def train(data, output, config=None, processes=1, **changes):
    """Run ``lynx train`` on the GPUs and return the losses of its log."""
    changes = {**CHANGES, "data": data, "output": output, **changes}
    launcher = ["-m", "lynx.cli"]
    if config is not None:
        options = ["--config_file", str(LAUNCH / config), "--num_processes", str(processes), "--main_process_port", "0"]
        launcher = ["-m", "accelerate.commands.launch", *options, "-m", "lynx.cli"]
    arguments = [f"{key}={value}" for key, value in changes.items()]
    done = subprocess.run(
        [sys.executable, *launcher, "train", "tiny", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return [entry["loss"] for entry in read_log(output / "log.jsonl") if "loss" in entry]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_records(tmp_path_factory.mktemp("data"), 24)


@pytest.mark.usefixtures("cuda")
def test_sharded_training_gives_the_same_losses(data, tmp_path):
    """On up to two GPUs. Packs depend on the number of ranks, so both runs have the same number."""
    processes = min(2, torch.cuda.device_count())
    whole, sharded = (train(data, tmp_path / name, f"{name}.yaml", processes) for name in ("ddp", "fsdp2"))
    assert sharded == pytest.approx(whole, rel=5e-2)
    assert list((tmp_path / "fsdp2/checkpoints/train/checkpoint-6").glob("pytorch_model_fsdp*")), "it was not sharded"
    for name in ("ddp", "fsdp2"):
        model, _ = checkpoint.load(tmp_path / name)
        assert not any(torch.isnan(parameter).any() for parameter in model.parameters())


@pytest.mark.usefixtures("cuda")
def test_one_launched_process_equals_a_plain_run(data, tmp_path):
    launched = train(data, tmp_path / "launched", "ddp.yaml", 1, tokens_per_step=2 * 256)
    assert launched == pytest.approx(train(data, tmp_path / "plain", tokens_per_step=2 * 256), rel=1e-2)


@pytest.mark.usefixtures("cuda")
def test_sharded_training_is_resumed(data, tmp_path):
    """Resume from the middle checkpoint. The remaining losses equal those of the uninterrupted run."""
    processes = min(2, torch.cuda.device_count())
    whole = train(data, tmp_path / "out", "fsdp2.yaml", processes)
    (tmp_path / "out" / "config.json").unlink()
    shutil.rmtree(tmp_path / "out" / "checkpoints" / "train" / "checkpoint-6")
    again = train(data, tmp_path / "out", "fsdp2.yaml", processes)
    assert again[:3] == whole[:3]
    assert again[3:] == pytest.approx(whole[3:], rel=1e-3)


@pytest.mark.usefixtures("cuda")
def test_frozen_parameters_have_no_optimizer_state(data, tmp_path):
    """In a stage that trains the adapters, each trained parameter has two fp32 moments, and no other has any."""
    chosen = recipe.load("tiny", {"data": str(data), "output": str(tmp_path), "trainable": ["adapters"], **CHANGES})
    run.run(chosen)
    state = torch.load(tmp_path / "checkpoints/train/checkpoint-6/optimizer.pt", weights_only=True, map_location="cpu")
    model, _ = checkpoint.load(tmp_path)
    adapters = sum(value.numel() for name, value in model.named_parameters() if "output_adapter" in name)
    moments = [each[key] for each in state["state"].values() for key in ("exp_avg", "exp_avg_sq")]
    assert sum(moment.numel() for moment in moments) == 2 * adapters
    assert {moment.dtype for moment in moments} == {torch.float32}
