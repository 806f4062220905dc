from dataclasses import replace
from functools import partial

import pytest
import torch

from lynx_kernels import PackedLayout, SpanLayout, cross_attention, prefix_attention, prefix_attention_decode
from lynx_kernels.backends import dispatch
from lynx_kernels.ops import cross_attention as cross
from lynx_kernels.ops import prefix_attention as prefix
from lynx_kernels.ops import prefix_attention_decode as decode
from tests.gpu import bench
from tests.lynx_kernels.attention_cases import (
    CASES,
    assert_results_within_budget,
    decode_case,
    grads_of_case,
    packed_case,
    span_case,
)
from tests.lynx_kernels.attention_helpers import random, run
from tests.lynx_kernels.helpers import count_compilations, permuted

BF16 = torch.bfloat16
MODULES = {"causal roots": prefix, "full roots": prefix, "spans": cross, "decode 1": decode, "decode 3": decode}
# Roots and branches that are shared, missing, empty, and several tiles long, with full and partial tiles. Spans of
# latents and of texts: shared, overlapping, empty; no query sees the last keys. Beams of two images, and an image
# without beams.
GROUPS = [(576, [37, 0, 120]), (0, [300]), (257, [19, 1]), (5, []), (0, [1, 64]), (64, [64])]
SPANS = [32, 32, 3, 0, 150, 1, 33], [(0, 576), (576, 1152), (0, 576), (3, 9), (500, 1300), (7, 7), (1151, 1152)], 1365
BEAMS = [0, 2, 0, 0, 2, 0], [576, 33, 0], [3, 70, 64, 128, 5, 17]
REAL = {
    "causal roots": partial(packed_case, True, GROUPS),
    "full roots": partial(packed_case, False, GROUPS),
    "spans": partial(span_case, SPANS),
    "decode 1": partial(decode_case, 1, batch=BEAMS),
    "decode 3": partial(decode_case, 3, batch=BEAMS),
}
# Other batches in tensors of the same sizes.
OTHER_GROUPS = [(37, [576, 1, 120]), (300, []), (19, [257, 0]), (5, [64, 1, 63, 65])]
OTHER_SPANS = (
    [3, 32, 32, 100, 50, 33, 1],
    [(576, 1152), (0, 576), (0, 576), (9, 9), (500, 1300), (1151, 1152), (7, 7)],
    1365,
)
OTHER_BEAMS = [2, 1, 1, 0, 0, 2], [576, 0, 500], [128, 3, 70, 64, 5, 9]
OTHER = {
    "causal roots": partial(packed_case, True, OTHER_GROUPS),
    "full roots": partial(packed_case, False, OTHER_GROUPS),
    "spans": partial(span_case, OTHER_SPANS),
    "decode 1": partial(decode_case, 1, batch=OTHER_BEAMS),
    "decode 3": partial(decode_case, 3, batch=OTHER_BEAMS),
}
WIDE = {"heads": 32, "kv_heads": 8, "dim": 128} if bench.DEVICE == "cuda" else {"heads": 4, "kv_heads": 2, "dim": 16}


def make(name, impl, dtype, cases=REAL, **options):
    return cases[name](impl=impl, dtype=dtype, device=bench.DEVICE, **options)


def runs(name, impl, dtype):
    case = make(name, None, dtype, CASES)
    return impl not in dispatch.explain(case.operation, *case.inputs).reasons


CALLS = [
    (name, impl, dtype)
    for name, module in MODULES.items()
    for impl in module.OPERATION.names
    for dtype in bench.DTYPES
    if bench.PRESENT and runs(name, impl, dtype)
]
calls = pytest.mark.parametrize(("name", "impl", "dtype"), CALLS)
# One dtype each, bf16 where it runs.
IMPLEMENTATIONS = list({(name, impl): (name, impl, dtype) for name, impl, dtype in CALLS}.values())
implementations = pytest.mark.parametrize(("name", "impl", "dtype"), IMPLEMENTATIONS)


def results(name, impl, case, grads=None, operation=None):
    """Output, LSE and, if the implementation has gradients, all gradients for ``grads``."""
    operation = operation or case.operation
    if MODULES[name] is decode and impl != "reference":
        return list(operation(*case.inputs))
    return run(operation, case.inputs, grads_of_case(case) if grads is None else grads)


