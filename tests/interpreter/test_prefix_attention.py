"""Prefix attention in Triton, compared with plain attention. test_prefix_attention_forests.py has random forests.

The interpreter's time depends on the number of programs, not on their size. So most cases have few tiles and heads.
"""

from dataclasses import replace

import pytest
import torch

from lynx_kernels import PackedLayout, prefix_attention
from lynx_kernels.backends import dispatch
from lynx_kernels.ops.attention_common.triton import bwd as common_bwd
from lynx_kernels.ops.attention_common.triton import launches
from lynx_kernels.ops.attention_common.triton.launches import Launch
from lynx_kernels.ops.prefix_attention import triton as implementation
from tests.lynx_kernels.attention_cases import Case, assert_results_within_budget, grads_of
from tests.lynx_kernels.attention_helpers import dense_attention, random, run
from tests.lynx_kernels.forests import Forest
from tests.lynx_kernels.helpers import permuted
from tests.numbers import assert_within_budget

FP32, FP16 = torch.float32, torch.float16


def forest_of(lengths, parents, full=None, **local):
    return Forest([*lengths], [*parents], [*full] if full else [False] * len(lengths), **local)


# Tiles of 16: a trunk of three, of which the first branch goes on; a tree without a root; forks in a fork.
SEVERAL_TILES = forest_of((37, 19, 5, 35), (-1, 0, 0, -1))
FORKS = forest_of((17, 9, 3, 14, 5, 11), (-1, 0, 0, 2, 2, 4))
ONE_TILE_EACH = forest_of((5, 3, 4, 6), (-1, 0, 0, -1))
TILES = [Launch(16, 32, 4, 1), Launch(32, 16, 4, 1)]  # both make the diagonal cross several tiles
NAMES = ["output", "lse", "gradient of q", "gradient of k", "gradient of v", "gradient of sinks"]
full_too = pytest.mark.parametrize("full", [False, True])


def use_launch(monkeypatch, launch):
    monkeypatch.setattr(implementation, "choose_launches", lambda *shape: (launch,) * 3)


@pytest.fixture
def _small_tiles(monkeypatch):
    use_launch(monkeypatch, Launch(16, 16, 4, 1))


def with_full_roots(forest):
    return replace(forest, full=[parent == -1 for parent in forest.parents])


def make(
    forest,
    dtype=FP32,
    heads=1,
    kv_heads=1,
    dim=16,
    value_dim=None,
    scale=None,
    softcap=None,
    sinks=False,
    impl="triton",
    layout=None,
):
    """The operation and plain attention over a forest, the inputs, and gradients for output and LSE."""
    layout, visible = layout or forest.layout(), forest.visible()
    tokens = layout.num_tokens
    shapes = [(tokens, heads, dim), (tokens, kv_heads, dim), (tokens, kv_heads, value_dim or dim), (heads,)]
    inputs = [random(*shape, dtype=dtype, seed=i) for i, shape in enumerate(shapes if sinks else shapes[:3])]

    def operation(q, k, v, sinks=None):
        options = {"scale": scale, "softcap": softcap, "sinks": sinks}
        return prefix_attention(q, k, v, layout, **options, return_lse=True, impl=impl)

    def naive(q, k, v, sinks=None):
        return dense_attention(q, k, v, visible, scale, softcap, sinks)

    outputs = [torch.empty(tokens, heads, value_dim or dim), inputs[0][..., 0]]
    return operation, naive, inputs, [grad.to(dtype) for grad in grads_of(outputs)]


def check(forest, *case, magnitude=0.0, **options):
    """Output, LSE and the gradients through both are within the error budget."""
    operation, naive, inputs, grads = make(forest, *case, **options)
    results = run(operation, inputs, grads)
    # The gradient of a sink sums rowsum(dO * O), which may cancel.
    magnitudes = [magnitude] * 5 + [max(magnitude, grads[0].shape[2] ** 0.5)]
    case = Case(operation, naive, inputs, [])
    assert_results_within_budget(results, case, grads, magnitudes[: len(results)])


@full_too
@pytest.mark.parametrize("launch", TILES, ids=str)
@pytest.mark.parametrize("dtype", [FP32, FP16])
def test_tiles(dtype, launch, full, monkeypatch):
    use_launch(monkeypatch, launch)
    forest = with_full_roots(SEVERAL_TILES) if full else SEVERAL_TILES
    check(forest, dtype, heads=2 if dtype == FP32 else 1)


