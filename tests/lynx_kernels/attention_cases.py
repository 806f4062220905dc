"""Test cases of the three attention operations: a call, and the same call of plain attention to compare with."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch

from lynx_kernels import PackedLayout, SpanLayout, cross_attention, prefix_attention, prefix_attention_decode
from tests.lynx_kernels.attention_helpers import (
    dense_attention,
    dense_decode,
    packed_visible,
    random,
    run,
    span_visible,
)
from tests.lynx_kernels.helpers import permuted
from tests.numbers import assert_within_budget

GROUPS_OF_A_BATCH = [(3, [2, 0, 4]), (0, []), (0, [5]), (4, []), (2, [1]), (0, [2, 1]), (1, [0])]
SPANS_OF_A_BATCH = [3, 2, 0, 4, 1, 2], [(0, 6), (4, 9), (1, 3), (5, 5), (8, 9), (0, 6)], 10  # no query sees key 9
BRANCH_TO_ROOT, ROOT_LENGTHS, BRANCH_LENGTHS = [2, 0, 0, 2, 1], [5, 0, 7, 4], [3, 6, 4, 3, 5]  # root 3 has no branch


@dataclass
class Case:
    """A call of an operation that also returns the LSE, and the same call of plain attention.

    Attributes:
        table: the integer tensors that tell the operation which keys each query sees.
    """

    operation: Callable
    naive: Callable
    inputs: list
    table: list


def packed_case(
    root_is_causal,
    groups=GROUPS_OF_A_BATCH,
    heads=4,
    kv_heads=2,
    dim=7,
    dtype=torch.float64,
    scale=None,
    impl=None,
    device="cpu",
):
    layout = PackedLayout.from_groups(groups, root_is_causal=root_is_causal, device=device)
    visible, tokens = packed_visible(groups, root_is_causal).to(device), layout.num_tokens
    all_heads = [heads, kv_heads, kv_heads]
    inputs = [random(tokens, h, dim, dtype=dtype, seed=i, device=device) for i, h in enumerate(all_heads)]
    return Case(
        lambda q, k, v: prefix_attention(q, k, v, layout, scale=scale, return_lse=True, impl=impl),
        lambda q, k, v: dense_attention(q, k, v, visible, scale),
        inputs,
        [layout.runs, layout.tokens, layout.key_runs],
    )


def span_case(
    batch=SPANS_OF_A_BATCH, heads=4, kv_heads=2, dim=7, dtype=torch.float64, scale=None, impl=None, device="cpu"
):
    layout, visible = SpanLayout.from_spans(*batch, device=device), span_visible(*batch).to(device)
    shapes = [(layout.num_queries, heads), (layout.num_keys, kv_heads), (layout.num_keys, kv_heads)]
    inputs = [random(*shape, dim, dtype=dtype, seed=i, device=device) for i, shape in enumerate(shapes)]
    return Case(
        lambda q, k, v: cross_attention(q, k, v, layout, scale=scale, return_lse=True, impl=impl),
        lambda q, k, v: dense_attention(q, k, v, visible, scale),
        inputs,
        [layout.segments, layout.tile_offsets, layout.tile_segments],
    )


def decode_case(
    queries,
    heads=4,
    kv_heads=2,
    dim=7,
    dtype=torch.float64,
    scale=None,
    index_dtype=torch.int32,
    batch=(BRANCH_TO_ROOT, ROOT_LENGTHS, BRANCH_LENGTHS),
    impl=None,
    device="cpu",
    value_dim=None,
    **options,
):
    """``batch``: for each branch the root that it reads, all lengths of roots, those of branches."""
    branch_to_root, root_lengths, branch_lengths = batch
    room = max(root_lengths) + 1  # of a root among the shared keys
    ranges = [[[root * room, root * room + root_lengths[root]]] for root in branch_to_root]
    shared = len(root_lengths) * room
    return path_case(
        queries, shared, ranges, branch_lengths, heads, kv_heads, dim, dtype, scale, index_dtype, impl, device,
        value_dim, **options,
    )  # fmt: skip


def path_case(
    queries,
    num_shared,
    ranges,
    branch_lengths,
    heads=4,
    kv_heads=2,
    dim=7,
    dtype=torch.float64,
    scale=None,
    index_dtype=torch.int32,
    impl=None,
    device="cpu",
    value_dim=None,
    **options,
):
    """Decoding whose branches read any ranges (B, P, 2) of the shared keys."""
    branches, room, values = len(branch_lengths), max(branch_lengths), value_dim or dim
    indices = [torch.tensor(each, dtype=index_dtype, device=device) for each in (ranges, branch_lengths)]
    shapes = [
        (branches, queries, heads, dim), (num_shared, kv_heads, dim), (num_shared, kv_heads, values),
        (branches, room, kv_heads, dim), (branches, room, kv_heads, values),
    ]  # fmt: skip
    inputs = [random(*shape, dtype=dtype, seed=i, device=device) for i, shape in enumerate(shapes)]
    options = {"scale": scale, **options}
    return Case(
        lambda *floats: prefix_attention_decode(*floats, *indices, **options, return_lse=True, impl=impl),
        lambda *floats: dense_decode(*floats, *indices, **options),
        inputs,
        indices,
    )


def poison_beyond_lengths(case):
    """The same decoding case with NaN in all keys and values that no branch reads."""
    ranges, branch_lengths = case.table
    _, *shared, branch_k, branch_v = case.inputs
    unread = torch.ones(len(shared[0]), dtype=torch.bool)
    for start, end in ranges.flatten(0, 1).tolist():
        unread[start:end] = False
    for cache in shared:
        cache[unread] = float("nan")
    for cache in (branch_k, branch_v):
        for row, length in zip(cache, branch_lengths.tolist(), strict=True):
            row[length:] = float("nan")
    return case


# Roots with several branches, one, and none; with several key tiles, and with none; the branches are not sorted.
SEVERAL_TILES = [2, 0, 0, 1, 2, 0], [37, 0, 50, 5], [5, 40, 33, 17, 16, 18]


def cache_case(queries, batch=SEVERAL_TILES, heads=2, kv_heads=1, dim=24, dtype=torch.float32, **options):
    """A decoding case whose caches hold NaN beyond the lengths."""
    return poison_beyond_lengths(decode_case(queries, heads, kv_heads, dim, dtype, batch=batch, **options))


def without_shared_keys(case_of, impl):
    """Cases of ``case_of`` in which no branch reads a shared key: with some there, without, and without ranges."""
    case = case_of(2, ([0, 1], [0, 0], [3, 2]))
    ranges, branch_lengths = case.table
    for shared, number in ((2, 1), (0, 1), (0, 0)):
        inputs = [each[:shared] if i in (1, 2) else each for i, each in enumerate(case.inputs)]
        table = [(ranges * 0)[:, :number], branch_lengths]
        yield replace(
            case,
            operation=lambda *floats, table=table: prefix_attention_decode(*floats, *table, return_lse=True, impl=impl),
            naive=lambda *floats, table=table: dense_decode(*floats, *table),
            inputs=inputs,
            table=table,
        )


def nothing_to_decode(branches, queries):
    """The arguments of decoding over three shared keys. One of ``branches`` and ``queries`` is 0."""
    shared, branch, q = torch.ones(3, 1, 16), torch.ones(branches, 2, 1, 16), torch.ones(branches, queries, 1, 16)
    ranges, branch_lengths = (torch.ones(branches, *shape, dtype=torch.int32) for shape in ((1, 2), ()))
    return q, shared, shared, branch, branch, ranges, branch_lengths


def other_strides(inputs):
    """The inputs of decoding with heads as the outer dimension, as in transformers' caches, and with other strides."""
    yield [inputs[0], *(each.transpose(-3, -2).contiguous().transpose(-3, -2) for each in inputs[1:])]
    yield [permuted(each) if i % 2 else each for i, each in enumerate(inputs)]
    yield [torch.cat([each + 1, each], -1)[..., each.shape[-1] :] for each in inputs]
    yield [permuted(each) for each in inputs]


