"""Layers that the kernels cannot take run PyTorch's attention, log it, and are right."""

import logging
import types
from functools import partial

import pytest
import torch
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    DeepseekV3Config,
    LlamaConfig,
    StaticCache,
)
from transformers.masking_utils import create_masks_for_generate

from lynx_kernels import PackedLayout, prefix_attention_decode
from lynx_kernels.backends import cpu as cpu_backend
from lynx_kernels.integrations import logs
from lynx_kernels.integrations import transformers as integration
from tests.lynx_kernels import families
from tests.lynx_kernels.attention_helpers import dense_decode

integration.register()
SIZES = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip
MLA = {
    **SIZES, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4, "v_head_dim": 8, "first_k_dense_replace": 2, "n_routed_experts": 2, "n_group": 1,
    "topk_group": 1, "num_experts_per_tok": 1,
}  # fmt: skip
PADDINGS = {
    "none": [[1] * 6, [1] * 6],
    "left": [[0, 0, 1, 1, 1, 1], [1] * 6],
    "right": [[1, 1, 1, 0, 0, 0], [1] * 6],
    "between": [[1, 0, 1, 1, 0, 1], [1] * 6],
    "between and at the ends": [[0, 1, 0, 1, 1, 0], [0] * 6],
}


def decoder(config, implementation):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(
                parameter.nan_to_num().clamp(-2, 2) + 0.05 * torch.randn_like(parameter)
            )  # some are uninitialised
    return model


