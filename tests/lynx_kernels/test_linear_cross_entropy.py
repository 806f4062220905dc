from functools import partial

import pytest
import torch
from torch.nn import functional as F

from lynx_kernels import explain
from lynx_kernels.backends import onednn
from lynx_kernels.ops.head_common import chunked, reference
from lynx_kernels.ops.linear_cross_entropy import linear_cross_entropy
from tests.lynx_kernels.head_cases import (
    DTYPES,
    IMPLEMENTATIONS,
    OPTIONS,
    logits_of,
    make,
    make_entries,
    precision_of_logits,
)
from tests.lynx_kernels.helpers import check, count_compilations, dtensors, permuted, run
from tests.numbers import assert_within_budget

REDUCTIONS = ["mean", "sum", "none"]
NAMES = ("loss", "gradient of hidden", "gradient of weight")
FORWARD = torch.ops.lynx_kernels.linear_cross_entropy.default
BACKWARD = torch.ops.lynx_kernels.linear_cross_entropy_backward.default

pytestmark = pytest.mark.usefixtures("host")
once = pytest.mark.parametrize("host", ["cpu"], indirect=True)
every_impl = pytest.mark.parametrize("impl", IMPLEMENTATIONS)


def calls(impl, **options):
    return partial(linear_cross_entropy, impl=impl, **options)


def naive(hidden, weight, labels, **options):
    logits = F.linear(hidden, weight)
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels, **options)


def entry_calls(impl, **options):
    """The operation as a function of what ``make_entries`` returns."""
    return lambda hidden, weight, bias, labels, predictors: linear_cross_entropy(
        hidden, weight, labels, predictors=predictors, bias=bias, impl=impl, **options
    )


def naive_entries(
    hidden, weight, bias, labels, predictors, *, weights=None, label_smoothing=0.0, reduction="mean", **options
):
    logits = logits_of(hidden, weight, bias, **options)[predictors.clamp(min=0)]
    labels = labels.masked_fill(predictors < 0, -100)
    weights = torch.ones(labels.shape) if weights is None else weights
    weights = torch.where(labels == -100, 0, weights.to(logits.dtype))
    losses = weights * F.cross_entropy(logits, labels, label_smoothing=label_smoothing, reduction="none")
    return {"none": losses, "sum": losses.sum(), "mean": losses.sum() / weights.sum()}[reduction]


def make_weights(entries=90):
    return torch.rand(entries, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 37])
@pytest.mark.parametrize(("reduction", "label_smoothing"), [("mean", 0.0), ("sum", 0.1), ("none", 0.1)])
@every_impl
def test_equals_cross_entropy(rows, dtype, reduction, label_smoothing, impl):
    options = {"reduction": reduction, "label_smoothing": label_smoothing}
    inputs = make(rows, dtype=dtype)
    check(calls(impl, **options), partial(naive, **options), inputs)
    if reduction == "none":
        grad = torch.randn(rows, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        check(calls(impl, **options), partial(naive, **options), inputs, grad)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("reduction", "label_smoothing"), [("mean", 0.0), ("none", 0.1)])
@every_impl
def test_entries(dtype, reduction, label_smoothing, options, impl):
    """More entries than rows, with weights, and a head with a bias that trains."""
    options = {"reduction": reduction, "label_smoothing": label_smoothing, "weights": make_weights(), **options}
    grad = make_weights(90) - 0.5 if reduction == "none" else None
    inputs, precision = make_entries(dtype=dtype), precision_of_logits(impl, dtype)
    check(entry_calls(impl, **options), partial(naive_entries, **options), inputs, grad, precision=precision)


