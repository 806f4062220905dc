"""The compiled CPU attention: every instruction set, any number of threads, forked processes."""

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lynx_kernels import PackedLayout, SpanLayout, cross_attention, explain, prefix_attention
from lynx_kernels.backends import cpu as cpu_backend
from tests.lynx_kernels import attention_cases
from tests.lynx_kernels.attention_cases import (
    GROUPS_OF_A_BATCH,
    SPANS_OF_A_BATCH,
    assert_results_within_budget,
    grads_of_case,
)
from tests.lynx_kernels.attention_helpers import FEW_EXAMPLES, GROUPS, dense_attention, random, run, spans
from tests.lynx_kernels.helpers import assert_child_ends_well, permuted

if cpu_backend.MISSING is not None:
    pytest.skip(cpu_backend.MISSING, allow_module_level=True)

pytestmark = pytest.mark.usefixtures("poison")

packed_case = partial(attention_cases.packed_case, impl="cpu")
span_case = partial(attention_cases.span_case, impl="cpu")

# Several blocks and tiles of queries and keys, with remainders; one group, and one with many branches.
LONG_GROUPS = [(150, [70]), (0, [131]), (40, [1, 37, 90]), (129, [])]
LONG_SPANS = [50, 1, 0, 13, 7], [(0, 200), (150, 331), (3, 9), (331, 331), (330, 340)], 345
# Long enough for several work units of queries and several splits of keys.
SPLIT_GROUPS = [(500, [600, 3]), (30, [20])]


def assert_case_within_budget(case, spread=lambda each: each, cancels=False):
    """``cancels``: the magnitudes of dq and dk are those of scale * sum P dP k, and the same for q.

    With a head dimension of 1, dP and delta are nearly equal, so dP - delta cancels. The LSE is in fp32. Where it is
    near 12, its rounding alone gives P a relative error of up to 4 eps, different for every query. Plain PyTorch keeps
    P and does not have this error.
    """
    grads, magnitudes = grads_of_case(case), [0.0] * 5
    actual = run(case.operation, [spread(each) for each in case.inputs], [spread(grad) for grad in grads])
    if cancels:
        exact_inputs = [each.double() for each in case.inputs]
        out, lse = case.naive(*exact_inputs)
        uncancelled = run(case.naive, exact_inputs, [grads[0], (grads[0].double() * out).sum(-1)])
        lse_error = max(1, lse[lse.isfinite()].abs().max().item() / 2)  # in eps of P
        magnitudes[2:4] = [lse_error * each.abs().max().item() for each in uncancelled[2:4]]
    assert_results_within_budget(actual, case, grads, magnitudes)


def cases(dtype, dim, heads=2, kv_heads=1, **options):
    options |= {"dtype": dtype, "dim": dim, "heads": heads, "kv_heads": kv_heads}
    yield packed_case(True, LONG_GROUPS, **options)
    yield packed_case(False, LONG_GROUPS, **options)
    yield span_case(LONG_SPANS, **options)


def split_case(root_is_causal, **options):
    """The mask comes from the layout here, because building it in Python would take seconds."""
    case = packed_case(root_is_causal, [], **options)
    layout = PackedLayout.from_groups(SPLIT_GROUPS, root_is_causal=root_is_causal)
    case.operation = lambda q, k, v: prefix_attention(q, k, v, layout, return_lse=True, impl="cpu")
    case.naive = lambda q, k, v: dense_attention(q, k, v, layout.visible())
    case.inputs = [
        random(layout.num_tokens, *each.shape[1:], dtype=each.dtype, seed=i) for i, each in enumerate(case.inputs)
    ]
    return case


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [1, 7, 16, 33, 64, 88, 128, 256])
def test_every_instruction_set(instruction_set, dtype, dim):
    for case in cases(dtype, dim):
        assert_case_within_budget(case, cancels=dim == 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "kv_heads", "scale"), [(1, 1, 1.5), (6, 2, None), (3, 1, -0.3)])
