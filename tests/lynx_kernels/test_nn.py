import pytest
import torch
from torch import nn as torch_nn
from torch.nn import functional as F

from lynx_kernels import SpanLayout, explain, nn
from tests.lynx_kernels.attention_helpers import random, span_visible

ACTIVATIONS = {
    "silu": torch_nn.SiLU(),
    "relu": torch_nn.ReLU(),
    "gelu": torch_nn.GELU(),
    "gelu_tanh": torch_nn.GELU("tanh"),
}


def randomized(module):
    """The module in fp64 with random parameters: 0 and 1 could hide that one is not used."""
    module = module.double()
    for index, parameter in enumerate(module.parameters()):
        parameter.data = random(*parameter.shape, seed=100 + index)
    return module


def assert_same(module, composition, parameters, *inputs):
    """Outputs and gradients of inputs and parameters equal those of ``composition`` with the same parameters."""
    results = []
    for function in (module, composition):
        leaves = [each.clone().requires_grad_() for each in inputs]
        out = function(*leaves)
        wanted = [*leaves, *parameters]
        results.append([out, *torch.autograd.grad(out, wanted, random(*out.shape, seed=50))])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(5,), (2, 3)])
def test_adapter_equals_torch_modules(activation, shape):
    module = randomized(nn.Adapter(7, 3, activation=activation, eps=1e-2))
    bottleneck = torch_nn.Sequential(module.norm, module.down, ACTIVATIONS[activation], module.up)
    assert module.norm.eps == 1e-2
    assert_same(module, lambda x: x + module.scale * bottleneck(x), list(module.parameters()), random(*shape, 7))


def test_adapter_initialises_as_lynx():
    module = nn.Adapter(64, 16)
    assert list(module.state_dict()) == [
        "scale", "norm.weight", "norm.bias", "down.weight", "down.bias", "up.weight", "up.bias",
    ]  # fmt: skip
    assert [tuple(each.weight.shape) for each in (module.down, module.up)] == [(16, 64), (64, 16)]
    for _ in range(2):
        assert module.scale.tolist() == [1]
        for each in (module.down, module.up):
            assert (each.bias == 0).all()
            assert each.weight.std().item() == pytest.approx(0.02, rel=0.15)
        assert (module.norm.weight == 1).all()
        for parameter in module.parameters():
            parameter.data.fill_(7)
        module.reset_parameters()


@pytest.mark.parametrize("media_width", [None, 5])
def test_perceiver_attention_equals_torch_modules(media_width):
    query_lengths, key_spans, num_keys = batch = [2, 3, 1, 2], [(0, 4), (4, 9), (0, 4), (3, 3)], 9
    module = randomized(nn.PerceiverAttention(6, media_width, num_heads=2, head_dim=3, eps=1e-2))
    mask = span_visible(*batch)

    def composition(latents, media):
        q = module.to_q(F.layer_norm(latents, (6,), module.norm_latents.weight, module.norm_latents.bias, 1e-2))
        media = F.layer_norm(media, media.shape[-1:], module.norm_media.weight, module.norm_media.bias, 1e-2)
        k, v = module.to_kv(media).chunk(2, -1)
        heads = []
        for channels in (slice(0, 3), slice(3, 6)):
            scores = q[:, channels] @ k[:, channels].T / 3**0.5
            heads.append((scores.masked_fill(~mask, -1e300).softmax(-1) * mask) @ v[:, channels])
        return module.to_out(torch.cat(heads, -1))

    layout = SpanLayout.from_spans(query_lengths, key_spans, num_keys)
    assert_same(
        lambda *inputs: module(*inputs, layout),
        composition,
        list(module.parameters()),
        random(8, 6),
        random(9, media_width or 6, seed=1),
    )


def test_perceiver_attention_has_no_biases():
    module = nn.PerceiverAttention(6, 5, num_heads=2, head_dim=4)
    shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    assert shapes == {
        "norm_media.weight": (5,), "norm_media.bias": (5,), "norm_latents.weight": (6,), "norm_latents.bias": (6,),
        "to_q.weight": (8, 6), "to_kv.weight": (16, 5), "to_out.weight": (6, 8),
    }  # fmt: skip


@pytest.mark.parametrize("norm", ["pre", "post", None])
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"scale": 0.5, "trains_scale": False}], ids=str)
def test_adapter_variants_equal_torch_modules(norm, options):
    module = randomized(nn.Adapter(7, 3, norm=norm, activation="gelu", eps=1e-2, **options))
    bottleneck = torch_nn.Sequential(module.down, ACTIVATIONS["gelu"], module.up)
    compositions = {
        "pre": lambda x: x + module.scale * bottleneck(module.norm(x)),
        "post": lambda x: module.norm(x + module.scale * bottleneck(x)),
        None: lambda x: x + module.scale * bottleneck(x),
    }
    assert_same(module, compositions[norm], list(module.parameters()), random(2, 3, 7))