@every_impl
def test_predictors_of_each_row_are_no_predictors(impl):
    hidden, weight, labels = make()
    expected = run(calls(impl), (hidden, weight, labels), None)
    for dtype in (torch.int64, torch.int32):
        actual = run(calls(impl, predictors=torch.arange(37, dtype=dtype)), (hidden, weight, labels), None)
        for ours, theirs in zip(actual, expected, strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_weight(dtype):
    """In fp32 on CPUs, products with a large weight use oneDNN."""
    inputs = make(37, 70, 2000, dtype=dtype)
    assert inputs[1].numel() > onednn.SMALL_WEIGHT
    check(linear_cross_entropy, naive, inputs)


@pytest.mark.parametrize("has_bf16", [False, True])
@every_impl
def test_sums_over_many_chunks(has_bf16, impl, monkeypatch):
    """Each of 1100 chunks adds the same, which a sum in bf16 no longer takes after 512 at most."""
    monkeypatch.setattr(chunked, "CHUNK", 2)
    monkeypatch.setattr(reference, "CHUNK", 2)
    monkeypatch.setattr(onednn, "HAS_BF16", has_bf16)  # products of CPUs with and without bf16 of their own
    hidden, weight, labels = make(2, 8, 3, torch.bfloat16)
    bias = torch.zeros(3, dtype=torch.bfloat16)
    inputs = hidden.repeat(1100, 1), weight, bias, labels.repeat(1100), torch.arange(2200)
    exact = run(
        partial(naive_entries, reduction="sum"),
        [hidden.double().repeat(1100, 1), weight.double(), bias.double(), *inputs[3:]],
        None,
    )
    for ours, truth in zip(run(entry_calls(impl, reduction="sum"), inputs, None), exact, strict=True):
        torch.testing.assert_close(ours.double(), truth, rtol=0, atol=0.02 * truth.abs().max().item())


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2, 1.0])
@every_impl
def test_gradcheck(label_smoothing, reduction, impl):
    hidden, weight, bias, labels, predictors = make_entries(14, 6, 4, 5)
    leaves = [each.requires_grad_() for each in (hidden, weight, bias)]
    function = entry_calls(
        impl, label_smoothing=label_smoothing, reduction=reduction, weights=make_weights(14), softcap=2.0,
        logit_scale=1.5,
    )  # fmt: skip
    assert torch.autograd.gradcheck(lambda *leaves: function(*leaves, labels, predictors), leaves, fast_mode=True)


@pytest.mark.parametrize("ignore_index", [-100, -1, 0, 5])
@every_impl
def test_ignore_index(ignore_index, impl):
    hidden, weight, labels = make(ignore_index=ignore_index)
    labels[3] = 4
    options = {"ignore_index": ignore_index, "reduction": "none"}
    check(calls(impl, **options), partial(naive, **options), (hidden, weight, labels))
    losses = linear_cross_entropy(hidden, weight, labels, **options)
    assert losses[labels == ignore_index].eq(0).all()
    assert losses[3] > 0


@pytest.mark.parametrize("reduction", REDUCTIONS)
@every_impl
def test_nothing_is_counted(reduction, impl):
    """No label, no predictor, no entry, no row, no weight."""
    hidden, weight, bias, labels, predictors = make_entries()
    none, ignored, few = torch.full_like(predictors, -1), torch.full_like(labels, -100), labels[:0]
    for inputs in (
        (hidden, weight, bias, ignored, predictors),
        (hidden, weight, bias, labels, none),
        (hidden, weight, bias, few, few),
        (hidden[:0], weight, bias, labels, none),
        (hidden[:0], weight, bias, few, None),
    ):
        for options in ({}, {"weights": make_weights()[: len(inputs[3])]}, {"max_supervised": 0}):
            for each in run(entry_calls(impl, reduction=reduction, **options), inputs, None):
                torch.testing.assert_close(each, torch.zeros_like(each))
    options = {"reduction": reduction, "weights": torch.zeros(90)}
    for each in run(entry_calls(impl, **options), (hidden, weight, bias, labels, predictors), None):
        torch.testing.assert_close(each, torch.zeros_like(each))
    assert calls(impl, num_items=0)(hidden, weight, ignored, predictors=predictors) == 0


