"""``apply``: the kernels in models of transformers that are there already, reported, and taken out again."""

import copy
import pickle
import re
import types

import peft
import pytest
import torch
import transformers as hf

from lynx_kernels.integrations import head_loss
from lynx_kernels.integrations import transformers as integration
from lynx_kernels.integrations.apply import apply
from tests.lynx_kernels import families, more_vlms, vlms
from tests.lynx_kernels.vlm_checks import labelled

SMALL = {name: value for name, value in vlms.TEXT.items() if name != "head_dim"}


@pytest.mark.parametrize("family", vlms.FAMILIES)
def test_what_runs_on_the_kernels(family):
    """That it computes the same: test_vlm_families.py."""
    model = vlms.build(family)
    with apply(model) as patch, families.counted() as calls, torch.no_grad():
        model(**vlms.FAMILIES[family].batch(), use_cache=False)
    # Two layers of text; and where towers cut rows of patches, two layers of the tower, each in one call.
    assert calls["kernels"] == (4 if family in ("Qwen3VL", "Qwen25VL", "Pixtral") else 2), patch.report()
    assert calls["cross"] == (2 if family == "Mllama" else 0), patch.report()


def test_logits_are_none_in_training_with_labels_alone():
    model = vlms.build("Qwen3VL").train()
    inputs = vlms.FAMILIES["Qwen3VL"].batch()
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    with apply(model):
        assert model(**inputs, labels=labels).logits is None
        assert model(**inputs).logits is not None
        assert model.eval()(**inputs, labels=labels).logits is not None
    assert type(model.get_output_embeddings()) is torch.nn.Linear
    assert "_loss_function" not in vars(model)


HEADS = {
    "plain": hf.LlamaConfig(**vlms.TEXT),
    "cap": hf.Gemma2Config(**vlms.TEXT, final_logit_softcapping=3.0),
    "factor": hf.CohereConfig(**SMALL, logit_scale=0.3),
    "quotient": hf.GraniteConfig(**SMALL, logits_scaling=3.0),
    "bias": hf.PhiConfig(**SMALL),
}


@pytest.mark.parametrize("num_items", [None, 7, torch.tensor(7)])
@pytest.mark.parametrize("head", HEADS)
def test_losses_of_every_kind_of_head(head, num_items, monkeypatch):
    """A cap, a factor, a bias; and the divisor that Trainer gives."""
    model = families.build(HEADS[head], "eager").train()
    ids = torch.randint(3, 50, (2, 9), generator=torch.Generator().manual_seed(0))
    labels = ids.masked_fill(torch.rand(ids.shape, generator=torch.Generator().manual_seed(1)) < 0.4, -100)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    if num_items is not None:
        inputs["num_items_in_batch"] = num_items
    before = vlms.run(model, inputs)
    seen = []
    function = head_loss.linear_cross_entropy
    monkeypatch.setattr(head_loss, "linear_cross_entropy", lambda *a, **k: seen.append(k) or function(*a, **k))
    with apply(model):
        vlms.assert_close(vlms.run(model, inputs), before)
    [options] = seen
    assert options["softcap"] == (3.0 if head == "cap" else None)
    assert options["logit_scale"] == pytest.approx({"factor": 0.3, "quotient": 1 / 3}.get(head, 1.0))
    assert (options["bias"] is not None) == (head == "bias")


def test_logits_that_are_cut_on_the_way_stay_a_promise():
    """BLIP-2 would cut off what stands before its labels, and asks for the device."""
    model, inputs = vlms.build(more_vlms.ALL["Blip2"]).train(), labelled(more_vlms.ALL["Blip2"].batch())
    before = vlms.run(model, inputs)
    with apply(model) as patch:
        vlms.assert_close(vlms.run(model, inputs), before)
        out = model(**inputs)
        assert patch.parts()[-1].why == "linear_cross_entropy, logits are None"
    assert out.logits is None
    assert out.language_model_outputs.logits is None


