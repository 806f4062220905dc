from functools import partial

import pytest
import torch

from lynx_kernels import explain, prefix_attention_decode
from lynx_kernels.ops.attention_common.triton.launches import Launch
from lynx_kernels.ops.prefix_attention_decode import triton as implementation
from tests.lynx_kernels.attention_cases import (
    assert_case_within_budget,
    cache_case,
    nothing_to_decode,
    other_strides,
    path_case,
    poison_beyond_lengths,
    without_shared_keys,
)
from tests.lynx_kernels.attention_helpers import random
from tests.lynx_kernels.helpers import permuted

pytestmark = pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")  # the LSE without keys is log 0

case_of = partial(cache_case, impl="triton")


@pytest.fixture
def cut(monkeypatch):
    """Sets the launch, the number of splits, and how many branches are scanned at once."""

    def choose(launch, num_splits=1):
        monkeypatch.setattr(implementation, "choose_launch", lambda *shape: launch)
        monkeypatch.setattr(implementation, "choose_num_splits", lambda *shape: num_splits)
        monkeypatch.setattr(implementation, "_SCAN", 4)

    return choose


@pytest.mark.parametrize(
    ("queries", "rows", "num_splits", "dtype"),
    [
        (1, 16, 1, torch.float16),
        (1, 16, 3, torch.float32),
        (3, 16, 1, torch.float32),
        (3, 16, 3, torch.float16),
        (5, 32, 2, torch.float32),
        (5, 16, 2, torch.float16),
    ],
)
def test_tiles(queries, rows, num_splits, dtype, cut):
    """A tile of 16 rows holds all 3 readers of a range, 2 of them, or 1."""
    cut(Launch(rows, 16, 4, 1), num_splits)
    assert_case_within_budget(case_of(queries, dtype=dtype), gradients=False)


def test_more_rows_than_a_tile(cut):
    cut(Launch(16, 16, 4, 1), 2)
    assert_case_within_budget(case_of(5, ([0, 1, 0], [20, 3], [5, 19, 33]), heads=7), gradients=False)


@pytest.mark.parametrize(("heads", "kv_heads", "dim", "scale"), [(4, 2, 7, -0.3), (3, 3, 88, -0.1), (2, 2, 33, 0.0)])
def test_heads_and_scales(heads, kv_heads, dim, scale):
    """With the shipped launches."""
    case = case_of(
        2,
        ([2, 0, 1, 0], [40, 0, 3], [5, 33, 2, 4]),
        heads=heads,
        kv_heads=kv_heads,
        dim=dim,
        scale=scale,
        index_dtype=torch.int64,
    )
    assert_case_within_budget(case, gradients=False)


