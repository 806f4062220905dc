"""``PackedSFTTrainer`` trains as TRL's ``SFTTrainer``, on the same dialogs."""

import inspect
import logging

import peft
import pytest
import torch
import trl
from datasets import Dataset

from lynx_kernels.integrations.trl import PackedSFTTrainer
from lynx_kernels.integrations.trl.packs import Packs
from tests.lynx_kernels import trl_models
from tests.lynx_kernels.test_trl_grpo import PlainHead, check

ANSWERS = [["w30 w31 w32", "w30 w33"], ["w40"], ["w41 w42 w43 w44", "w45", "w46 w47"]]


def annotated(flat=False):
    """Three images with two, one and three annotations; a row for each image, or for each annotation."""
    columns = {"prompt": [], "completion": [], "image": [], "branches": []}
    for number, answers in enumerate(ANSWERS):
        said = [[trl_models.said("assistant", each)] for each in answers]
        for first in said if flat else said[:1]:
            columns["prompt"].append([trl_models.said("user", f"w{10 + number} w11")])
            columns["completion"].append(first)
            columns["image"].append(trl_models.image(number))
            columns["branches"].append([{"completion": each} for each in said[1:]])
    if flat:
        del columns["branches"]
    return Dataset.from_dict(columns)


def make(kind, folder, family="Llava", *, data=None, dtype=torch.float32, peft_config=None, ours=None, **options):
    model, processor = trl_models.build(family, dtype=dtype)
    shared = kind is PackedSFTTrainer
    wanted = {
        "per_device_train_batch_size": 3 if shared else 6, "max_steps": 2, "learning_rate": 0.1, "optim": "sgd",
        "logging_steps": 1, "report_to": [], "save_strategy": "no", "disable_tqdm": True, "use_cpu": True,
        "bf16": False, "gradient_checkpointing": False, "max_grad_norm": 0.0, "max_length": None,
    }  # fmt: skip
    data = annotated(flat=not shared) if data is None else data
    if not {"image", "images"} & set(data.column_names):
        processor = processor.tokenizer
    config = trl.SFTConfig(folder, **(wanted | options))
    torch.manual_seed(0)
    return kind(
        model, args=config, train_dataset=data, processing_class=processor, peft_config=peft_config,
        **(ours or {} if shared else {}),
    )  # fmt: skip


def train(kind, folder, family="Llava", **options):
    trainer = make(kind, folder, family, **options)
    trainer.train()
    logged = [each for each in trainer.state.log_history if "loss" in each]
    names = ("loss", "entropy", "mean_token_accuracy", "num_tokens")
    metrics = [[each[name] for name in names] for each in logged]
    return metrics, {name: each.detach() for name, each in trainer.model.named_parameters() if each.requires_grad}


