"""Packed rows of hybrids: layers that mix tokens without being attention get each path of the layout as a row."""

import copy
import gc

import pytest
import torch

from lynx_kernels import PackedLayout
from lynx_kernels.integrations import transformers as integration
from lynx_kernels.integrations.apply import apply
from lynx_kernels.integrations.token_mixers import paths_of
from tests.lynx_kernels import families, vlms

LINEAR = {"layer_types": ["linear_attention", "full_attention"]}
MODELS = {
    "qwen3_next": LINEAR,
    "granitemoehybrid": {**LINEAR, "mamba_chunk_size": 16},
    "olmo_hybrid": {},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "bamba": {"attn_layer_indices": [1], "mamba_chunk_size": 16},
    "nemotron_h": {"chunk_size": 16},
}
FOREST = PackedLayout.from_segments([2, 3, 4, 17, 0, 3, 1], [-1, 0, 0, -1, -1, -1, -1])
PATHS = [[0, 1, 2, 3, 4], [0, 1, 5, 6, 7, 8], list(range(9, 26)), [26, 27, 28], [29]]


def model_of(name):
    return families.build(families.config_of(name, **MODELS[name]), "sdpa")


def ids_of(layout):
    return torch.randint(3, 60, (layout.num_tokens,), generator=torch.Generator().manual_seed(0))


def packed_inputs(layout):
    return {
        "input_ids": ids_of(layout)[None],
        "attention_mask": integration.packed_mask(layout),
        "position_ids": layout.position_ids[None],
    }


def run(model, **options):
    """Logits (T, V) of the packed row, and gradients of a sum over them."""
    model.zero_grad()
    logits = model(**packed_inputs(FOREST), **options).logits[0]
    (logits * torch.randn(logits.shape, generator=torch.Generator().manual_seed(3))).sum().backward()
    return vlms.Ran(logits.detach(), None, gradients_of(model))


def alone(model):
    """The same of each path alone. Tokens of several paths count once."""
    model.zero_grad()
    logits = torch.zeros(FOREST.num_tokens, 64)
    weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(3))
    for path in PATHS:
        out = model(ids_of(FOREST)[path][None], use_cache=False).logits[0]
        (out * weight[path]).sum().backward()
        logits[path], weight[path] = out.detach(), 0
    return vlms.Ran(logits, None, gradients_of(model))


def gradients_of(model):
    return {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}


@pytest.mark.parametrize("name", MODELS)
def test_each_path_is_as_alone(name):
    """In evaluation and in training, with and without a cache that is asked for, with checkpointing, in copies."""
    model = model_of(name)
    expected = alone(model)
    patch = apply(model)
    vlms.assert_close(run(model, use_cache=False), expected)
    vlms.assert_close(run(copy.deepcopy(model).train(), use_cache=True), expected)
    if model.supports_gradient_checkpointing:
        model.train().gradient_checkpointing_enable({"use_reentrant": False})
        vlms.assert_close(run(model, use_cache=False), expected)
        model.gradient_checkpointing_disable()
    model.eval()
    ids = ids_of(FOREST)[None, :9]
    with torch.no_grad():
        padded = model(ids).logits
        patch.undo()
        torch.testing.assert_close(padded, model(ids).logits, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="packed"):
        run(model)


def test_two_forwards_before_the_backward_of_the_first():
    """Checkpointed layers run again with the samples of their own forward."""
    model = model_of("lfm2").train()
    expected = alone(model)
    apply(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.zero_grad()
    logits = model(**packed_inputs(FOREST), use_cache=False).logits[0]
    model(**packed_inputs(PackedLayout.causal([15, 15])), use_cache=False)
    (logits * torch.randn(logits.shape, generator=torch.Generator().manual_seed(3))).sum().backward()
    vlms.assert_close(vlms.Ran(logits.detach(), None, gradients_of(model)), expected)


@pytest.mark.parametrize(
    "layout",
    [
        FOREST,
        PackedLayout.causal([5]),
        PackedLayout.causal([3, 1, 0, 40, 2]),
        PackedLayout.from_groups([(4, [2, 2, 9]), (0, [1, 2]), (3, [])]),
        PackedLayout.from_segments([1, 2, 3, 4, 5, 6], [-1, 0, 1, 1, 0, -1]),
        PackedLayout.from_segments([3, 2, 4], [-1, 0, 1], full=[False, True, False]),
    ],
)
def test_paths_are_those_of_the_layout(layout):
    paths, seen = paths_of(layout), layout.visible()
    places = torch.cat([row.flatten() for row in paths.rows])
    assert torch.equal(places[paths.back], torch.arange(layout.num_tokens))
    ends = [end for rows in paths.rows for end in range(rows.shape[1], rows.numel() + 1, rows.shape[1])]
    assert len(ends) == len(layout.runs) - 1 or layout is FOREST
    for rows in paths.rows:
        for row in rows.tolist():
            path = row[: 1 + row.index(max(row))]
            assert path == [token for token in range(layout.num_tokens) if seen[path[-1], token]]
        lengths = [1 + row.index(max(row)) for row in rows.tolist()]
        assert 2 * min(lengths) > rows.shape[1]


def test_what_does_not_get_the_samples_is_refused():
    """Layers that their decoder layer tells nothing, or that get more of the tokens; and nothing is left behind."""
    jamba = families.build(families.config_of("jamba", attn_layer_period=2, attn_layer_offset=1), "sdpa")
    with apply(jamba):
        with pytest.raises(
            ValueError, match="JambaMambaMixer would mix the samples of a packed row: its decoder layer"
        ):
            run(jamba)
        jamba(torch.arange(3, 9)[None])
    for name in ("minimax", "zamba"):
        model = families.build(families.config_of(name), "sdpa")
        with apply(model), pytest.raises(ValueError, match=f"{name} has layers of the kind .*; pass padded rows"):
            run(model)


def test_errors_leave_nothing_behind():
    model = model_of("lfm2")
    expected = alone(model)
    apply(model)
    layer = model.model.layers[0].conv
    layer.forward, forward = lambda *args, **kwargs: 1 / 0, layer.forward
    with pytest.raises(ZeroDivisionError):
        run(model)
    layer.forward = forward
    gc.collect()
    assert model(ids_of(FOREST)[None, :9]).logits is not None
    vlms.assert_close(run(model), expected)


@pytest.mark.parametrize("is_patched", [False, True])
def test_positions_that_start_again_are_refused(is_patched):
    """Linear layers would not notice, and mix the samples."""
    model = model_of("qwen3_next")
    model = model if is_patched else families.build(model.config, "lynx")
    if is_patched:
        apply(model)
    layout = PackedLayout.causal([3, 5])
    with pytest.raises(ValueError, match=r"linear_attention, which .* mix the samples .* after apply\(\) packed_mask"):
        model(torch.arange(3, 11)[None], position_ids=layout.position_ids[None], use_cache=False)
