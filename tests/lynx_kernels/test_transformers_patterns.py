"""Windows, chunks, image blocks, packed samples, soft caps and sinks of transformers' models, on our kernels."""

import pytest
import torch
from transformers import Gemma2Config, GptOssConfig, Llama4TextConfig, LlamaConfig, MistralConfig
from transformers import masking_utils as theirs

from lynx_kernels import PackedLayout
from lynx_kernels.integrations import patterns
from lynx_kernels.integrations import transformers as integration
from tests.lynx_kernels import families

integration.register()
SIZES = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8,
}  # fmt: skip
LENGTH = 12
PADDINGS = {
    "no mask": None,
    "none": [[1] * LENGTH] * 2,
    "left": [[0] * 3 + [1] * 9, [1] * LENGTH],
    "right": [[1] * 9 + [0] * 3, [1] * LENGTH],
    "an empty row": [[0] * LENGTH, [0] * 2 + [1] * 10],
}
BLOCKS = {
    "none": None,
    "two images": [[-1, -1, -1, -1, 0, 0, 0, -1, -1, 1, 1, -1], [0, 0, 0, 0, -1, 1, 1, -1, -1, -1, 2, 2]],
    "neighbours": [[-1, 0, 0, 0, 1, 1, 1, 2, 2, -1, -1, -1], [-1] * LENGTH],
    "a prefix": [[0] * 7 + [-1] * 5, [0] * 4 + [-1] * 8],
    "in two parts": [[0, 0, -1, 0, 0, -1, -1, -1, 1, 1, 1, -1], [-1] * LENGTH],
}
KINDS = {  # how transformers asks for it
    "causal": theirs.create_causal_mask,
    "window": theirs.create_sliding_window_causal_mask,
    "chunk": theirs.create_chunked_causal_mask,
    "a window that holds in blocks": theirs.create_causal_mask,
}


def make_masks(kind, blocks, padding=None, positions=None):
    """Ours and transformers' dense one, (2, 1, L, L) bool."""
    blocks = None if blocks is None else torch.tensor(blocks)
    found = []
    for implementation in ("lynx", "sdpa"):
        config = LlamaConfig(**SIZES, sliding_window=4, attention_chunk_size=5)
        config._attn_implementation = implementation
        options = {"block_sequence_ids": blocks}
        if kind == "a window that holds in blocks":  # as Gemma 3 asks for it
            options = {"and_mask_function": theirs.sliding_window_overlay(4)}
            if blocks is not None:
                options["or_mask_function"] = theirs.blockwise_overlay(blocks)
        found.append(
            KINDS[kind](
                config,
                torch.zeros(2, LENGTH, 1),
                None if padding is None else torch.tensor(padding),
                None,
                position_ids=positions,
                **({"allow_is_causal_skip": False} if implementation == "sdpa" else {}),
                **options,
            )
        )
    ours, dense = found
    return ours, dense.expand(2, 1, LENGTH, LENGTH)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize("kind", KINDS)
def test_masks_of_padded_rows(kind, blocks, padding):
    ours, dense = make_masks(kind, BLOCKS[blocks], PADDINGS[padding])
    tokens = torch.tensor(PADDINGS[padding] or PADDINGS["none"], dtype=torch.bool)
    torch.testing.assert_close(ours.dense()[:, 0][tokens], dense[:, 0][tokens])
    if kind == "a window that holds in blocks" and blocks == "none":
        return  # transformers says of it what it says of masks that a model changes afterwards
    # A prefix of 7 is longer than the window.
    fits = blocks != "in two parts" and not (kind == "a window that holds in blocks" and blocks == "a prefix")
    if fits:
        assert (ours.layout.window, ours.layout.chunk) == (
            4 if "window" in kind else None,
            5 if kind == "chunk" else None,
        )
    elif padding in ("no mask", "none"):  # padding may take a part of the block away
        assert ours.layout is None


