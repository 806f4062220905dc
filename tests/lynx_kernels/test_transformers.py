"""The attention implementation for transformers' decoders, in fp64 (where their eager one uses an fp32 softmax)."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from lynx_kernels import PackedLayout
from lynx_kernels.integrations import transformers as integration

integration.register()
SIZES = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8,
}  # fmt: skip
DECODERS = [LlamaConfig, Qwen2Config, Qwen3Config, MistralConfig]


def decoder(config_class, implementation="lynx", **options):
    if config_class is MistralConfig:
        options = {"sliding_window": None, **options}
    torch.manual_seed(0)
    config = config_class(**SIZES, **options)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation).double().eval()
    for layer in model.model.layers:
        layer.self_attn.scaling = 0.7  # not the default, 1 / sqrt(8)
    return model


def run_packed(model, ids, layout):
    mask = integration.packed_mask(layout)
    return model(ids[None], attention_mask=mask, position_ids=layout.position_ids[None], layout=layout).logits[0]


@pytest.mark.parametrize("config_class", DECODERS)
def test_packed_rows_equal_single_sequences_(config_class):
    lengths = [5, 1, 9]
    ids = torch.randint(50, (sum(lengths),))
    model, alone = decoder(config_class), decoder(config_class, "sdpa")
    packed = run_packed(model, ids, PackedLayout.causal(lengths))
    single = torch.cat([alone(row[None]).logits[0] for row in ids.split(lengths)])
    torch.testing.assert_close(packed, single)
    packed.square().sum().backward()
    single.square().sum().backward()
    for (name, parameter), other in zip(model.named_parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, msg=name)


def test_branches_see_their_root_and_not_each_other():
    model = decoder(LlamaConfig)
    root, first, second = torch.randint(50, (4,)), torch.randint(50, (3,)), torch.randint(50, (5,))
    layout = PackedLayout.from_groups([(4, [3, 5])])
    packed = run_packed(model, torch.cat([root, first, second]), layout)
    alone = [
        run_packed(model, torch.cat([root, each]), PackedLayout.causal([4 + len(each)])) for each in (first, second)
    ]
    torch.testing.assert_close(packed[:7], alone[0])
    torch.testing.assert_close(packed[7:], alone[1][4:])


@pytest.mark.parametrize("config_class", DECODERS)
def test_padded_rows_equal_sdpa(config_class):
    ids = torch.randint(50, (2, 6))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    logits = [decoder(config_class, name)(ids, attention_mask=mask).logits for name in ("lynx", "sdpa")]
    torch.testing.assert_close(logits[0][mask.bool()], logits[1][mask.bool()])


def test_generation_equals_sdpa():
    ids = torch.randint(50, (2, 6))
    options = {"attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6]), "max_new_tokens": 5, "num_beams": 2}
    tokens = [decoder(LlamaConfig, name).generate(ids, **options) for name in ("lynx", "sdpa")]
    assert torch.equal(*tokens)


def test_what_packed_attention_lacks_is_refused():
    ids, layout = torch.randint(50, (4,)), PackedLayout.causal([4])
    with pytest.raises(ValueError, match="no sliding_window, but the layer asks for it: 2"):
        run_packed(decoder(MistralConfig, sliding_window=2), ids, layout)
    with pytest.raises(ValueError, match=r"no dropout, but attention_dropout is 0\.5"):
        run_packed(decoder(LlamaConfig, attention_dropout=0.5).train(), ids, layout)
    mask = integration.packed_mask(layout)
    with pytest.raises(ValueError, match="the batch has 2 rows"):
        decoder(LlamaConfig)(ids.repeat(2, 1), attention_mask=mask, layout=layout)
