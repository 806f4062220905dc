"""What a run may turn on and off, for both fusions: memory, precision, compilation, workers, logs."""

import multiprocessing
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import TrainerCallback, TrainingArguments
from transformers.models.blip_2.modeling_blip_2 import Blip2MLP
from transformers.models.llama.modeling_llama import LlamaMLP

from lynx import presets
from lynx.train import build, param_groups, recipe, run
from lynx.train.log import read_log
from lynx.train.trainer import LynxTrainer
from tests.lynx.small import write_records
from tests.lynx.train.test_training import train

READS = {"prefix": "adapters", "cross_attention": "cross_attention"}  # what a fusion puts into the decoder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_records(tmp_path_factory.mktemp("data"), 12)


@pytest.fixture(params=READS)
def fusion(request):
    """What training an otherwise frozen model with this fusion changes."""
    trainable = ["resampler", "frame_positions", READS[request.param], "vision_tower"]
    return {"model_options.fusion": request.param, "trainable": trainable, "workers": 0}


def losses(log):
    return [entry["loss"] for entry in log]


def counted(monkeypatch, kind):
    """How often modules of a class ran, as a list that grows; whether under autocast."""
    calls, forward = [], kind.forward

    def counting(*args, **kwargs):
        calls.append(torch.is_autocast_enabled("cpu"))
        return forward(*args, **kwargs)

    monkeypatch.setattr(kind, "forward", counting)
    return calls


def test_gradient_checkpointing_runs_every_layer_again(fusion, data, tmp_path, monkeypatch):
    of_decoder, of_tower = (counted(monkeypatch, kind) for kind in (LlamaMLP, Blip2MLP))
    plain = train(data, tmp_path / "plain", steps=3, **fusion)
    once = len(of_decoder), len(of_tower)
    assert once == (9, 9), "three layers in three steps"
    again = train(data, tmp_path / "again", steps=3, gradient_checkpointing=True, **fusion)
    assert (len(of_decoder), len(of_tower)) == (3 * once[0], 3 * once[1])
    assert losses(again) == pytest.approx(losses(plain), rel=1e-6)


def test_bf16_casts_and_learns_the_same(fusion, data, tmp_path, monkeypatch):
    casts = counted(monkeypatch, LlamaMLP)
    plain = train(data, tmp_path / "plain", steps=3, **fusion)
    assert not any(casts)
    casts.clear()
    low = train(data, tmp_path / "low", steps=3, precision="bf16", **fusion)
    assert casts
    assert all(casts)
    assert losses(low) != losses(plain)
    assert losses(low) == pytest.approx(losses(plain), rel=2e-2)


def test_workers_change_nothing(fusion, data, tmp_path):
    plain, loaded = (train(data, tmp_path / str(n), steps=3, **{**fusion, "workers": n}) for n in (0, 1))
    assert losses(loaded) == losses(plain)


def test_workers_outlive_sigterm(data, tmp_path, monkeypatch):
    """Which a scheduler sends to them as well: a run that wants to end its step and save still needs them."""
    step = LynxTrainer.training_step

    def terminating(*args, **kwargs):
        for worker in multiprocessing.active_children():
            worker.terminate()  # SIGTERM
        return step(*args, **kwargs)

    monkeypatch.setattr(LynxTrainer, "training_step", terminating)
    assert len(train(data, tmp_path, steps=8, workers=1)) == 8, "more than were loaded ahead"


class AtTheStep(TrainerCallback):
    """Looks at every parameter between an optimizer's step and the end of its gradients."""

    def __init__(self):
        self.seen = {}

    def on_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        states = optimizer.optimizer.state
        for name, parameter in model.named_parameters():
            moments = [value for value in states.get(parameter, {}).values() if value.dim()]
            held = [parameter.dtype, None if parameter.grad is None else parameter.grad.dtype]
            self.seen[name] = [*held, *(each.dtype for each in moments)]