def check(name, impl, case, grads=None, operation=None):
    grads = grads_of_case(case) if grads is None else grads
    actual = results(name, impl, case, grads, operation)
    assert_results_within_budget(actual, case, grads)
    return actual


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("dtype", bench.DTYPES)
@pytest.mark.parametrize("name", MODULES)
def test_default_implementation(name, dtype):
    case = make(name, None, dtype)
    assert dispatch.explain(case.operation, *case.inputs).name == "triton"


@calls
def test_real_lengths(name, impl, dtype):
    check(name, impl, make(name, impl, dtype, **WIDE))


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "scale"),
    [(1, 1, 1, None), (3, 1, 7, -0.3), (2, 2, 64, None), (4, 2, 88, None), (2, 1, 256, None), (2, 2, 33, 0.0)],
)
@calls
def test_heads_and_scales(name, impl, dtype, heads, kv_heads, dim, scale):
    """With batches that have every kind of empty segment."""
    check(name, impl, make(name, impl, dtype, CASES, heads=heads, kv_heads=kv_heads, dim=dim, scale=scale))


@implementations
def test_permuted_inputs_and_gradients(name, impl, dtype):
    case = make(name, impl, dtype)
    case.inputs = [permuted(each) for each in case.inputs]
    actual = check(name, impl, case, [permuted(each) for each in grads_of_case(case)])
    assert all(each.is_contiguous() for each in actual)


@implementations
def test_expanded_gradients(name, impl, dtype):
    case = make(name, impl, dtype)
    check(
        name, impl, case, [each.flatten()[:1].reshape([1] * each.dim()).expand_as(each) for each in grads_of_case(case)]
    )


@pytest.mark.parametrize(("name", "impl"), [(name, impl) for name, impl, dtype in CALLS if dtype == BF16])
def test_autocast_with_mixed_dtypes(name, impl):
    """transformers passes queries and keys in fp32 and values in bf16. The result equals that with all in bf16."""
    case = make(name, impl, torch.float32)
    grads = [each.to(BF16) for each in grads_of_case(case)]
    narrow = replace(case, inputs=[each.to(BF16) for each in case.inputs])
    mixed = replace(case, inputs=[each.to(BF16) if i in (2, 4) else each for i, each in enumerate(case.inputs)])

    def under_autocast(*inputs):
        with torch.autocast(bench.DEVICE, BF16):
            return case.operation(*inputs)

    expected, actual = results(name, impl, narrow, grads), results(name, impl, mixed, grads, under_autocast)
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs.to(ours.dtype), rtol=0, atol=0)
    assert [each.dtype for each in actual[2:]] == [each.dtype for each in mixed.inputs][: len(actual) - 2]


@implementations
def test_compiled(name, impl, dtype):
    case = make(name, impl, dtype)
    torch._dynamo.reset()
    check(name, impl, case, operation=torch.compile(case.operation, fullgraph=True))


@pytest.mark.parametrize("impl", prefix.OPERATION.names)
def test_new_lengths_compile_twice_at_most(impl):
    if not any(each == impl for _, each, _ in CALLS):
        pytest.skip(f"{impl} does not run here")
    random_on = partial(random, dtype=torch.float32, device=bench.DEVICE)

    def counts(operation, layouts, rows):
        inputs = [[random_on(n, 2, 16).requires_grad_() for n in rows(each)] + [each] for each in layouts]
        return count_compilations(partial(operation, impl=impl), inputs, "inductor")

    batches = [[(3, [4])], [(2, [4, 1]), (0, [5])], [(70, [2])] * 3, [(0, [511])], [(4, [2] * 3)] * 9]
    layouts = [PackedLayout.from_groups(groups, device=bench.DEVICE) for groups in batches]
    packed = counts(prefix_attention, layouts, lambda layout: [layout.num_tokens] * 3)
    batches = [
        ([3], [(0, 4)], 5),
        ([2, 4], [(1, 70), (0, 3)], 80),
        ([5] * 3, [(0, 2)] * 3, 7),
        ([9] * 80, [(3, 200)] * 80, 200),
    ]
    layouts = [SpanLayout.from_spans(*batch, device=bench.DEVICE) for batch in batches]
    spans = counts(cross_attention, layouts, lambda layout: [layout.num_queries, *[layout.num_keys] * 2])
    assert packed[-1] == packed[2] <= 3
    assert spans[-1] == spans[2] <= 3