@every_impl
def test_rows_that_predict_nothing_may_hold_anything(impl):
    hidden, weight, labels = make()
    expected = run(calls(impl), (hidden, weight, labels), None)
    hidden[labels == -100] = torch.nan
    for ours, theirs in zip(run(calls(impl), (hidden, weight, labels), None), expected, strict=True):
        torch.testing.assert_close(ours, theirs)

    hidden, weight, bias, labels, predictors = make_entries()
    inputs = hidden, weight, bias, labels, predictors
    expected = run(entry_calls(impl), inputs, None)
    free = torch.ones(len(hidden), dtype=torch.bool)
    free[predictors[(labels != -100) & (predictors >= 0)]] = False
    assert free.any()
    hidden[free] = torch.nan
    weights = torch.where((labels == -100) | (predictors < 0), torch.nan, 1.0)
    for options in ({}, {"weights": weights}):
        for ours, theirs in zip(run(entry_calls(impl, **options), inputs, None), expected, strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("num_items", [5, torch.tensor(5), torch.tensor(5.0)])
@every_impl
def test_num_items(num_items, impl):
    inputs = make()
    actual = run(calls(impl, num_items=num_items), inputs, None)
    expected = run(lambda *inputs: naive(*inputs, reduction="sum") / 5, inputs, None)
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@every_impl
def test_weights_that_do_not_add_up(impl):
    """Negative ones where the result is not divided by their sum."""
    weights, inputs = make_weights() - 0.5, make_entries()
    for options in ({"reduction": "sum"}, {"reduction": "none"}):
        check(
            entry_calls(impl, weights=weights, **options),
            partial(naive_entries, weights=weights, **options),
            inputs,
        )
    assert entry_calls(impl, weights=weights, num_items=7)(*inputs) == pytest.approx(
        naive_entries(*inputs, weights=weights, reduction="sum").item() / 7
    )
    with pytest.raises(ValueError, match="weights has a negative value, and 'mean' divides by their sum; pass num_it"):
        entry_calls(impl, weights=weights)(*inputs)


@every_impl
def test_small_weights_in_fp16(impl):
    """Gradients of the logits fit into fp16 although the weights do not."""
    hidden, weight, labels = make(dtype=torch.float16)
    results = []
    for size in (1.0, 1e-9):
        options = {"weights": torch.full((37,), size), "reduction": "sum"}
        function = calls(impl, **options)
        results.append(run(lambda *inputs, f=function, s=size: f(*inputs) / s, (hidden, weight, labels), None))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=1e-3)


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, 1e300])
def test_weights_that_are_not_finite(wrong):
    """Neither as they are nor in the dtype of the result."""
    hidden, weight, labels = make(dtype=torch.float32)
    weights = torch.ones(37, dtype=torch.float64)
    weights[0] = wrong
    with pytest.raises(ValueError, match="weights has a counted value that is not finite"):
        linear_cross_entropy(hidden, weight, labels, weights=weights)


@once
def test_weights_get_no_gradient():
    hidden, weight, labels = make()
    weights = torch.ones(37).requires_grad_()
    with pytest.raises(ValueError, match=r"weights requires a gradient, but gets none; pass weights.detach\(\)"):
        linear_cross_entropy(hidden, weight, labels, weights=weights)
    with torch.no_grad():
        linear_cross_entropy(hidden, weight, labels, weights=weights)


@pytest.mark.parametrize("dtype", DTYPES)
@every_impl
def test_huge_logits(dtype, impl):
    hidden, weight, labels = make(dtype=dtype)
    hidden = hidden * (2e4 / F.linear(hidden, weight).abs().max())
    for label_smoothing in (0.0, 0.1):
        options = {"label_smoothing": label_smoothing, "reduction": "none"}
        check(calls(impl, **options), partial(naive, **options), (hidden, weight, labels))


@every_impl
def test_logits_beyond_fp16(impl):
    hidden = torch.full((2, 4), 300.0, dtype=torch.float16)
    weight = torch.tensor([[300.0] * 4, [299.0] * 4], dtype=torch.float16)
    for reduction, expected in (("none", [0.0, 1200.0]), ("sum", 1200.0)):
        losses = calls(impl, reduction=reduction)(hidden, weight, torch.tensor([0, 1]))
        torch.testing.assert_close(losses, torch.tensor(expected))


