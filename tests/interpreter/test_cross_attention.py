from dataclasses import replace

import pytest
import torch

from lynx_kernels import SpanLayout, cross_attention, explain
from lynx_kernels.ops.attention_common.triton import splits
from lynx_kernels.ops.attention_common.triton.launches import Launch
from lynx_kernels.ops.attention_common.triton.splits import choose_num_splits
from lynx_kernels.ops.cross_attention import triton as implementation
from lynx_kernels.ops.cross_attention.call import CrossAttentionBackwardCall
from tests.lynx_kernels.attention_cases import (
    assert_case_within_budget,
    assert_huge_scores_within_budget,
    grads_of,
    span_case,
)
from tests.lynx_kernels.attention_helpers import run
from tests.lynx_kernels.helpers import permuted

# The LSE without keys is log 0. Scores that a query does not see may overflow before they are masked.
pytestmark = pytest.mark.filterwarnings("ignore:(divide by zero|overflow):RuntimeWarning")

# Spans that start and end inside tiles, cover whole tiles, overlap, are shared, are empty. No query sees key 99.
# Segment 4 shares a tile of the inverse table with other segments, but no key.
SEVERAL_TILES = [35, 3, 0, 18, 1, 5], [(0, 63), (33, 99), (5, 9), (70, 70), (0, 2), (0, 63)], 102
SMALL = Launch(16, 32, 4, 1)


def case_of(batch=SEVERAL_TILES, heads=2, kv_heads=1, dim=24, dtype=torch.float32, **options):
    return span_case(batch, heads, kv_heads, dim, dtype, impl="triton", **options)


@pytest.fixture
def cut(monkeypatch):
    """Sets the launch and the number of splits of the keys."""

    def choose(launch, num_splits=1):
        monkeypatch.setattr(implementation, "choose_launches", lambda *shape: (launch,) * 3)
        monkeypatch.setattr(implementation, "choose_num_splits", lambda *shape: num_splits)

    return choose


@pytest.mark.parametrize(
    ("dtype", "rows", "num_splits"),
    [(torch.float32, 16, 3), (torch.float32, 32, 1), (torch.float16, 16, 1), (torch.float16, 32, 3)],
)
def test_tiles(dtype, rows, num_splits, cut):
    cut(Launch(rows, 48 - rows, 4, 1), num_splits)
    assert_case_within_budget(case_of(dtype=dtype))


@pytest.mark.parametrize(("heads", "kv_heads", "dim", "scale"), [(3, 1, 7, -0.3), (1, 1, 88, None), (2, 2, 33, 0.0)])
def test_heads_and_scales(heads, kv_heads, dim, scale):
    """With the shipped launches: splits of one tile."""
    batch = [3, 2, 0, 4, 1], [(0, 36), (30, 40), (1, 3), (5, 5), (38, 39)], 40
    assert_case_within_budget(case_of(batch, heads, kv_heads, dim, scale=scale))


def test_spans_that_miss_one_key_of_a_tile(cut):
    """Full query tiles, which need no mask for key tiles that they see completely."""
    cut(SMALL)
    assert_case_within_budget(case_of(([16, 16], [(1, 64), (0, 63)], 64), 1, dim=16))


def test_many_segments(cut):
    """Like texts between images: segments of a few tokens, each sees the image before it."""
    cut(SMALL)
    assert_case_within_budget(case_of(([2, 5, 1, 17] * 2, [(i * 9, i * 9 + 9) for i in range(8)], 72), 1))


