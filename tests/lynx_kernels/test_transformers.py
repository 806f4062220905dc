"""Our attention in transformers' decoders, in fp64 (transformers' eager attention uses an fp32 softmax even there)."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    Llama4TextConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    masking_utils,
)

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
    return model(ids[None], attention_mask=mask, position_ids=layout.position_ids[None]).logits[0]


@pytest.mark.parametrize("config_class", DECODERS)
def test_packed_rows_equal_single_sequences(config_class):
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


def test_branches_see_only_their_root_and_themselves():
    model = decoder(LlamaConfig)
    root, first, second = torch.randint(50, (4,)), torch.randint(50, (3,)), torch.randint(50, (5,))
    layout = PackedLayout.from_groups([(4, [3, 5])])
    packed = run_packed(model, torch.cat([root, first, second]), layout)
    alone = [
        run_packed(model, torch.cat([root, each]), PackedLayout.causal([4 + len(each)])) for each in (first, second)
    ]
    torch.testing.assert_close(packed[:7], alone[0])
    torch.testing.assert_close(packed[7:], alone[1][4:])


@pytest.fixture
def calls(monkeypatch):
    """The layouts that reach prefix_attention, one per call."""
    seen = []
    function = integration.prefix_attention

    def spy(q, k, v, layout, **options):
        seen.append(layout)
        return function(q, k, v, layout, **options)

    monkeypatch.setattr(integration, "prefix_attention", spy)
    return seen


PADDINGS = {
    "left": [[0, 0, 1, 1, 1, 1], [1] * 6],
    "right": [[1, 1, 1, 0, 0, 0], [1] * 6],
    "both sides, and an empty row": [[0, 1, 1, 0, 0, 0], [0] * 6],
    "none": [[1] * 6, [1] * 6],
}


def check_padded(model, other, mask):
    ids, weight = torch.randint(50, (2, 6)), torch.randn(2, 6, 50, dtype=torch.float64)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    is_token = mask.bool()
    for each in (model, other):
        each.out = each(ids, attention_mask=mask, position_ids=positions).logits[is_token]
        (each.out * weight[is_token]).sum().backward()
    torch.testing.assert_close(model.out, other.out)
    for (name, parameter), its in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, its.grad, msg=name)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("config_class", DECODERS)
def test_padded_rows_equal_sdpa(config_class, padding, calls):
    check_padded(decoder(config_class), decoder(config_class, "sdpa"), torch.tensor(PADDINGS[padding]))
    assert len(calls) == SIZES["num_hidden_layers"]  # the layout is made from the mask; there is no dense mask


@pytest.mark.parametrize("padding", ["left", "right", "both sides, and an empty row"])
def test_padded_rows_of_a_full_decoder_equal_sdpa(padding, calls):
    """Older releases of transformers ignore ``is_causal`` and make these causal as well."""
    models = [decoder(LlamaConfig, name, is_causal=False) for name in ("lynx", "sdpa")]
    check_padded(*models, torch.tensor(PADDINGS[padding]))
    assert len(calls) == SIZES["num_hidden_layers"]


def test_rows_without_a_mask_equal_padded_ones(calls):
    ids, model = torch.randint(50, (2, 6)), decoder(LlamaConfig)
    torch.testing.assert_close(model(ids).logits, decoder(LlamaConfig, "sdpa")(ids).logits)
    assert len(calls) == SIZES["num_hidden_layers"]


def test_restarting_positions():
    """transformers detects packed rows by their position_ids and makes a dense block-diagonal mask."""
    ids, positions = torch.randint(50, (1, 6)), torch.tensor([[0, 1, 0, 1, 2, 3]])
    logits = [decoder(LlamaConfig, n)(ids, position_ids=positions, use_cache=False).logits for n in ("lynx", "sdpa")]
    torch.testing.assert_close(*logits)
    alone = decoder(LlamaConfig, "sdpa")(ids[:, 2:]).logits
    torch.testing.assert_close(logits[0][:, 2:], alone)


def test_padded_cross_attention_is_not_taken_for_self_attention():
    """As many queries as keys, and a mask for the keys only. Queries at positions of padded keys are not padding."""
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = BertConfig(**sizes, num_attention_heads=4, is_decoder=True, add_cross_attention=True)
    memory, mask = torch.randn(2, 6, 32, dtype=torch.float64), torch.tensor(PADDINGS["left"])
    ids, states = torch.randint(50, (2, 6)), []
    for name in ("lynx", "sdpa"):
        torch.manual_seed(0)
        model = BertModel._from_config(config, attn_implementation=name).double().eval()
        states.append(model(ids, encoder_hidden_states=memory, encoder_attention_mask=mask).last_hidden_state)
    torch.testing.assert_close(*states)


FULL_DECODER = LlamaConfig(**SIZES, is_causal=False)
CAUSAL = {"mask_function": masking_utils.causal_mask_function, "config": LlamaConfig(**SIZES)}
BIDIRECTIONAL = {
    "mask_function": masking_utils.bidirectional_mask_function, "config": FULL_DECODER,
    "allow_is_bidirectional_skip": True, "allow_is_causal_skip": False,
}  # fmt: skip


def make_mask(options, columns=4):
    padding = torch.ones(2, columns, dtype=torch.bool)
    padding[0, 0] = False
    queries = {"q_length": 4, "cache_position": torch.arange(4), "device": "cpu"}  # of newer and of older releases
    return integration.mask(batch_size=2, kv_length=4, attention_mask=padding, **queries, **options)


@pytest.mark.parametrize("options", [CAUSAL, BIDIRECTIONAL])
def test_plain_masks_are_layouts(options):
    mask = make_mask(options)
    assert tuple(mask.shape) == (2, 1, 4, 4)
    assert (mask.layout.num_tokens, mask.seen) == (8, None)


@pytest.mark.parametrize(
    ("options", "columns"),
    [
        ({**CAUSAL, "allow_is_causal_skip": False}, 4),  # a model that changes the mask afterwards
        ({**BIDIRECTIONAL, "allow_is_bidirectional_skip": False}, 4),
        ({**BIDIRECTIONAL, "config": LlamaConfig(**SIZES, is_causal=False, is_encoder_decoder=True)}, 4),
        (CAUSAL, 6),  # for a cache that is longer than its content
    ],
)
def test_other_masks_are_dense(options, columns):
    mask = make_mask(options, columns)
    assert mask.layout is None
    assert (mask.seen.dtype, tuple(mask.seen.shape), tuple(mask.shape)) == (torch.bool, (2, 1, 4, 4), (2, 1, 4, 4))


LAYOUTS = {
    "causal": PackedLayout.causal([3, 1, 4]),
    "causal roots": PackedLayout.from_groups([(3, [2, 2]), (2, [1])]),
    "full roots": PackedLayout.from_groups([(3, [2, 2]), (2, [1])], root_is_causal=False),
    "left": PackedLayout.from_padding_mask(torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])),
    "right": PackedLayout.from_padding_mask(torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]])),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_information_leaks(layout):
    """If a token changes, exactly the outputs that may see it change. All others stay bit for bit."""
    visible, model = LAYOUTS[layout].visible(), decoder(LlamaConfig)
    if layout in ("left", "right"):
        mask = torch.tensor({"left": [[0, 0, 1, 1], [1, 1, 1, 1]], "right": [[1, 1, 1, 0], [1, 0, 0, 0]]}[layout])
        is_token = mask.flatten().bool()

        def run(embeddings):
            return model(inputs_embeds=embeddings.view(2, 4, -1), attention_mask=mask).logits.flatten(0, 1)
    else:
        is_token = torch.ones(len(visible), dtype=torch.bool)

        def run(embeddings):
            packed = LAYOUTS[layout]
            options = {"attention_mask": integration.packed_mask(packed), "position_ids": packed.position_ids[None]}
            return model(inputs_embeds=embeddings[None], **options).logits[0]

    with torch.no_grad():
        embeddings = torch.randn(len(visible), SIZES["hidden_size"], dtype=torch.float64)
        before = run(embeddings)
        for token in range(len(visible)):
            perturbed = embeddings.clone()
            perturbed[token] += 1
            changed = (run(perturbed) != before).any(-1)
            assert torch.equal(changed[is_token], visible[is_token, token]), f"token {token}"


def test_generation_equals_sdpa(calls):
    ids = torch.randint(50, (2, 6))
    options = {"attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6]), "max_new_tokens": 5, "num_beams": 2}
    tokens = [decoder(LlamaConfig, name).generate(ids, **options) for name in ("lynx", "sdpa")]
    assert torch.equal(*tokens)
    assert len(calls) == SIZES["num_hidden_layers"]  # the prompt; then transformers' mask over the cache


@pytest.mark.parametrize("cache", ["static", "dynamic"])
def test_prompt_in_two_chunks(cache):
    """The result equals that of one chunk. The second chunk has fewer queries than keys."""
    ids, mask = torch.randint(50, (2, 6)), torch.tensor(PADDINGS["left"])
    options = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False, "cache_implementation": cache}
    tokens = [decoder(LlamaConfig, name).generate(ids, **options) for name in ("lynx", "sdpa")]
    assert torch.equal(*tokens)
    model, whole = decoder(LlamaConfig), decoder(LlamaConfig, "sdpa")(ids, attention_mask=mask).logits
    first = model(ids[:, :4], attention_mask=mask[:, :4], use_cache=True)
    second = model(ids[:, 4:], attention_mask=mask, past_key_values=first.past_key_values).logits
    torch.testing.assert_close(second, whole[:, 4:])


def test_chunks_of_packed_rows_are_refused():
    """transformers counts padding for them, before it calls our mask function."""
    config = Llama4TextConfig(**SIZES, attention_chunk_size=2, num_local_experts=2, intermediate_size_mlp=8)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="lynx").eval()
    with pytest.raises(ValueError, match=r"\(cumsum\).*it cannot take packed rows"):
        run_packed(model, torch.randint(50, (4,)), PackedLayout.causal([4]))


def test_contradictory_calls_raise():
    ids, layout = torch.randint(50, (4,)), PackedLayout.causal([4])
    mask, model = integration.packed_mask(layout), decoder(LlamaConfig)
    with pytest.raises(ValueError, match=r"has no dropout, but attention_dropout is 0\.5"):
        run_packed(decoder(LlamaConfig, attention_dropout=0.5).train(), ids, layout)
    for other in (ids.repeat(2, 1), ids[None, :3]):
        with pytest.raises(ValueError, match="is for one row of 4 tokens, but LlamaAttention uses it for a batch of"):
            model(other, attention_mask=mask)
    for other in (None, torch.ones(1, 4, dtype=torch.int64)):
        with pytest.raises(ValueError, match="beside a layout stands attention_mask=packed_mask"):
            model(ids[None], attention_mask=other, layout=layout)
