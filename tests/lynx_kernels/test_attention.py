from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lynx_kernels import PackedLayout, SpanLayout, cross_attention, prefix_attention, prefix_attention_decode
from lynx_kernels.ops.attention_common import reference
from tests.lynx_kernels.attention_cases import (
    GROUPS_OF_A_BATCH,
    SPANS_OF_A_BATCH,
    all_cases,
    assert_case_within_budget,
    assert_huge_scores_within_budget,
    decode_case,
    grads_of,
    packed_case,
    poison_beyond_lengths,
    span_case,
)
from tests.lynx_kernels.attention_helpers import (
    FEW_EXAMPLES,
    GROUPS,
    dense_attention,
    packed_visible,
    random,
    run,
    spans,
)
from tests.lynx_kernels.helpers import permuted


@pytest.fixture(autouse=True)
def poison():
    """Fill uninitialised memory with NaN, so that a test fails if an output is not written."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def assert_equal_to_naive(case):
    """Outputs and gradients equal those of plain attention in fp64."""
    with torch.no_grad():
        grads = grads_of(case.naive(*case.inputs))
    actual, expected = run(case.operation, case.inputs, grads), run(case.naive, case.inputs, grads)
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-11)


@all_cases
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (6, 3), (3, 1)])
@pytest.mark.parametrize(("dim", "scale"), [(1, None), (7, -0.3), (33, None)])
def test_equals_dense_attention(make, heads, kv_heads, dim, scale):
    assert_equal_to_naive(make(heads=heads, kv_heads=kv_heads, dim=dim, scale=scale))


@FEW_EXAMPLES
@given(GROUPS.filter(lambda groups: any(root + sum(branches) for root, branches in groups)), st.booleans())
def test_any_packed_layout(groups, root_is_causal):
    assert_equal_to_naive(packed_case(root_is_causal, groups, dim=3))


@FEW_EXAMPLES
@given(spans())
def test_any_span_layout(batch):
    assert_equal_to_naive(span_case(batch, dim=3))


@all_cases
def test_gradcheck(make):
    case = make(heads=2, kv_heads=1, dim=2)
    inputs = [each.requires_grad_() for each in case.inputs]

    def finite(*inputs):
        out, lse = case.operation(*inputs)
        return out, lse.masked_fill(lse.isneginf(), 0)

    assert torch.autograd.gradcheck(finite, inputs, fast_mode=True)


@all_cases
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [16, 72])
def test_within_budget(make, dtype, dim):
    assert_case_within_budget(make(dim=dim, dtype=dtype, impl="reference"))


@all_cases
def test_any_strides(make):
    case = make()
    grads = grads_of(case.naive(*case.inputs))
    expected = run(case.operation, case.inputs, grads)
    wider = [torch.cat([each, each], -1)[..., ::2] for each in case.inputs]
    for spread in (permuted, lambda each: torch.cat([each + 1, each], -2)[..., each.shape[-2] :, :]):
        actual = run(case.operation, [spread(each) for each in case.inputs], [spread(grad) for grad in grads])
        for ours, theirs in zip(actual, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-11)
    assert_equal_to_naive(replace(case, inputs=wider))
    assert_equal_to_naive(replace(case, inputs=[each[..., :1, :].expand_as(each) for each in case.inputs]))


@all_cases
def test_expanded_and_absent_gradients(make):
    case = make()
    leaves = [each.requires_grad_() for each in case.inputs]
    for pick in (
        lambda outputs: outputs[0].sum(),
        lambda outputs: outputs[1][outputs[1].isfinite()].sum(),
        lambda outputs: outputs[0].sum() + outputs[1].masked_fill(outputs[1].isneginf(), 0).sum(),
    ):
        actual = torch.autograd.grad(pick(case.operation(*leaves)), leaves, materialize_grads=True)
        expected = torch.autograd.grad(pick(case.naive(*leaves)), leaves, materialize_grads=True)
        for ours, theirs in zip(actual, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-11)


def test_return_lse_does_not_change_the_output():
    q, k, v = packed_case(True).inputs
    layout = PackedLayout.from_groups(GROUPS_OF_A_BATCH)
    assert torch.equal(prefix_attention(q, k, v, layout), prefix_attention(q, k, v, layout, return_lse=True)[0])
    q, k, v = span_case().inputs
    layout = SpanLayout.from_spans(*SPANS_OF_A_BATCH)
    assert torch.equal(cross_attention(q, k, v, layout), cross_attention(q, k, v, layout, return_lse=True)[0])


def test_reference_where_a_query_sees_no_key():
    """Layouts never mix such rows with others in one block, but the reference's formulas hold for any mask."""
    visible = torch.rand(6, 8, generator=torch.Generator().manual_seed(0)) < 0.4
    visible[2] = False
    inputs = [random(6, 4, 3), random(8, 2, 3, seed=1), random(8, 2, 3, seed=2)]
    grads = [random(6, 4, 3, seed=3), random(6, 4, seed=4)]
    expected = run(lambda *floats: dense_attention(*floats, visible, 0.7), inputs, grads)
    outputs = reference.attend(*inputs, visible, 0.7)
    gradients = reference.attend_backward(*grads, *outputs, *inputs, visible, 0.7)
    for ours, theirs in zip([*outputs, *gradients], expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-11)