@pytest.mark.parametrize("residual", ["input", "norm", None])
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"dropout": 0.5}], ids=str)
def test_adapter_with_a_scale_per_channel(residual, options):
    module = randomized(
        nn.Adapter(7, 3, activation="relu", residual=residual, scale_per_channel=True, **options)
    ).eval()
    assert module.scale.shape == (7,)

    def composition(x):
        normed = module.norm(x)
        out = module.scale * module.up(torch.relu(module.down(normed)))
        return out if residual is None else out + (x if residual == "input" else normed)

    assert_same(module, composition, list(module.parameters()), random(2, 3, 7))


def test_adapter_drops_activations_in_training():
    module = nn.Adapter(6, 512, norm=None, bias=False, dropout=0.25)
    with torch.no_grad():
        module.down.weight.fill_(1.0)
        module.up.weight.fill_(1 / 512)
    x = torch.ones(2000, 6)
    branch = module(x) - x
    kept = (branch / F.silu(torch.tensor(6.0)))[:, 0] * 0.75 * 512
    assert torch.allclose(kept, kept.round(), atol=1e-2)
    assert abs(kept.mean() - 384) < 1
    assert "drops numbers in training" in str(explain(module, x))
    assert torch.allclose(module.eval()(x) - x, F.silu(torch.tensor(6.0)), rtol=1e-5)


def test_adapter_starts_as_identity():
    x = torch.randn(4, 12)
    module = nn.Adapter(12, 5, norm=None, starts_as_identity=True)
    assert torch.equal(module(x), x)
    for parameter in module.parameters():
        parameter.data.fill_(3)
    module.reset_parameters()
    assert torch.equal(module(x), x)
    assert module.down.weight.std() > 0  # otherwise no gradient would reach the up-projection
    assert module.scale.item() == 1


def test_adapter_with_a_fixed_scale():
    module = nn.Adapter(12, 5, scale=0.25, trains_scale=False, bias=False)
    assert module.state_dict()["scale"].tolist() == [0.25]
    assert [name for name, _ in module.named_parameters()] == ["norm.weight", "norm.bias", "down.weight", "up.weight"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": "both"}, "norm='both'"),
        ({"activation": "nonsense"}, "nonsense"),
        ({"residual": "output"}, "residual='output'"),
        ({"residual": "norm", "norm": "post"}, "residual='norm' with norm='post'"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"dropout": -0.1}, "dropout"),
    ],
)
def test_adapter_rejects_unknown_options(options, message):
    with pytest.raises(ValueError, match=message):
        nn.Adapter(12, 5, **options)


def gated(width=6, media_width=5, **options):
    return randomized(nn.GatedCrossAttention(width, media_width, num_heads=2, head_dim=3, eps=1e-2, **options))


def gated_composition(module, mask):
    """The block of the docstring, from torch's modules and a dense mask."""

    def composition(x, media):
        def norm(each, x):
            return F.layer_norm(x, x.shape[-1:], each.weight, each.bias, 1e-2)

        q = module.to_q(norm(module.norm, x.reshape(-1, 6)))
        k, v = module.to_kv(media).chunk(2, -1)
        heads = []
        for channels in (slice(0, 3), slice(3, 6)):
            scores = q[:, channels] @ k[:, channels].T / 3**0.5
            heads.append((scores.masked_fill(~mask, -1e300).softmax(-1) * mask) @ v[:, channels])
        x = x + torch.tanh(module.attention_gate) * module.to_out(torch.cat(heads, -1)).view_as(x)
        inner = F.gelu(module.feed_forward_in(norm(module.feed_forward_norm, x)))
        return x + torch.tanh(module.feed_forward_gate) * module.feed_forward_out(inner)

    return composition


SPANS = [2, 3, 1, 2], [(0, 4), (4, 9), (0, 9), (3, 3)], 9


@pytest.mark.parametrize("media_width", [None, 5])
@pytest.mark.parametrize(("shape", "expansion"), [((8, 6), 4), ((2, 4, 6), 1)])
def test_gated_cross_attention_equals_torch_modules(media_width, shape, expansion):
    module = gated(media_width=media_width, expansion=expansion)
    layout = SpanLayout.from_spans(*SPANS)
    inputs = random(*shape), random(9, media_width or 6, seed=1)
    composition = gated_composition(module, span_visible(*SPANS))
    assert_same(lambda x, media: module(x, media, layout), composition, list(module.parameters()), *inputs)
    assert_same(
        lambda x, media: module(x, module.keys_values(media), layout), composition, list(module.parameters()), *inputs
    )