POSITIONS = {
    "samples": [[0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]],
    "one": [list(range(LENGTH))] * 2,
    "of one row": [[0, 0, 1, 2, 0, 1, 2, 3, 4, 5, 6, 7]],
    "that start anywhere": [[7, 8, 9, 3, 4, 5, 6, 7, 8, 0, 1, 2]] * 2,
}


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("blocks", ["none", "two images", "in two parts"])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "a window that holds in blocks"])
def test_masks_of_packed_samples(kind, blocks, positions):
    """Whose positions start again, as padding-free collators of other libraries make them."""
    ours, dense = make_masks(kind, BLOCKS[blocks], positions=torch.tensor(POSITIONS[positions]))
    assert torch.equal(ours.dense(), dense)
    is_cut = kind == "chunk" and positions == "that start anywhere"
    if blocks == "none" or (blocks, positions) == ("two images", "one"):
        assert (ours.layout is not None) == (not is_cut)


def test_blocks_that_cross_samples_stay_dense():
    """Equal numbers in two samples see each other, says the model."""
    blocks = [[-1, -1, -1, 0, 0, 0, 0, -1, -1, -1, -1, -1], [-1] * LENGTH]
    ours, dense = make_masks("causal", blocks, positions=torch.tensor(POSITIONS["samples"]))
    assert ours.layout is None
    assert torch.equal(ours.dense(), dense)


def test_unknown_functions_have_no_pattern():
    causal, full = theirs.causal_mask_function, theirs.bidirectional_mask_function
    window, blocks = theirs.sliding_window_overlay(3), theirs.blockwise_overlay(torch.zeros(1, 4))
    own = lambda batch, head, query, key: query == key  # noqa: E731
    for unknown in (
        own,
        theirs.and_masks(causal, own),
        theirs.or_masks(causal, own),
        theirs.or_masks(causal, window),
        theirs.or_masks(causal, blocks, blocks),
        theirs.or_masks(theirs.or_masks(causal, blocks), blocks),
        theirs.and_masks(window, theirs.sliding_window_overlay(2), causal),
        theirs.and_masks(theirs.or_masks(causal, blocks), causal),
        theirs.and_masks(theirs.or_masks(causal, blocks), theirs.chunked_overlay(3, torch.zeros(1))),
        theirs.sliding_window_bidirectional_mask_function(3),
        theirs.sliding_window_overlay(0),
        theirs.padding_mask_function(torch.ones(1, 4)),
    ):
        assert patterns.read(unknown) is None
    assert not patterns.read(theirs.and_masks(window, full)).is_causal
    assert patterns.read(causal).is_plain
    assert not patterns.read(theirs.sliding_window_causal_mask_function(3)).is_plain


MODELS = {
    "windows": MistralConfig(**SIZES, sliding_window=3),
    "windows and soft caps": Gemma2Config(**SIZES, sliding_window=3, attn_logit_softcapping=0.5),
    "windows and sinks": GptOssConfig(**SIZES, sliding_window=3, num_local_experts=2, num_experts_per_tok=1),
    "chunks": Llama4TextConfig(
        **SIZES, attention_chunk_size=3, num_local_experts=2, intermediate_size_mlp=8, num_experts_per_tok=1
    ),
}


def make_model(kind, implementation):
    model = families.build(MODELS[kind], implementation)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("sinks"):
                parameter.copy_(torch.linspace(-1, 2, len(parameter)))
    return model