def test_heads_and_scales(dtype, heads, kv_heads, scale):
    for case in cases(dtype, 24, heads, kv_heads, scale=scale):
        assert_case_within_budget(case)
        assert_case_within_budget(case, permuted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("root_is_causal", [True, False])
def test_split_groups(dtype, root_is_causal):
    assert_case_within_budget(split_case(root_is_causal, heads=1, kv_heads=1, dim=8, dtype=dtype))


@FEW_EXAMPLES
@given(GROUPS.filter(lambda groups: any(root + sum(branches) for root, branches in groups)), st.booleans())
def test_any_packed_layout(groups, root_is_causal):
    for dtype in (torch.float32, torch.bfloat16):
        assert_case_within_budget(packed_case(root_is_causal, groups, dim=3, dtype=dtype))


@FEW_EXAMPLES
@given(spans(max_keys=40).filter(lambda batch: sum(batch[0]) and batch[2]))
def test_any_span_layout(batch):
    for dtype in (torch.float32, torch.bfloat16):
        assert_case_within_budget(span_case(batch, dim=3, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_expanded_and_absent_gradients(dtype):
    case = packed_case(True, LONG_GROUPS, dtype=dtype)
    leaves = [each.requires_grad_() for each in case.inputs]
    for index in (0, 1):
        outputs = case.operation(*leaves)
        expanded = torch.autograd.grad(outputs[index].sum(), leaves, retain_graph=True, materialize_grads=True)
        written = torch.autograd.grad(outputs[index], leaves, torch.ones_like(outputs[index]), retain_graph=True)
        zeros = [torch.zeros_like(each) for each in outputs]
        zeros[index] = torch.ones_like(outputs[index])
        both = torch.autograd.grad(outputs, leaves, zeros)
        for first, second, third in zip(expanded, written, both, strict=True):
            assert torch.equal(first, second)
            assert torch.equal(first, third)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_result_does_not_depend_on_threads(dtype, restore_threads):
    split = split_case(False, heads=2, kv_heads=1, dim=8, dtype=dtype)
    for case in (*cases(dtype, 24), split):
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            grads = [torch.ones_like(each) for each in case.operation(*case.inputs)]
            results.append(run(case.operation, case.inputs, grads))
        for others in results[1:]:
            for ours, theirs in zip(results[0], others, strict=True):
                assert torch.equal(ours, theirs)


@pytest.mark.parametrize("kv_heads", [3, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_key_heads_that_do_not_divide_among_threads(dtype, kv_heads, restore_threads):
    """Of 60 segments, a thread takes one, two or more heads in a row. Each head is what it is alone, bit for bit."""
    options = {"heads": 2 * kv_heads, "kv_heads": kv_heads, "dim": 8, "dtype": dtype}
    groups = [(0, [3])] * 60
    spans = [3] * 60, [(3 * i, 3 * i + 3) for i in range(60)], 180
    for case in (
        packed_case(True, groups, **options),
        packed_case(False, groups, **options),
        span_case(spans, **options),
    ):
        grads = grads_of_case(case)
        alone = []
        torch.set_num_threads(1)
        for head in range(kv_heads):
            own, its = slice(2 * head, 2 * head + 2), slice(head, head + 1)
            inputs = [case.inputs[0][:, own], *(each[:, its] for each in case.inputs[1:])]
            alone.append(run(case.operation, inputs, [grad[:, own] for grad in grads]))
        expected = [torch.cat(each, 1) for each in zip(*alone, strict=True)]
        for threads in range(1, 13):
            torch.set_num_threads(threads)
            for ours, theirs in zip(run(case.operation, case.inputs, grads), expected, strict=True):
                assert torch.equal(ours, theirs), f"{threads} threads"


def test_forked_child_does_not_hang(restore_threads):
    torch.set_num_threads(2)
    case = packed_case(True, LONG_GROUPS, dtype=torch.float32)
    expected = case.operation(*case.inputs)[0]
    assert_child_ends_well(lambda: torch.equal(case.operation(*case.inputs)[0], expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_stays_in_its_group(instruction_set, dtype):
    case = packed_case(True, LONG_GROUPS, dtype=dtype)
    grads = [random(*each.shape, seed=9) for each in case.operation(*case.inputs)]
    expected = run(case.operation, case.inputs, grads)
    group = slice(220, 351)
    others = torch.ones(len(case.inputs[0]), dtype=torch.bool)
    others[group] = False
    inputs, grads = ([each.clone() for each in tensors] for tensors in (case.inputs, grads))
    for each in [*inputs, *grads]:
        each[group] = float("nan")
    for ours, theirs in zip(run(case.operation, inputs, grads), expected, strict=True):
        assert torch.equal(ours[others], theirs[others])
        assert ours[group].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_does_not_reach_other_spans(dtype):
    case = span_case(dtype=dtype)
    before = case.operation(*case.inputs)
    q, k, v = (each.clone() for each in case.inputs)
    k[8], v[8] = float("nan"), float("nan")  # queries 3, 4 and 9 see key 8
    others = torch.ones(12, dtype=torch.bool)
    others[[3, 4, 9]] = False
    for ours, theirs in zip(case.operation(q, k, v), before, strict=True):
        assert torch.equal(ours[others], theirs[others])
        assert ours[~others].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_far_apart(instruction_set, dtype):
    """The running maximum rises often and by large steps, falls, and starts far below 0."""
    layout = PackedLayout.causal([400])
    q = torch.ones(400, 1, 4, dtype=dtype)
    v = random(400, 1, 4, dtype=dtype)
    for sign in (1, -1):
        k = (sign * torch.arange(400.0).sub(900)[:, None, None].expand(400, 1, 4) / 4).to(dtype)
        out, lse = prefix_attention(q, k, v, layout, scale=0.5, return_lse=True, impl="cpu")
        exact, exact_lse = prefix_attention(
            *(each.double() for each in (q, k, v)), layout, scale=0.5, return_lse=True, impl="reference"
        )
        torch.testing.assert_close(out.double(), exact, rtol=0.01, atol=1e-5 if dtype == torch.float32 else 0.02)
        torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-6, atol=1e-4)


def test_explain_and_unsupported_reasons(monkeypatch):
    q, layout = torch.zeros(5, 2, 4), PackedLayout.from_groups([(3, [2])])
    assert explain(prefix_attention, q, q, q, layout).name == "cpu"
    span_layout = SpanLayout.from_spans([5], [(0, 5)], 5)
    assert explain(cross_attention, q, q, q, span_layout).name == "cpu"
    for dtype in (torch.float16, torch.float64):
        half = q.to(dtype)
        assert f"would be in {dtype}" in explain(prefix_attention, half, half, half, layout).reasons["cpu"]
    with torch.autocast("cpu", dtype=torch.float16):
        assert "would be in torch.float16" in explain(prefix_attention, q, q, q, layout).reasons["cpu"]
    monkeypatch.setattr(cpu_backend, "MISSING", "the compiled module is missing")
    choice = explain(cross_attention, q, q, q, span_layout)
    assert (choice.name, choice.reasons["cpu"]) == ("reference", "the compiled module is missing")


def test_instruction_sets():
    assert cpu_backend.instruction_sets()[-1] == "plain"
    with pytest.raises(ValueError, match=r"instruction set 'mmx' is not available here; there are:.* plain"):
        cpu_backend.force_instruction_set("mmx")


def test_invalid_tables():
    q = torch.zeros(5, 1, 4)
    operators = torch.ops.lynx_kernels
    layout, spans = PackedLayout.from_groups([(3, [1, 1])]), SpanLayout.from_spans([5], [(0, 5)], 5)
    inverse = spans.tile_offsets, spans.tile_segments
    tables = layout.runs, layout.tokens, layout.key_runs
    options = None, None, 1.0, None, "cpu"
    for table, row, column, value, message in (
        (0, 1, 0, 9, "do not go from 0 to 5|ends before it starts"),
        (0, 1, 1, 7, "run 1 of the layout has an offset that is not in its rows"),
        (0, 1, 3, -1, "run 1 of the layout sees rows that are not before it"),
        (0, 1, 4, 5, "run 1 of the layout sees rows that are not before it"),
        (0, 1, 5, 3, "run 1 of the layout sees a run whose offset is not in its rows"),
        (0, -1, 0, 9, "runs do not go from 0 to 5"),
        (1, 0, 2, 3, "has tokens that see, or are seen by, rows they cannot"),
        (1, 1, 0, 5, "has tokens that see, or are seen by, rows they cannot"),
        (1, 2, 1, 9, "has tokens that see, or are seen by, rows they cannot"),
        (2, 1, None, 2, "is not a part of a run whose keys have one last query"),
        (2, -1, None, 7, "key_runs do not go from 0 to 5"),
    ):
        broken = [each.clone() for each in tables]
        broken[table][row if column is None else (row, column)] = value
        with pytest.raises(ValueError, match=message):
            operators.prefix_attention(q, q, q, None, *broken, *options)
    broken = spans.segments.clone()
    broken[0, 2] = 6
    with pytest.raises(ValueError, match="segment 0 of the layout sees keys outside 0 to 5"):
        operators.cross_attention(q, q, q, broken, *inverse, 1.0, "cpu")
    longer = layout.runs, torch.cat([layout.tokens, layout.tokens[:, -1:]], 1), layout.key_runs
    with pytest.raises(ValueError, match="do not go from 0 to 6"):
        operators.prefix_attention(*[q.new_zeros(6, 1, 4)] * 3, None, *longer, *options)
    with pytest.raises(ValueError, match="do not run from 0 to 4"):
        operators.cross_attention(q[:4], q, q, spans.segments, *inverse, 1.0, "cpu")


def test_small_shared_cases(instruction_set):
    for dtype in (torch.float32, torch.bfloat16):
        for dim in (5, 40):
            assert_case_within_budget(packed_case(True, GROUPS_OF_A_BATCH, dim=dim, dtype=dtype))
            assert_case_within_budget(packed_case(False, GROUPS_OF_A_BATCH, dim=dim, dtype=dtype))
            assert_case_within_budget(span_case(SPANS_OF_A_BATCH, dim=dim, dtype=dtype))