@every_impl
def test_banned_tokens(impl):
    """A bias of -inf: the token has no probability and no gradient."""
    hidden, weight, bias, labels, predictors = make_entries()
    bias[[1, 11]] = -torch.inf
    labels[(labels == 1) | (labels == 11)] = 2
    kept = bias.isfinite()
    loss, grad_hidden, grad_weight, grad_bias = run(entry_calls(impl), (hidden, weight, bias, labels, predictors), None)
    labels = torch.where(labels < 0, labels, kept.cumsum(0)[labels.clamp(min=0)] - 1)
    expected = run(entry_calls(impl), (hidden, weight[kept], bias[kept], labels, predictors), None)
    for ours, theirs in zip((loss, grad_hidden, grad_weight[kept], grad_bias[kept]), expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert not grad_weight[~kept].any()
    assert not grad_bias[~kept].any()


@every_impl
def test_sums_of_gradients_beyond_fp16(impl):
    """The gradient of the mean fits into fp16 where the gradient of the sum does not."""
    rows = 400
    hidden = torch.full((rows, 4), 300.0, dtype=torch.float16)
    weight = torch.zeros(2, 4, dtype=torch.float16, requires_grad=True)
    calls(impl)(hidden, weight, torch.zeros(rows, dtype=torch.int64)).backward()
    torch.testing.assert_close(weight.grad, torch.tensor([[-150.0] * 4, [150.0] * 4], dtype=torch.float16))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@every_impl
def test_permuted_inputs_and_gradient(reduction, impl):
    inputs = make_entries()
    grad = torch.randn(90, dtype=torch.float64) if reduction == "none" else torch.tensor(3.0)
    weights = make_weights()
    expected = run(entry_calls(impl, reduction=reduction, weights=weights), inputs, grad)
    function = entry_calls(impl, reduction=reduction, weights=permuted(weights))
    for ours, theirs in zip(run(function, [*map(permuted, inputs)], permuted(grad)), expected, strict=True):
        torch.testing.assert_close(ours, theirs)
        assert ours.is_contiguous()


@every_impl
def test_expanded_inputs(impl):
    hidden, weight, labels = make()
    inputs = (hidden[:1].expand_as(hidden), weight[:, :1].expand_as(weight), labels[1:2].expand_as(labels))
    check(calls(impl), naive, inputs)


@every_impl
def test_mixed_dtypes(impl):
    """The result is as if all were in the wider dtype. Each gradient has the dtype of its input."""
    hidden, weight, labels = make()
    inputs = (hidden.float(), weight.bfloat16(), labels)
    actual = run(calls(impl), inputs, None)
    exact = run(naive, (hidden.float().double(), weight.bfloat16().double(), labels), None)
    plain = run(naive, (hidden.float(), weight.bfloat16().float(), labels), None)
    assert [each.dtype for each in actual] == [torch.float32, torch.float32, torch.bfloat16]
    for name, ours, truth, theirs in zip(NAMES, actual, exact, plain, strict=True):
        assert_within_budget(ours, truth, theirs.to(ours.dtype), name)


@every_impl
def test_bias_in_fp32_of_a_head_in_bf16(impl):
    """It is added in fp32, and does not widen the products."""
    inputs = [each.bfloat16() if each.is_floating_point() else each for each in make_entries()]
    inputs[2] = inputs[2].float() + 1e-4
    loss, *gradients = run(entry_calls(impl), inputs, None)
    exact = run(naive_entries, [each.double() if each.is_floating_point() else each for each in inputs], None)
    torch.testing.assert_close(loss.double(), exact[0], rtol=1e-2, atol=0)
    assert [each.dtype for each in gradients] == [torch.bfloat16, torch.bfloat16, torch.float32]
    for ours, truth in zip(gradients, exact[1:], strict=True):
        torch.testing.assert_close(ours.double(), truth, rtol=0.05, atol=2e-3)
    if impl == "reference":  # logits, and so the bias's gradient, are not rounded to bf16
        torch.testing.assert_close(gradients[2].double(), exact[3], rtol=1e-5, atol=1e-6)
    wide = [inputs[0].float(), inputs[1].float(), inputs[2].double(), *inputs[3:]]
    assert entry_calls(impl)(*wide).dtype == torch.float64


@pytest.mark.parametrize("trained", ["hidden", "weight"])
@every_impl
def test_only_needed_gradients(trained, products, impl):
    hidden, weight, labels = make(7)
    _, *expected = run(calls(impl), (hidden, weight, labels), None)
    leaf = (hidden if trained == "hidden" else weight).requires_grad_()
    products.clear()
    calls(impl)(hidden, weight, labels).backward()
    torch.testing.assert_close(leaf.grad, expected[trained == "weight"])
    logits, gradient = products[0], products[-1]
    assert gradient == ((logits[0], 19, 13) if trained == "hidden" else (19, logits[0], 13))
    assert products == [logits] * (1 if impl == "chunked" else 2) + [gradient]
    products.clear()
    with torch.no_grad():
        calls(impl)(hidden, weight, labels)
    calls(impl)(hidden.detach(), weight.detach(), labels)
    assert products == [logits] * 2


@pytest.mark.parametrize("reduction", ["sum", "none"])
@every_impl
def test_a_bias_may_train_alone(reduction, products, impl):
    inputs = make_entries()
    *_, expected = run(entry_calls(impl, reduction=reduction), inputs, None)
    products.clear()
    bias = inputs[2].requires_grad_()
    torch.testing.assert_close(
        torch.autograd.grad(entry_calls(impl, reduction=reduction)(*inputs).sum(), bias)[0], expected
    )
    assert {shape[1:] for shape in products} == {(13, 19)}  # no products but the logits


@every_impl
def test_logits_never_exist_for_all_rows(products, host, impl):
    hidden, weight, labels = make(130)
    calls(impl)(hidden, weight, labels)
    assert max(shape[0] for shape in products) <= 7
    assert sum(shape[0] for shape in products) == (130 if host == "device" else (labels != -100).sum())


def test_a_row_is_multiplied_once(products, host):
    """However many labels it predicts, and once more for its gradient."""
    hidden, weight, _, labels, predictors = make_entries()
    counted = predictors[(labels != -100) & (predictors >= 0)]
    linear_cross_entropy(hidden.requires_grad_(), weight, labels, predictors=predictors).backward()
    assert max(shape[0] for shape in products) <= 7
    expected = len(hidden) if host == "device" else len(counted.unique())
    assert expected < len(counted)
    for inner, columns in ((13, 19), (19, 13)):
        assert sum(shape[0] for shape in products if shape[1:] == (inner, columns)) == expected


@every_impl
def test_max_supervised_limits_the_rows_on_a_gpu(products, host, impl):
    inputs = make(130)
    count = int((inputs[2] != -100).sum())
    expected = run(calls(impl), inputs, None)
    for bound in (count, count + 5, 130, 200):
        products.clear()
        actual = run(calls(impl, max_supervised=bound), inputs, None)
        for ours, theirs in zip(actual, expected, strict=True):
            torch.testing.assert_close(ours, theirs)
        if impl == "chunked":
            rows_seen = sum(shape[0] for shape in products if shape[1:] == (13, 19))
            assert rows_seen == (min(bound, 130) if host == "device" else count)
    error = RuntimeError if host == "device" else ValueError
    with pytest.raises(error, match=f"more.* than max_supervised={count - 1}"):
        calls(impl, max_supervised=count - 1)(*inputs)
    hidden, weight, labels = inputs
    assert calls(impl, max_supervised=0)(hidden, weight, torch.full_like(labels, -100)) == 0


@every_impl
def test_max_supervised_bounds_entries(products, host, impl):
    inputs = make_entries(30)
    hidden, *_, labels, predictors = inputs
    count = int(((labels != -100) & (predictors >= 0)).sum())
    expected = run(entry_calls(impl), inputs, None)
    for bound in (count, count + 2, 30, 99):
        products.clear()
        for ours, theirs in zip(run(entry_calls(impl, max_supervised=bound), inputs, None), expected, strict=True):
            torch.testing.assert_close(ours, theirs)
        if impl == "chunked" and host == "device":
            assert sum(shape[0] for shape in products if shape[1:] == (13, 19)) == min(bound, len(hidden))
    with pytest.raises((ValueError, RuntimeError), match=f"more entries .*than max_supervised={count - 1}|{count} ent"):
        entry_calls(impl, max_supervised=count - 1)(*inputs)


@every_impl
def test_repeated_predictors_are_added_in_a_fixed_order(impl, monkeypatch):
    """Bit by bit, with two threads: many entries of few rows, in fp32."""
    for module in (chunked, reference):
        monkeypatch.setattr(module, "CHUNK", 512)
    inputs = make_entries(1000, dtype=torch.float32)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        first, *others = (run(entry_calls(impl, reduction="none"), inputs, None) for _ in range(3))
    finally:
        torch.set_num_threads(threads)
    for again in others:
        assert all(map(torch.equal, again, first))


@every_impl
def test_backward_twice_and_no_second_derivative(impl):
    hidden, weight, labels = make()
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    for reduction in ("mean", "none"):
        output = calls(impl, reduction=reduction)(hidden, weight, labels)
        grad = torch.ones_like(output)
        first = torch.autograd.grad(output, leaves, grad, retain_graph=True)
        second = torch.autograd.grad(output, leaves, 2 * grad, create_graph=True)
        for once, twice in zip(first, second, strict=True):
            torch.testing.assert_close(2 * once, twice.detach())
        with pytest.raises(RuntimeError, match="no second derivatives"):
            second[0].sum().backward()


def test_saved_tensors():
    for dtype, trained, expected in (
        (torch.bfloat16, False, 37 * 13 * 2),
        (torch.bfloat16, True, 37 * 13 * 2 + 19 * 13 * 2),
        (torch.float16, True, 37 * 13 * 2 + 19 * 13 * 4),
        (torch.float32, True, 37 * 13 * 4 + 19 * 13 * 4),
    ):
        hidden, weight, labels = make(dtype=dtype)
        weight.requires_grad_(trained)
        hidden.requires_grad_()
        for impl, reduction in (("chunked", "sum"), ("chunked", "none"), ("reference", "sum")):
            kept = []
            with torch.autograd.graph.saved_tensors_hooks(
                lambda each, kept=kept: kept.append(each) or each, lambda each: each
            ):
                calls(impl, reduction=reduction)(hidden, weight, labels)
            if (impl, reduction) == ("chunked", "sum"):
                assert sum(each.nbytes for each in kept) == expected
            else:
                assert {each.data_ptr() for each in kept} == {each.data_ptr() for each in (hidden, weight, labels)}


@once
@pytest.mark.parametrize("layout", [lambda tensor: tensor, permuted])
def test_opcheck(layout):
    hidden, weight, bias, labels, predictors = make_entries(9, 5, dtype=torch.float32)
    hidden, weight = layout(hidden), layout(weight)
    rest = labels, predictors, make_weights(9).float()
    options = (2.0, 0.7, 0.1, -100, None)
    for needs, each in (([True, True, True], weight), ([False, True, False], weight.bfloat16())):
        arguments = (hidden, each, *rest, bias, *options, needs, "reference")
        torch.library.opcheck(BACKWARD, (torch.ones(9), *arguments))
    leaves = hidden.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()
    for impl in IMPLEMENTATIONS:
        arguments = (*leaves[:2], *rest, leaves[2], *options, False, [False] * 3, impl)
        torch.library.opcheck(FORWARD, arguments)
    for needs in ([True, True, True], [True, False, False], [False, True, False]):
        inputs = [each.detach().requires_grad_(needed) for each, needed in zip(leaves, needs, strict=True)]
        # Not test_aot_dynamic_dispatch: it differentiates the gradients, which are outputs here; that is an error.
        tests = ("test_schema", "test_autograd_registration", "test_faketensor")
        for others in (rest, (labels[:5], None, None)):
            arguments = (*inputs[:2], *others, inputs[2], *options[:-1], 9, True, needs, "chunked")
            torch.library.opcheck(FORWARD, arguments, test_utils=tests)


@once
@pytest.mark.parametrize("num_items", [None, "int", "tensor"])
def test_compiles_twice_at_most(num_items):
    def step(hidden, weight, labels, items):
        return linear_cross_entropy(hidden, weight, labels, num_items=items)

    def leaves(rows):
        hidden, weight, labels = make(rows)
        items = {None: None, "int": rows // 2, "tensor": torch.tensor(rows // 2)}[num_items]
        return hidden.requires_grad_(), weight, labels, items

    counts = count_compilations(step, [leaves(rows) for rows in (37, 50, 61, 20, 77)])
    assert counts[-1] == counts[2] <= 3


@once
@every_impl
def test_entries_compile_twice_at_most(impl):
    """Numbers of entries and of rows change, each alone and together."""

    def step(weights, cap, scale, *inputs):
        return entry_calls(impl, weights=weights, softcap=cap, logit_scale=scale)(*inputs)

    def leaves(entries, rows):
        hidden, *others = make_entries(entries, rows)
        return make_weights(entries), 2.0, 0.5, hidden.requires_grad_(), *others

    sizes = (90, 21), (80, 23), (95, 30), (20, 40), (77, 12)
    counts = count_compilations(step, [leaves(*each) for each in sizes])
    assert counts[-1] == counts[2] <= 3


@pytest.mark.parametrize("reduction", REDUCTIONS)
@every_impl
def test_compiled_equals_eager(reduction, impl):
    torch._dynamo.reset()
    function = entry_calls(impl, reduction=reduction, weights=make_weights(), softcap=3.0)
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    inputs = make_entries()
    for ours, theirs in zip(run(compiled, inputs, None), run(function, inputs, None), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("compiled", [False, True])
@every_impl
def test_autocast(compiled, impl):
    hidden, weight, labels = make(dtype=torch.float32)
    function = calls(impl)
    if compiled:
        torch._dynamo.reset()
        function = torch.compile(function, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16):
        actual = run(function, (hidden, weight, labels), None)
    rounded = hidden.bfloat16(), weight.bfloat16()
    logits = precision_of_logits(impl, torch.bfloat16) or torch.float32
    exact = run(naive, (*(each.double() for each in rounded), labels), None)
    plain = run(naive, (*(each.to(logits) for each in rounded), labels), None)
    precisions = logits, torch.bfloat16, torch.bfloat16  # gradients are products in bf16
    for name, ours, truth, theirs, precision in zip(NAMES, actual, exact, plain, precisions, strict=True):
        assert ours.dtype == torch.float32
        assert_within_budget(ours, truth, theirs, name, precision=precision)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@every_impl
def test_autocast_casts_products_only(reduction, impl):
    hidden, weight, bias, labels, predictors = make_entries(dtype=torch.float32)
    function = entry_calls(impl, reduction=reduction, weights=make_weights())
    with torch.autocast("cpu", torch.bfloat16):
        actual = run(function, (hidden, weight, bias, labels, predictors), None)
    expected = run(function, (hidden.bfloat16(), weight.bfloat16(), bias, labels, predictors), None)
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs.float(), rtol=0, atol=0)


@every_impl
def test_autocast_leaves_fp64_alone(impl):
    inputs = make()
    with torch.autocast("cpu", torch.bfloat16):
        actual = run(calls(impl), inputs, None)
    for ours, theirs in zip(actual, run(calls(impl), inputs, None), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@every_impl
def test_backward_inside_autocast(impl):
    hidden, weight, labels = make(dtype=torch.float32)
    hidden.requires_grad_()
    loss = calls(impl)(hidden, weight, labels)
    (expected,) = torch.autograd.grad(loss, hidden, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        (actual,) = torch.autograd.grad(loss, hidden)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("wrong", [-1, 19, -101])
@every_impl
def test_labels_out_of_range(wrong, host, impl):
    hidden, weight, labels = make()
    labels[5] = wrong
    error, message = (
        (IndexError, rf"labels\[5\] is {wrong}, which is neither in \[0, 19\) nor ignore_index=-100")
        if host == "cpu"
        else (RuntimeError, "labels has a value neither in")
    )
    with pytest.raises(error, match=message):
        calls(impl)(hidden, weight, labels)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("wrong", [-2, 21, -100])
@every_impl
def test_predictors_out_of_range(wrong, dtype, host, impl):
    """Also where there is no label."""
    hidden, weight, bias, labels, predictors = make_entries()
    predictors[5] = wrong
    assert labels[5] == -100
    error, message = (
        (IndexError, rf"predictors\[5\] is {wrong}, which is neither a row of hidden, in \[0, 21\), nor -1")
        if host == "cpu"
        else (RuntimeError, "predictors has a value neither a row")
    )
    with pytest.raises(error, match=message):
        entry_calls(impl)(hidden, weight, bias, labels, predictors.to(dtype))


def test_explain_and_unknown_implementation():
    for reduction in REDUCTIONS:
        choice = explain(linear_cross_entropy, *make(), reduction=reduction)
        assert choice.name == "chunked"
        assert "written for" in choice.reasons["triton"]
    with pytest.raises(ValueError, match="impl='nonsense' is not an implementation"):
        linear_cross_entropy(*make(), impl="nonsense")


@once
@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"labels": torch.zeros(37, dtype=torch.int32)}, TypeError, "labels is torch.int32"),
        ({"predictors": torch.zeros(37)}, TypeError, "predictors is torch.float32, expected torch.int64 or"),
        ({"weights": torch.ones(37, dtype=torch.int64)}, TypeError, "weights is torch.int64"),
        ({"hidden": torch.zeros(37, 13, dtype=torch.int64)}, TypeError, "hidden is torch.int64"),
        ({"weight": torch.zeros(19, 13, dtype=torch.int64)}, TypeError, "weight is torch.int64"),
        ({"bias": torch.zeros(19, dtype=torch.int64)}, TypeError, "bias is torch.int64"),
        ({"softcap": torch.tensor(3.0)}, TypeError, "softcap is a Tensor, expected a finite number above 0"),
        ({"logit_scale": "1"}, TypeError, "logit_scale is a str, expected a finite number"),
        ({"hidden": torch.zeros(1, 37, 13)}, ValueError, "hidden has shape .1, 37, 13., expected .T, d."),
        ({"weight": torch.zeros(13)}, ValueError, "weight has shape .13,., expected .V, 13."),
        ({"weight": torch.zeros(19, 12)}, ValueError, "weight has shape .19, 12., expected .V, 13."),
        ({"bias": torch.zeros(18)}, ValueError, "bias has shape .18,., expected .19,."),
        ({"labels": torch.zeros(1, 37, dtype=torch.int64)}, ValueError, "labels has shape .1, 37."),
        ({"labels": torch.zeros(36, dtype=torch.int64)}, ValueError, "labels has shape .36,., .*pass predictors"),
        ({"predictors": torch.zeros(36, dtype=torch.int64)}, ValueError, "predictors has shape .36,., .*like labels"),
        ({"predictors": torch.tensor(0)}, ValueError, "predictors has shape .., expected .37,. like labels"),
        ({"weights": torch.ones(36)}, ValueError, "weights has shape .36,., expected .37,. like labels"),
        ({"weight": torch.zeros(19, 13, device="meta")}, ValueError, "weight is on meta, expected cpu"),
        ({"weights": torch.zeros(37, device="meta")}, ValueError, "weights is on meta, expected cpu"),
        ({"bias": torch.zeros(19, device="meta")}, ValueError, "bias is on meta, expected cpu"),
        ({"softcap": 0.0}, ValueError, "softcap=0.0, expected a finite number above 0"),
        ({"softcap": -3}, ValueError, "softcap=-3, expected a finite number above 0"),
        ({"logit_scale": float("inf")}, ValueError, "logit_scale=inf, expected a finite number"),
        ({"label_smoothing": 1.5}, ValueError, "label_smoothing=1.5, expected 0 to 1"),
        ({"label_smoothing": -0.1}, ValueError, "label_smoothing=-0.1, expected 0 to 1"),
        ({"reduction": "max"}, ValueError, "reduction='max', expected one of"),
        ({"reduction": "sum", "num_items": 3}, ValueError, "num_items needs reduction='mean', got 'sum'"),
        ({"num_items": -3}, ValueError, "num_items=-3, expected a finite number of at least 0"),
        ({"num_items": torch.ones(1)}, ValueError, "num_items has shape .1,., expected .. or a number"),
        ({"max_supervised": -1}, ValueError, "max_supervised=-1, expected at least 0"),
    ],
)  # fmt: skip
def test_errors(changed, error, message):
    arguments = dict(zip(("hidden", "weight", "labels"), make(), strict=True))
    with pytest.raises(error, match=f"linear_cross_entropy: {message}"):
        linear_cross_entropy(**{**arguments, **changed})


@once
def test_dtensor_raises(tmp_path):
    hidden, weight, labels = make()
    with dtensors(tmp_path) as distribute:
        for name, tensor in (("weights", torch.ones(37)), ("predictors", torch.arange(37))):
            with pytest.raises(TypeError, match=f"{name} is a DTensor"):
                linear_cross_entropy(hidden, weight, labels, **{name: distribute(tensor)})
        with pytest.raises(TypeError, match="weight is a DTensor"):
            linear_cross_entropy(hidden, distribute(weight), labels)