@pytest.mark.parametrize("way", ["packed mask", "positions"])
@pytest.mark.parametrize("kind", MODELS)
def test_packed_samples_equal_each_alone(kind, way):
    """Outputs and gradients, with transformers' eager attention for each sample."""
    if (kind, way) == ("chunks", "packed mask"):
        pytest.skip("transformers counts the padding for chunks itself, which packed_mask refuses by name")
    if (kind, way) == ("windows and sinks", "positions"):
        pytest.skip(
            "gpt-oss does not tell its mask function of positions, and mixes the samples in eager attention, too"
        )
    ours, eager = make_model(kind, "lynx"), make_model(kind, "eager")
    lengths, ids = [5, 1, 9], torch.randint(50, (15,), generator=torch.Generator().manual_seed(0))
    layout = PackedLayout.causal(lengths)
    options = {"position_ids": layout.position_ids[None], "use_cache": False}
    if way == "packed mask":
        options["attention_mask"] = integration.packed_mask(layout)
    with families.counted() as calls:
        packed = ours(ids[None], **options).logits[0]
    assert calls == {"kernels": 2}
    alone = torch.cat([eager(each[None], use_cache=False).logits[0] for each in ids.split(lengths)])
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-5)
    weight = torch.randn(alone.shape, generator=torch.Generator().manual_seed(1))
    for logits in (packed, alone):
        (logits * weight).sum().backward()
    for (name, parameter), its in zip(ours.named_parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, its.grad, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_branches_have_the_windows_of_the_model():
    model, eager = make_model("windows", "lynx"), make_model("windows", "eager")
    root, first, second = (torch.randint(50, (length,)) for length in (4, 3, 5))
    layout = PackedLayout.from_groups([(4, [3, 5])])
    options = {"attention_mask": integration.packed_mask(layout), "position_ids": layout.position_ids[None]}
    packed = model(torch.cat([root, first, second])[None], **options).logits[0]
    alone = [eager(torch.cat([root, each])[None]).logits[0] for each in (first, second)]
    torch.testing.assert_close(packed[:7], alone[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(packed[7:], alone[1][4:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"cache_implementation": "static"}, {"use_cache": False}])
@pytest.mark.parametrize("kind", MODELS)
def test_generation_equals_eager(kind, options):
    """Decoding has soft caps and sinks, too: plain products, since PyTorch's attention has neither."""
    ids = torch.randint(50, (2, 6), generator=torch.Generator().manual_seed(2))
    tokens = [
        make_model(kind, name).generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, **options
        )
        for name in ("lynx", "eager")
    ]
    assert torch.equal(*tokens)


def test_layouts_with_a_window_refuse_that_of_the_model():
    model, layout = make_model("windows", "lynx"), PackedLayout.causal([4]).with_local(window=2)
    options = {"attention_mask": integration.packed_mask(layout), "position_ids": layout.position_ids[None]}
    with pytest.raises(ValueError, match=r"mistral adds .*: a window or chunk, and the layout has one already"):
        model(torch.arange(4)[None], **options)


def test_patterns_that_no_layer_uses_do_no_harm():
    """Qwen2-MoE asks for windows of 0 tokens where they are switched off."""
    model = families.build(families.config_of("qwen2_moe"), "lynx")
    layout, ids = PackedLayout.causal([3, 5]), torch.arange(3, 11)
    options = {"attention_mask": integration.packed_mask(layout), "position_ids": layout.position_ids[None]}
    packed = model(ids[None], **options, use_cache=False).logits[0]
    alone = torch.cat([model(each[None], use_cache=False).logits[0] for each in ids.split([3, 5])])
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-5)


def test_causal_layouts_refuse_models_that_see_both_ways():
    model, layout = families.build(families.config_of("bert"), "lynx"), PackedLayout.causal([4, 3])
    with pytest.raises(ValueError, match=r"bert adds .*: attention in both directions, and the layout is causal"):
        model(torch.arange(7)[None], attention_mask=integration.packed_mask(layout))


def test_one_graph_for_all_lengths():
    """Under torch.compile masks are read as they are outside."""
    torch._dynamo.reset()
    model = make_model("windows and soft caps", "lynx")
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for length in (5, 7, 8):
        ids = torch.arange(length)[None]
        mask = torch.ones_like(ids)
        with torch.no_grad():
            expected = model(ids, attention_mask=mask, use_cache=False).logits
            torch.testing.assert_close(compiled(ids, attention_mask=mask, use_cache=False).logits, expected)


@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize("has_sinks", [False, True])
@pytest.mark.parametrize("way", ["causal", "dense", "additive", "none"])
def test_plain_products_equal_the_kernels(way, has_sinks, softcap):
    if softcap is None and not has_sinks:
        pytest.skip("that is PyTorch's attention")
    q, k, v = (torch.randn(1, heads, 6, 8, dtype=torch.float64) for heads in (4, 2, 2))
    sinks = torch.randn(4, dtype=torch.float64) if has_sinks else None
    layout = PackedLayout.full([6]) if way == "none" else PackedLayout.causal([6])
    options = {"softcap": softcap, "s_aux": sinks, "scaling": 0.3}
    seen = torch.ones(6, 6, dtype=torch.bool).tril()[None, None]
    mask = {"dense": seen, "additive": torch.where(seen, 0.0, -1e30).double()}.get(way)
    module = torch.nn.Module()
    module.is_causal = way == "causal"
    with families.counted() as calls:
        plain, _ = integration.attention(module, q, k, v, mask, **options)
    assert calls == {}
    ours, _ = integration.attention(module, q, k, v, integration.packed_mask(layout), **options)
    torch.testing.assert_close(plain, ours)
