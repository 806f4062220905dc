"""Calls of the three attentions, each beside the same call of plain attention: the cases that their tests run over."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch

from lynx_kernels import PackedLayout, SpanLayout, cross_attention, prefix_attention, prefix_attention_decode
from tests.lynx_kernels.attention_helpers import dense_attention, dense_decode, packed_visible, random, span_visible

GROUPS_OF_A_BATCH = [(3, [2, 0, 4]), (0, []), (0, [5]), (4, []), (2, [1]), (0, [2, 1]), (1, [0])]
SPANS_OF_A_BATCH = [3, 2, 0, 4, 1, 2], [(0, 6), (4, 9), (1, 3), (5, 5), (8, 9), (0, 6)], 10  # key 9 is seen by none
BRANCH_TO_ROOT, ROOT_LENGTHS, BRANCH_LENGTHS = [2, 0, 0, 2, 1], [5, 0, 7, 4], [3, 6, 4, 3, 5]  # root 3 has no branch


@dataclass
class Case:
    """A call of an operation, returning its LSE too, and the same call of plain attention."""

    operation: Callable
    naive: Callable
    inputs: list


def packed_case(
    root_is_causal,
    groups=GROUPS_OF_A_BATCH,
    heads=4,
    kv_heads=2,
    dim=7,
    dtype=torch.float64,
    scale=None,
    impl=None,
):
    layout = PackedLayout.from_groups(groups, root_is_causal=root_is_causal)
    visible, tokens = packed_visible(groups, root_is_causal), layout.num_tokens
    inputs = [random(tokens, h, dim, dtype=dtype, seed=i) for i, h in enumerate([heads, kv_heads, kv_heads])]
    return Case(
        lambda q, k, v: prefix_attention(q, k, v, layout, scale=scale, return_lse=True, impl=impl),
        lambda q, k, v: dense_attention(q, k, v, visible, scale),
        inputs,
    )


def span_case(batch=SPANS_OF_A_BATCH, heads=4, kv_heads=2, dim=7, dtype=torch.float64, scale=None, impl=None):
    layout, visible = SpanLayout.from_spans(*batch), span_visible(*batch)
    shapes = [(layout.num_queries, heads), (layout.num_keys, kv_heads), (layout.num_keys, kv_heads)]
    inputs = [random(*shape, dim, dtype=dtype, seed=i) for i, shape in enumerate(shapes)]
    return Case(
        lambda q, k, v: cross_attention(q, k, v, layout, scale=scale, return_lse=True, impl=impl),
        lambda q, k, v: dense_attention(q, k, v, visible, scale),
        inputs,
    )


def decode_case(
    queries, heads=4, kv_heads=2, dim=7, dtype=torch.float64, scale=None, index_dtype=torch.int32, impl=None
):
    indices = [torch.tensor(each, dtype=index_dtype) for each in (BRANCH_TO_ROOT, ROOT_LENGTHS, BRANCH_LENGTHS)]
    root, branch = (len(ROOT_LENGTHS), 8, kv_heads, dim), (len(BRANCH_TO_ROOT), 6, kv_heads, dim)
    shapes = [(len(BRANCH_TO_ROOT), queries, heads, dim), root, root, branch, branch]
    inputs = [random(*shape, dtype=dtype, seed=i) for i, shape in enumerate(shapes)]
    return Case(
        lambda *floats: prefix_attention_decode(*floats, *indices, scale=scale, return_lse=True, impl=impl),
        lambda *floats: dense_decode(*floats, *indices, scale=scale),
        inputs,
    )


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
    return [random(*output.shape, seed=10 + i) for i, output in enumerate(outputs)]