def test_gated_cross_attention_without_media():
    """Without media only the feed-forward acts. Every parameter still has a gradient, because DDP needs one."""
    module = gated()
    x = random(4, 6)
    out = module(x, random(0, 5), SpanLayout.from_spans([4], [(0, 0)], 0))
    expected = gated_composition(module, torch.zeros(4, 1, dtype=torch.bool))(x, torch.zeros(1, 5).double())
    torch.testing.assert_close(out, expected)
    assert all(each is not None for each in torch.autograd.grad(out.sum(), list(module.parameters())))
    assert module(x[:0], random(3, 5), SpanLayout.from_spans([], [], 3)).shape == (0, 6)


def test_new_gates_are_zero():
    torch.manual_seed(0)
    module = nn.GatedCrossAttention(64, 32, num_heads=2, head_dim=8)
    x, media, layout = torch.randn(5, 64), torch.randn(3, 32), SpanLayout.from_spans([5], [(0, 3)], 3)
    for _ in range(2):
        assert torch.equal(module(x, media, layout), x)
        torch.autograd.backward(module(x, media, layout).square().sum())
        gates = module.attention_gate, module.feed_forward_gate
        assert all(gate.shape == (1,) and gate.grad.abs() > 1e-3 for gate in gates), (
            "a gate without a gradient never trains"
        )
        for each in (module.to_q, module.to_kv, module.to_out, module.feed_forward_in, module.feed_forward_out):
            assert each.bias is None
            assert each.weight.std().item() == pytest.approx((3 * each.in_features) ** -0.5, rel=0.1)
        assert (module.norm.weight == 1).all()
        for parameter in module.parameters():
            parameter.data.fill_(7)
            parameter.grad = None
        module.reset_parameters()
    assert module.feed_forward_in.out_features == 4 * 64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("parameters", [torch.float32, torch.bfloat16])
def test_gated_cross_attention_in_mixed_dtypes(dtype, parameters):
    """Blocks in fp32 inside a frozen bf16 decoder, and the reverse."""
    module = gated()
    layout = SpanLayout.from_spans(*SPANS)
    x, media = random(8, 6).to(dtype), random(9, 5, seed=1)
    exact = module(x.double(), media, layout)
    out = module.to(parameters)(x, media.float(), layout)
    assert out.dtype == dtype
    coarser = torch.finfo(max(dtype, parameters, key=lambda each: torch.finfo(each).eps)).eps
    assert (out.double() - exact).abs().max() < 8 * coarser * exact.abs().max()
    with torch.autocast("cpu", torch.bfloat16):
        assert module(x, media.float(), layout).dtype == dtype


def test_perceiver_attention_over_media_and_latents():
    """One softmax over an item's media and its latents. An item without media uses its latents only."""
    query_lengths, _, num_keys = batch = [2, 3, 1], [(0, 4), (4, 9), (9, 9)], 9
    module = randomized(nn.PerceiverAttention(6, num_heads=2, head_dim=3))
    own = [(0, 2), (2, 5), (5, 6)]
    mask = torch.cat([span_visible(*batch), span_visible(query_lengths, own, 6)], 1)

    def composition(latents, media):
        latents, media = module.norm_latents(latents), module.norm_media(media)
        q = module.to_q(latents)
        k, v = module.to_kv(torch.cat([media, latents])).chunk(2, -1)
        heads = []
        for channels in (slice(0, 3), slice(3, 6)):
            scores = q[:, channels] @ k[:, channels].T / 3**0.5
            heads.append(scores.masked_fill(~mask, -1e300).softmax(-1) @ v[:, channels])
        return module.to_out(torch.cat(heads, -1))

    layouts = SpanLayout.from_spans(*batch), SpanLayout.from_spans(query_lengths, own, 6)
    inputs = random(6, 6), random(num_keys, 6, seed=1)
    assert_same(lambda *each: module(*each, *layouts), composition, list(module.parameters()), *inputs)
    assert module.bfloat16()(*(each.bfloat16() for each in inputs), *layouts).dtype == torch.bfloat16


def test_latents_of_another_width_cannot_be_concatenated():
    layout = SpanLayout.from_spans([2], [(0, 2)], 2)
    with pytest.raises(ValueError, match="latents of width 6 cannot pass the projection of media of width 5"):
        nn.PerceiverAttention(6, 5)(torch.zeros(2, 6), torch.zeros(2, 5), layout, layout)
