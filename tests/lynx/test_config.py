"""Configurations that contradict themselves say so."""

import pytest

from lynx import LynxConfig
from tests.lynx.conftest import make_config


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adapter_activation": "tanhh"}, "adapter_activation='tanhh'"),
        ({"num_latents": "3"}, "num_latents is '3'"),
        ({"fusion": "telepathy"}, "fusion='telepathy'"),
        ({"adapter_frequency": 4}, "text_config has 3 layers"),
        ({"num_latents": 0}, "num_latents is 0"),
        ({"bridge": "rope"}, "bridge='rope' is not known; there is 'resampler', 'mlp', 'linear'"),
        ({"prefix_is_causal": 1}, "prefix_is_causal is 1, must be True or False"),
        ({"sees_media": "all"}, "sees_media='all', but with fusion='prefix'"),
        ({"bridge": "mlp", "resampler_concatenates_latents": True}, "there is no resampler"),
        ({"resampler_concatenates_latents": True}, "hidden_size, 24, but a prefix needs text_config's, 32"),
        ({"image_token_id": -1}, "image_token_id is -1"),
        ({"adapter_size": True}, "adapter_size is True"),
    ],
)
def test_contradictory_configurations_are_refused(tokenizer, options, message):
    with pytest.raises(ValueError, match=message):
        make_config(tokenizer, **options)


@pytest.mark.parametrize(
    ("part", "field", "value", "message"),
    [
        (
            "text_config",
            "num_key_value_heads",
            3,
            "text_config: num_attention_heads, 4, must be a multiple of num_key_value_heads, 3",
        ),
        ("text_config", "num_attention_heads", 0, "text_config is not a configuration of model_type 'llama'"),
        ("text_config", "num_attention_heads", 5, "hidden size .32. is not a multiple"),
        ("text_config", "model_type", "parrot", "text_config is not a configuration of model_type 'parrot'"),
        ("vision_config", "num_attention_heads", 0, "vision_config: num_attention_heads is 0"),
        (
            "vision_config",
            "num_attention_heads",
            5,
            "vision_config: hidden_size, 24, must be a multiple of num_attention_heads, 5",
        ),
        ("vision_config", "patch_size", 3, "image_size, 8, must be a multiple of patch_size, 3"),
    ],
)
def test_parts_that_contradict_themselves_are_refused(tokenizer, part, field, value, message):
    config = make_config(tokenizer).to_dict()
    config[part][field] = value
    config[part].pop("head_dim", None)
    with pytest.raises(ValueError, match=message):
        LynxConfig.from_dict(config)
