"""The compiled CPU decoding: every instruction set, any number of threads, forked processes."""

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lynx_kernels import explain, prefix_attention_decode
from lynx_kernels.backends import cpu as cpu_backend
from tests.lynx_kernels.attention_cases import (
    SEVERAL_TILES,
    assert_case_within_budget,
    cache_case,
    nothing_to_decode,
    other_strides,
    path_case,
    without_shared_keys,
)
from tests.lynx_kernels.attention_helpers import FEW_EXAMPLES, random
from tests.lynx_kernels.helpers import assert_child_ends_well, permuted

if cpu_backend.MISSING is not None:
    pytest.skip(cpu_backend.MISSING, allow_module_level=True)

pytestmark = pytest.mark.usefixtures("poison")

case_of = partial(cache_case, impl="cpu")
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])

# A root of several splits, the last of them short; branch keys of two tiles and of two splits.
SEVERAL_SPLITS = [1, 0, 1], [64, 300], [70, 3, 131]
# A root with more keys than the maximum number of splits has with one tile each.
LONG = [0, 0], [2100], [9, 4]
# More rows of one root than a block holds, with two key tiles.
MANY_ROWS = [0] * 7, [90], [3, 4, 5, 6, 7, 8, 9]


@st.composite
def batches(draw):
    """For ``decode_case``: roots of branches, lengths of roots and of branches, for two queries per branch."""
    roots = draw(st.lists(st.integers(0, 140), min_size=1, max_size=4))
    branches = draw(st.lists(st.tuples(st.integers(0, len(roots) - 1), st.integers(2, 70)), min_size=1, max_size=6))
    return [root for root, _ in branches], roots, [length for _, length in branches]


@both_dtypes
@pytest.mark.parametrize("dim", [1, 7, 16, 33, 64, 88, 128, 256])
def test_every_instruction_set(instruction_set, dtype, dim):
    for queries, batch in ((1, SEVERAL_TILES), (3, SEVERAL_TILES), (2, SEVERAL_SPLITS)):
        assert_case_within_budget(case_of(queries, batch, dim=dim, dtype=dtype), gradients=False)


@both_dtypes
def test_long_roots(instruction_set, dtype):
    assert_case_within_budget(case_of(1, LONG, dim=16, dtype=dtype), gradients=False)


@both_dtypes
@pytest.mark.parametrize(
    ("heads", "kv_heads", "scale"), [(1, 1, 0.5), (6, 2, None), (3, 3, -0.3), (8, 1, -0.1), (2, 2, 0.0)]
)
def test_heads_and_scales(dtype, heads, kv_heads, scale):
    for batch in (SEVERAL_SPLITS, MANY_ROWS):
        case = case_of(2, batch, heads, kv_heads, dtype=dtype, scale=scale, index_dtype=torch.int64)
        assert_case_within_budget(case, gradients=False)


@FEW_EXAMPLES
@given(batches())
def test_any_batch(batch):
    for dtype in (torch.float32, torch.bfloat16):
        assert_case_within_budget(case_of(2, batch, dim=5, dtype=dtype), gradients=False)


@both_dtypes
@pytest.mark.parametrize("dim", [24, 64])
def test_strides(instruction_set, dtype, dim):
    case = case_of(2, ([0, 1, 0], [20, 3], [5, 2, 19]), heads=4, kv_heads=2, dim=dim, dtype=dtype)
    expected = case.operation(*case.inputs)
    for inputs in other_strides(case.inputs):
        for ours, theirs in zip(case.operation(*inputs), expected, strict=True):
            assert torch.equal(ours, theirs)
            assert ours.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_strides_of_indices(dtype):
    case = case_of(1, ([1, 0], [20, 3], [3, 9]))
    expected = case.operation(*case.inputs)
    indices = [permuted(each.to(dtype)) for each in case.table]
    actual = prefix_attention_decode(*case.inputs, *indices, return_lse=True, impl="cpu")
    for ours, theirs in zip(actual, expected, strict=True):
        assert torch.equal(ours, theirs)


