"""The attention operations as registered operators: compiled, exported, under autocast."""

import pytest
import torch

from lynx_kernels import PackedLayout, SpanLayout, cross_attention, prefix_attention
from tests.lynx_kernels.attention_cases import (
    GROUPS_OF_A_BATCH,
    SPANS_OF_A_BATCH,
    all_cases,
    decode_case,
    grads_of,
    packed_case,
    span_case,
)
from tests.lynx_kernels.attention_helpers import random, run
from tests.lynx_kernels.helpers import count_compilations, permuted

_SPANS = SpanLayout.from_spans(*SPANS_OF_A_BATCH)
_PACKED = PackedLayout.from_groups(GROUPS_OF_A_BATCH)
OPERATORS = {
    "prefix_attention": (
        packed_case(True),
        [None, _PACKED.runs, _PACKED.tokens, _PACKED.key_runs],
        [None, None, 0.4, None],
    ),
    "cross_attention": (span_case(), [_SPANS.segments, _SPANS.tile_offsets, _SPANS.tile_segments], [0.4]),
    "prefix_attention_decode": (
        decode_case(2),
        [None, *decode_case(2).table],
        [None, None, 0.4, None],
    ),
}


@pytest.mark.parametrize(
    ("spread", "dtype"), [(torch.clone, torch.float64), (permuted, torch.float64), (torch.clone, torch.bfloat16)]
)
@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(name, spread, dtype):
    case, offsets, options = OPERATORS[name]
    inputs = [spread(each.to(dtype)) for each in case.inputs]
    arguments = [*offsets, *options, "reference"]
    torch.library.opcheck(
        getattr(torch.ops.lynx_kernels, name), (*(each.requires_grad_() for each in inputs), *arguments)
    )
    inputs = [each.detach() for each in inputs]
    outputs = [spread(each) for each in case.operation(*inputs)]
    backward = getattr(torch.ops.lynx_kernels, f"{name}_backward")
    for grads in ((outputs[0], None), (None, outputs[1]), outputs):
        torch.library.opcheck(
            backward, (*grads, *outputs, *inputs, *arguments), test_utils=("test_schema", "test_faketensor")
        )
    torch.library.opcheck(backward, (*outputs, *outputs, *inputs, *arguments))


@all_cases
def test_compiled_equals_eager(make):
    case = make()
    grads = grads_of(case.naive(*case.inputs))
    torch._dynamo.reset()
    compiled = torch.compile(case.operation, backend="aot_eager", fullgraph=True)
    expected = run(case.operation, case.inputs, grads)
    for ours, theirs in zip(run(compiled, case.inputs, grads), expected, strict=True):
        assert torch.equal(ours, theirs)


def assert_few_compilations(operation, layouts, rows):
    calls = [[random(n, 2, 4).requires_grad_() for n in rows(each)] + [each] for each in layouts]
    counts = count_compilations(operation, calls)
    assert counts[2] <= 3
    assert counts[2:] == [counts[2]] * len(counts[2:])


def test_new_lengths_compile_twice_at_most():
    batches = [[(3, [4])], [(2, [4, 1]), (0, [5])], [(7, [2])] * 3, [(0, [11])], [(4, [2] * 3)] * 9, [(0, [1] * 7)]]
    layouts = [PackedLayout.from_groups(groups) for groups in batches]
    assert_few_compilations(prefix_attention, layouts, lambda layout: [layout.num_tokens] * 3)
    batches = [
        ([3], [(0, 4)], 5),
        ([2, 4], [(1, 70), (0, 3)], 80),
        ([5] * 3, [(0, 2)] * 3, 7),
        ([9] * 8, [(3, 200)] * 8, 200),
    ]
    layouts = [SpanLayout.from_spans(*batch) for batch in batches]
    assert_few_compilations(cross_attention, layouts, lambda layout: [layout.num_queries, *[layout.num_keys] * 2])


class Attention(torch.nn.Module):
    def __init__(self, operation):
        super().__init__()
        self.operation = operation

    def forward(self, q, k, v, layout):
        return self.operation(q, k, v, layout)


DYNAMIC = torch.export.Dim.DYNAMIC


@pytest.mark.parametrize(
    ("operation", "layouts", "rows", "dynamic"),
    [
        (
            prefix_attention,
            [
                PackedLayout.from_groups([(3, [2, 4]), (0, [5])]),
                PackedLayout.from_groups([(5, [2, 4, 9]), (7, [1])] * 3),
            ],
            lambda layout: [layout.num_tokens] * 3,
            [{0: DYNAMIC}, {1: DYNAMIC}, *[{0: DYNAMIC}] * 3, DYNAMIC, None],
        ),
        (
            cross_attention,
            [SpanLayout.from_spans([2, 3], [(0, 70), (4, 9)], 75), SpanLayout.from_spans([4] * 5, [(7, 200)] * 5, 210)],
            lambda layout: [layout.num_queries, *[layout.num_keys] * 2],
            [*[{0: DYNAMIC}] * 3, *[DYNAMIC] * 4],
        ),
    ],
)
def test_exports_with_a_layout(operation, layouts, rows, dynamic):
    batches = [(*(random(n, 2, 4, seed=i) for i, n in enumerate(rows(layout))), layout) for layout in layouts]
    shapes = (*[{0: DYNAMIC}] * 3, dynamic)
    exported = torch.export.export(Attention(operation), batches[0], dynamic_shapes=shapes).module()
    for batch in batches:
        assert torch.equal(exported(*batch), operation(*batch))


@all_cases
def test_autocast_with_mixed_dtypes(make):
    case = make(dtype=torch.float32)
    case.inputs = [each.bfloat16() if i in (2, 4) else each for i, each in enumerate(case.inputs)]  # the values
    grads = grads_of(case.naive(*make().inputs))
    expected = run(case.operation, [each.bfloat16() for each in case.inputs], grads)

    def under_autocast(*inputs):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return case.operation(*inputs)

    actual = run(under_autocast, case.inputs, grads)
    assert actual[0].dtype == torch.bfloat16
    assert actual[1].dtype == torch.float32
    for ours, theirs in zip(actual, expected, strict=True):
        assert torch.equal(ours, theirs.to(ours.dtype))
    for gradient, tensor in zip(actual[2:], case.inputs, strict=True):
        assert gradient.dtype == tensor.dtype
    exact = make()
    for ours, theirs in zip(under_autocast(*exact.inputs), exact.operation(*exact.inputs), strict=True):
        assert torch.equal(ours, theirs)  # fp64 stays fp64


@all_cases
def test_mixed_dtypes_without_autocast(make):
    case = make(dtype=torch.float32)
    inputs = [each.bfloat16() if i in (2, 4) else each for i, each in enumerate(case.inputs)]
    grads = grads_of(case.naive(*make().inputs))
    actual, expected = run(case.operation, inputs, grads), run(case.operation, [each.float() for each in inputs], grads)
    for ours, theirs in zip(actual, expected, strict=True):
        assert torch.equal(ours, theirs.to(ours.dtype))
    assert [each.dtype for each in actual[2:]] == [each.dtype for each in inputs]


@all_cases
def test_second_derivatives_raise(make):
    case = make()
    inputs = [each.requires_grad_() for each in case.inputs]
    (grad,) = torch.autograd.grad(case.operation(*inputs)[0].sum(), inputs[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="have no second derivatives"):
        grad.sum().backward()
