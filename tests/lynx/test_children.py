"""Other people's tools change the model's submodules, and training and decoding see it alike, in either fusion."""

import copy
from functools import cache

import peft
import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from torch.nn import functional as F
from transformers.integrations.neftune import activate_neftune, deactivate_neftune

from lynx import LynxProcessor, embedding, heads
from lynx.generation.answers import generate_answers
from lynx_kernels import explain
from tests.lynx.conftest import conversation, make_config, make_image, make_model, make_tokenizer
from tests.lynx.model_checks import inputs

OPTIONS = {
    "prefix": {},
    "cross_attention": {
        "fusion": "cross_attention", "cross_attention_heads": 2, "cross_attention_head_dim": 8,
    },
}  # fmt: skip
BRANCHES = {
    "prefix": ("down", "up"),
    "cross_attention": ("to_q", "to_kv", "to_out", "feed_forward_in", "feed_forward_out"),
}
TARGETS = [
    (fusion, target)
    for fusion, branch in BRANCHES.items()
    for target in ("all-linear", "lm_head", "embed_tokens", "q_proj", "patch_embedding", *branch)
]
ANSWERS = {"max_new_tokens": 6, "do_sample": False}


@cache
def _made(fusion):
    tokenizer = make_tokenizer()
    config = make_config(tokenizer, **OPTIONS[fusion])
    processor = LynxProcessor.for_model(config, tokenizer)
    conversations = [
        conversation("Which digit is this?", "seven", images=[make_image(0)]),
        conversation("Hello", "yes, hello"),
        conversation("Same?", "no", images=[make_image(4)], videos=[[make_image(5), make_image(6)]]),
    ]
    model = make_model(config)
    assert explain(model).reasons == {
        "kernels for the embedding table": "it trains, and the row padding_idx=0 gets no gradient"
    }
    model.get_input_embeddings().requires_grad_(False)
    assert explain(model).name == "kernels"
    return model, processor, [processor.encode(each) for each in conversations]


class Case:
    """A fresh copy of a model, and batches for it."""

    def __init__(self, fusion):
        model, self.processor, samples = _made(fusion)
        self.model = copy.deepcopy(model)
        self.packed, self.padded = self.processor.pack(samples), self.processor.pad(samples)
        self.question = inputs(self.processor.pad(samples[:1]))
        del self.question["max_supervised"]

    def logits(self, model):
        with torch.no_grad():
            return model(**inputs(self.packed)).logits


@pytest.fixture(params=OPTIONS)
def case(request):
    return Case(request.param)


def lora(model, targets, **options):
    options = {"target_modules": targets if targets == "all-linear" else [targets], "r": 4, **options}
    return peft.get_peft_model(model, peft.LoraConfig(**options))


