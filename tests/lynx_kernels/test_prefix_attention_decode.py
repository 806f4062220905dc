"""Decoding over any ranges of shared keys, with windows, chunks, soft caps and sinks, against plain attention."""

import random as python_random
from functools import partial

import pytest
import torch

from lynx_kernels import explain, prefix_attention_decode
from lynx_kernels.backends import cpu as cpu_backend
from tests.lynx_kernels.attention_cases import (
    assert_case_within_budget,
    grads_of,
    path_case,
    poison_beyond_lengths,
)
from tests.lynx_kernels.attention_helpers import dense_decode, random, run
from tests.lynx_kernels.helpers import permuted

pytestmark = pytest.mark.usefixtures("poison")
cpu = pytest.mark.skipif(cpu_backend.MISSING is not None, reason=str(cpu_backend.MISSING))


def drawn(seed, dtype, impl):
    """A case of any shape. Ranges are drawn from few, so that branches share some: equal, overlapping, tiny, empty."""
    draw = python_random.Random(seed)
    branches, queries, num_shared = draw.randint(1, 5), draw.choice([1, 1, 2, 4]), draw.choice([3, 20, 80, 300])
    few = [sorted(draw.choices(range(num_shared + 1), k=2)) for _ in range(3)] + [[0, 0], [num_shared] * 2, [1, 2]]
    ranges = torch.tensor([draw.choices(few, k=4) for _ in range(branches)])[:, : draw.randint(0, 4)]
    lengths = [queries + draw.choice([0, 1, 5, 60, 150]) for _ in range(branches)]
    kv_heads, dim = draw.choice([1, 2, 3]), draw.choice([5, 16, 24, 64])
    heads = kv_heads * draw.choice([1, 2, 5])
    options = {"value_dim": draw.choice([dim, dim // 2]), "scale": draw.choice([None, 0.9, -0.3])}
    local = draw.choice([None, "window", "chunk"])
    if local:
        options[local] = draw.choice([1, 2, 7, 33, 150, 1000])
    if draw.random() < 0.4:
        options["softcap"] = draw.choice([1.5, 30.0])
    if draw.random() < 0.4:
        options["sinks"] = random(heads, seed=9, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    index_dtype = draw.choice([torch.int32, torch.int64])
    case = path_case(
        queries, num_shared, ranges.tolist(), lengths, heads, kv_heads, dim, dtype, index_dtype=index_dtype, impl=impl,
        **options,
    )  # fmt: skip
    case.table[0] = ranges.to(index_dtype)  # which an empty list does not tell
    return poison_beyond_lengths(case)


@cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_paths(instruction_set, dtype):
    for seed in range(40):
        assert_case_within_budget(drawn(seed, dtype, "cpu"), gradients=False)


def test_reference():
    """In fp64, with every gradient; that of the sinks too."""
    for seed in range(60):
        case = drawn(seed, torch.float64, "reference")
        if not case.table[0].shape[1]:  # plain attention does not use the shared keys, and autograd refuses that
            torch.testing.assert_close(case.operation(*case.inputs), case.naive(*case.inputs), rtol=1e-9, atol=1e-10)
            continue
        grads = grads_of(case.operation(*case.inputs))
        expected = run(case.naive, case.inputs, grads)
        for ours, theirs in zip(run(case.operation, case.inputs, grads), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


def test_gradient_of_sinks():
    case = path_case(2, 20, [[[0, 20], [3, 9]]] * 2, [4, 2], window=9, softcap=3.0)
    sinks = random(4, seed=7)
    grads = grads_of(case.operation(*case.inputs))

    def attend(sinks, call):
        return call(*case.inputs, *case.table, window=9, softcap=3.0, sinks=sinks)

    ours, theirs = (
        run(partial(attend, call=call), [sinks], grads)[-1]
        for call in (partial(prefix_attention_decode, return_lse=True), dense_decode)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("impl", [pytest.param("cpu", marks=cpu), "reference"])
def test_strides_change_nothing(impl):
    case = path_case(
        2, 90, [[[0, 40], [60, 90]], [[0, 40], [1, 1]]], [5, 70], 6, 3, 16, torch.float32, impl=impl, window=60,
        sinks=permuted(random(6, dtype=torch.float32)),
    )  # fmt: skip
    expected = case.operation(*case.inputs)
    case.table[:] = map(permuted, case.table)
    for ours, theirs in zip(case.operation(*map(permuted, case.inputs)), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@cpu
@pytest.mark.parametrize("local", [{"window": 200}, {"chunk": 128}])
def test_a_window_skips_whole_splits(local):
    """What lies before it may hold anything."""
    case = path_case(1, 1000, [[[0, 1000]]] * 2, [5, 9], 2, 2, 16, torch.float32, impl="cpu", **local)
    expected = case.operation(*case.inputs)
    for shared in case.inputs[1:3]:
        shared[:768] = torch.nan
    for ours, theirs in zip(case.operation(*case.inputs), expected, strict=True):
        assert torch.equal(ours, theirs)


@cpu
def test_wide_heads():
    assert_case_within_budget(
        path_case(1, 70, [[[0, 70]]] * 2, [5, 40], 4, 2, 512, torch.bfloat16, impl="cpu"), gradients=False
    )


def test_compiled():
    """One graph for any window; the options reach the operator."""
    case = path_case(2, 90, [[[0, 40], [60, 90]], [[0, 40], [1, 1]]], [5, 70], dtype=torch.float32)
    call = partial(prefix_attention_decode, return_lse=True, softcap=3.0, sinks=random(4, dtype=torch.float32))
    torch._dynamo.reset()
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    for options in ({}, {"window": 30}, {"chunk": 30}):
        with torch.no_grad():
            found = compiled(*case.inputs, *case.table, **options)
        for ours, theirs in zip(found, call(*case.inputs, *case.table, **options), strict=True):
            assert torch.equal(ours, theirs)


def test_explain_says_what_many_queries_are_for():
    for queries, is_many in ((1, False), (32, False), (33, True)):
        case = path_case(queries, 9, [[[0, 9]]], [queries])
        told = str(explain(prefix_attention_decode, *case.inputs, *case.table))
        assert ("scaled_dot_product_attention" in told) == is_many
        assert (f"note: a branch has {queries} queries" in told) == is_many
