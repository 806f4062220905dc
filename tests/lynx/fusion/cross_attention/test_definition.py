"""Logits and gradients against a plain definition, one sample at a time."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from lynx import LynxProcessor
from tests.lynx.conftest import conversation, make_image, make_model
from tests.lynx.fusion.cross_attention.conftest import cross_config, interleaved
from tests.lynx.model_checks import inputs


def plain_logits(model, sample, media, sees):
    """One sample by itself, from the descriptions: dense masks, PyTorch's modules, no kernel of ours.

    Args:
        media: (tokens, width) of its items, each ``num_latents``.
    """
    decoder, config = model.get_decoder(), model.config
    ids = torch.tensor([sample.token_ids])
    x = decoder.embed_tokens(ids)
    cos_sin = decoder.rotary_emb(x, position_ids=torch.arange(ids.shape[1])[None])
    token = torch.arange(ids.shape[1])[:, None]
    place = torch.tensor(sample.places, dtype=torch.int64)
    sees_item = place <= token
    if sees == "preceding" and len(place):
        sees_item &= place == torch.where(sees_item, place, -1).amax(1, keepdim=True)
    mask = sees_item.repeat_interleave(config.num_latents, 1)
    frequency = config.cross_attention_frequency
    for number, layer in enumerate(decoder.layers, start=1):
        assert hasattr(layer, "cross_attention") == (number % frequency == 0)
        if number % frequency == 0:
            x = plain_block(layer.cross_attention, x, media, mask)
        hidden = layer.input_layernorm(x)
        attention = layer.self_attn
        q, k, v = (
            project(hidden).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
            for project in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        q, k = apply_rotary_pos_emb(q, k, *cos_sin)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + attention.o_proj(out.transpose(1, 2).flatten(2))
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return model.language_model.lm_head(decoder.norm(x))[0]


def plain_block(block, x, media, mask):
    q = block.to_q(block.norm(x)).unflatten(-1, (-1, block.head_dim))[0]
    k, v = block.to_kv(media).unflatten(-1, (2, -1, block.head_dim)).unbind(1)
    scores = torch.einsum("qhd,khd->hqk", q, k) / block.head_dim**0.5
    weights = scores.masked_fill(~mask, -1e300).softmax(-1) * mask
    x = x + block.attention_gate.tanh() * block.to_out(torch.einsum("hqk,khd->qhd", weights, v).flatten(1))
    inner = F.gelu(block.feed_forward_in(block.feed_forward_norm(x)))
    return x + block.feed_forward_gate.tanh() * block.feed_forward_out(inner)


def in_fp64(model):
    """Llama's RMSNorm rounds to fp32 inside; PyTorch's does not."""
    for module in list(model.language_model.modules()):
        for name, child in list(module.named_children()):
            if type(child).__name__ == "LlamaRMSNorm":
                norm = nn.RMSNorm(child.weight.shape[0], eps=child.variance_epsilon)
                norm.weight = child.weight
                setattr(module, name, norm)
    return model.double()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"sees_media": "all", "cross_attention_frequency": 2},
        {"resampler_concatenates_latents": True, "sees_media": "all"},
        {"resampler_concatenates_latents": True, "cross_attention_frequency": 3},
    ],
    ids=str,
)
def test_equals_the_plain_definition(tokenizer, options):
    """Logits, and the gradient of every parameter, in fp64."""
    config = cross_config(tokenizer, **options)
    model, processor = in_fp64(make_model(config)), LynxProcessor.for_model(config, tokenizer)
    batches = [
        [*interleaved(), {"role": "assistant", "content": "no"}],
        conversation("Hello", "yes"),
        conversation("Same?", "no", images=[make_image(4)], videos=[[make_image(5), make_image(6)]]),
    ]
    samples = [processor.encode(messages) for messages in batches]
    packed = processor.pack(samples)
    logits = model(**inputs(packed)).logits[0]
    items = [len(sample.media) * config.num_latents for sample in samples]
    media = model.encode_media(packed["pixel_values"], packed["frame_positions"], packed["media_layout"]).split(items)
    expected = torch.cat(
        [plain_logits(model, sample, own, config.sees_media) for sample, own in zip(samples, media, strict=True)]
    )
    torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-10)
    weight = torch.randn_like(logits)
    parameters = dict(model.named_parameters())
    ours, theirs = (
        torch.autograd.grad((each * weight).sum(), list(parameters.values())) for each in (logits, expected)
    )
    for name, actual, exact in zip(parameters, ours, theirs, strict=True):
        assert exact.any(), name
        torch.testing.assert_close(actual, exact, rtol=1e-8, atol=1e-8, msg=name)