@pytest.mark.parametrize("num_splits", [1, 2])
def test_strides_do_not_change_a_bit(num_splits, cut):
    cut(SMALL, num_splits)
    case = case_of(([20, 3], [(0, 36), (30, 40)], 40), 1)
    grads = grads_of(case.operation(*case.inputs))
    expected = run(case.operation, case.inputs, grads)
    for spread in (permuted, lambda each: torch.cat([each + 1, each], -2)[..., each.shape[-2] :, :]):
        actual = run(case.operation, [spread(each) for each in case.inputs], [spread(grad) for grad in grads])
        for ours, theirs in zip(actual, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
            assert ours.is_contiguous()


def test_any_strides_of_results_and_tables(cut):
    cut(SMALL)
    case, layout = case_of(([4, 3], [(1, 9), (3, 40)], 40)), SpanLayout.from_spans([4, 3], [(1, 9), (3, 40)], 40)
    results = case.operation(*case.inputs)
    arguments = [*grads_of(results), *results, *case.inputs]
    arguments += [layout.segments, layout.tile_offsets, layout.tile_segments]
    expected = implementation.backward(CrossAttentionBackwardCall(*arguments, 0.2))
    for ours, theirs in zip(
        implementation.backward(CrossAttentionBackwardCall(*map(permuted, arguments), 0.2)), expected, strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("index", [0, 1])
def test_omitted_and_expanded_gradients(index):
    case = case_of(([4], [(1, 9)], 9))
    leaves = [each.requires_grad_() for each in case.inputs]
    actual = torch.autograd.grad(case.operation(*leaves)[index].sum(), leaves, materialize_grads=True)
    expected = torch.autograd.grad(case.naive(*leaves)[index].sum(), leaves, materialize_grads=True)
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_mixed_dtypes():
    case = case_of(([4], [(1, 9)], 9))
    inputs = [case.inputs[0].half(), *case.inputs[1:]]
    grads = grads_of(case.operation(*case.inputs))
    wide = run(case.operation, [each.float() for each in inputs], [grads[0].half().float(), grads[1]])
    for ours, theirs in zip(run(case.operation, inputs, grads), wide, strict=True):
        torch.testing.assert_close(ours.float(), theirs, rtol=2e-3, atol=2e-3)
    assert [each.dtype for each in run(case.operation, inputs, grads)[2:]] == [each.dtype for each in inputs]


@pytest.mark.parametrize("num_splits", [1, 2])
@pytest.mark.parametrize(
    "batch", [([], [], 0), ([], [], 3), ([0], [(0, 2)], 3), ([2], [(0, 0)], 0), ([2, 1], [(1, 1), (0, 0)], 3)]
)
def test_no_queries_or_keys(batch, num_splits, cut):
    cut(SMALL, num_splits)
    case = case_of(batch)
    grads = [torch.ones(case.inputs[0].shape), torch.ones(case.inputs[0].shape[:2])]
    out, lse, *gradients = run(case.operation, case.inputs, grads)
    assert (out == 0).all()
    assert lse.isneginf().all()
    assert all((gradient == 0).all() for gradient in gradients)


@pytest.mark.parametrize("num_splits", [1, 3])
def test_nan_in_unseen_keys_does_not_spread(num_splits, cut):
    cut(SMALL, num_splits)
    case = case_of(([20, 3], [(7, 40), (30, 45)], 70))
    grads = grads_of(case.operation(*case.inputs))
    expected = run(case.operation, case.inputs, grads)
    seen = torch.arange(70)[:, None, None].sub(26).abs() <= 19  # keys 7 to 45; no query sees key 45
    seen[45] = False
    hidden = [case.inputs[0], *(each.where(seen, torch.nan) for each in case.inputs[1:])]
    for ours, theirs in zip(run(case.operation, hidden, grads), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("index", [1, 2], ids=["key", "value"])
def test_nan_reaches_only_queries_that_see_it(index, cut):
    """In backward it also reaches the other keys that these queries see, but no further keys of their tiles."""
    cut(SMALL)
    case = case_of(([4, 3, 2], [(7, 20), (17, 28), (20, 31)], 31))
    grads = grads_of(case.operation(*case.inputs))
    expected = run(case.operation, case.inputs, grads)
    case.inputs[index][10] = torch.nan
    out, lse, grad_q, grad_k, grad_v = run(case.operation, case.inputs, grads)
    for ours, theirs in zip((out, lse, grad_q), expected, strict=False):
        assert torch.equal(ours[4:], theirs[4:])
    assert out[:4].isnan().all()
    for ours, theirs in zip((grad_k, grad_v), expected[3:], strict=True):
        for others in (slice(0, 7), slice(20, 31)):
            assert torch.equal(ours[others], theirs[others])
    assert grad_k[7:20].isnan().all()


def test_large_scores():
    case = case_of(([4, 2], [(0, 40), (38, 40)], 40))
    case = replace(case, inputs=[case.inputs[0] * 1e4, *case.inputs[1:]])
    assert_huge_scores_within_budget(case)


@pytest.mark.parametrize("large", [0, 1])
def test_splits_of_very_different_weight(large):
    num_splits, split_lse = torch.randn(2, 3, 16), torch.zeros(2, 3)
    split_lse[large] = 200
    splits.combine(num_splits, split_lse, out := torch.empty(3, 16), lse := torch.empty(3))
    torch.testing.assert_close(out, num_splits[large])
    torch.testing.assert_close(lse, split_lse[large])


@pytest.mark.parametrize("keys", [901, 4505])
def test_few_queries_fill_a_gpu(keys):
    """32 latents and 16 heads over one image or one video make at least 132 programs, one per multiprocessor."""
    assert 132 <= 16 * choose_num_splits(16, keys, 64) <= 2 * splits._PROGRAMS
    assert choose_num_splits(500, keys, 64) == 1


def test_interpreter_runs_only_when_named():
    case, layout = case_of(), SpanLayout.from_spans(*SEVERAL_TILES)
    assert explain(cross_attention, *case.inputs, layout).reasons == {
        "triton": "the Triton interpreter runs only when named by impl="
    }