@pytest.mark.usefixtures("_small_tiles")
@full_too
def test_roots_that_end_near_a_tile_boundary(full):
    """The first query of a second branch sees one key less than a tile, exactly a tile, and one key more."""
    forest = forest_of((14, 1, 2, 15, 1, 2, 16, 1, 2), (-1, 0, 0, -1, 3, 3, -1, 6, 6))
    check(with_full_roots(forest) if full else forest, FP16)


@full_too
@pytest.mark.parametrize(
    "forest",
    [forest_of((150, 70), (-1, 0)), forest_of((40, 10, 70, 1, 1, 1), (-1, 0, 0, -1, -1, -1))],
    ids=["long", "short"],
)
def test_shipped_launches(forest, full):
    check(with_full_roots(forest) if full else forest, FP16)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "value_dim", "scale", "softcap"),
    [
        (4, 2, 7, 7, -0.3, None), (3, 1, 7, 3, -0.3, 1.5), (1, 1, 88, 88, -0.3, None), (2, 2, 33, 33, 0.0, None),
        (2, 2, 33, 17, 0.0, 0.7), (1, 1, 1, 1, None, None), (1, 1, 256, 40, None, None), (1, 1, 512, 512, None, None),
        (1, 1, 300, 257, None, 2.0),
    ],
)  # fmt: skip
@pytest.mark.parametrize("sinks", [False, True])
def test_heads_and_scales(heads, kv_heads, dim, value_dim, scale, softcap, sinks):
    check(ONE_TILE_EACH, FP32, heads, kv_heads, dim, value_dim, scale, softcap, sinks)


def test_no_tokens():
    operation, _, inputs, grads = make(forest_of((0, 0, 0), (-1, -1, 1)), sinks=True)
    for result, like in zip(run(operation, inputs, grads), [inputs[0], grads[1], *inputs], strict=True):
        assert result.shape == like.shape
    assert (result == 0).all()


@pytest.mark.usefixtures("_small_tiles")
def test_empty_sequences_from_offsets():
    """Layouts made on the device have runs without tokens, the random forests' have none."""
    offsets = torch.tensor([0, 0, 20, 20, 20, 23, 40, 40])
    for is_causal in (True, False):
        layout = PackedLayout.from_offsets(offsets, 40, is_causal=is_causal)
        forest = forest_of((20, 3, 17), (-1,) * 3, (not is_causal,) * 3)
        check(forest, layout=layout)
        check(replace(forest, window=5), layout=layout.with_local(window=5))


def in_wider_rows(tensor):
    """The same values surrounded by NaN, as in a slice of a fused projection."""
    if tensor.dim() == 1:
        return torch.stack([tensor, torch.full_like(tensor, torch.nan)], 1)[:, 0]
    wider = torch.full((tensor.shape[0], tensor.shape[1] + 2, tensor.shape[2] + 3), torch.nan, dtype=tensor.dtype)
    return wider[:, 1:-1, 2:-1].copy_(tensor)


@pytest.mark.usefixtures("_small_tiles")
def test_any_strides():
    """Tiles that need a mask for columns, rows, both, and none; with NaN beyond every edge."""
    operation, _, inputs, grads = make(
        forest_of((20, 19, 3), (-1, 0, 0), window=30), FP16, dim=40, value_dim=24, sinks=True
    )
    expected = run(operation, inputs, grads)
    for spread in (permuted, in_wider_rows):
        for ours, theirs in zip(
            run(operation, [spread(each) for each in inputs], [spread(grads[0]), permuted(grads[1])]),
            expected,
            strict=True,
        ):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
            assert ours.is_contiguous()
    one_token = [each[:1].expand_as(each) for each in inputs]
    expected = run(operation, [each.contiguous() for each in one_token], grads)
    for ours, theirs in zip(run(operation, one_token, grads), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_rows_with_too_large_strides_are_copied():
    for distance, is_copied in [(2**24 - 1, False), (2**24, True)]:
        rows = torch.empty_strided((2, 1, 8), (distance, 8, 1), device="meta")
        assert launches.readable(rows, FP32).is_contiguous() == is_copied


@pytest.mark.usefixtures("_small_tiles")
@pytest.mark.parametrize("weights", [(1, 0), (0, 1), (1, 1)], ids=["output", "lse", "both"])
def test_expanded_and_omitted_gradients(weights):
    operation, naive, inputs, _ = make(ONE_TILE_EACH, sinks=True)

    def gradients(function, dtype):
        leaves = [each.to(dtype).requires_grad_() for each in inputs]
        summed = [output.sum() for output, weight in zip(function(*leaves), weights, strict=True) if weight]
        return torch.autograd.grad(sum(summed), leaves, materialize_grads=True)

    for ours, truth, theirs in zip(
        gradients(operation, FP32), gradients(naive, torch.float64), gradients(naive, FP32), strict=True
    ):
        # The gradients of the sum of a softmax cancel to 0; their rounding errors are those of values near 1.
        assert_within_budget(ours, truth, theirs, magnitude=1.0)


@pytest.mark.usefixtures("_small_tiles")
@pytest.mark.parametrize(("dtype", "size"), [(FP32, 30.0), (FP16, 30.0)])
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (-1.0, None), (-1.0, 3e3)])
@pytest.mark.parametrize("sink", [None, -1e4, 1e4])
def test_huge_scores(dtype, size, scale, softcap, sink):
    """Scores of thousands: P is nearly 0 or 1, and no exponential overflows, masked or not."""
    forest = replace(ONE_TILE_EACH, window=4)
    operation, naive, inputs, grads = make(forest, dtype, scale=scale, softcap=softcap, sinks=sink is not None)
    inputs = [inputs[0] * size, inputs[1] * size, *inputs[2:]]
    if sink is not None:
        inputs[3][:] = sink
    exact = run(naive, [each.double() for each in inputs], grads)
    for name, ours, truth in zip(NAMES[: len(exact)], run(operation, inputs, grads), exact, strict=True):
        torch.testing.assert_close(ours.double(), truth, rtol=0, atol=2e-2 * max(1, truth.abs().max().item()), msg=name)