OPTIONS = {
    "answers": {},
    "all tokens": {"completion_only_loss": False, "gradient_checkpointing": True},
    "dft": {"loss_type": "dft"},
    "lora": {"peft_config": peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_are_those_of_trl(name, tmp_path):
    check(*(train(kind, tmp_path, **OPTIONS[name]) for kind in (PackedSFTTrainer, trl.SFTTrainer)), 2e-5)


@pytest.mark.parametrize("family", trl_models.FAMILIES)
def test_families_train_as_with_trl(family, tmp_path):
    check(*(train(kind, tmp_path, family) for kind in (PackedSFTTrainer, trl.SFTTrainer)), 2e-5)


def test_accumulated_micro_batches(tmp_path):
    """Of other numbers of tokens: the mean is over all of them."""
    options = {"per_device_train_batch_size": 1, "max_steps": 1}
    ours = train(PackedSFTTrainer, tmp_path, gradient_accumulation_steps=3, **options)
    theirs = train(trl.SFTTrainer, tmp_path, gradient_accumulation_steps=6, **options)
    check((0.0, ours[1]), (0.0, theirs[1]), 2e-5)


@pytest.mark.parametrize("images", [True, False])
def test_assistant_turns_only(images, tmp_path):
    said = trl_models.said
    dialogs = [
        [said("user", "w10 w11"), said("assistant", "w20 w21"), said("user", "w12"), said("assistant", "w22")],
        [said("user", "w10 w11"), said("assistant", "w20 w23")],
    ]
    if images:
        image = [trl_models.image(0)]
        flat = Dataset.from_dict({"messages": dialogs, "image": image * 2})
        data = Dataset.from_dict({"messages": dialogs[:1], "branches": [[{"messages": dialogs[1]}]], "image": image})
    else:
        flat = data = Dataset.from_dict({"messages": dialogs})
    options = {"assistant_only_loss": True, "per_device_train_batch_size": 2}
    ours, theirs = (
        train(kind, tmp_path, data=rows, **options) for kind, rows in ((PackedSFTTrainer, data), (trl.SFTTrainer, flat))
    )
    check(ours, theirs, 2e-5)
    batch = make(PackedSFTTrainer, tmp_path, data=data, **options)
    collated = batch.data_collator([dict(each) for each in batch.train_dataset])
    assert (collated["labels"] != -100).sum() == 8  # what the assistant says, and <end>
    assert len(set(collated["branches"].predictors.tolist())) == 6  # both begin with "w20"


def test_twenty_steps_in_fp64(tmp_path, monkeypatch):
    monkeypatch.setattr("trl.trainer.utils._ChunkedLogProbFunction", PlainHead)
    trl_models.without_fp32(trl_models.build("SmolVLM")[0], monkeypatch)
    options = {"dtype": torch.float64, "max_steps": 20, "optim": "adamw_torch", "learning_rate": 1e-3}
    check(*(train(kind, tmp_path, "SmolVLM", **options) for kind in (PackedSFTTrainer, trl.SFTTrainer)), 1e-9)


def test_weights_of_dialogs(tmp_path):
    """A dialog of n tokens counts sqrt(n), or 1, in the mean."""
    flat = make(trl.SFTTrainer, tmp_path)
    batch = flat.data_collator([dict(each) for each in flat.train_dataset])
    labels = batch.pop("labels")[:, 1:]
    log_probs = flat.model(**batch).logits[:, :-1].log_softmax(-1)
    is_scored = labels != -100
    losses = -log_probs.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    count = is_scored.sum(1)
    assert sorted(count.tolist()) == [2, 2, 3, 3, 4, 5]
    for name, factor in (("sqrt", count.rsqrt()), ("equal", 1 / count)):
        weights = factor[:, None] * is_scored
        expected = (losses * weights).sum() / weights.sum()
        trainer = make(PackedSFTTrainer, tmp_path, max_steps=1, ours={"branch_weights": name})
        trainer.train()
        assert trainer.state.log_history[0]["loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_an_image_runs_once(tmp_path):
    trainer = make(PackedSFTTrainer, tmp_path, max_steps=1)
    seen = []
    trainer.model.model.vision_tower.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    trainer.train()
    assert seen == [3]
    batch = trainer.data_collator([dict(each) for each in trainer.train_dataset])
    assert batch["branches"].num_tokens == 3 * 8 + (4 + 2 - 0) + 2 + (5 + 2 + 3)


def test_rows_are_filled_up_to_the_budget(tmp_path, caplog):
    """Every sample once each time around; one that is too long, and one that cannot be read, skipped and named."""
    data = annotated()
    long = [trl_models.said("user", " ".join(trl_models.WORDS[:30]))]
    bad = {"prompt": [trl_models.said("user", "w5")], "image": None, "branches": None}
    rows = [*data.to_list(), {**data[0], "prompt": long}, {**bad, "completion": [trl_models.said("assistant", "w5")]}]
    trainer = make(PackedSFTTrainer, tmp_path, ours={"token_budget": 40}, max_steps=8)
    collate = trainer.data_collator
    broken = collate.collate

    def read(examples):
        if examples[0]["image"] is None:
            raise OSError("cannot identify image file")
        return broken(examples)

    collate.collate = read
    packs = Packs([{**each, "image": data[0]["image"] if each["image"] else None} for each in rows], collate,
                  token_budget=40)  # fmt: skip
    with caplog.at_level(logging.WARNING, "lynx_kernels"):
        batches = [batch for batch, _ in zip(packs, range(12), strict=False)]
    assert all(batch["branches"].num_tokens <= 40 for batch in batches)
    assert max(len(batch["labels"]) for batch in batches) > 3  # more than one sample
    assert "sample 3 is skipped (" in caplog.text
    assert "it has 42 tokens, and token_budget is 40" in caplog.text
    assert "sample 4 of the batch is skipped: OSError: cannot identify image file" in caplog.text
    with pytest.raises(ValueError, match="none of the 1 samples of this part can be used; the log says why"):
        next(iter(Packs(rows[3:4], collate, token_budget=40)))
    with pytest.raises(ValueError, match="none of the 1 samples of a batch could be read; the log says why"):
        collate([rows[4]])
    trainer.data_collator.collate = broken
    trainer.train()
    assert trainer.state.global_step == 8


def test_resumed_runs_see_the_same_samples(tmp_path):
    options = {"ours": {"token_budget": 24}, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = make(PackedSFTTrainer, tmp_path / "whole", "SmolVLM", **options)
    whole.train()
    again = make(PackedSFTTrainer, tmp_path / "again", "SmolVLM", **options)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for name, each in whole.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], each), name


def test_what_cannot_be_right_is_refused(tmp_path):
    def refused(match, ours=None, **options):
        with pytest.raises(ValueError, match=match):
            make(PackedSFTTrainer, tmp_path, ours=ours, **options)

    text = Dataset.from_dict({"text": ["w5 w6", "w7 w8"]})
    refused("branch_weights is 'mean', must be", {"branch_weights": "mean"})
    refused("with token_budget, max_steps says when to stop", {"token_budget": 20}, max_steps=-1)
    refused("PackedSFTTrainer packs rows itself", data=text, packing=True, max_length=16)
    refused("PackedSFTTrainer makes no logits, which", label_smoothing_factor=0.1)
    refused("loss_type='dft' weighs tokens itself", {"branch_weights": "sqrt"}, loss_type="dft")
    with_branches = Dataset.from_dict({"text": ["w5 w6"], "branches": [["w6"]]})
    refused("samples without images need no column 'branches'", data=with_branches)


def test_what_of_trl_is_replaced_and_what_is_relied_on():
    """A new release of TRL that fails here wants another look at ``integrations/trl``."""
    inherited = {name for kind in trl.SFTTrainer.__mro__ for name in vars(kind)}
    replaced = {name for name in vars(PackedSFTTrainer) if name in inherited and name[:2] != "__"}
    assert replaced - {"_tag_names"} == {
        "_get_num_items_in_batch", "_prepare_inputs", "_set_signature_columns_if_needed", "get_train_dataloader",
    }  # fmt: skip
    source = inspect.getsource(trl.SFTTrainer.compute_loss)
    assert "outputs = model(**inputs, fused_lm_head=True)" in source
    assert "per_token_loss = -outputs.log_probs" in source
    assert "num_tokens = outputs.label_mask.sum() if num_items_in_batch is None else num_items_in_batch" in source