class OwnLoss(hf.LlamaForCausalLM):
    """Its loss looks at the logits in ways of its own."""

    def forward(self, input_ids, labels=None, **kwargs):
        logits = self.lm_head(self.model(input_ids, **kwargs).last_hidden_state)
        logits = torch.tanh(logits * 2) + 0.5 * logits - logits[..., :1]
        loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size)
        loss = loss + (1 - logits.float()).square().mean() + torch.cat([logits, logits]).mean() + len(logits)
        return hf.modeling_outputs.CausalLMOutput(loss=loss, logits=logits)


def test_promised_logits_are_made_for_whoever_reads_them():
    torch.manual_seed(0)
    model = OwnLoss(HEADS["plain"]).train()
    ids = torch.randint(3, 50, (2, 9))
    before = vlms.run(model, {"input_ids": ids, "labels": ids})
    with apply(model) as patch:
        ours = vlms.run(model, {"input_ids": ids, "labels": ids})
        assert re.search(r"loss +loss +its own +the model reads its logits, so they are made", patch.report())
    vlms.assert_close(ours, before)
    torch.testing.assert_close(ours.logits, before.logits)


def test_models_with_a_loss_of_their_own_keep_it():
    """Also where only what they do tells, and logits that were made are returned."""
    model = families.build(families.config_of("xlnet"), "eager")
    assert "its forward has a loss of its own" in apply(model).report()
    model, inputs = vlms.build(more_vlms.ALL["Qwen2Audio"]).train(), more_vlms.ALL["Qwen2Audio"].batch()
    inputs["labels"] = inputs["input_ids"]
    before = vlms.run(model, inputs)
    with apply(model) as patch:
        ours = vlms.run(model, inputs)
        assert patch.parts()[-1].why == "its forward has a loss of its own"
    vlms.assert_close(ours, before)
    assert ours.logits is not None


@pytest.mark.parametrize("kind", ["loss=False", "a loss of its own", "another head"])
def test_losses_of_packed_rows_without_ours(kind):
    """Labels are scored by the rows on their paths, a sample's first one nowhere; or it is refused."""
    torch.manual_seed(0)
    model = OwnLoss(HEADS["plain"]) if kind == "a loss of its own" else families.build(HEADS["plain"], "sdpa")
    if kind == "a loss of its own":
        model.loss_function = hf.loss.loss_utils.ForSequenceClassificationLoss
        model.forward = types.MethodType(plain_loss, model)
    if kind == "another head":
        model.lm_head = torch.nn.Sequential(model.lm_head)
    model.train()
    ids = torch.randint(3, 50, (1, 9))
    expected = [model(each, labels=each).loss * (each.shape[1] - 1) for each in ids.split([4, 5], 1)]
    layout = integration.PackedLayout.causal([4, 5])
    with apply(model, loss=kind != "loss=False"):
        out = model(
            ids, labels=ids, attention_mask=integration.packed_mask(layout), position_ids=layout.position_ids[None]
        )
        torch.testing.assert_close(out.loss, sum(expected) / 7)
        assert out.logits is not None
        tree = integration.PackedLayout.from_groups([(3, [2, 4])])
        inputs = {"attention_mask": integration.packed_mask(tree), "position_ids": tree.position_ids[None]}
        if kind == "a loss of its own":
            with pytest.raises(ValueError, match=r"would score the first tokens of branches by the rows before them"):
                model(ids, labels=ids, **inputs)
            return
        loss = model(ids, labels=ids, **inputs).loss
    paths = ids[:, :5], ids[:, [0, 1, 2, 5, 6, 7, 8]]
    scored = [
        torch.nn.functional.cross_entropy(model(path).logits[0, :-1], path[0, 1:], reduction="none") for path in paths
    ]
    torch.testing.assert_close(loss, torch.cat([scored[0], scored[1][2:]]).mean())


def plain_loss(self, input_ids, labels=None, attention_mask=None, position_ids=None):
    logits = self.lm_head(self.model(input_ids, attention_mask, position_ids).last_hidden_state)
    loss = torch.nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:])
    return hf.modeling_outputs.CausalLMOutput(loss=loss, logits=logits)


def test_errors_leave_the_model_as_it_was():
    model = families.build(HEADS["plain"], "sdpa").train()
    with apply(model):
        with pytest.raises((ValueError, RuntimeError), match=r"\d"):
            model(torch.zeros(1, 3, dtype=torch.int64), labels=torch.zeros(1, 5, dtype=torch.int64))
        assert type(model.lm_head) is torch.nn.Linear
        assert "_loss_function" not in vars(model)