@both_dtypes
def test_result_does_not_depend_on_threads(dtype, restore_threads):
    """For batches large enough for several threads."""
    for batch in (([1, 0, 1], [640, 1500], [70, 3, 131]), LONG):
        case = case_of(2, batch, heads=8, kv_heads=4, dim=64, dtype=dtype)
        results = []
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            results.append(case.operation(*case.inputs))
        for others in results[1:]:
            for ours, theirs in zip(results[0], others, strict=True):
                assert torch.equal(ours, theirs)


@both_dtypes
def test_result_does_not_depend_on_the_rest_of_the_batch(dtype):
    """The result of a branch is the same bit for bit, whatever other roots and branches are in the batch."""
    for options in ({}, {"window": 40}, {"chunk": 50}):
        ranges = [[[64, 364], [0, 30]], [[0, 64], [64, 364]], [[64, 364], [0, 64]], [[64, 364], [0, 30]]]
        case = path_case(
            1, 400, ranges, [70, 3, 131, 75], heads=4, kv_heads=2, dim=16, dtype=dtype, impl="cpu", **options
        )
        (q, *shared, branch_k, branch_v), (table, lengths) = case.inputs, case.table
        together = case.operation(*case.inputs)
        for branch in range(4):
            one = slice(branch, branch + 1)
            indices = table[one], lengths[one]
            alone = prefix_attention_decode(
                q[one], *shared, branch_k[one], branch_v[one], *indices, **options, return_lse=True, impl="cpu"
            )
            for ours, theirs in zip(alone, together, strict=True):
                assert torch.equal(ours, theirs[one])


def test_forked_child_does_not_hang(restore_threads):
    torch.set_num_threads(2)
    case = case_of(1, LONG, heads=8, kv_heads=8, dim=64)
    expected = case.operation(*case.inputs)[0]
    assert_child_ends_well(lambda: torch.equal(case.operation(*case.inputs)[0], expected))


@both_dtypes
def test_nan_reaches_only_branches_that_see_it(instruction_set, dtype):
    case = case_of(1, SEVERAL_SPLITS, heads=4, kv_heads=2, dtype=dtype)
    expected = case.operation(*case.inputs)
    # Branch 1 reads root 0, the others read root 1, from row 301 on. Only the first two heads get NaN.
    for index, entry, branches in ((0, 1, [1]), (1, 0, [1]), (2, 301, [0, 2]), (3, 2, [2]), (4, 0, [0])):
        inputs = [each.clone() for each in case.inputs]
        (inputs[index][entry] if index in (1, 2) else inputs[index][entry, 0])[:1] = float("nan")
        hit = torch.zeros(expected[1].shape, dtype=torch.bool)
        hit[branches, :, : 1 if index == 0 else 2] = True
        out, lse = case.operation(*inputs)
        assert torch.equal(out[~hit], expected[0][~hit])
        assert torch.equal(lse[~hit], expected[1][~hit])
        assert out[hit].isnan().all()
        assert lse[hit].isnan().all() == (index in (0, 1, 3))


