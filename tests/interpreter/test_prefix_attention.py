"""Prefix attention in Triton, compared with plain attention.

The interpreter's time depends on the number of programs, not on their size. So most cases have few tiles and heads.
"""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lynx_kernels import PackedLayout, prefix_attention
from lynx_kernels.backends import dispatch
from lynx_kernels.ops.attention_common import triton as implementation
from lynx_kernels.ops.attention_common.triton.launches import Launch
from tests.lynx_kernels.attention_cases import GROUPS_OF_A_BATCH, Case, assert_results_within_budget, grads_of
from tests.lynx_kernels.attention_helpers import EXAMPLES, dense_attention, packed_visible, random, run
from tests.lynx_kernels.helpers import permuted
from tests.numbers import assert_within_budget

FP32, FP16 = torch.float32, torch.float16
SEVERAL_TILES = [(37, [0, 19, 5]), (0, [35])]  # tiles of 16: three for a root; several branches; no root
ONE_TILE_EACH = [(5, [3, 4]), (0, [6])]
TILES = [Launch(16, 32, 4, 1), Launch(32, 16, 4, 1)]  # both make the diagonal cross several tiles
NAMES = ["output", "lse", "gradient of q", "gradient of k", "gradient of v"]
both_roots = pytest.mark.parametrize("root_is_causal", [True, False])


def use_launch(monkeypatch, launch):
    monkeypatch.setattr(implementation, "choose_launches", lambda *shape: (launch,) * 3)


@pytest.fixture
def _small_tiles(monkeypatch):
    use_launch(monkeypatch, Launch(16, 16, 4, 1))


def make(groups, root_is_causal, dtype=FP32, heads=1, kv_heads=1, dim=16, scale=None, impl="triton"):
    """The operation and plain attention over ``groups``, the inputs, and gradients for output and LSE."""
    layout = PackedLayout.from_groups(groups, root_is_causal=root_is_causal)
    operation = partial(prefix_attention, layout=layout, scale=scale, return_lse=True, impl=impl)
    naive = partial(dense_attention, visible=packed_visible(groups, root_is_causal), scale=scale)
    inputs = [random(layout.num_tokens, h, dim, dtype=dtype, seed=i) for i, h in enumerate([heads, kv_heads, kv_heads])]
    return operation, naive, inputs, [grad.to(dtype) for grad in grads_of([inputs[0], inputs[0][..., 0]])]


def check_prefix(*case, magnitude=0.0, **options):
    """Output, LSE and the gradients through both are within the error budget."""
    operation, naive, inputs, grads = make(*case, **options)
    results = run(operation, inputs, grads)
    assert_results_within_budget(results, Case(operation, naive, inputs, []), grads, [magnitude] * len(results))


@both_roots
@pytest.mark.parametrize("launch", TILES, ids=str)
@pytest.mark.parametrize("dtype", [FP32, FP16])
def test_tiles(dtype, launch, root_is_causal, monkeypatch):
    use_launch(monkeypatch, launch)
    check_prefix(SEVERAL_TILES, root_is_causal, dtype, heads=2 if dtype == FP32 else 1)


@pytest.mark.usefixtures("_small_tiles")
@both_roots
def test_roots_that_end_near_a_tile_boundary(root_is_causal):
    """The first query of a branch sees one key less than a tile, exactly a tile, and one key more."""
    check_prefix([(14, [2]), (15, [2]), (16, [2])], root_is_causal, FP16)


@both_roots
@pytest.mark.parametrize("groups", [[(150, [70])], [(40, [70])] + [(0, [1])] * 3], ids=["long", "short"])
def test_shipped_launches(groups, root_is_causal):
    check_prefix(groups, root_is_causal, FP16)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "scale", "root_is_causal"),
    [
        (4, 2, 7, -0.3, True), (3, 1, 7, -0.3, False), (1, 1, 88, -0.3, False), (2, 2, 33, 0.0, True),
        (1, 1, 1, None, True), (1, 1, 256, None, True),
    ],
)  # fmt: skip
def test_heads_and_scales(heads, kv_heads, dim, scale, root_is_causal):
    check_prefix(ONE_TILE_EACH, root_is_causal, heads=heads, kv_heads=kv_heads, dim=dim, scale=scale)


