"""Adapters in models of transformers: what they compute, what they leave alone, and that they go again."""

import copy
import pickle

import pytest
import torch
import transformers as hf
from peft import LoraConfig, get_peft_model

from lynx_kernels.integrations.adapters import add_adapters, load_adapters
from lynx_kernels.integrations.apply import apply
from lynx_kernels.nn import Adapter
from tests.lynx_kernels.vlms import TEXT, Gemma3, SmolVLM

IDS = torch.arange(3, 15).view(2, 6)


def llama():
    torch.manual_seed(0)
    return hf.LlamaForCausalLM(hf.LlamaConfig(**TEXT)).eval()


def gpt2():
    torch.manual_seed(0)
    config = hf.GPT2Config(
        vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2
    )
    return hf.GPT2LMHeadModel(config).eval()


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(ids).logits


def hooked(model, owner, change):
    """The logits where ``change(module, input, output)`` is what the module returns."""

    def hook(module, args, kwargs, output):
        x = args[0] if args else kwargs["hidden_states"]
        return (change(x, output[0]), *output[1:]) if isinstance(output, tuple) else change(x, output)

    handle = model.get_submodule(owner).register_forward_hook(hook, with_kwargs=True)
    found = logits(model)
    handle.remove()
    return found


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("at", [None, "mlp", "attention"])
def test_where_the_adapter_stands(make, at, parallel):
    model = make()
    block = "model.layers.1" if make is llama else "transformer.h.1"
    child = {"attention": "self_attn" if make is llama else "attn"}.get(at, at)
    adapters = add_adapters(model, 4, at=child, parallel=parallel, layers=[1])
    [(name, adapter)] = adapters.modules.items()
    owner = block if child is None else f"{block}.{child}"
    assert name == f"{owner}.adapter"
    ours = logits(model)
    adapters.remove()
    theirs = hooked(model, owner, lambda x, out: out + adapter(x) if parallel else adapter(out))
    assert torch.allclose(ours, theirs, atol=1e-6)
    assert not torch.allclose(ours, logits(model), atol=1e-4)


def test_the_model_is_left_alone():
    model = llama()
    before, state, classes = logits(model), copy.deepcopy(model.state_dict()), [type(each) for each in model.modules()]
    adapters = add_adapters(model, 4, starts_as_identity=True)
    assert torch.equal(logits(model), before)
    assert [key for key in model.state_dict() if "adapter" not in key] == list(state)
    hidden = model(IDS, output_hidden_states=True).hidden_states
    assert len(hidden) == 3
    for each in adapters.modules.values():
        torch.nn.init.ones_(each.up.bias)
    assert torch.allclose(model(IDS, output_hidden_states=True).hidden_states[1], hidden[1] + 1, atol=1e-6)
    adapters.remove()
    assert torch.equal(logits(model), before)
    assert [type(each) for each in model.modules()] == classes
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert list(state) == list(model.state_dict())


def test_training_checkpointing_generation():
    model = llama()
    adapters = add_adapters(model, 4, at="mlp", dropout=0.1, scale_per_channel=True)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for parameter in adapters.parameters():
        parameter.requires_grad_(True)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.train()
        torch.manual_seed(1)
        loss = model(IDS, labels=IDS).loss
        gradients.append(torch.autograd.grad(loss, list(adapters.parameters())))
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))
    assert all(each.any() for each in gradients[0])
    model.eval()
    written = model.generate(IDS, max_new_tokens=5, do_sample=False, use_cache=True)
    assert torch.equal(written, model.generate(IDS, max_new_tokens=5, do_sample=False, use_cache=False))


@pytest.mark.parametrize("family", [Gemma3, SmolVLM])
def test_models_with_images(family):
    model, batch = family().model().eval(), family().batch()
    before = model(**batch).logits
    adapters = add_adapters(model, 4)
    assert len(adapters.modules) == TEXT["num_hidden_layers"]  # of the text's decoder, not of the tower
    after = model(**batch).logits
    assert not torch.allclose(after, before, atol=1e-3)
    patch = apply(model)
    assert {part.kind for part in patch.parts() if "text" in part.name and part.runs != "lynx"} == set()
    valid = batch["attention_mask"].bool()
    assert torch.allclose(model(**batch).logits[valid], after[valid], atol=2e-5)
    patch.undo()
    adapters.remove()
    assert torch.equal(model(**batch).logits, before)


