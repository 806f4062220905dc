"""One batch, however it is split: over packs, micro-batches, ranks, and sharded parameters."""

import pytest
import torch
from torch import distributed
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainingArguments

from lynx import LynxProcessor
from lynx.train import param_groups
from lynx.train.trainer import LynxTrainer
from tests.lynx import processes
from tests.lynx.conftest import make_config, make_model, make_tokenizer
from tests.lynx.packs import FixedPacks, Records, stage

# The same eight samples for every step, and a second, other step.
SPLITS = {
    "one pack": [[0, 1, 2, 3, 4, 5, 6, 7]],
    "two packs": [[0, 1, 2, 3], [4, 5, 6, 7]],
    "uneven packs": [[7], [6, 0, 5, 1, 3, 2, 4]],
    "a sample each": [[index] for index in (4, 2, 7, 0, 1, 3, 6, 5)],
}
STEPS = 3


class Gradients(TrainerCallback):
    """Keeps the gradients of the first step, and the losses."""

    def __init__(self):
        self.first, self.losses = {}, []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if not self.first:
            self.first = {
                name.removeprefix("module."): parameter.grad.clone()
                for name, parameter in model.named_parameters()
                if parameter.grad is not None
            }

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.losses.append(logs["loss"])


def make():
    tokenizer = make_tokenizer()
    config = make_config(tokenizer)
    model = make_model(config)
    return model, LynxProcessor.for_model(config, tokenizer)


def train(split, folder, *, ranks=1, rank=0):
    """Three steps on the same eight samples, with an epsilon so large that AdamW is gentle to rounding."""
    model, processor = make()
    chosen = stage(steps=STEPS, learning_rate=0.5, epsilon=1.0)
    param_groups.set_trainable(model, chosen.trainable)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        gradient_accumulation_steps=len(split) // ranks,
        max_grad_norm=0.0,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        ddp_find_unused_parameters=False,
    )
    seen = Gradients()
    trainer = LynxTrainer(
        model,
        arguments,
        stage=chosen,
        sampler=FixedPacks(split, ranks, rank),
        train_dataset=Records(processor, 8, with_text_only=False),
        data_collator=processor.pack,
        callbacks=[seen],
    )
    trainer.train()
    return {
        "gradients": seen.first,
        "losses": seen.losses,
        "weights": trainer.trained(),
        "log": trainer.state.log_history,
    }


def train_rank(rank, split, folder):
    result = train(split, folder, ranks=2, rank=rank)
    assert distributed.get_backend() == "gloo"
    return {**result, "ranks": distributed.get_world_size()}


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    return train(SPLITS["one pack"], tmp_path_factory.mktemp("one"))


def check(result, expected):
    assert result["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    assert result["losses"][-1] < 0.9 * result["losses"][0], "nothing was learned"
    for what in ("gradients", "weights"):
        assert result[what].keys() == expected[what].keys()
        for name, value in expected[what].items():
            scale = value.abs().max().clamp(min=1e-4)  # of a parameter
            worst = (result[what][name] - value).abs().max() / scale
            assert worst < 1e-3, f"{what}: {name} is off by {worst:.1e}"


@pytest.mark.parametrize("split", [name for name in SPLITS if name != "one pack"])
def test_a_split_into_packs_changes_nothing(split, expected, tmp_path):
    check(train(SPLITS[split], tmp_path), expected)


@pytest.mark.parametrize("split", ["two packs", "uneven packs", "a sample each"])
def test_ranks_change_nothing(split, expected, tmp_path):
    """DDP on two processes; with a sample each, four accumulated micro-batches a rank."""
    for result in processes.ranks(2, tmp_path, train_rank, SPLITS[split], tmp_path):
        assert result["ranks"] == 2
        check(result, expected)
        speeds = [entry for entry in result["log"] if "loss" in entry]
        assert all(
            entry["pack_utilization"]
            == pytest.approx(expected["log"][0]["pack_utilization"] / len(SPLITS[split]), abs=2e-4)
            for entry in speeds
        )


def shard_rank(rank, split):
    """The same steps with every decoder layer's and the rest's parameters sharded, plain PyTorch around them."""
    distributed.init_process_group("gloo")
    model, processor = make()
    chosen = stage(learning_rate=0.5, epsilon=1.0)
    param_groups.set_trainable(model, chosen.trainable, torch.bfloat16)
    frozen = sum(not parameter.requires_grad for parameter in model.parameters())
    mesh = distributed.init_device_mesh("cpu", (2,))
    for layer in model.get_decoder().layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    assert {parameter.dtype for parameter in model.parameters() if not parameter.requires_grad} == {torch.bfloat16}
    optimizer = torch.optim.AdamW(
        param_groups.optimizer_groups(model, chosen.weight_decay), lr=chosen.learning_rate, eps=chosen.epsilon
    )
    records = Records(processor, 8, with_text_only=False)
    losses = []
    for _ in range(STEPS):
        batch = processor.pack([records[index] for index in split[rank]])
        count = (batch["labels"] != -100).sum()
        distributed.all_reduce(count)
        loss = model(**batch, num_items_in_batch=count).loss
        (2 * loss).backward()  # the gradients are averaged
        optimizer.step()
        optimizer.zero_grad()
        whole = loss.detach().clone()
        distributed.all_reduce(whole)
        losses.append(whole.item())
    assert len(optimizer.state) == sum(parameter.requires_grad for parameter in model.parameters())
    assert frozen
    return {"losses": losses}


def whole_losses(split):
    """As ``shard_rank``, in one process and unsharded."""
    model, processor = make()
    chosen = stage(learning_rate=0.5, epsilon=1.0)
    param_groups.set_trainable(model, chosen.trainable, torch.bfloat16)
    optimizer = torch.optim.AdamW(
        param_groups.optimizer_groups(model, chosen.weight_decay), lr=chosen.learning_rate, eps=chosen.epsilon
    )
    records = Records(processor, 8, with_text_only=False)
    losses = []
    for _ in range(STEPS):
        batches = [processor.pack([records[index] for index in pack]) for pack in split]
        count = sum((batch["labels"] != -100).sum() for batch in batches)
        loss = sum(model(**batch, num_items_in_batch=count).loss for batch in batches)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("split", ["two packs", "uneven packs"])
def test_sharded_parameters_change_nothing(split, tmp_path):
    """FSDP2; through ``fully_shard`` itself, as accelerate on a CPU would silently run DDP instead."""
    expected = whole_losses(SPLITS[split])
    assert expected[-1] < 0.9 * expected[0]
    for result in processes.ranks(2, tmp_path, shard_rank, SPLITS[split]):
        assert result["losses"] == pytest.approx(expected, rel=1e-4)
