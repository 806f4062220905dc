"""``apply(cross_attention=True)``: layers whose keys are other tokens run ``cross_attention``, where a span says it."""

import copy
import pickle
import re

import pytest
import torch
import transformers as hf

from lynx_kernels.integrations import logs
from lynx_kernels.integrations import transformers as integration
from lynx_kernels.integrations.apply import apply
from lynx_kernels.integrations.collator import PackedCollator
from lynx_kernels.integrations.spans import read_spans
from tests.lynx_kernels import families, more_vlms, vlms

FAMILIES = {"Mllama": vlms.FAMILIES["Mllama"]} | {
    name: more_vlms.ALL[name] for name in ("Idefics2", "Idefics", "InstructBLIP")
}
LAYERS = {"Mllama": 2, "Idefics2": 2, "Idefics": 2, "InstructBLIP": 1}


@pytest.mark.parametrize("family", FAMILIES)
def test_families_equal_themselves_before(family):
    """Outputs and gradients; Mllama's tiles that are not there, resamplers of padded images, tokens without images."""
    model, eager = vlms.build(FAMILIES[family]), vlms.build(FAMILIES[family], "eager")
    had = [getattr(layer, "config", None) for layer in model.modules()]
    for side in ("left", "right"):
        inputs = FAMILIES[family].batch(side)
        before = vlms.run(model, inputs)
        with apply(model) as patch, families.counted() as calls:
            ours = vlms.run(model, inputs)
            assert len(re.findall(r" lynx +cross_attention$", patch.report(), re.MULTILINE)) in (1, LAYERS[family])
        vlms.assert_close(ours, before)
        if family != "Mllama":  # the gradients of whose vision tower are other ones in eager attention
            vlms.assert_close(ours, vlms.run(eager, inputs))
        assert calls["cross"] == LAYERS[family]
        after = vlms.run(model, inputs)
        assert torch.equal(after.logits, before.logits)
        assert all(torch.equal(after.gradients[name], each) for name, each in before.gradients.items())
    assert all(getattr(layer, "config", None) is config for layer, config in zip(model.modules(), had, strict=True))


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}])
def test_generation_equals_itself_before(options):
    model, inputs = vlms.build("Mllama"), vlms.FAMILIES["Mllama"].batch("left")
    options = {"max_new_tokens": 5, "do_sample": False, **options}
    expected = model.generate(**inputs, **options)
    with apply(model):
        assert torch.equal(model.generate(**inputs, **options), expected)


def test_checkpointing_and_copies():
    model, inputs = vlms.build("Mllama").train(), vlms.FAMILIES["Mllama"].batch()
    before = vlms.run(model, inputs)
    apply(model)
    for each in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model):
        each.gradient_checkpointing_enable({"use_reentrant": False})
        with families.counted() as calls:
            vlms.assert_close(vlms.run(each, inputs), before)
        assert calls["cross"] == 4  # once more in the backward pass


def test_it_can_be_left_out():
    model, inputs = vlms.build("Mllama"), vlms.FAMILIES["Mllama"].batch()
    for options, expected in (({"cross_attention": False}, (2, 0)), ({"attention": False}, (0, 2))):
        with apply(model, **options) as patch, families.counted() as calls:
            vlms.run(model, inputs)
        assert (calls["kernels"], calls["cross"]) == expected
        assert ("cross_attention=False" in patch.report()) == ("cross_attention" in options)


def test_packed_rows_say_which_images_are_whose():
    """Mllama's tokens before their first image see all images, which in a packed row are others', too."""
    model, family = vlms.build("Mllama"), vlms.FAMILIES["Mllama"]
    inputs = family.batch(rows=(2,))
    layout = integration.PackedLayout.causal([4, inputs["input_ids"].shape[1] - 4])
    packed = {"attention_mask": integration.packed_mask(layout), "position_ids": layout.position_ids[None]}
    with apply(model):
        with pytest.raises(ValueError, match="cross_attention_mask in a packed row does not say which images are of"):
            model(**{**inputs, **packed})
        assert model(inputs["input_ids"], **packed).logits is not None  # without images nothing stands in the way
    batch = PackedCollator(model)([family.batch(rows=(row,)) for row in range(3)])
    with apply(model, cross_attention=False), pytest.raises(ValueError, match=r"need apply\(cross_attention=True\)"):
        model(**batch)
    with apply(model):
        model.train()
        for layer in model.model.language_model.layers:
            if hasattr(layer, "cross_attn"):
                layer.cross_attn.dropout = 0.1
        with pytest.raises(ValueError, match=r"MllamaTextCrossAttention cannot run packed rows: its dropout is"):
            model(**batch, use_cache=False)


def test_encoders_with_padding():
    """Decoders that read an encoder's tokens, padded on either side."""
    model = families.build(families.config_of("bart"), "sdpa", auto=hf.AutoModel)
    for padding in ("none", "left", "right", "between"):
        expected = families.run(model, padding)
        with apply(model) as patch, families.counted() as calls:
            torch.testing.assert_close(families.run(model, padding), expected, rtol=2e-5, atol=1e-5)
        # Keys with gaps are moved together.
        assert calls["cross"] == 2, (padding, patch.report())