def test_trainer_accumulates(tmp_path):
    """The same weights after two steps, with batches of different numbers of labels."""
    rows = [{"input_ids": list(range(3, 3 + n)), "labels": list(range(3, 3 + n))} for n in (4, 9, 5, 7)]
    weights = []
    for is_patched in (False, True):
        model = families.build(HEADS["plain"], "sdpa")
        if is_patched:
            apply(model)
        options = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "max_steps": 2, "use_cpu": True}
        arguments = hf.TrainingArguments(tmp_path, **options, report_to=[], save_strategy="no", disable_tqdm=True)
        hf.Trainer(model, arguments, train_dataset=rows, data_collator=lambda rows: {
            name: torch.tensor([row[name] for row in rows]) for name in rows[0]
        }).train()  # fmt: skip
        weights.append(model.state_dict())
    for name, each in weights[0].items():
        torch.testing.assert_close(weights[1][name], each, rtol=1e-5, atol=1e-6)


def test_lora_and_checkpointing():
    """peft after apply; LoRA on the head takes the logits' way, and undoing below peft is refused."""
    inputs = vlms.FAMILIES["Qwen3VL"].batch()
    inputs["labels"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    for targets in (["q_proj", "v_proj"], ["q_proj", "lm_head"]):
        losses = []
        for is_patched in (False, True):
            model = vlms.build("Qwen3VL")
            patch = apply(model) if is_patched else None
            torch.manual_seed(1)
            lora = peft.get_peft_model(model, peft.LoraConfig(target_modules=targets, init_lora_weights=False))
            lora.train().gradient_checkpointing_enable({"use_reentrant": False})
            losses.append(vlms.run(lora, inputs))
        vlms.assert_close(losses[1], losses[0])
        with pytest.raises(RuntimeError, match=r"undo: model\.\S+ is a peft\S+ and was .*undo that first"):
            patch.undo()
        lora.unload()
        patch.undo()


def test_reports_say_layer_by_layer_what_runs():
    model = vlms.build("Qwen3VL")
    patch = apply(model)
    assert patch.report().splitlines()[0].split() == ["layer", "class", "runs"]
    assert re.search(
        r"model\.visual\.blocks\.0-1\.attn +Qwen3VLVisionAttention +lynx +prefix_attention, one", patch.report()
    )
    assert re.search(r"layers\.0-1\.self_attn +Qwen3VLTextAttention +lynx +prefix_attention for padded", patch.report())
    assert re.search(r"loss +loss +lynx +in train\(\) with labels", patch.report())
    inputs = vlms.FAMILIES["Qwen3VL"].batch(rows=(0,))
    model(**inputs)
    assert {part.why for part in patch.parts()[:-1]} == {"prefix_attention"}
    model.generate(**inputs, max_new_tokens=2)
    assert re.search(r"TextAttention +its own +PyTorch's scaled_dot_product_attention, since its mask", patch.report())
    patch.undo()
    patch = apply(model, attention=False, vision=False, cross_attention=False, loss=False)
    assert {part.runs for part in patch.parts()} == {"its own"}
    assert {part.why for part in patch.parts()} == {"attention=False", "vision=False", "loss=False"}


def test_what_cannot_run_is_named():
    hybrid = families.build(
        families.config_of("qwen3_next", layer_types=["linear_attention", "full_attention"]), "sdpa"
    )
    with pytest.raises(ValueError, match=r"cannot run the kernels:\n  model\.layers\.0\S* .*linear_attention: not att"):
        apply(hybrid, on_unsupported="raise")
    assert "linear_attention: not attention; each sample of a packed row is a row of its own" in apply(hybrid).report()
    zamba = families.build(families.config_of("zamba"), "sdpa")
    assert "would mix the samples of a packed row" in apply(zamba).report()
    bloom = families.build(families.config_of("bloom"), "eager")
    assert re.search(r"loss +loss +lynx", apply(bloom).report())
    encoder = families.build(families.config_of("vit"), "sdpa")
    assert "it has no output head that is a torch.nn.Linear" in apply(encoder).report()
    with pytest.raises(TypeError, match=r"expected a model of transformers, got a torch\.nn\.modules\.linear\.Linear"):
        apply(torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match="on_unsupported is 'drop'"):
        apply(encoder, on_unsupported="drop")


@pytest.mark.parametrize("name", ["inkling_text", "deepseek_v32", "longt5"])
def test_layers_with_what_our_attention_lacks_stay(name):
    model = families.build(families.config_of(name, num_key_value_heads=4), "eager")
    expected = families.run(model, "left")
    with apply(model) as patch:
        assert torch.equal(families.run(model, "left"), expected)
        assert re.search(r"its own +\w+ has (position biases|sparse attention)", patch.report())
    with pytest.raises(ValueError, match=r"has (position biases|sparse attention)"):
        apply(model, on_unsupported="raise")


def test_twice_is_an_error_and_copies_run_alone():
    model = families.build(HEADS["plain"], "sdpa").train()
    ids = torch.arange(3, 12)[None]
    expected = model(ids, labels=ids).loss
    patch = apply(model)
    with pytest.raises(RuntimeError, match="LlamaForCausalLM is patched already; undo"):
        apply(model)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with families.counted() as calls:
            out = copied(ids, labels=ids)
        assert (calls["kernels"], out.logits) == (2, None)
        torch.testing.assert_close(out.loss, expected)
    for copier in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="a Patch"):
            copier(patch)
    patch.undo()
    patch.undo()
    assert torch.equal(model(ids, labels=ids).loss, expected)
    apply(model).undo()