def test_empty_span():
    out, lse, grad_q, grad_k, grad_v = run(
        (case := span_case()).operation, case.inputs, grads_of(case.naive(*case.inputs))
    )
    empty = slice(5, 9)
    assert (out[empty] == 0).all()
    assert lse[empty].isneginf().all()
    assert (grad_q[empty] == 0).all()
    assert (grad_k[9] == 0).all()
    assert (grad_v[9] == 0).all()


@pytest.mark.parametrize(
    "case",
    [
        packed_case(True, []),
        packed_case(False, [(0, []), (0, [0])]),
        span_case(([], [], 0)),
        span_case(([], [], 3)),
        span_case(([0, 0], [(0, 2), (1, 3)], 3)),
        span_case(([2], [(0, 0)], 0)),
        span_case(([2, 1], [(1, 1), (0, 0)], 3)),
    ],
)
def test_no_queries_or_keys(case):
    grads = [torch.ones(case.inputs[0].shape), torch.ones(case.inputs[0].shape[:-1])]
    out, lse, *gradients = run(case.operation, case.inputs, grads)
    assert out.shape == case.inputs[0].shape
    assert lse.shape == case.inputs[0].shape[:-1]
    assert (out == 0).all()
    assert lse.isneginf().all()
    for gradient, tensor in zip(gradients, case.inputs, strict=True):
        assert gradient.shape == tensor.shape
        assert (gradient == 0).all()


@pytest.mark.parametrize(("branches", "shared", "queries"), [(0, 0, 1), (0, 2, 1), (2, 1, 0)])
def test_no_queries_to_decode(branches, shared, queries):
    q, root, branch = random(branches, queries, 4, 3), random(shared, 2, 3), random(branches, 6, 2, 3)
    indices = [torch.zeros(branches, *shape, dtype=torch.int32) for shape in ((1, 2), ())]
    operation = partial(prefix_attention_decode, return_lse=True)
    out, lse, *gradients = run(
        lambda *floats: operation(*floats, *indices), [q, root, root, branch, branch], [q, q[..., 0]]
    )
    assert out.shape == q.shape
    assert lse.shape == q.shape[:-1]
    assert all((gradient == 0).all() for gradient in gradients)


@all_cases
@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 1e4), (torch.float16, 200.0), (torch.bfloat16, 1e4)])
def test_huge_scores(make, dtype, size):
    case = make(dtype=dtype)
    case.inputs = [each * size for each in case.inputs[:-1]] + case.inputs[-1:]
    if len(case.inputs) == 5:
        case.inputs[2] = case.inputs[2] / size
    assert_huge_scores_within_budget(case)


@FEW_EXAMPLES
@given(
    GROUPS.filter(lambda groups: any(root + sum(branches) for root, branches in groups)),
    st.booleans(),
    st.sampled_from([0.5, 1e30]),
    st.data(),
)
def test_no_information_leaks(groups, root_is_causal, size, data):
    case = packed_case(root_is_causal, groups, dim=3)
    token = data.draw(st.integers(0, len(case.inputs[0]) - 1))
    may_see = packed_visible(groups, root_is_causal)[:, token]
    before = case.operation(*case.inputs)
    changed = [each.clone() for each in case.inputs]
    for each in changed:
        each[token] += size
    for was, became in zip(before, case.operation(*changed), strict=True):
        differs = (was != became).flatten(1).any(1)
        assert torch.equal(differs, may_see)


@pytest.mark.parametrize("root_is_causal", [True, False])
def test_nan_stays_in_its_group(root_is_causal):
    case = packed_case(root_is_causal)
    grads = grads_of(case.naive(*case.inputs))
    expected = run(case.operation, case.inputs, grads)
    group = slice(9, 14)  # the third group of the batch
    inputs, grads = ([each.clone() for each in tensors] for tensors in (case.inputs, grads))
    for each in [*inputs, *grads]:
        each[group] = float("nan")
    others = torch.ones(len(inputs[0]), dtype=torch.bool)
    others[group] = False
    for ours, theirs in zip(run(case.operation, inputs, grads), expected, strict=True):
        assert torch.equal(ours[others], theirs[others])
        assert ours[group].isnan().all()


def test_nan_does_not_reach_other_spans():
    case = span_case()
    grads = grads_of(case.naive(*case.inputs))
    expected = run(case.operation, case.inputs, grads)
    q, k, v = (each.clone() for each in case.inputs)
    k[8], v[8], q[9] = float("nan"), float("nan"), float("nan")  # queries 3, 4 and 9 see key 8
    others = torch.ones(12, dtype=torch.bool)
    others[[3, 4, 9]] = False
    out, lse, grad_q, grad_k, grad_v = run(case.operation, [q, k, v], grads)
    for ours, theirs in zip((out, lse, grad_q), expected, strict=False):
        assert torch.equal(ours[others], theirs[others])
        assert ours[~others].isnan().all()
    for ours, theirs in zip((grad_k, grad_v), expected[3:], strict=True):
        assert torch.equal(ours[:4], theirs[:4])