@both_roots
def test_empty_roots_branches_and_groups(root_is_causal):
    check_prefix(GROUPS_OF_A_BATCH, root_is_causal)


def test_no_tokens():
    operation, _, inputs, grads = make([(0, []), (0, [0])], True)
    for result, like in zip(run(operation, inputs, grads), [inputs[0], grads[1], *inputs], strict=True):
        assert result.shape == like.shape


LENGTHS = st.integers(0, 20)
FEW_GROUPS = st.lists(st.tuples(LENGTHS, st.lists(LENGTHS, max_size=2)), max_size=2).filter(
    lambda groups: 0 < sum(root + sum(branches) for root, branches in groups) < 60
)


@pytest.mark.usefixtures("_small_tiles")
@settings(EXAMPLES, max_examples=5)
@given(FEW_GROUPS, st.booleans())
def test_any_layout(groups, root_is_causal):
    # For a token that sees only itself, the gradient of q cancels; its rounding errors are those of values near 1.
    check_prefix(groups, root_is_causal, magnitude=1.0)


@pytest.mark.usefixtures("_small_tiles")
@both_roots
@pytest.mark.parametrize("token", [36, 37, 61])
def test_no_information_leaks(token, root_is_causal):
    """Forward, a token reaches only the tokens that see it. Backward, it reaches only the tokens that it sees."""
    operation, _, inputs, grads = make(SEVERAL_TILES, root_is_causal)
    visible = packed_visible(SEVERAL_TILES, root_is_causal)
    leaves = [each.requires_grad_() for each in inputs]
    outputs = operation(*leaves)
    changed = [each.detach().clone() for each in inputs]
    for each in changed:
        each[token] += 0.5
    for before, after in zip(outputs, operation(*changed), strict=True):
        assert torch.equal((before != after).flatten(1).any(1), visible[:, token])
    only_of_token = [
        torch.zeros_like(grad).index_copy(0, torch.tensor([token]), grad[token : token + 1]) for grad in grads
    ]
    grad_q, grad_k, grad_v = torch.autograd.grad(outputs, leaves, only_of_token)
    seen = visible[token]
    assert torch.equal((grad_q != 0).flatten(1).any(1), torch.arange(len(seen)) == token)
    assert torch.equal((grad_k != 0).flatten(1).any(1), seen)
    assert torch.equal((grad_v != 0).flatten(1).any(1), seen)


def in_wider_rows(tensor):
    """The same values surrounded by NaN, as in a slice of a fused projection."""
    wider = torch.full((tensor.shape[0], tensor.shape[1] + 2, tensor.shape[2] + 3), torch.nan, dtype=tensor.dtype)
    return wider[:, 1:-1, 2:-1].copy_(tensor)


@pytest.mark.usefixtures("_small_tiles")
def test_any_strides():
    """Tiles that need a mask for columns, rows, both, and none; with NaN beyond every edge."""
    operation, _, inputs, grads = make([(20, [19])], True, FP16, dim=40)
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
        assert implementation._readable(rows, FP32).is_contiguous() == is_copied


@pytest.mark.usefixtures("_small_tiles")
@pytest.mark.parametrize("weights", [(1, 0), (0, 1), (1, 1)], ids=["output", "lse", "both"])
def test_expanded_and_omitted_gradients(weights):
    operation, naive, inputs, _ = make(ONE_TILE_EACH, True)

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
@pytest.mark.parametrize("scale", [1.0, -1.0])
def test_huge_scores(dtype, size, scale):
    """Scores of thousands: P is nearly 0 or 1, and no exponential overflows, masked or not."""
    operation, naive, inputs, grads = make(ONE_TILE_EACH, True, dtype, scale=scale)
    inputs = [inputs[0] * size, inputs[1] * size, inputs[2]]
    exact = run(naive, [each.double() for each in inputs], grads)
    for name, ours, truth in zip(NAMES, run(operation, inputs, grads), exact, strict=True):
        torch.testing.assert_close(ours.double(), truth, rtol=0, atol=2e-2 * max(1, truth.abs().max().item()), msg=name)


@pytest.mark.usefixtures("_small_tiles")
def test_delta_beyond_fp16():
    """For a token that sees only itself dS is 0, however large rowsum(dO * O) is."""
    operation, _, inputs, grads = make([(0, [1, 1])], True, FP16)
    _, _, grad_q, grad_k, _ = run(operation, [*inputs[:2], inputs[2] * 1000], [grads[0] * 1000, grads[1] * 0])
    for gradient in (grad_q, grad_k):
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1)