@pytest.mark.usefixtures("_small_tiles")
def test_delta_beyond_fp16():
    """For a token that sees only itself dS is 0, however large rowsum(dO * O) is."""
    operation, _, inputs, grads = make(forest_of((1, 1), (-1, -1)), FP16)
    _, _, grad_q, grad_k, _ = run(operation, [*inputs[:2], inputs[2] * 1000], [grads[0] * 1000, grads[1] * 0])
    for gradient in (grad_q, grad_k):
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1)


@pytest.mark.usefixtures("_small_tiles")
def test_two_runs_agree_bit_by_bit():
    operation, _, inputs, grads = make(replace(FORKS, window=11), FP16, heads=2, sinks=True)
    for ours, theirs in zip(run(operation, inputs, grads), run(operation, inputs, grads), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize(
    "dtypes", [(FP16, FP32, FP32, FP32), (FP32, FP16, FP16, FP16), (FP16, FP16, FP32, FP32)], ids=str
)
def test_mixed_dtypes(dtypes):
    """Products are in fp32. Every result has the dtype of its input and is as exact as the reference."""
    operation, naive, inputs, grads = make(ONE_TILE_EACH, sinks=True)
    reference, *_ = make(ONE_TILE_EACH, sinks=True, impl="reference")
    inputs = [each.to(dtype) for each, dtype in zip(inputs, dtypes, strict=True)]
    exact = run(naive, [each.double() for each in inputs], [grad.to(dtypes[0]) for grad in grads])
    actual, plain = run(operation, inputs, grads), run(reference, inputs, grads)
    for name, ours, truth, theirs in zip(NAMES, actual, exact, plain, strict=True):
        assert ours.dtype == theirs.dtype
        assert_within_budget(ours, truth, theirs, name)


def test_one_launch_forward_and_three_backward(monkeypatch):
    launched = []
    for module in (implementation.fwd, implementation.bwd, common_bwd):
        for name in (name for name in vars(module) if name.endswith("_kernel")):
            kernel = getattr(module, name)
            monkeypatch.setattr(
                kernel, "run", lambda *a, run=kernel.run, name=name, **k: (launched.append(name), run(*a, **k))
            )
    operation, _, inputs, grads = make(ONE_TILE_EACH)
    run(operation, inputs, grads)
    assert launched == [
        "prefix_attention_fwd_kernel",
        "attention_bwd_preprocess_kernel",
        "prefix_attention_bwd_dq_kernel",
        "prefix_attention_bwd_dkdv_kernel",
    ]


def test_interpreter_runs_only_when_named():
    layout = PackedLayout.causal([3])
    inputs = [random(3, 1, 16, dtype=FP32)] * 3
    choice = dispatch.explain(prefix_attention, *inputs, layout)
    assert choice.name != "triton"
    assert choice.reasons["triton"] == "the Triton interpreter runs only when named by impl="
    assert dispatch.explain(prefix_attention, *inputs, layout, impl="triton").name == "triton"
    wide = dispatch.explain(prefix_attention, *[random(3, 1, 513, dtype=FP32)] * 3, layout, impl="triton")
    assert wide.name is None
    assert wide.reasons["triton"].endswith("support head_dim up to 512, and it is 513")