@pytest.mark.parametrize("queries", [1, 3])
def test_decode_ignores_the_caches_beyond_the_lengths(queries):
    case = decode_case(queries)
    grads = grads_of(case.naive(*case.inputs))
    expected = run(case.operation, case.inputs, grads)
    inputs = poison_beyond_lengths(replace(case, inputs=[each.clone() for each in case.inputs])).inputs
    assert not torch.equal(inputs[1], case.inputs[1])
    for ours, theirs in zip(run(case.operation, inputs, grads), expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("queries", [1, 2])
@pytest.mark.parametrize("is_shared", [True, False])
def test_decode_equals_prefix_attention(queries, is_shared):
    """Decoding equals a packed batch with shared roots, and one in which every branch has a copy of its root."""
    heads, kv_heads, dim, roots, branches = 4, 2, 5, {0: 4, 1: 0, 2: 3}, [(0, 2), (0, 5), (1, 3), (2, 2), (2, 4)]
    shared_k, shared_v = random(12, kv_heads, dim, seed=1), random(12, kv_heads, dim, seed=2)
    branch_k, branch_v = random(5, 6, kv_heads, dim, seed=3), random(5, 6, kv_heads, dim, seed=4)
    q, grad = random(5, queries, heads, dim), random(5, queries, heads, dim, seed=5)
    starts = {root: 4 * root for root in roots}  # among the shared keys
    ranges = [[[starts[root], starts[root] + roots[root]]] for root, _ in branches]
    indices = [torch.tensor(each) for each in (ranges, [n for _, n in branches])]
    if is_shared:
        groups = [(length, [n for r, n in branches if r == root]) for root, length in roots.items()]
    else:
        groups = [(roots[r], [n]) for r, n in branches]
    layout = PackedLayout.from_groups(groups)

    def pack(q, shared_k, shared_v, branch_k, branch_v):
        rows_q, rows_k, rows_v, wanted, tokens = [], [], [], [], 0
        roots_done = set()
        for branch, (root, length) in enumerate(branches):
            if not (is_shared and root in roots_done):
                roots_done.add(root)
                rows_q.append(torch.full((roots[root], heads, dim), 3.0, dtype=q.dtype))
                rows_k.append(shared_k[starts[root] :][: roots[root]])
                rows_v.append(shared_v[starts[root] :][: roots[root]])
                tokens += roots[root]
            rows_q += [torch.full((length - queries, heads, dim), 3.0, dtype=q.dtype), q[branch]]
            rows_k.append(branch_k[branch, :length])
            rows_v.append(branch_v[branch, :length])
            tokens += length
            wanted += range(tokens - queries, tokens)
        outputs = prefix_attention(torch.cat(rows_q), torch.cat(rows_k), torch.cat(rows_v), layout, return_lse=True)
        return tuple(each[wanted].unflatten(0, (5, queries)) for each in outputs)

    def decode(*floats):
        return prefix_attention_decode(*floats, *indices, return_lse=True)

    inputs, grads = [q, shared_k, shared_v, branch_k, branch_v], [grad, grad[..., 0]]
    for ours, theirs in zip(run(decode, inputs, grads), run(pack, inputs, grads), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-11)


def test_partial_results_combine():
    """Attention to two halves of the keys, combined by LSE, equals attention to all keys."""
    query_lengths, key_spans, num_keys = (
        [3, 2, 4],
        [(0, 7), (2, 9), (6, 9)],
        9,
    )  # the last query sees no key of the first half
    cut = 5
    halves = [
        SpanLayout.from_spans(query_lengths, [(min(a, cut), min(b, cut)) for a, b in key_spans], num_keys),
        SpanLayout.from_spans(query_lengths, [(max(a, cut), max(b, cut)) for a, b in key_spans], num_keys),
    ]
    whole = SpanLayout.from_spans(query_lengths, key_spans, num_keys)

    def merged(q, k, v):
        outs, lses = zip(*(cross_attention(q, k, v, half, return_lse=True) for half in halves), strict=True)
        lse = torch.logaddexp(*lses)
        return sum(out * (part - lse).exp()[..., None] for out, part in zip(outs, lses, strict=True)), lse

    inputs = [random(9, 4, 5), random(9, 2, 5, seed=1), random(9, 2, 5, seed=2)]
    grads = [random(9, 4, 5, seed=3), random(9, 4, seed=4)]
    expected = run(lambda *floats: cross_attention(*floats, whole, return_lse=True), inputs, grads)
    for ours, theirs in zip(run(merged, inputs, grads), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-11)