CASES = {
    "causal roots": partial(packed_case, True),
    "full roots": partial(packed_case, False),
    "spans": span_case,
    "decode 1": partial(decode_case, 1),
    "decode 3": partial(decode_case, 3, index_dtype=torch.int64),
}
all_cases = pytest.mark.parametrize("make", CASES.values(), ids=CASES)


def grads_of(outputs):
    """Gradients for an output and its LSE."""
    return [random(*output.shape, seed=10 + i, device=output.device) for i, output in enumerate(outputs)]


def grads_of_case(case) -> list:
    """Gradients for the output and LSE of a case, in the dtype of the inputs."""
    q = case.inputs[0]
    return [grad.to(q.dtype) for grad in grads_of([q, q[..., 0]])]


def assert_case_within_budget(case, *, gradients=True):
    """Output, LSE and the gradients through both are within the error budget. -inf is only where it should be."""
    grads = grads_of_case(case)
    actual = run(case.operation, case.inputs, grads) if gradients else case.operation(*case.inputs)
    assert_results_within_budget(actual, case, grads)


def assert_results_within_budget(actual: Sequence, case, grads: Sequence, magnitudes: Sequence[float] | None = None):
    """The same check for given results: output, LSE and, if present, gradients.

    ``magnitudes``: for each result, the magnitude of its budget. The magnitude that follows from the LSE is used where
    it is larger.
    """
    dtype, has_gradients = case.inputs[0].dtype, len(actual) > 2

    def results(inputs):
        return run(case.naive, inputs, grads) if has_gradients else list(case.naive(*inputs))

    exact, plain = results([each.double() for each in case.inputs]), results(case.inputs)
    plain[1] = case.naive(*(each.float() for each in case.inputs))[1]  # the LSE is in fp32
    names = ["output", "lse", *(f"gradient {i}" for i in range(len(case.inputs)))]
    seen = exact[1].isfinite()
    assert torch.equal(actual[1].isneginf(), ~seen)
    # Gradients use exp(score - LSE). Its relative error is the absolute error of the fp32 LSE.
    lse_error = exact[1][seen].abs().max().item() * torch.finfo(torch.float32).eps if seen.any() else 0.0
    magnitudes = magnitudes or [0.0] * len(names)
    for name, ours, truth, theirs, magnitude in zip(names, actual, exact, plain, magnitudes, strict=has_gradients):
        assert ours.dtype == (torch.float32 if name == "lse" else dtype)
        if name == "lse":
            ours, truth, theirs = ours[seen], truth[seen], theirs[seen]
        if name.startswith("gradient") and truth.numel():
            magnitude = max(magnitude, truth.abs().max().item() * lse_error / torch.finfo(dtype).eps)
        assert_within_budget(ours, truth, theirs, name, magnitude)


def assert_huge_scores_within_budget(case):
    """Output and LSE are as exact as plain attention in fp32, which does not overflow. Gradients are finite."""
    grads = grads_of_case(case)
    out, lse, *gradients = run(case.operation, case.inputs, grads)
    exact_out, exact_lse = case.naive(*(each.double() for each in case.inputs))
    plain_out, plain_lse = case.naive(*(each.float() for each in case.inputs))
    seen = exact_lse.isfinite()
    assert_within_budget(out, exact_out, plain_out)
    assert_within_budget(lse[seen], exact_lse[seen], plain_lse[seen], "lse")
    assert all(gradient.isfinite().all() for gradient in gradients)
