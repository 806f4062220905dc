"""``PackedCollator``: each sample of a packed row as if it were alone, for models with images."""

import pytest
import torch
import transformers as hf

from lynx_kernels.integrations import transformers as integration
from lynx_kernels.integrations.apply import apply
from lynx_kernels.integrations.collator import PackedCollator
from tests.lynx_kernels import families, vlms
from tests.lynx_kernels.vlm_checks import samples_of


@pytest.mark.parametrize("family", ["Qwen3VL", "Qwen25VL", "Pixtral"])
def test_all_attention_runs_on_the_kernels(family):
    """That each sample is as alone, and trees, too: test_vlm_families.py."""
    model = vlms.build(family)
    with apply(model), families.counted() as calls, torch.no_grad():
        model(**PackedCollator(model)(samples_of(vlms.FAMILIES[family])), use_cache=False)
    assert calls == {"kernels": 4}


def test_trainer_takes_it_as_it_is(tmp_path):
    model = vlms.build("Qwen3VL")
    apply(model)
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 2, "use_cpu": True}
    arguments = hf.TrainingArguments(
        tmp_path,
        **options,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        remove_unused_columns=False,
        logging_steps=1,
    )
    rows = [{name: each[0] if name in ("input_ids", "labels", "attention_mask") else each for name, each in row.items()}
            for row in samples_of(vlms.FAMILIES["Qwen3VL"])] * 2  # fmt: skip
    trainer = hf.Trainer(model, arguments, train_dataset=rows, data_collator=PackedCollator(model))
    assert trainer.train().training_loss > 0


def test_what_has_no_packed_form_is_named():
    model = vlms.build("Qwen3VL")
    apply(model)
    collate, [first, text, _] = PackedCollator(model, token_budget=12), samples_of(vlms.FAMILIES["Qwen3VL"])
    with pytest.raises(ValueError, match=r"2 samples have .* tokens, and token_budget is 12; plan batches"):
        collate([first, text])
    with pytest.raises(ValueError, match="sample 1 has no input_ids, but labels"):
        collate([text, {"labels": [1, 2]}])
    with pytest.raises(ValueError, match="sample 0: conversations of one tree must have the same images"):
        collate([[first, text]])
    other = {**text, "labels": torch.full_like(text["labels"], -100)}
    with pytest.raises(ValueError, match="sample 0: conversations of one tree have the same tokens up to token 4, but"):
        collate([[text, other]])
    with pytest.raises(ValueError, match="samples of one row differ in their values per token: only some have labels"):
        collate([text, {name: each for name, each in text.items() if name != "labels"}])
    with pytest.raises(ValueError, match=r"input_ids are \(2, 3\), must be of one conversation"):
        collate([{"input_ids": torch.ones(2, 3)}])


def test_positions_that_are_not_the_models_are_refused():
    model, layout = vlms.build("Qwen3VL"), integration.PackedLayout.causal([2, 3])
    inputs = {"input_ids": torch.arange(3, 8)[None], "attention_mask": integration.packed_mask(layout)}
    with apply(model):
        with pytest.raises(ValueError, match=r"three dimensions \(M-RoPE\), got position_ids of shape \(1, 5\)"):
            model(**inputs, position_ids=layout.position_ids[None])
        with pytest.raises(ValueError, match="a packed row needs position_ids"):
            model(**inputs)
    model = families.build(families.config_of("opt"), "sdpa")
    model.forward = lambda input_ids, attention_mask: None
    with apply(model), pytest.raises(ValueError, match="OPTForCausalLM takes no position_ids"):
        model(**inputs)


def test_positions_labels_and_shared_tokens():
    """Trees share what conversations begin with alike, and nothing that is alike after they differ."""
    model = vlms.build("PaliGemma")
    members = [{"input_ids": ids, "labels": ids} for ids in ([5, 6, 7, 8], [5, 6, 9, 8])]
    batch = PackedCollator(model)([members, {"input_ids": [5, 6], "labels": [5, 6]}])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 8, 5, 6]]
    assert batch["position_ids"].tolist() == [[1, 2, 3, 4, 3, 4, 1, 2]]
    assert batch["labels"].tolist() == [[-100, 6, 7, 8, 9, 8, -100, 6]]
    assert torch.equal(batch["attention_mask"].layout.visible(), integration.PackedLayout.from_groups(
        [(2, [2, 2]), (2, [])]
    ).visible())  # fmt: skip


@pytest.mark.parametrize("family", ["Qwen3VL", "Gemma3", "SmolVLM"])
def test_placeholders_run_the_tower_and_change_nothing(family):
    """Text-only rows have the loss and gradients that they have without; the tower gets gradients of zero."""
    image, text, _ = samples_of(vlms.FAMILIES[family])
    model = vlms.build(family, "eager").train()
    placeholder = {name: each for name, each in image.items() if name != "labels"}
    with apply(model):
        expected = vlms.run(model, PackedCollator(model)([text]))
        ours = vlms.run(model, PackedCollator(model, placeholder=placeholder)([text]))
        both = PackedCollator(model, placeholder=placeholder)([text, image])
    assert both["input_ids"].shape[1] == text["input_ids"].shape[1] + image["input_ids"].shape[1]
    towers = ours.gradients.keys() - expected.gradients.keys()
    assert any("vis" in name for name in towers)
    assert all(not ours.gradients.pop(name).any() for name in towers)
    vlms.assert_close(ours, expected)