@pytest.mark.parametrize("fusion", READS)
def test_what_is_frozen_is_bf16_and_has_neither_gradient_nor_state(fusion, data, tmp_path):
    trainable = ("resampler", READS[fusion])
    chosen = recipe.load(
        "tiny",
        {
            "data": str(data), "output": str(tmp_path), "token_budget": 100, "steps": 2, "precision": "bf16",
            "model_options.fusion": fusion, "trainable": list(trainable), "betas": [0.8, 0.9], "epsilon": 1e-5,
            "weight_decay": 0.2, "max_grad_norm": 0.25,
        },
    )  # fmt: skip
    mixture = build.mixture(chosen, chosen.stages[0])
    model, processor = build.model(chosen, lambda: mixture)
    trainer, at_the_step = build.trainer(chosen, chosen.stages[0], model, processor, mixture), AtTheStep()
    trainer.add_callback(at_the_step)
    trainer.train()
    assert trainer.args.max_grad_norm == 0.25
    for group, decay in zip(trainer.optimizer.param_groups, (0.2, 0.0), strict=True):
        assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.8, 0.9), 1e-5, decay)
    held = sum(len(group["params"]) for group in trainer.optimizer.param_groups)
    assert held == sum(parameter.requires_grad for parameter in model.parameters())
    assert at_the_step.seen.keys() == {name for name, _ in model.named_parameters()}
    present = {param_groups.group_of(name) for name in at_the_step.seen}
    assert present == {*trainable, "frame_positions", "vision_tower", "language_model"}
    for name, dtypes in at_the_step.seen.items():
        trained = [torch.float32] * 4  # itself, its gradient and two moments
        assert dtypes == (trained if param_groups.group_of(name) in trainable else [torch.bfloat16, None]), name


def one_layer_each(tokenizer):
    config = presets.tiny(tokenizer)
    config.text_config.num_hidden_layers = config.vision_config.num_hidden_layers = config.resampler_depth = 1
    return config


def test_compiled_training(fusion, data, tmp_path, monkeypatch):
    """Through torch.compile, by the backend that needs no compiler; a graph for each size that is seen to change only.

    After eight graphs torch.compile gives up and runs the model as it is.
    """
    monkeypatch.setattr(build, "presets", SimpleNamespace(**{**vars(presets), "tiny": one_layer_each}))
    plain = train(data, tmp_path / "plain", steps=11, **fusion)
    monkeypatch.setattr(build, "TrainingArguments", partial(TrainingArguments, torch_compile_backend="eager"))
    torch._dynamo.reset()
    counters.clear()
    compiled = train(data, tmp_path / "compiled", steps=11, compile=True, **fusion)
    assert 0 < counters["stats"]["unique_graphs"] <= 4
    assert counters["frames"]["ok"] == counters["frames"]["total"], "something cannot be compiled"
    assert losses(compiled) == pytest.approx(losses(plain), rel=1e-5)


def test_tensorboard_is_asked_for_in_vain(data, tmp_path, monkeypatch):
    monkeypatch.setattr(run.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(recipe.RecipeError, match="pip install tensorboard"):
        train(data, tmp_path / "out", steps=1, tensorboard=True)
    assert not (tmp_path / "out").exists(), "said before anything is begun"


def test_tensorboard_gets_the_log(data, tmp_path, monkeypatch):
    """All numbers of it, into one folder a stage; what comes after the step that a run goes on from is purged."""
    opened, written = [], []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            opened.append((folder, purge_step))

        def add_scalar(self, name, value, step):
            written.append((step, name, value))

        def flush(self):
            pass

        def close(self):
            opened.append("closed")

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=SummaryWriter))
    monkeypatch.setattr(run.importlib.util, "find_spec", lambda name: name == "tensorboard")
    train(data, tmp_path, steps=2, tensorboard=True)
    folder = str(tmp_path / "tensorboard" / "train")
    assert opened == [(folder, 1), "closed"]
    logged = read_log(tmp_path / "log.jsonl")
    known = ("stage", "step", "time")
    assert written == [(entry["step"], name, entry[name]) for entry in logged for name in entry if name not in known]
    (tmp_path / "config.json").unlink()
    train(data, tmp_path, steps=2, tensorboard=True)
    assert opened[2:] == [(folder, 3), "closed"]