def test_dropout_and_compiled_code_run_what_they_ran():
    model, inputs = vlms.build("Mllama"), vlms.FAMILIES["Mllama"].batch()
    with torch.no_grad():
        expected = model(**inputs, use_cache=False).logits
    with apply(model) as patch:
        for layer in model.modules():
            if hasattr(layer, "q_norm"):
                layer.dropout = 1e-9
        model.train()
        layer = model.model.language_model.layers[1].cross_attn
        media = torch.randn(2, 5, 32)
        layer(torch.randn(2, 3, 32), media)
        assert "since its dropout is 1e-09" in patch.report()
        model.eval()
        torch._dynamo.reset()
        with torch.no_grad():
            compiled = torch.compile(model.model.language_model.layers[1].cross_attn, backend="eager", fullgraph=True)
            hidden = torch.randn(2, 3, 32)
            torch.testing.assert_close(compiled(hidden, media)[0], layer(hidden, media)[0])
            is_token = inputs["attention_mask"].bool()
            torch.testing.assert_close(model(**inputs, use_cache=False).logits[is_token], expected[is_token])


def random_spans(rows, queries, keys, seed=0):
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(keys, (rows, queries, 1), generator=generator)
    length = torch.randint(1, keys, (rows, queries, 1), generator=generator)
    key = torch.arange(keys)
    return ((first <= key) & (key < first + length))[:, None]


@pytest.mark.parametrize("kind", ["bool", "added", "one for all rows", "one for all queries", "holes", "none"])
def test_spans_are_those_of_the_mask(kind):
    rows, queries, keys = 3, 4, 7
    seen = random_spans(
        1 if kind == "one for all rows" else rows, 1 if kind == "one for all queries" else queries, keys
    )
    if kind == "holes":  # keys that only tokens with all keys see
        seen[0, 0, :, 2:4] = seen[1, 0, :, ::3] = False
        seen[0, 0, :, 1] = seen[0, 0, :, 4] = True
        seen[1, 0, :, 1:3] = True
        seen[1, 0, 1] = seen[2, 0, 0] = True
    mask = torch.where(seen, 0.0, torch.finfo(torch.float32).min) if kind == "added" else seen
    mask = None if kind == "none" else mask
    spans = read_spans(mask, rows, queries, rows, keys, torch.device("cpu"))
    seen = torch.ones_like(seen) if kind == "none" else seen
    visible = spans.layout.visible().view(rows, queries, rows, keys)
    order = torch.arange(keys).expand(rows, keys) if spans.order is None else spans.order
    assert (spans.order is not None) == (kind == "holes")
    for row in range(rows):
        other = [each for each in range(rows) if each != row]
        assert not visible[row][:, other].any()
        torch.testing.assert_close(visible[row, :, row], seen.expand(rows, 1, queries, keys)[row, 0][:, order[row]])
    assert read_spans(mask, rows, queries, rows, keys, torch.device("cpu")) is spans or kind == "none"
    if kind == "bool":
        mask[0, 0, 0] = True
        again = read_spans(mask, rows, queries, rows, keys, torch.device("cpu"))
        assert again.layout.visible()[0, :keys].all()


def test_keys_that_all_rows_share():
    seen = random_spans(3, 4, 7)
    spans = read_spans(seen, 3, 4, 1, 7, torch.device("cpu"))
    torch.testing.assert_close(spans.layout.visible(), seen.flatten(0, 2))


SEEN = torch.ones(2, 1, 3, 4, dtype=torch.bool)
PARTS = torch.tensor([[1, 0, 1, 0], [0, 1, 0, 1], [1, 1, 0, 0]])
NO_SPANS = {
    "its mask adds to the scores": torch.where(SEEN, 0.5, 0.0),
    "its mask differs from head to head": SEEN.expand(2, 2, 3, 4),
    "a query sees keys in several parts": PARTS[None, None].bool(),
    "its mask is (2, 1, 3, 4), for 2 rows of 5 queries and 4 keys": SEEN,
    "its mask is torch.int64, neither bool nor floating point": SEEN.long(),
    "a query sees no key, of which eager attention makes a mean of all values": SEEN & (torch.arange(3) < 2)[:, None],
}


@pytest.mark.parametrize("reason", NO_SPANS)
def test_other_masks_run_what_they_ran(reason):
    mask, queries = NO_SPANS[reason], 5 if "5 queries" in reason else 3
    found = read_spans(mask, 2, queries, 2, 4, torch.device("cpu"))
    assert found == reason or found.has_blind
    if queries == 5 or mask.dtype == torch.int64:
        return  # no attention takes it
    layer = torch.nn.Module()
    layer.config = hf.LlamaConfig()
    q, k, v = torch.randn(2, 2, 3, 8), torch.randn(2, 1, 4, 8), torch.randn(2, 1, 4, 8)
    with families.counted() as calls:
        out, _ = integration.attention_to_others(layer, q, k, v, mask)
    assert calls == {"sdpa": 1}
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
    torch.testing.assert_close(out, expected.transpose(1, 2))
    assert logs.ran[layer] == ("its own", f"PyTorch's attention, since {reason}")