@both_dtypes
def test_scores_far_apart(instruction_set, dtype):
    """The running maximum rises often and by large steps, falls, and differs by hundreds between splits."""
    q, v = torch.ones(1, 1, 1, 4, dtype=dtype), random(1, 2400, 1, 4, dtype=dtype)
    indices = torch.tensor([[[0, 2400]]]), torch.tensor([400])
    for sign in (1, -1):
        k = (sign * torch.arange(2400.0).sub(900)[None, :, None, None].expand(1, 2400, 1, 4) / 4).to(dtype)
        caches = k[0], v[0], k[:, :400], v[:, :400]
        out, lse = prefix_attention_decode(q, *caches, *indices, scale=0.5, return_lse=True, impl="cpu")
        exact, exact_lse = prefix_attention_decode(
            *(each.double() for each in (q, *caches)), *indices, scale=0.5, return_lse=True, impl="reference"
        )
        torch.testing.assert_close(out.double(), exact, rtol=0.01, atol=1e-5 if dtype == torch.float32 else 0.02)
        torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("narrow", [slice(0, 1), slice(1, 3), slice(3, 5)], ids=["queries", "shared", "branches"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_dtypes(narrow, dtype):
    case = case_of(1, ([0, 0], [20], [3, 9]))
    inputs = list(case.inputs)
    inputs[narrow] = [each.to(dtype) for each in inputs[narrow]]
    wide = case.operation(*(each.float() for each in inputs))
    out, lse = case.operation(*inputs)
    assert out.dtype == inputs[0].dtype
    assert torch.equal(out, wide[0].to(out.dtype))
    assert torch.equal(lse, wide[1])


def test_no_shared_keys():
    for case in without_shared_keys(case_of, "cpu"):
        assert_case_within_budget(case, gradients=False)


@pytest.mark.parametrize(("branches", "queries"), [(0, 1), (2, 0)])
def test_no_queries_to_decode(branches, queries):
    inputs = nothing_to_decode(branches, queries)
    assert prefix_attention_decode(*inputs, impl="cpu").shape == inputs[0].shape


def test_indices_out_of_range():
    """The operator checks them too, because compiled graphs call it without the checks of the public function."""
    case = case_of(2, ([0, 1], [4, 9], [3, 2]))
    call = torch.ops.lynx_kernels.prefix_attention_decode
    for number, place, value, message in (
        (0, (1, 0, 0), -1, r"ranges\[1, 0\] is \[-1, 19\], expected 0 <= start <= end <= 20"),
        (0, (1, 0, 1), 21, r"ranges\[1, 0\] is \[10, 21\], expected 0"),
        (0, (1, 0, 1), 9, r"ranges\[1, 0\] is \[10, 9\], expected 0"),
        (1, 1, 1, r"branch_lengths\[1\] is 1, expected 2 to 3"),
        (1, 1, 4, r"branch_lengths\[1\] is 4, expected 2 to 3"),
    ):
        for dtype in (torch.int32, torch.int64):
            broken = [each.to(dtype, copy=True) for each in case.table]
            broken[number][place] = value
            with pytest.raises(ValueError, match=rf"decode: {message}"):
                call(*case.inputs, None, *broken, None, None, 1.0, None, "cpu")


def test_compiled_equals_eager():
    case = case_of(2, heads=4, kv_heads=2)
    torch._dynamo.reset()
    compiled = torch.compile(case.operation, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        for ours, theirs in zip(compiled(*case.inputs), case.operation(*case.inputs), strict=True):
            assert torch.equal(ours, theirs)


def test_explain_and_unsupported_reasons(monkeypatch):
    case = case_of(1)
    indices = case.table
    ask = partial(explain, prefix_attention_decode)
    assert ask(*case.inputs, *indices).name == "cpu"
    for dtype in (torch.float16, torch.float64):
        assert f"would be in {dtype}" in ask(*(each.to(dtype) for each in case.inputs), *indices).reasons["cpu"]
    with torch.autocast("cpu", dtype=torch.float16):
        assert "would be in torch.float16" in ask(*case.inputs, *indices).reasons["cpu"]
    for tensor in case.inputs:
        tensor.requires_grad_()
        choice = ask(*case.inputs, *indices)
        assert choice.name == "reference"
        assert choice.reasons["cpu"] == "the C++ kernels for decoding have no gradient, and an argument requires one"
        with torch.no_grad():
            assert ask(*case.inputs, *indices).name == "cpu"
        tensor.requires_grad_(False)
    monkeypatch.setattr(cpu_backend, "MISSING", "the compiled module is missing")
    choice = ask(*case.inputs, *indices)
    assert (choice.name, choice.reasons["cpu"]) == ("reference", "the compiled module is missing")