def test_compiled_models_keep_their_logits():
    torch._dynamo.reset()
    model = families.build(HEADS["plain"], "sdpa").train()
    ids = torch.arange(3, 12)[None]
    expected = model(ids, labels=ids).loss
    with apply(model):
        out = torch.compile(model, backend="eager")(ids, labels=ids)
        torch.testing.assert_close(out.loss, expected)


@pytest.mark.parametrize("kind", ["mistral", "gpt_oss", "llama"])
def test_cu_seq_lens_keep_samples_apart(kind):
    """What padding-free collators pass for FlashAttention, to models whose masks do not know of positions, too."""
    model = families.build(families.config_of(kind), "eager")
    lengths, ids = [5, 1, 7], torch.randint(3, 60, (13,), generator=torch.Generator().manual_seed(0))
    alone = torch.cat([model(each[None], use_cache=False).logits[0] for each in ids.split(lengths)])
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    offsets = torch.tensor([0, 5, 6, 13], dtype=torch.int32)
    with apply(model), families.counted() as calls:
        options = {"cu_seq_lens_q": offsets, "cu_seq_lens_k": offsets, "max_length_q": 7, "max_length_k": 7}
        packed = model(ids[None], position_ids=positions, use_cache=False, **options).logits[0]
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-4)
    assert calls == {"kernels": 2}


@pytest.mark.parametrize("family", ["Gemma3", "PaliGemma"])
def test_packed_rows_of_image_blocks_equal_each_alone(family):
    """The layout adds samples to the model's blocks and windows."""
    model, rows = vlms.build(family, "eager"), vlms.FAMILIES[family].rows()
    alone = [model(**vlms.FAMILIES[family].batch(rows=(row,)), use_cache=False).logits[0] for row in range(len(rows))]
    batches = [vlms.FAMILIES[family].batch(rows=(row,)) for row in range(len(rows))]
    layout = integration.PackedLayout.causal([len(row.ids) for row in rows])
    first = 1 if family == "PaliGemma" else 0  # its positions start at 1
    with apply(model), families.counted() as calls:
        packed = model(
            torch.cat([each["input_ids"][0] for each in batches])[None],
            token_type_ids=torch.cat([each["token_type_ids"][0] for each in batches])[None],
            pixel_values=vlms.FAMILIES[family].pixels([0, 1, 2])["pixel_values"],
            attention_mask=integration.packed_mask(layout),
            position_ids=layout.position_ids[None] + first,
            use_cache=False,
        ).logits[0]
    assert calls["kernels"] == 2
    torch.testing.assert_close(packed, torch.cat(alone), rtol=1e-4, atol=1e-4)