def check_padded(config, padding, function=lambda model: model):
    """Compare logits at tokens, and all gradients, with eager attention in fp32: in fp64 its left padding gives NaN."""
    ids, mask = torch.randint(50, (2, 6)), torch.tensor(PADDINGS[padding])
    weight, models = torch.randn(2, 6, 50)[mask.bool()], []
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    for name in ("lynx", "eager"):
        model = decoder(config, name)
        run = function(model) if name == "lynx" else model
        model.out = run(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits[mask.bool()]
        (model.out * weight).sum().backward()
        models.append(model)
    ours, theirs = models
    torch.testing.assert_close(ours.out, theirs.out, rtol=1e-5, atol=1e-5)
    for (name, parameter), its in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert (parameter.grad is None) == (its.grad is None), name
        if its.grad is not None:
            torch.testing.assert_close(parameter.grad, its.grad, rtol=1e-4, atol=1e-5, msg=name)


@pytest.fixture
def said(caplog):
    """Reads what was logged: a list of (level, message)."""
    logs._said.clear()
    caplog.set_level(logging.INFO, "lynx_kernels")

    def read():
        return [(each.levelno, each.getMessage()) for each in caplog.records if each.name == "lynx_kernels"]

    return read


@pytest.mark.parametrize("padding", ["between", "between and at the ends"])
@pytest.mark.parametrize("options", [{}, {"is_causal": False}], ids=["causal", "full"])
def test_padding_between_tokens(options, padding, said):
    config = LlamaConfig(**SIZES, num_key_value_heads=2, **options)
    with families.counted() as calls:
        check_padded(config, padding)
        check_padded(config, padding)
    assert calls == {"sdpa": 2 * SIZES["num_hidden_layers"]}
    [warning] = [message for level, message in said() if level == logging.WARNING]
    assert warning.startswith("llama: attention runs PyTorch's")
    assert "since a row has padding between its tokens" in warning


def test_generation_with_padding_between_tokens():
    ids, mask = torch.randint(50, (2, 6)), torch.tensor(PADDINGS["between"])
    config, options = LlamaConfig(**SIZES), {"attention_mask": mask, "max_new_tokens": 5, "num_beams": 2}
    tokens = [decoder(config, name).generate(ids, **options) for name in ("lynx", "eager")]
    assert torch.equal(*tokens)


def test_encoders_with_padding_between_tokens():
    ids, mask = torch.randint(50, (2, 6)), torch.tensor(PADDINGS["between"])
    states = []
    for name in ("lynx", "eager"):
        torch.manual_seed(0)
        model = BertModel._from_config(BertConfig(**SIZES), attn_implementation=name).eval()
        states.append(model(ids, attention_mask=mask).last_hidden_state[mask.bool()])
    torch.testing.assert_close(*states)


def test_compiled_code_refuses_padding_between_tokens():
    """It cannot read the mask to choose the dense one."""
    model = torch.compile(decoder(LlamaConfig(**SIZES), "lynx"), backend="eager", fullgraph=True)
    with pytest.raises(RuntimeError, match="a row has padding between tokens"), torch.no_grad():
        model(torch.randint(50, (2, 6)), attention_mask=torch.tensor(PADDINGS["between"]), use_cache=False)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("width", [8, 16])
def test_values_narrower_and_wider_than_keys(width, padding, said):
    """The kernels take narrower ones (MLA)."""
    with families.counted() as calls:
        check_padded(DeepseekV3Config(**{**MLA, "v_head_dim": width}), padding)
    runs = "sdpa" if width > 12 or padding.startswith("between") else "kernels"
    assert calls == {runs: MLA["num_hidden_layers"]}
    warnings = [message for level, message in said() if level == logging.WARNING]
    if padding.startswith("between"):
        assert len(warnings) == 1
        assert warnings[0].startswith("deepseek_v3: attention runs PyTorch's")
    else:
        assert warnings == [
            "DeepseekV3Attention: runs PyTorch's scaled_dot_product_attention, since its values are 16 wide and its "
            "keys 12; with padding or packed, the mask is dense"
        ] * (width > 12)


def test_packed_rows_of_narrow_values():
    model, theirs = (decoder(DeepseekV3Config(**MLA), name) for name in ("lynx", "eager"))
    layout, ids = PackedLayout.from_groups([(2, [3, 1]), (0, [4])]), torch.randint(50, (10,))
    mask = integration.packed_mask(layout)
    packed = model(ids[None], attention_mask=mask, position_ids=layout.position_ids[None]).logits[0]
    for tokens, outputs in (([0, 1, 2, 3, 4], [0, 1, 2, 3, 4]), ([0, 1, 5], [0, 1, 5]), ([6, 7, 8, 9], [6, 7, 8, 9])):
        alone = theirs(ids[tokens][None]).logits[0]
        torch.testing.assert_close(packed[outputs], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("values", "head_dim"), [(4, 8), (16, 8), (8, 8)])
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_values_of_any_width(values, head_dim, kv_heads):
    """Without padding, with padding, and with a layout in place of a mask."""
    q = torch.randn(2, 4, 6, head_dim, dtype=torch.float64)
    k, v = (torch.randn(2, kv_heads, 6, width, dtype=torch.float64) for width in (head_dim, values))
    module = types.SimpleNamespace(num_key_value_groups=4 // kv_heads, config=None)
    keys = [each.repeat_interleave(4 // kv_heads, 1) for each in (k, v)]
    for padding in PADDINGS.values():
        tokens = torch.tensor(padding, dtype=torch.bool)
        mask = make_mask(tokens)
        seen = (tokens[:, None, :] & torch.ones(6, 6, dtype=torch.bool).tril())[:, None]
        expected = F.scaled_dot_product_attention(q, *keys, attn_mask=seen, scale=0.3).transpose(1, 2)
        actual, _ = integration.attention(module, q, k, v, mask, scaling=0.3)
        torch.testing.assert_close(actual[tokens], expected[tokens])
    layout = PackedLayout.from_groups([(2, [3, 1])], root_is_causal=False)
    expected = F.scaled_dot_product_attention(
        q[:1], *(each[:1] for each in keys), attn_mask=layout.visible(), scale=0.3
    )
    actual, _ = integration.attention(module, q[:1], k[:1], v[:1], integration.packed_mask(layout), scaling=0.3)
    torch.testing.assert_close(actual, expected.transpose(1, 2))


@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize(
    ("scaling", "local", "scores"),
    [
        (None, {}, {}),
        (0.3, {"window": 4}, {}),
        (-1.7, {"chunk": 3}, {"softcap": 2.0}),
        (None, {"window": 5}, {"sinks": torch.tensor([0.5, -1.0, 2.0, 0.0])}),
    ],
)
def test_decoding_over_shared_roots(scaling, local, scores, impl, monkeypatch):
    """Each layer reads its own roots, with its own factor on the scores, soft cap and sinks, its mask's window."""
    monkeypatch.setattr(integration, "prefix_attention_decode", partial(prefix_attention_decode, impl=impl))
    if impl == "cpu" and cpu_backend.MISSING is not None:
        pytest.skip(cpu_backend.MISSING)
    q, branches = torch.randn(3, 4, 2, 8), [torch.randn(3, 2, 5, 8) for _ in range(2)]  # (B, heads, length, D)
    roots = [torch.randn(2, 12, 2, 8) for _ in range(2)]  # (layers, K, heads, D)
    indices = [torch.tensor(each) for each in ([[[6, 10]], [[0, 6]], [[6, 10]]], [2, 5, 3])]
    for layer in range(2):
        module = types.SimpleNamespace(layer_idx=layer, config=None)
        shared = integration.SharedRoots(*roots, *indices)
        mask = integration.packed_mask(PackedLayout.causal([1]).with_local(**local))
        actual, _ = integration.attention(module, q, *branches, mask, scaling=scaling, shared_roots=shared, **scores)
        tensors = [q.transpose(1, 2), roots[0][layer], roots[1][layer], *(each.transpose(1, 2) for each in branches)]
        expected, _ = dense_decode(*(each.double() for each in tensors), *indices, scale=scaling, **local, **scores)
        torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)


def make_mask(tokens):
    rows, length = tokens.shape
    options = {"q_length": length, "device": tokens.device, "config": LlamaConfig(**SIZES)}
    return integration.mask(batch_size=rows, kv_length=length, attention_mask=tokens, **options)


@pytest.mark.parametrize(("head_dim", "device"), [(512, "cpu"), (520, "cpu"), (520, "meta")])
def test_wide_heads(head_dim, device, said):
    """GPU kernels take 512 columns, CPU kernels any number."""
    q = torch.randn(1, 2, 5, head_dim, device=device)
    mask = make_mask(torch.ones(1, 5, dtype=torch.bool, device=device))
    with families.counted() as calls:
        out, _ = integration.attention(types.SimpleNamespace(), q, q, q, mask)
    assert calls == {"kernels" if device == "cpu" else "sdpa": 1}
    assert [message for _, message in said() if "heads are 520 wide" in message] or device == "cpu"
    if device == "cpu":
        expected = F.scaled_dot_product_attention(q, q, q, is_causal=True).transpose(1, 2)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("padding", [0, 1])
def test_prompts_in_a_static_cache(padding):
    """More keys than queries: those after the prompt are not filled yet."""
    q, k, v = torch.randn(3, 2, 2, 4, 8)
    keys, values = (torch.cat([each, torch.full((2, 2, 3, 8), 1e3)], 2) for each in (k, v))
    tokens = torch.ones(2, 4, dtype=torch.bool)
    tokens[0, :padding] = False
    mask = integration.mask(
        batch_size=2, kv_length=7, q_length=4, device="cpu", attention_mask=tokens, config=LlamaConfig(**SIZES)
    )
    actual, _ = integration.attention(types.SimpleNamespace(), q, keys, values, mask)
    expected, _ = integration.attention(types.SimpleNamespace(), q, k, v, make_mask(tokens))
    torch.testing.assert_close(actual[tokens], expected[tokens])
    assert torch.equal(mask.dense()[:, 0, :, :4][tokens], make_mask(tokens).dense()[:, 0][tokens])
    assert not mask.dense()[..., 4:].any()


def test_layers_without_a_mask():
    """They see all keys, as in eager attention, unless the layer says that it is causal."""
    q = torch.randn(1, 2, 5, 8)
    full, causal = (F.scaled_dot_product_attention(q, q, q, is_causal=each).transpose(1, 2) for each in (False, True))
    for module, options, expected in (
        (types.SimpleNamespace(), {}, full),
        (types.SimpleNamespace(is_causal=False), {}, full),
        (types.SimpleNamespace(is_causal=True), {}, causal),
        (types.SimpleNamespace(is_causal=True), {"is_causal": False}, full),
        (types.SimpleNamespace(), {"is_causal": True}, causal),
    ):
        out, _ = integration.attention(module, q, q, q, None, **options)
        torch.testing.assert_close(out, expected)


def test_masks_that_do_not_fit_are_refused():
    q, module = torch.randn(2, 2, 5, 8), types.SimpleNamespace()
    mask = make_mask(torch.ones(2, 5, dtype=torch.bool))
    for keys in (q[:, :, :4], torch.cat([q, q], 2)):
        with pytest.raises(ValueError, match="uses it for 2 rows of 5 queries and"):
            integration.attention(module, q, keys, keys, mask)
    with pytest.raises(ValueError, match="uses it for 1 rows"):
        integration.attention(module, q[:1], q[:1], q[:1], mask)
    with pytest.raises(ValueError, match=r"is torch\.int64 of shape \(2, 5\), neither bool nor floating point"):
        integration.attention(module, q, q, q, torch.ones(2, 5, dtype=torch.int64))


@pytest.mark.parametrize(
    "name", ["position_bias", "indices", "block_indices", "attention_bias", "alibi", "topk_indices"]
)
def test_arguments_for_unsupported_features_are_refused(name):
    q = torch.randn(1, 2, 4, 8)
    with pytest.raises(ValueError, match=f"but the layer asks for {name}; take another one for this model"):
        integration.attention(torch.nn.Module(), q, q, q, None, **{name: torch.ones(2)})
    integration.attention(torch.nn.Module(), q, q, q, None, **{name: None}, position_ids=torch.arange(4))


def test_decoding_is_logged_once_at_info(said):
    model = decoder(LlamaConfig(**SIZES), "lynx")
    model.generate(torch.randint(50, (1, 4)), attention_mask=torch.ones(1, 4, dtype=torch.int64), max_new_tokens=4)
    [(level, message)] = said()
    assert level == logging.INFO
    assert message.startswith("LlamaAttention: runs PyTorch's scaled_dot_product_attention, since its mask")


WAYS = {
    "compiled": lambda model: torch.compile(model, backend="aot_eager", fullgraph=True),
    "checkpointed": lambda model: checkpointed(model.train()),
    "compiled layers": lambda model: compiled_layers(model),
    "compiled and checkpointed": lambda model: torch.compile(checkpointed(model.train()), backend="aot_eager"),
}


def checkpointed(model):
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def compiled_layers(model):
    for layer in model.model.layers:
        layer.compile(backend="aot_eager", fullgraph=True)
    return model


@pytest.mark.parametrize(
    ("way", "config"),
    [
        *((way, LlamaConfig(**{**SIZES, "num_hidden_layers": 1}, num_key_value_heads=2)) for way in WAYS),
        ("compiled", DeepseekV3Config(**{**MLA, "num_hidden_layers": 1})),
        ("checkpointed", DeepseekV3Config(**MLA)),
    ],
    ids=lambda value: getattr(value, "model_type", value),
)
def test_masks_pass_through(way, config):
    """A graph builds the mask, or gets it, or a layer runs twice."""
    torch._dynamo.reset()
    check_padded(config, "left", WAYS[way])


def test_masks_built_before_a_compiled_step(said):
    """As generate builds them with static caches."""
    model, theirs = (decoder(LlamaConfig(**SIZES), name) for name in ("lynx", "eager"))
    ids, tokens = torch.randint(50, (2, 6)), torch.tensor(PADDINGS["left"])
    expected = theirs(ids, attention_mask=tokens).logits
    cache = StaticCache(config=model.config, max_cache_len=8)
    graphs = []

    def backend(graph, _inputs):
        graphs.append(graph)
        return graph

    step = torch.compile(model, backend=backend, fullgraph=True)
    with torch.no_grad():
        model(ids[:, :3], attention_mask=tokens[:, :3], past_key_values=cache)
        for position in range(3, 6):
            embeddings = model.get_input_embeddings()(ids[:, position, None])
            mask = create_masks_for_generate(
                config=model.config,
                inputs_embeds=embeddings,
                attention_mask=tokens[:, : position + 1],
                past_key_values=cache,
            )
            logits = step(inputs_embeds=embeddings, attention_mask=mask, past_key_values=cache).logits[:, 0]
            torch.testing.assert_close(logits, expected[:, position], rtol=1e-5, atol=1e-5)
    assert len(graphs) == 1


def test_export(said):
    model = decoder(LlamaConfig(**SIZES), "lynx")
    inputs = {"input_ids": torch.randint(50, (2, 6)), "attention_mask": torch.tensor(PADDINGS["left"])}
    program = torch.export.export(model, (), {**inputs, "use_cache": False})
    expected = model(**inputs).logits
    torch.testing.assert_close(program.module()(**inputs, use_cache=False).logits, expected)