@both_roots
@pytest.mark.usefixtures("_small_tiles")
def test_nan_stays_in_its_group(root_is_causal):
    operation, _, inputs, grads = make([(5, [3, 4]), (2, [6]), (0, [3])], root_is_causal)
    group, others = slice(12, 20), [*range(12), *range(20, 23)]
    expected = run(operation, inputs, grads)
    for each in [*inputs, *grads]:
        each[group] = torch.nan
    for ours, theirs in zip(run(operation, inputs, grads), expected, strict=True):
        assert torch.equal(ours[others], theirs[others])
        assert ours[group].isnan().all()


@both_roots
@pytest.mark.usefixtures("_small_tiles")
def test_nan_in_a_branch_does_not_reach_root_or_other_branches(root_is_causal):
    operation, _, inputs, grads = make([(5, [3, 4, 2])], root_is_causal)
    branch, others = slice(8, 12), [*range(8), *range(12, 14)]
    expected = run(operation, inputs, grads)
    for each in [*inputs, *grads]:
        each[branch] = torch.nan
    out, lse, grad_q, grad_k, grad_v = run(operation, inputs, grads)
    for ours, theirs in zip((out, lse, grad_q), expected, strict=False):
        assert torch.equal(ours[others], theirs[others])
    for ours, theirs in zip((grad_k, grad_v), expected[3:], strict=True):
        assert torch.equal(ours[others][5:], theirs[others][5:])
        assert ours[:5].isnan().all()  # the branch sees the root


@pytest.mark.usefixtures("_small_tiles")
def test_two_runs_agree_bit_by_bit():
    operation, _, inputs, grads = make(SEVERAL_TILES, True, FP16)
    for ours, theirs in zip(run(operation, inputs, grads), run(operation, inputs, grads), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("dtypes", [(FP16, FP32, FP32), (FP32, FP16, FP16), (FP16, FP16, FP32)], ids=str)
def test_mixed_dtypes(dtypes):
    """Products are in fp32. Every result has the dtype of its input and is as exact as the reference."""
    operation, naive, inputs, grads = make(ONE_TILE_EACH, True)
    reference, *_ = make(ONE_TILE_EACH, True, impl="reference")
    inputs = [each.to(dtype) for each, dtype in zip(inputs, dtypes, strict=True)]
    exact = run(naive, [each.double() for each in inputs], [grad.to(dtypes[0]) for grad in grads])
    actual, plain = run(operation, inputs, grads), run(reference, inputs, grads)
    for name, ours, truth, theirs in zip(NAMES, actual, exact, plain, strict=True):
        assert ours.dtype == theirs.dtype
        assert_within_budget(ours, truth, theirs, name)


def test_one_launch_forward_and_three_backward(monkeypatch):
    launched = []
    for module in (implementation.fwd, implementation.bwd):
        for name in (name for name in vars(module) if name.endswith("_kernel")):
            kernel = getattr(module, name)
            monkeypatch.setattr(
                kernel, "run", lambda *a, run=kernel.run, name=name, **k: (launched.append(name), run(*a, **k))
            )
    operation, _, inputs, grads = make(ONE_TILE_EACH, True)
    run(operation, inputs, grads)
    assert launched == [
        "attention_fwd_kernel",
        "attention_bwd_preprocess_kernel",
        "attention_bwd_dq_kernel",
        "attention_bwd_dkdv_kernel",
    ]


def test_interpreter_runs_only_when_named():
    layout = PackedLayout.causal([3])
    inputs = [random(3, 1, 16, dtype=FP32)] * 3
    choice = dispatch.explain(prefix_attention, *inputs, layout)
    assert choice.name != "triton"
    assert choice.reasons["triton"] == "the Triton interpreter runs only when named by impl="
    assert dispatch.explain(prefix_attention, *inputs, layout, impl="triton").name == "triton"
    wide = dispatch.explain(prefix_attention, *[random(3, 1, 257, dtype=FP32)] * 3, layout, impl="triton")
    assert wide.name is None
    assert wide.reasons["triton"].endswith("support head_dim up to 256, and it is 257")
