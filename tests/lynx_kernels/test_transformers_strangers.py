"""Two models of transformers, LLaVA and PaliGemma, give the same results as with their own eager attention.

A sample is an image and a text, or only a text. Eager attention gets one sample at a time. Ours gets all samples,
padded or packed. Eager attention computes its softmax in fp32 for every dtype of the model, hence the tolerance.
"""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    GemmaConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    SiglipVisionConfig,
)

from lynx_kernels import PackedLayout
from lynx_kernels.integrations import transformers as integration

integration.register()
VOCABULARY, IMAGE, WIDTH = 50, 49, 32
TEXT = {
    "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "attention_dropout": 0.0,
}  # fmt: skip
VISION = {
    "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 8,
    "patch_size": 4,
}  # fmt: skip
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


class Llava:
    """Image tokens anywhere in the text; everything is causal."""

    first_position = 0

    @staticmethod
    def make(implementation):
        config = LlavaConfig(
            vision_config=CLIPVisionConfig(**VISION), text_config=LlamaConfig(**TEXT), image_token_id=IMAGE
        )
        return LlavaForConditionalGeneration._from_config(config, attn_implementation=implementation)

    @staticmethod
    def layout(samples):
        return PackedLayout.causal([len(each.ids) for each in samples])

    @staticmethod
    def token_types(is_suffix):
        return {}


class PaliGemma:
    """Image and question come before the answer and have full attention."""

    first_position = 1

    @staticmethod
    def make(implementation):
        vision = SiglipVisionConfig(**VISION, vision_use_head=False)
        config = PaliGemmaConfig(
            vision_config=vision, text_config=GemmaConfig(**TEXT), image_token_id=IMAGE, projection_dim=WIDTH
        )
        return PaliGemmaForConditionalGeneration._from_config(config, attn_implementation=implementation)

    @staticmethod
    def layout(samples):
        prefixes = [each.prefix for each in samples]
        suffixes = [len(each.ids) - each.prefix for each in samples]
        return PackedLayout.from_prefixes(prefixes, suffixes, root_is_causal=False)

    @staticmethod
    def token_types(is_suffix):
        return {"token_type_ids": is_suffix.long()}


@dataclass
class Sample:
    ids: Tensor  # (length,) int64
    prefix: int  # tokens before the answer
    pixels: Tensor  # (images, 3, 8, 8)

    @classmethod
    def random(cls, images, question, answer):
        before, after = torch.randint(IMAGE, (1,)), torch.randint(IMAGE, (question - 1 + answer,))
        ids = torch.cat([before, torch.full((4 * images,), IMAGE), after])
        return cls(ids, 4 * images + question, torch.randn(images, 3, 8, 8, dtype=torch.float64))


@pytest.fixture(params=[Llava, PaliGemma])
def stranger(request):
    return request.param


def make_model(stranger, implementation):
    torch.manual_seed(0)
    model = stranger.make(implementation).double().eval()
    with torch.no_grad():  # far from the initial values, so that every parameter affects the logits
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    for layer in model.model.language_model.layers:
        layer.self_attn.scaling = 0.7  # not the default, 1 / sqrt(8)
    return model


def make_samples():
    torch.manual_seed(1)
    return [Sample.random(*counts) for counts in ((1, 2, 3), (0, 4, 1), (1, 1, 6))]


def pixels_of(samples):
    pixels = torch.cat([each.pixels for each in samples])
    return {"pixel_values": pixels} if len(pixels) else {}


def eager(stranger, model, samples):
    """Logits (T, vocabulary) of all samples, end to end."""
    logits = []
    for each in samples:
        is_suffix = torch.arange(len(each.ids))[None] >= each.prefix
        options = {**stranger.token_types(is_suffix), **pixels_of([each])}
        logits.append(model(each.ids[None], attention_mask=torch.ones_like(each.ids)[None], **options).logits[0])
    return torch.cat(logits)


def padded(stranger, model, samples, side):
    length = max(len(each.ids) for each in samples)
    ids, mask = torch.zeros(2, len(samples), length, dtype=torch.int64)
    is_suffix = torch.ones(len(samples), length, dtype=torch.bool)
    for row, each in enumerate(samples):
        start = length - len(each.ids) if side == "left" else 0
        tokens = slice(start, start + len(each.ids))
        ids[row, tokens], mask[row, tokens], is_suffix[row, start : start + each.prefix] = each.ids, 1, False
    positions = (mask.cumsum(-1) - 1).clamp(min=0) + stranger.first_position
    options = {**stranger.token_types(is_suffix), **pixels_of(samples)}
    return model(ids, attention_mask=mask, position_ids=positions, **options).logits[mask.bool()]


def packed(stranger, model, samples):
    layout, ids = stranger.layout(samples), torch.cat([each.ids for each in samples])
    positions = layout.position_ids[None] + stranger.first_position
    options = {"attention_mask": integration.packed_mask(layout), "position_ids": positions, **pixels_of(samples)}
    return model(ids[None], **options).logits[0]


@pytest.mark.parametrize("form", ["packed", "left", "right"])
def test_logits_and_gradients_equal_eager(stranger, form):
    samples, ours, theirs = make_samples(), make_model(stranger, "lynx"), make_model(stranger, "eager")
    assert ours.model.language_model.config._attn_implementation == "lynx"
    assert theirs.model.language_model.config._attn_implementation == "eager"
    expected = eager(stranger, theirs, samples)
    logits = packed(stranger, ours, samples) if form == "packed" else padded(stranger, ours, samples, form)
    torch.testing.assert_close(logits, expected, **TOLERANCE)
    weight = torch.randn_like(expected)
    for each in (logits, expected):
        (each * weight).sum().backward()
    gradients = 0
    for (name, parameter), its in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert (parameter.grad is None) == (its.grad is None), name  # the last layers of LLaVA's tower have no gradient
        if its.grad is not None:
            torch.testing.assert_close(parameter.grad, its.grad, **TOLERANCE, msg=lambda m, n=name: f"{n}: {m}")
            gradients += bool(its.grad.any())
    assert gradients > 40


def test_no_information_leaks(stranger):
    """If a token of a packed row changes, exactly the outputs that may see it change. All others stay bit for bit."""
    layout, model = stranger.layout(make_samples()), make_model(stranger, "lynx")
    options = {"attention_mask": integration.packed_mask(layout), "position_ids": layout.position_ids[None] + 1}
    embeddings = torch.randn(1, layout.num_tokens, WIDTH, dtype=torch.float64)
    with torch.no_grad():
        before = model(inputs_embeds=embeddings, **options).logits[0]
        for token, sees in enumerate(layout.visible().T):
            perturbed = embeddings.clone()
            perturbed[0, token] += torch.randn(WIDTH, dtype=torch.float64)
            after = model(inputs_embeds=perturbed, **options).logits[0]
            assert torch.equal((after != before).any(-1), sees), f"token {token}"


@pytest.mark.parametrize("images", [0, 1])
def test_generation_equals_eager(stranger, images):
    torch.manual_seed(2)
    sample = Sample.random(images, 5, 0)
    ids, pixels = sample.ids.repeat(2, 1), sample.pixels.repeat(2, 1, 1, 1)
    options = {**stranger.token_types(torch.zeros_like(ids)), **({"pixel_values": pixels} if images else {})}
    tokens = [
        make_model(stranger, name).generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False, **options
        )
        for name in ("lynx", "eager")
    ]
    assert torch.equal(*tokens)