def test_saved_apart_from_the_model(tmp_path):
    model = llama()
    before = logits(model)
    adapters = add_adapters(model, 4, at="self_attn", layers=[1], name="small", activation="gelu", scale=0.5)
    expected = logits(model)
    adapters.save(tmp_path / "small.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["small.safetensors"]
    adapters.remove()
    assert torch.equal(logits(model), before)
    again = load_adapters(model, tmp_path / "small.safetensors")
    assert torch.equal(logits(model), expected)
    assert list(again.modules) == ["model.layers.1.self_attn.small"]


def test_files_that_do_not_fit(tmp_path):
    adapters = add_adapters(llama(), 4)
    adapters.save(tmp_path / "adapters.safetensors")
    wider = hf.LlamaForCausalLM(hf.LlamaConfig(**{**TEXT, "hidden_size": 40}))
    with pytest.raises(ValueError, match=r"does not fit this LlamaForCausalLM: .*shape \(4, 32\), expected \(4, 40\)"):
        load_adapters(wider, tmp_path / "adapters.safetensors")
    assert not any(isinstance(each, Adapter) for each in wider.modules())
    shorter = hf.LlamaForCausalLM(hf.LlamaConfig(**{**TEXT, "num_hidden_layers": 1}))
    with pytest.raises(ValueError, match="layer 1 is not one of the decoder's 0 to 0"):
        load_adapters(shorter, tmp_path / "adapters.safetensors")
    (tmp_path / "text.safetensors").write_text("no tensors")
    with pytest.raises(ValueError, match=r"text\.safetensors cannot be read"):
        load_adapters(wider, tmp_path / "text.safetensors")
    llama().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds no adapters"):
        load_adapters(wider, tmp_path / "model.safetensors")


def test_two_kinds_in_one_model():
    model = llama()
    before = logits(model)
    first = add_adapters(model, 4, name="first")
    second = add_adapters(model, 4, name="second", at="mlp", parallel=True)
    third = add_adapters(model, 2, name="third")
    with pytest.raises(RuntimeError, match=r"model\.layers\.0 was changed after the adapter 'first' was added"):
        first.remove()
    third.remove()
    first.remove()
    second.remove()
    assert torch.equal(logits(model), before)


def test_lora_and_copies():
    model = llama()
    adapters = add_adapters(model, 4)
    expected = logits(model)
    assert torch.equal(logits(copy.deepcopy(model)), expected)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model))), expected)
    tuned = get_peft_model(model, LoraConfig(target_modules=["q_proj", "down"]))  # also the adapters' own projections
    assert torch.allclose(logits(tuned), expected, atol=1e-6)
    model.train()
    tuned(IDS, labels=IDS).loss.backward()
    trained = [name for name, each in tuned.named_parameters() if "adapter.down.lora_B" in name and each.grad.any()]
    assert len(trained) == 2
    tuned.unload()
    adapters.remove()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": [2]}, "layer 2 is not one of the decoder's 0 to 1"),
        ({"at": "feed_forward"}, "layer 0 has no child 'feed_forward'; it has self_attn, mlp, "),
        ({"name": "mlp"}, "has an attribute 'mlp' already"),
        ({"parallel": True, "residual": "input"}, "a parallel adapter has no residual"),
        ({"activation": "nonsense"}, "nonsense"),
    ],
)
def test_refused(options, message):
    model = llama()
    with pytest.raises(ValueError, match=message):
        add_adapters(model, 4, **options)
    assert not any(isinstance(each, Adapter) for each in model.modules())


def test_compiles_in_one_graph():
    model = llama()
    add_adapters(model, 4, at="mlp")
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.allclose(logits(compiled), logits(model), atol=1e-6)