def test_strides(cut):
    cut(Launch(16, 16, 4, 1), 2)
    case = case_of(2, ([0, 1, 0], [20, 3], [5, 2, 19]))
    expected = case.operation(*case.inputs)
    for inputs in other_strides(case.inputs):
        for ours, theirs in zip(case.operation(*inputs), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
            assert ours.is_contiguous()


def test_strides_of_indices():
    case = case_of(1, ([1, 0], [20, 3], [3, 9]))
    expected = case.operation(*case.inputs)
    indices = case.table
    call = partial(prefix_attention_decode, return_lse=True, impl="triton")
    for ours, theirs in zip(call(*case.inputs, *map(permuted, indices)), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_caches_with_too_large_strides_are_copied():
    for distance, is_copied in [(2**24 - 1, False), (2**24, True)]:
        cache = torch.empty_strided((1, 2, 1, 8), (2 * distance, distance, 8, 1), device="meta")
        for each in (cache, cache[0]):
            assert implementation._readable(each, torch.float32).is_contiguous() == is_copied


@pytest.mark.parametrize("narrow", [slice(0, 1), slice(1, 3), slice(3, 5)], ids=["queries", "shared", "branches"])
def test_mixed_dtypes(narrow):
    case = case_of(1, ([0, 0], [20], [3, 9]))
    inputs = list(case.inputs)
    inputs[narrow] = [each.half() for each in inputs[narrow]]
    wide = case.operation(*(each.float() for each in inputs))
    out, lse = case.operation(*inputs)
    assert out.dtype == inputs[0].dtype
    torch.testing.assert_close(out, wide[0].to(out.dtype), rtol=0, atol=0)
    torch.testing.assert_close(lse, wide[1], rtol=0, atol=0)


def test_no_shared_keys():
    for case in without_shared_keys(case_of, "triton"):
        assert_case_within_budget(case, gradients=False)


@pytest.mark.parametrize(("branches", "queries"), [(0, 1), (2, 0)])
def test_no_queries_to_decode(branches, queries):
    inputs = nothing_to_decode(branches, queries)
    assert prefix_attention_decode(*inputs, impl="triton").shape == inputs[0].shape


def test_num_splits_counts_only_programs_that_work(monkeypatch):
    """For a range, one program works per tile of 16 rows, although every branch has programs."""
    counted = []
    monkeypatch.setattr(implementation, "choose_launch", lambda *shape: Launch(16, 16, 4, 1))
    monkeypatch.setattr(implementation, "choose_num_splits", lambda *shape: counted.append(shape) or 1)
    case = case_of(2, ([0, 0, 1, 0, 0, 0], [20, 3], [5, 2, 4, 3, 2, 2]), heads=4, kv_heads=2)
    case.operation(*case.inputs)
    assert counted == [(2 * 2, 42, 16), (6 * 2, 5, 16)]


@pytest.mark.parametrize("num_splits", [1, 3])
@pytest.mark.parametrize(
    ("local", "scores"),
    [
        ({}, {"softcap": 2.0, "scale": -0.3}),
        ({"window": 1}, {}),
        ({"window": 30}, {"sinks": True}),
        ({"window": 50}, {"softcap": 2.0}),
        ({"chunk": 25}, {"scale": -0.3}),
        ({"chunk": 1000}, {"sinks": True}),
    ],
)
def test_several_ranges(local, scores, num_splits, cut):
    """Shared by all, by two at other places of their paths, by none; empty ones; ranges that overlap; narrow values."""
    cut(Launch(16, 16, 4, 1), num_splits)
    fork = [[0, 40], [40, 65], [5, 5]], [[0, 40], [65, 70], [40, 65]], [[0, 40], [40, 65], [30, 80]]
    other = [[3, 3], [0, 40], [7, 7]]
    sinks = {"sinks": random(6, seed=9, dtype=torch.float32)} if scores.get("sinks") else {}
    case = path_case(
        2, 90, [*fork, other], [5, 3, 40, 9], 6, 3, 24, torch.float32, impl="triton", value_dim=10,
        **local, **{**scores, **sinks},
    )  # fmt: skip
    assert_case_within_budget(poison_beyond_lengths(case), gradients=False)


def test_a_window_reads_only_its_tiles(cut):
    """Keys and values of tiles before the window may hold anything."""
    cut(Launch(16, 16, 4, 1), 2)
    case = path_case(1, 100, [[[0, 100]]] * 2, [5, 9], 2, 2, 16, torch.float32, impl="triton", window=20)
    expected = case.operation(*case.inputs)
    for shared in case.inputs[1:3]:
        shared[:80] = torch.nan  # the first place that a query sees is 85
    for ours, theirs in zip(case.operation(*case.inputs), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_gradients_raise():
    case = case_of(1)
    call = prefix_attention_decode
    indices = case.table
    for tensor in case.inputs:
        tensor.requires_grad_()
        reason = explain(call, *case.inputs, *indices).reasons["triton"]
        assert reason == "the Triton kernels for decoding have no gradient, and an argument requires one"
        with pytest.raises(RuntimeError, match=r"impl='triton' cannot run this call: .* have no gradient"):
            case.operation(*case.inputs)
        with torch.no_grad():
            assert explain(call, *case.inputs, *indices, impl="triton").name == "triton"
        tensor.requires_grad_(False)
    assert (
        explain(call, *case.inputs, *indices).reasons["triton"]
        == "the Triton interpreter runs only when named by impl="
    )
