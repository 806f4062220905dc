"""Batches and configurations that contradict themselves say so."""

import pytest
import torch
from transformers import DynamicCache, StaticCache

from lynx.fusion.cross_attention import Media
from lynx_kernels import SpanLayout
from tests.lynx.conftest import make_config, make_model
from tests.lynx.fusion.cross_attention.conftest import cross_config
from tests.lynx.model_checks import inputs


def test_bad_batches_say_what_is_wrong(tokenizer, model, processor, samples, questions):
    packed = inputs(processor.pack(samples))
    fewer = processor.pack(samples[:1])["cross_layout"]
    fewer_keys = SpanLayout.from_spans([packed["input_ids"].numel()], [(0, 9)], 9)
    shorter = SpanLayout.from_spans([3], [(0, 15)], 15)
    decoder_config = model.get_decoder().config
    filled = DynamicCache(config=decoder_config)
    model.requires_grad_(False)
    filled.update(torch.zeros(1, 2, 4, 8), torch.zeros(1, 2, 4, 8), 0)
    cases = [
        ({**packed, "cross_layout": None}, "cross_layout is missing"),
        ({**packed, "pixel_values": None}, "cross_layout describes 18 vision tokens, but the images give 0"),
        ({**packed, "cross_layout": fewer}, r"cross_layout describes \d+ tokens, but input_ids holds"),
        ({**packed, "cross_layout": fewer_keys}, "cross_layout describes 9 vision tokens, but the images give 18"),
        (
            {"input_ids": torch.tensor([[1, 2]]), "media": Media(torch.zeros(15, 32), shorter)},
            "3 tokens, the batch has",
        ),
        ({"input_ids": torch.tensor([[1, processor.image_token_id]])}, "one image token for each of the 0"),
        ({"input_ids": torch.tensor([[1]]), "past_key_values": filled}, "a DynamicCache, which cannot hold media"),
        (
            {"input_ids": torch.tensor([[1]]), "past_key_values": DynamicCache(config=decoder_config, offloading=True)},
            "cannot hold media",
        ),
        (
            {"input_ids": torch.tensor([[1]]), "past_key_values": StaticCache(decoder_config, max_cache_len=9)},
            "a StaticCache, which cannot hold media",
        ),
    ]
    for batch, message in cases:
        with pytest.raises(ValueError, match=message):
            model(**batch)
    with pytest.raises(ValueError, match="cannot hold media"):
        model.generate(**questions, max_new_tokens=2, cache_implementation="static")
    with pytest.raises(ValueError, match="no media reached LlamaDecoderLayerWithCrossAttention"):
        model.language_model(torch.tensor([[1, 2]]))
    with pytest.raises(ValueError, match="past_key_values already holds the media of its text"):
        model(**questions, past_key_values=model(**questions).past_key_values)
    prefix = make_model(make_config(tokenizer))
    with pytest.raises(ValueError, match="cross_layout is for fusion='cross_attention', this model has 'prefix'"):
        prefix(**packed)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cross_attention_frequency": 4}, "cross_attention_frequency is 4, but text_config has 3 layers"),
        ({"cross_attention_heads": 0}, "cross_attention_heads is 0"),
        ({"bridge": "mlp"}, "needs bridge='resampler', not 'mlp'"),
        ({"prefix_is_causal": False}, "there is no prefix"),
        ({"sees_media": "later"}, "sees_media='later' is not known; there is 'preceding', 'all'"),
    ],
)
def test_contradictory_configurations_are_refused(tokenizer, options, message):
    with pytest.raises(ValueError, match=message):
        cross_config(tokenizer, **options)


def test_what_another_fusion_ignores_is_no_contradiction(tokenizer):
    assert cross_config(tokenizer, adapter_frequency=9).fusion == "cross_attention"