def trained(model, case, steps=3):
    """The gradients of the first step, by name, after some steps with every batch."""
    optimizer, first = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], 0.5), {}
    for step in range(steps):
        for batch in (case.packed, case.padded):
            optimizer.zero_grad()
            model(**batch).loss.backward()
            optimizer.step()
            if step == 0:
                first |= {
                    name: each.grad.abs().max().item() for name, each in model.named_parameters() if each.requires_grad
                }
    return first


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize(("fusion", "targets"), TARGETS)
def test_lora_on_every_target(fusion, targets, use_dora, tmp_path):
    """It starts as the base model, trains, is decoded as it was trained, and is saved, loaded and merged."""
    case = Case(fusion)
    base, base_loss = case.logits(case.model), case.model(**case.packed).loss
    model = lora(case.model, targets, use_dora=use_dora)
    start = case.logits(model)
    torch.testing.assert_close(start, base, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model(**case.packed).loss, base_loss.detach(), rtol=1e-5, atol=1e-5)
    gradients = trained(model, case)
    assert gradients
    assert all(each > 0 for each in gradients.values()), gradients
    moved = case.logits(model)
    assert (moved - start).abs().max() > 1e-5
    loss = model(**case.packed).loss
    labels, rows = case.packed["layout"].select(case.packed["labels"][0])
    torch.testing.assert_close(loss.detach(), F.cross_entropy(moved[0, rows], labels), rtol=1e-5, atol=1e-5)
    answer = model.generate(**case.question, **ANSWERS)

    model.save_pretrained(tmp_path, save_embedding_layers=False)
    again = peft.PeftModel.from_pretrained(Case(fusion).model, tmp_path)
    torch.testing.assert_close(case.logits(again), moved)
    with model.disable_adapter():
        torch.testing.assert_close(case.logits(model), base)
    merged = model.merge_and_unload()
    assert explain(merged).name == "kernels"
    torch.testing.assert_close(case.logits(merged), moved, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(merged(**case.packed).loss, loss.detach(), rtol=1e-5, atol=1e-5)
    assert torch.equal(merged.generate(**case.question, **ANSWERS), answer)


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("targets", ["all-linear", "lm_head"])
def test_initialisations_that_move_weight_into_lora(case, init, targets):
    base, loss = case.logits(case.model), case.model(**case.packed).loss
    model = lora(case.model, targets, init_lora_weights=init)
    torch.testing.assert_close(case.logits(model), base, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(model(**case.packed).loss, loss, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("module", ["lm_head", "embed_tokens", "resampler", "fusion"])
def test_modules_to_save(case, module, tmp_path):
    """Whole modules that train beside LoRA, as copies of their own."""
    fusion = case.model.config.fusion
    base = case.logits(case.model)
    model = lora(case.model, "q_proj", modules_to_save=[case.model.fusion.submodule if module == "fusion" else module])
    torch.testing.assert_close(case.logits(model), base)
    gradients = trained(model, case)
    copies = {name: value for name, value in gradients.items() if "modules_to_save" in name}
    assert copies
    assert max(copies.values()) > 0
    moved, answer = case.logits(model), model.generate(**case.question, **ANSWERS)
    assert (moved - base).abs().max() > 1e-3
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    torch.testing.assert_close(case.logits(peft.PeftModel.from_pretrained(Case(fusion).model, tmp_path)), moved)
    merged = model.merge_and_unload()
    torch.testing.assert_close(case.logits(merged), moved, rtol=1e-4, atol=1e-4)
    assert torch.equal(merged.generate(**case.question, **ANSWERS), answer)


def test_new_token_rows(case):
    """``trainable_token_indices``: a few rows of the table train."""
    token = int(case.padded["input_ids"][0, -2])
    base = case.logits(case.model)
    config = peft.LoraConfig(target_modules=["q_proj"], r=4, trainable_token_indices=[token])
    model = peft.get_peft_model(case.model, config)
    torch.testing.assert_close(case.logits(model), base)
    gradients = trained(model, case)
    assert next(value for name, value in gradients.items() if "trainable_tokens" in name) > 0


def test_causal_lm_task_type(case):
    """peft's wrapper for causal language models passes all arguments on."""
    base = case.logits(case.model)
    model = lora(case.model, "all-linear", task_type="CAUSAL_LM")
    torch.testing.assert_close(case.logits(model), base, rtol=1e-4, atol=1e-4)
    assert model.generate(**case.question, **ANSWERS).shape[0] == 1


def test_inputs_that_require_gradients(case):
    """What peft does before gradient checkpointing of a frozen model."""
    case.model.requires_grad_(False)
    handle = case.model.get_input_embeddings().register_forward_hook(lambda m, args, out: out.requires_grad_(True))
    assert case.model(**case.packed).loss.requires_grad
    handle.remove()
    assert not case.model(**case.packed).loss.requires_grad


def test_neftune(case):
    """Its noise is on the embeddings in training, of both kinds of batches, and never in evaluation."""
    model = case.model
    losses = {}
    handle = activate_neftune(model, 50.0)
    for mode in (True, False):
        model.train(mode)
        for name, batch in (("packed", case.packed), ("padded", case.padded)):
            losses[mode, name] = [model(**batch).loss.item() for _ in range(2)]
    embeddings = model.train().embed(case.padded["input_ids"] % model.config.image_token_id)
    deactivate_neftune(model, handle)
    plain = model(**case.packed).loss.item()
    noise = embeddings - model.embed(case.padded["input_ids"] % model.config.image_token_id)
    width = embeddings.shape[1] * embeddings.shape[2]
    assert 0.8 < noise.abs().max() / (50 / width**0.5) <= 1
    for name in ("packed", "padded"):
        assert abs(losses[True, name][0] - losses[True, name][1]) > 1e-4
        assert losses[False, name] == pytest.approx([plain] * 2, rel=1e-5)


def test_neftune_leaves_vision_tokens_alone():
    case = Case("prefix")
    model, ids = case.model.train(), case.padded["input_ids"]
    is_image = ids == model.config.image_token_id
    vision = torch.randn(int(is_image.sum()), 32, requires_grad=True)
    activate_neftune(model, 50.0)
    out = model.embed(ids, vision)
    assert torch.equal(out[is_image], vision)
    (grad,) = torch.autograd.grad((out[is_image] * torch.arange(len(vision))[:, None]).sum(), vision)
    assert torch.equal(grad, torch.arange(len(vision), dtype=torch.float)[:, None].expand_as(grad))


@pytest.mark.parametrize("kind", ["forward", "forward_pre"])
def test_hooks_fire_once_a_pass_for_every_module(case, kind):
    """Of all modules that hold parameters; the loss and its gradients stay."""
    model = case.model
    model.requires_grad_(True).get_input_embeddings().requires_grad_(False)
    expected = model(**case.packed).loss
    expected.backward()
    gradients = {name: each.grad.clone() for name, each in model.named_parameters() if each.requires_grad}
    model.zero_grad()
    for name, module in model.named_modules():
        if not module._parameters or "vision_tower" in name:
            continue
        fired = []
        handle = getattr(module, f"register_{kind}_hook")(lambda *args, fired=fired: fired.append(1))
        loss = model(**case.packed).loss
        assert len(fired) == 1, name
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6, msg=name)
        if any(each in name for each in ("embed_tokens", "lm_head", model.fusion.submodule)):
            loss.backward()
            for other, each in model.named_parameters():
                if other in gradients:
                    torch.testing.assert_close(each.grad, gradients[other], rtol=1e-3, atol=1e-5, msg=other)
            model.zero_grad()
        handle.remove()


def test_hooks_of_the_vision_tower_fire(case):
    model = case.model
    expected = model(**case.packed).loss
    for name in ("", "embeddings", "embeddings.patch_embedding", "encoder", "encoder.layers.0"):
        fired = []
        handle = model.vision_tower.get_submodule(name).register_forward_hook(
            lambda *args, fired=fired: fired.append(1)
        )
        torch.testing.assert_close(model(**case.packed).loss, expected, rtol=1e-5, atol=1e-6)
        assert fired == [1], name
        handle.remove()


def test_a_hook_that_changes_the_head_changes_loss_logits_and_answers_alike(case):
    model, favourite = case.model, 5

    def favour(module, args, out):
        out = out.clone()
        out[..., favourite] += 100
        return out

    model.get_output_embeddings().register_forward_hook(favour)
    labels, rows = case.packed["layout"].select(case.packed["labels"][0])
    torch.testing.assert_close(
        model(**case.packed).loss, F.cross_entropy(model(**inputs(case.packed)).logits[0, rows], labels)
    )
    assert (model.generate(**case.question, **ANSWERS)[0, -6:] == favourite).all()


@pytest.mark.parametrize("trains", [True, False])
def test_the_called_table_is_the_kernel(trains):
    """Rows and gradients of vision tokens and of the table, with ids outside the table at images."""
    torch.manual_seed(0)
    table = torch.nn.Embedding(7, 4).requires_grad_(trains)
    ids = torch.tensor([[9, 9, 3, 1], [2, 9, 3, 3]])
    vision = torch.randn(3, 4, requires_grad=True)
    results = []
    for _ in range(2):
        out = embedding.embed(table, ids, ids == 9, vision, None)
        wanted = [vision, table.weight] if trains else [vision]
        results.append([out, *torch.autograd.grad(out, wanted, torch.arange(32.0).view(2, 4, 4))])
        table.register_forward_hook(lambda *args: None)
    torch.testing.assert_close(*results)


def test_a_called_table_keeps_its_own_rules():
    """The row of padding_idx gets no gradient, max_norm changes rows."""
    table = torch.nn.Embedding(7, 4, padding_idx=2)
    ids = torch.tensor([[2, 3, 9]])
    embedding.embed(table, ids, ids == 9, torch.ones(1, 4), 2).sum().backward()
    assert table.weight.grad.sum(1).tolist() == [0, 0, 0, 4, 0, 0, 0]
    table = torch.nn.Embedding(7, 4, max_norm=0.5)
    assert embedding.embed(table, ids, ids == 9, torch.ones(1, 4), None)[0, 1].norm() <= 0.5001


@pytest.mark.parametrize("num_items", [None, 7, torch.tensor(7), torch.tensor(0)])
@pytest.mark.parametrize("max_supervised", [None, 4])
@pytest.mark.parametrize("labels", [[-100, 3, 5, -100, 0, 1], [-100] * 6])
def test_the_loss_of_a_called_head_is_the_kernels(num_items, max_supervised, labels):
    torch.manual_seed(0)
    head, labels = torch.nn.Linear(4, 9, bias=False), torch.tensor(labels)
    hidden = torch.randn(6, 4)
    hidden[0] = torch.nan  # not supervised: it may hold anything
    hidden.requires_grad_()
    results = []
    for _ in range(2):
        loss = heads.loss(head, hidden, labels, num_items=num_items, max_supervised=max_supervised)
        results.append([loss, *torch.autograd.grad(loss, [hidden, head.weight])])
        head.register_forward_hook(lambda *args: None)
    torch.testing.assert_close(*results)
    with pytest.raises(ValueError, match=r"more (rows are supervised )?than max_supervised=1"):
        heads.loss(head, hidden, torch.arange(6), max_supervised=1)


def test_rows_that_are_not_supervised_may_hold_anything(monkeypatch):
    """Where they reach the head, as on a device."""
    head, hidden = torch.nn.Linear(4, 9, bias=False), torch.randn(3, 4)
    hidden[1] = torch.nan
    head.register_forward_hook(lambda *args: None)
    monkeypatch.setattr(heads, "_supervised", lambda labels, at_most: torch.arange(len(labels)))
    loss = heads.loss(head, hidden.requires_grad_(), torch.tensor([3, -100, 4]))
    for grad in torch.autograd.grad(loss, [hidden, head.weight]):
        assert grad.isfinite().all()


@pytest.mark.parametrize("max_supervised", [None, 3, 5])
def test_supervised_rows_of_a_device(max_supervised, monkeypatch):
    """Where the host does not read labels, as many rows as may be supervised are taken, these among them."""
    labels = torch.tensor([-100, 3, 5, -100, 0, -100])
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    rows = heads._supervised(labels, max_supervised)
    assert len(rows) == (max_supervised or 6)
    assert {1, 2, 4} <= set(rows.tolist())


def test_a_head_with_a_bias_is_not_called(case):
    head = case.model.get_output_embeddings()
    head.bias = torch.nn.Parameter(torch.randn(head.out_features))
    labels, rows = case.packed["layout"].select(case.packed["labels"][0])
    logits = case.logits(case.model)[0]
    case.model(**case.packed).loss.backward()
    torch.testing.assert_close(case.model(**case.packed).loss.detach(), F.cross_entropy(logits[rows], labels))
    assert head.bias.grad.any()
    assert explain(case.model).name == "kernels"


def on_disk(model, folder):
    return disk_offload(model, folder, torch.device("cpu"))


def on_the_cpu(model, folder):
    return cpu_offload(model, torch.device("cpu"))


def dispatched(model, folder):
    places = {
        "vision_tower": "cpu", "resampler": "disk", "language_model.lm_head": "disk",
        "language_model.model.embed_tokens": "disk", "language_model.model.norm": "cpu",
        "language_model.model.rotary_emb": "cpu", "language_model.model.layers.0": "disk",
        "language_model.model.layers.1": "cpu", "language_model.model.layers.2": "disk",
    }  # fmt: skip
    return dispatch_model(model, places, main_device="cpu", offload_dir=folder)


@pytest.mark.parametrize("offload", [on_disk, on_the_cpu, dispatched])
def test_offload(case, offload, tmp_path):
    text = case.processor.pack([case.processor.encode(conversation("Hello", "yes"))])
    expected = case.logits(case.model), case.model(**case.packed).loss.detach(), case.model(**text).loss.detach()
    answer = case.model.generate(**case.question, **ANSWERS)
    asked = [conversation("Which digit is this?", images=[make_image(0)]), conversation("Hello")]
    asked = [case.processor.encode(each) for each in asked]
    answers = generate_answers(case.model, case.processor, asked, max_new_tokens=6)
    model = offload(case.model, tmp_path)
    assert model.input_device == torch.device("cpu")
    with torch.no_grad():
        torch.testing.assert_close(case.logits(model), expected[0])
        torch.testing.assert_close(model(**case.packed).loss, expected[1])
        torch.testing.assert_close(model(**text).loss, expected[2])
    assert torch.equal(model.generate(**case.question, **ANSWERS), answer)
    assert generate_answers(model, case.processor, asked, max_new_tokens=6) == answers
    assert "AlignDevicesHook" in str(explain(model))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_dynamic_quantization(case):
    before = case.logits(case.model)
    model = torch.ao.quantization.quantize_dynamic(case.model, {torch.nn.Linear}, dtype=torch.qint8)
    logits = case.logits(model)
    assert 0 < (logits - before).abs().max() < 0.1 * before.abs().max()
    labels, rows = case.packed["layout"].select(case.packed["labels"][0])
    with torch.no_grad():
        torch.testing.assert_close(
            model(**case.packed).loss, F.cross_entropy(logits[0, rows], labels), rtol=1e-3, atol=1e-3
        )
    assert model.generate(**case.question, **ANSWERS).shape[0] == 1
    assert "quantized.dynamic" in explain(model).reasons["kernels for the head"]


@pytest.mark.parametrize("name", ["lm_head", "model.embed_tokens"])
def test_parametrized_weights(case, name):
    class Half(torch.nn.Module):
        def forward(self, weight):
            return weight / 2

    module = case.model.language_model.get_submodule(name)
    expected = Case(case.model.config.fusion).model
    with torch.no_grad():
        expected.language_model.get_submodule(name).weight /= 2
    torch.nn.utils.parametrize.register_parametrization(module, "weight", Half())
    torch.testing.assert_close(case.logits(case.model), case.logits(expected))
    torch.testing.assert_close(case.model(**case.packed).loss, expected(**case.packed).loss)