@calls
def test_deterministic(name, impl, dtype):
    case = make(name, impl, dtype, **WIDE)
    bench.check_deterministic(lambda: results(name, impl, case))


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("name", MODULES)
def test_never_synchronises(name):
    case = make(name, "triton", BF16, **WIDE)
    grads = grads_of_case(case)
    bench.check_never_synchronises(lambda: results(name, "triton", case, grads))


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("dtype", bench.DTYPES)
@pytest.mark.parametrize("name", MODULES)
def test_graph_replays_with_new_lengths(name, dtype):
    case, other = make(name, "triton", dtype), make(name, "triton", dtype, OTHER)
    other.inputs = [each.flip(-1) for each in other.inputs]
    grads = grads_of_case(case)
    new_grads = [-each for each in grads]
    actual = bench.replayed(
        lambda: results(name, "triton", case, grads),
        [*case.inputs, *case.table, *grads],
        [*other.inputs, *other.table, *new_grads],
    )
    assert_results_within_budget(actual, other, new_grads)


@pytest.mark.parametrize("name", MODULES)
def test_other_lengths_have_the_same_sizes(name):
    """The graph tests above need this."""
    case, other = (make(name, "reference", BF16, cases, dim=1) for cases in (REAL, OTHER))
    for ours, theirs in zip([*case.inputs, *case.table], [*other.inputs, *other.table], strict=True):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
    assert not all(torch.equal(*each) for each in zip(case.table, other.table, strict=True))


@pytest.mark.usefixtures("cuda")
def test_memory():
    """Forward keeps the output and the LSE. Backward allocates the gradients and two statistics per query and head. No
    memory grows with the square of the tokens."""
    tokens, heads, dim = 8192, 32, 128
    layout = PackedLayout.causal([tokens], device=bench.DEVICE)
    leaves = [torch.randn(tokens, heads, dim, device=bench.DEVICE, dtype=BF16).requires_grad_() for _ in range(3)]
    row = leaves[0].nbytes
    peak, kept = bench.memory_of(lambda: prefix_attention(*leaves, layout, impl="triton"))
    assert kept <= peak <= row + 4 * tokens * heads + 2 * bench.ROUNDING
    out = prefix_attention(*leaves, layout, impl="triton")
    grad = torch.randn_like(out)
    peak, _ = bench.memory_of(lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True))
    assert peak <= 3 * row + 8 * tokens * heads + 4 * bench.ROUNDING


@pytest.mark.usefixtures("cuda")
def test_more_than_2_to_the_31_elements():
    """In queries, keys and values. Only the last group is nonzero, so it determines every gradient."""
    bench.need_free(48)
    tail, heads = [(50, [30, 20])], {"heads": 128, "kv_heads": 128, "dim": 128}
    case = packed_case(True, tail, dtype=BF16, impl="triton", device=bench.DEVICE, **heads)
    grads = grads_of_case(case)
    groups = [(0, [1024])] * 128 + tail
    layout = PackedLayout.from_groups(groups, device=bench.DEVICE)

    def behind_zeros(tensor):
        wide = tensor.new_zeros(layout.num_tokens, *tensor.shape[1:])
        wide[-len(tensor) :] = tensor
        return wide

    operation = partial(prefix_attention, layout=layout, return_lse=True, impl="triton")
    actual = run(operation, [behind_zeros(each) for each in case.inputs], [behind_zeros(each) for each in grads])
    assert actual[0].numel() > 2**31
    assert_results_within_budget([each[-100:] for each in actual], case, grads)


@pytest.mark.usefixtures("cuda")
def test_a_cache_of_more_than_2_to_the_31_elements():
    bench.need_free(12)
    case = decode_case(2, 32, 32, 128, BF16, batch=([0], [576], [9]), impl="triton", device=bench.DEVICE)
    q, shared_k, shared_v, branch_k, branch_v = case.inputs
    before = 2**19

    def behind_zeros(shared):
        return torch.cat([shared.new_zeros(before, *shared.shape[1:]), shared])

    ranges, branch_lengths = case.table
    caches = behind_zeros(shared_k), behind_zeros(shared_v), branch_k, branch_v
    actual = prefix_attention_decode(q, *caches, ranges + before, branch_lengths, return_lse=True, impl="triton")
    assert caches[0].numel() > 2**31
    assert_results_within_budget(actual, case, grads_of_case(case))
