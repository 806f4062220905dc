"""TRL's trainers with shared prefixes on two ranks, of which one has rows without images."""

from contextlib import nullcontext

import pytest
import torch
from datasets import Dataset
from torch import distributed
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from lynx_kernels.integrations.apply import apply
from lynx_kernels.integrations.collator import PackedCollator
from lynx_kernels.integrations.trl import PackedSFTTrainer, SharedPrefixDPOTrainer
from lynx_kernels.integrations.trl.branches import pack_rows
from lynx_kernels.integrations.trl.head import add_head
from lynx_kernels.integrations.trl.install import conversation_with_image
from tests.lynx import processes
from tests.lynx_kernels import test_trl_dpo, test_trl_grpo, test_trl_sft, trl_models
from tests.lynx_kernels.test_trl_branches import rows_of

MAKERS = {"GRPO": (test_trl_grpo, test_trl_grpo.Ours), "DPO": (test_trl_dpo, SharedPrefixDPOTrainer),
          "SFT": (test_trl_sft, PackedSFTTrainer)}  # fmt: skip


def data_of(kind):
    """One sample with an image, one without."""
    said = trl_models.said
    columns = {
        "prompt": [[said("user", "w10 w11")], [said("user", "w12")]], "images": [[trl_models.image(0)], []],
    }  # fmt: skip
    answers = {"DPO": ("chosen", "rejected"), "SFT": ("completion",), "GRPO": ()}[kind]
    for number, name in enumerate(answers):
        columns[name] = [[said("assistant", f"w{20 + number} w21")], [said("assistant", f"w{30 + number}")]]
    return Dataset.from_dict(columns)


def train(rank, kind, ranks, folder):
    module, trainer_class = MAKERS[kind]
    trainer = module.make(
        trainer_class, folder / f"{rank}-{ranks}", "Qwen3VL", data=data_of(kind), max_steps=2,
        per_device_train_batch_size=(test_trl_grpo.GROUP if kind == "GRPO" else 1) * (2 // ranks),
    )  # fmt: skip
    trainer.train()
    assert trainer.accelerator.num_processes == ranks
    return {name: each.detach() for name, each in trainer.model.named_parameters()}


@pytest.mark.parametrize("kind", MAKERS)
def test_a_rank_without_images_does_not_wait(kind, tmp_path):
    """The mean over two ranks is that of one rank with both samples."""
    expected = train(0, kind, 1, tmp_path)
    for found in processes.ranks(2, tmp_path, train, kind, 2, tmp_path):
        for name, each in expected.items():
            torch.testing.assert_close(found[name], each, rtol=2e-5, atol=2e-5)


def sharded(rank, ranks):
    """Gradients of the mean over the ranks, of which rank 1 has rows of text."""
    model, processor = trl_models.build("Qwen3VL")
    apply(model, loss=False)
    add_head(model, outputs=("log_probs",), autocast=nullcontext)
    rows = rows_of(processor)
    if ranks == 1:
        (model(branches=pack_rows(rows[:5], PackedCollator(model))).log_probs.sum() / 2).backward()
        (model(branches=pack_rows(rows[5:], PackedCollator(model))).log_probs.sum() / 2).backward()
        return {name: each.grad for name, each in model.named_parameters()}
    distributed.init_process_group("gloo")
    collator = PackedCollator(model, placeholder=conversation_with_image(processor))
    mesh = distributed.init_device_mesh("cpu", (2,))
    for layer in (*model.model.language_model.layers, *model.model.visual.blocks):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert all(isinstance(each, DTensor) for each in model.parameters())
    model(branches=pack_rows(rows[5:] if rank else rows[:5], collator)).log_probs.sum().backward()
    return {name: each.grad.full_tensor() for name, each in model.named_parameters()}


def test_sharded_ranks_run_the_same_layers(tmp_path):
    """With FSDP2, a rank that left out the vision tower would leave the other waiting for its shards."""
    expected = sharded(0, 1)
    for found in processes.ranks(2, tmp_path, sharded, 2):
        for name, each in expected.items():
            torch.testing.assert_close(found[name], each, rtol=2e-5, atol=2e-5)
