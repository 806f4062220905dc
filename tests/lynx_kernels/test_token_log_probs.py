from functools import partial

import pytest
import torch
from torch.nn import functional as F

from lynx_kernels import explain, linear_cross_entropy, token_log_probs
from lynx_kernels.ops.head_common import chunked, reference
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

FORWARD = torch.ops.lynx_kernels.token_log_probs.default
BACKWARD = torch.ops.lynx_kernels.token_log_probs_backward.default
OF_JACOBIAN = torch.ops.lynx_kernels.token_log_probs_backward_of_jacobian.default

pytestmark = pytest.mark.usefixtures("host")
once = pytest.mark.parametrize("host", ["cpu"], indirect=True)
every_impl = pytest.mark.parametrize("impl", IMPLEMENTATIONS)


def calls(impl, **options):
    """The operation as a function of what ``make_entries`` returns."""
    return lambda hidden, weight, bias, labels, predictors: token_log_probs(
        hidden, weight, labels, predictors=predictors, bias=bias, impl=impl, **options
    )


def frozen(function, weight, bias):
    """The same as a function of hidden, labels and predictors: nothing else wants a gradient."""
    return lambda hidden, labels, predictors: function(
        hidden, weight.to(hidden.dtype), bias.to(hidden.dtype), labels, predictors
    )


def naive(hidden, weight, bias, labels, predictors, **options):
    return -F.cross_entropy(*_asked(hidden, weight, bias, labels, predictors, **options), reduction="none")


def naive_entropy(hidden, weight, bias, labels, predictors, **options):
    logits, labels = _asked(hidden, weight, bias, labels, predictors, **options)
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    return torch.where(labels == -100, 0, entropy)


def _asked(hidden, weight, bias, labels, predictors, **options):
    logits = logits_of(hidden, weight, bias, **options)
    return logits[predictors.clamp(min=0)], labels.masked_fill(predictors < 0, -100)


def make_grad(entries=90):
    return torch.randn(entries, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("options", [*OPTIONS, {"temperature": 0.6}, {"temperature": 2.0, **OPTIONS[1]}])
@pytest.mark.parametrize("dtype", DTYPES)
@every_impl
def test_equals_log_softmax(dtype, options, impl):
    """With a head that trains and with a frozen one."""
    inputs, grad = make_entries(dtype=dtype), make_grad()
    hidden, weight, bias, labels, predictors = inputs
    precision = precision_of_logits(impl, dtype)
    check(calls(impl, **options), partial(naive, **options), inputs, grad, precision=precision)
    ours, theirs = (frozen(each, weight, bias) for each in (calls(impl, **options), partial(naive, **options)))
    check(ours, theirs, (hidden, labels, predictors), grad, precision=precision)


@pytest.mark.parametrize("options", [{}, {"temperature": 0.6, **OPTIONS[1]}])
@pytest.mark.parametrize("dtype", DTYPES)
@every_impl
def test_entropy(dtype, options, impl):
    inputs = make_entries(dtype=dtype)
    expected = run(calls(impl, **options), inputs, make_grad())
    entropies = []

    def function(*inputs):
        log_probs, entropy = calls(impl, return_entropy=True, **options)(*inputs)
        assert not entropy.requires_grad
        entropies.append(entropy)
        return log_probs

    for ours, theirs in zip(run(function, inputs, make_grad()), expected, strict=True):
        assert torch.equal(ours, theirs)
    hidden, weight, bias, labels, predictors = inputs
    run(frozen(function, weight, bias), (hidden, labels, predictors), make_grad())
    with torch.no_grad():
        function(*inputs)
    assert len(entropies) == 3
    exact, plain = (
        naive_entropy(*(each.to(wanted) if each.is_floating_point() else each for each in inputs), **options)
        for wanted in (torch.float64, dtype)
    )
    for entropy in entropies:
        assert entropy.dtype == plain.dtype
        if dtype == torch.float64:
            torch.testing.assert_close(entropy, exact, rtol=1e-12, atol=1e-12)
        else:
            assert_within_budget(entropy, exact, plain, "entropy")


@pytest.mark.parametrize("dtype", DTYPES)
@every_impl
def test_rows_in_order(dtype, impl):
    """Without predictors."""
    hidden, weight, labels = make(dtype=dtype)

    def plain(hidden, weight, labels):
        return -F.cross_entropy(logits_of(hidden, weight), labels, reduction="none")

    grad = make_grad(37)
    check(partial(token_log_probs, impl=impl), plain, (hidden, weight, labels), grad)
    check(
        lambda hidden, labels: token_log_probs(hidden, weight.to(hidden.dtype), labels, impl=impl),
        lambda hidden, labels: plain(hidden, weight.to(hidden.dtype), labels),
        (hidden, labels),
        grad,
    )


@every_impl
def test_gradcheck(impl):
    hidden, weight, bias, labels, predictors = make_entries(14, 6, 4, 5)
    function = calls(impl, temperature=0.7, softcap=2.0, logit_scale=1.5)
    hidden.requires_grad_()
    assert torch.autograd.gradcheck(lambda each: function(each, weight, bias, labels, predictors), hidden)
    leaves = hidden, weight.requires_grad_(), bias.requires_grad_()
    assert torch.autograd.gradcheck(lambda *leaves: function(*leaves, labels, predictors), leaves)


@every_impl
def test_is_minus_the_loss(impl):
    inputs = make_entries(dtype=torch.float32)
    hidden, weight, bias, labels, predictors = inputs
    losses = linear_cross_entropy(hidden, weight, labels, predictors=predictors, bias=bias, reduction="none", impl=impl)
    assert torch.equal(calls(impl)(*inputs), -losses)


@every_impl
def test_one_row_predicts_the_first_token_of_every_branch(impl):
    """Its gradient is the sum of the gradients that the branches give it one by one."""
    hidden, weight, _ = make(9)
    labels = torch.tensor([5, 3, 5, 0])
    hidden.requires_grad_()
    for trained in (False, True):
        weight.requires_grad_(trained)
        grad = torch.tensor([1.0, -2.0, 0.5, 4.0], dtype=torch.float64)
        shared = torch.full((4,), 6, dtype=torch.int32)
        log_probs = token_log_probs(hidden, weight, labels, predictors=shared, impl=impl)
        (together,) = torch.autograd.grad(log_probs, hidden, grad)
        apart = 0
        for label, factor in zip(labels, grad, strict=True):
            log_prob = token_log_probs(hidden, weight, label[None], predictors=shared[:1], impl=impl)
            apart = apart + torch.autograd.grad(log_prob, hidden, factor[None])[0]
        torch.testing.assert_close(together, apart)
        assert together[6].any()
        assert not together[:6].any()


@pytest.mark.parametrize("trained", [False, True])
@every_impl
def test_nothing_is_counted(trained, impl):
    hidden, weight, bias, labels, predictors = make_entries()
    none, ignored, few = torch.full_like(predictors, -1), torch.full_like(labels, -100), labels[:0]
    for inputs in (
        (hidden, weight, bias, ignored, predictors),
        (hidden, weight, bias, labels, none),
        (hidden, weight, bias, few, few),
        (hidden[:0], weight, bias, labels, none),
        (hidden[:0], weight, bias, few, None),
    ):
        leaves = [each.detach().requires_grad_(trained or each is inputs[0]) for each in inputs[:3]]
        log_probs, entropy = calls(impl, return_entropy=True)(*leaves, *inputs[3:])
        log_probs.sum().backward()
        for each in (log_probs, entropy, *(each.grad for each in leaves if each.requires_grad)):
            torch.testing.assert_close(each, torch.zeros_like(each))


@pytest.mark.parametrize("trained", [False, True])
@every_impl
def test_what_is_not_counted_may_hold_anything(trained, impl):
    """Rows of hidden, and the gradient of the entries."""
    hidden, weight, bias, labels, predictors = make_entries()
    is_counted = (labels != -100) & (predictors >= 0)
    results = []
    for spoiled in (False, True):
        grad = make_grad()
        if spoiled:
            free = torch.ones(len(hidden), dtype=torch.bool)
            free[predictors[is_counted]] = False
            hidden = hidden.masked_fill(free[:, None], torch.nan)
            grad[~is_counted] = torch.nan
        leaves = [hidden.clone().requires_grad_(), *(each.clone().requires_grad_(trained) for each in (weight, bias))]
        log_probs = calls(impl)(*leaves, labels, predictors)
        results.append([log_probs, *torch.autograd.grad(log_probs, leaves if trained else leaves[:1], grad)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


@every_impl
def test_banned_tokens(impl):
    """A bias of -inf adds nothing to the entropy."""
    hidden, weight, bias, labels, predictors = make_entries()
    bias[[1, 11]] = -torch.inf
    labels[(labels == 1) | (labels == 11)] = 2
    kept = bias.isfinite()
    among_kept = torch.where(labels < 0, labels, kept.cumsum(0)[labels.clamp(min=0)] - 1)
    function = calls(impl, return_entropy=True)
    actual = function(hidden, weight, bias, labels, predictors)
    expected = function(hidden, weight[kept], bias[kept], among_kept, predictors)
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@every_impl
def test_huge_logits(impl):
    hidden, weight, labels = make(dtype=torch.float32)
    hidden = hidden * (2e4 / F.linear(hidden, weight).abs().max())
    log_probs, entropy = token_log_probs(hidden, weight, labels, return_entropy=True, impl=impl)
    plain = F.linear(hidden, weight).log_softmax(-1)
    torch.testing.assert_close(log_probs, -F.nll_loss(plain, labels, reduction="none"))
    expected = torch.where(labels == -100, 0, torch.special.entr(plain.exp()).sum(-1))
    torch.testing.assert_close(entropy, expected)


@pytest.mark.parametrize("trained", [0, 1, 2])
@every_impl
def test_only_needed_gradients(trained, impl):
    """Of hidden, weight or bias alone."""
    inputs, grad = make_entries(), make_grad()
    expected = run(calls(impl), inputs, grad)[1 + trained]
    leaf = inputs[trained].requires_grad_()
    (actual,) = torch.autograd.grad(calls(impl)(*inputs), leaf, grad)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("trained", [False, True])
def test_products(trained, products, host):
    """Two with a frozen head, all in forward; with a trained one the logits are computed again."""
    hidden, weight, _, labels, predictors = make_entries()
    counted = predictors[(labels != -100) & (predictors >= 0)]
    log_probs = token_log_probs(hidden.requires_grad_(), weight.requires_grad_(trained), labels, predictors=predictors)
    in_forward = len(products)
    log_probs.sum().backward()
    assert max(shape[0] for shape in products if shape[2] == 19) <= 7
    rows = len(hidden) if host == "device" else len(counted.unique())
    entries = len(labels) if host == "device" else len(counted)
    sums = [sum(shape[0] for shape in products if shape[1:] == each) for each in ((13, 19), (19, 13))]
    assert sums == ([2 * rows, rows] if trained else [entries, entries])
    assert (in_forward == len(products)) == (not trained)
    products.clear()
    with torch.no_grad():
        token_log_probs(hidden, weight, labels, predictors=predictors)
    assert sum(shape[0] for shape in products) == rows


def test_saved_tensors():
    """A frozen head: d log_prob / d hidden, and which entries count. Otherwise the arguments."""
    hidden, weight, bias, labels, predictors = make_entries(dtype=torch.bfloat16)
    for impl, trained in (("chunked", False), ("chunked", True), ("reference", False)):
        leaves = [hidden.requires_grad_(), weight.requires_grad_(trained), bias]
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda each, kept=kept: kept.append(each) or each, lambda each: each
        ):
            calls(impl)(*leaves, labels, predictors)
        if (impl, trained) == ("chunked", False):
            assert [(each.shape, each.dtype) for each in kept[:1]] == [((90, 13), torch.bfloat16)]
            assert {each.data_ptr() for each in kept[1:]} == {labels.data_ptr(), predictors.data_ptr()}
        else:
            assert {each.data_ptr() for each in kept} == {
                each.data_ptr() for each in (hidden, weight, bias, labels, predictors)
            }


@every_impl
def test_repeated_predictors_are_added_in_a_fixed_order(impl, monkeypatch):
    """Bit by bit, with two threads, in fp32; the order is that of the entries."""
    for module in (chunked, reference):
        monkeypatch.setattr(module, "CHUNK", 512)
    hidden, weight, bias, labels, predictors = make_entries(1000, dtype=torch.float32)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        function = frozen(calls(impl), weight, bias)
        first, *others = (run(function, (hidden, labels, predictors), make_grad(1000)) for _ in range(3))
    finally:
        torch.set_num_threads(threads)
    for again in others:
        assert all(map(torch.equal, again, first))


@pytest.mark.parametrize("trained", [False, True])
@every_impl
def test_permuted_inputs_and_gradient(trained, impl):
    inputs, grad = make_entries(), make_grad()
    results = []
    for spread in (torch.clone, permuted):
        leaves = [spread(each).detach().requires_grad_(trained or index == 0) for index, each in enumerate(inputs[:3])]
        log_probs = calls(impl)(*leaves, *map(spread, inputs[3:]))
        wanted = [each for each in leaves if each.requires_grad]
        results.append([log_probs, *torch.autograd.grad(log_probs, wanted, spread(grad))])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)
        assert theirs.is_contiguous()


@pytest.mark.parametrize("trained", [False, True])
def test_backward_twice_and_no_second_derivative(trained):
    hidden, weight, bias, labels, predictors = make_entries()
    hidden.requires_grad_()
    weight.requires_grad_(trained)
    output = calls("chunked")(hidden, weight, bias, labels, predictors)
    (first,) = torch.autograd.grad(output, hidden, make_grad(), retain_graph=True)
    (second,) = torch.autograd.grad(output, hidden, (2 * make_grad()).requires_grad_(), create_graph=True)
    torch.testing.assert_close(2 * first, second.detach())
    with pytest.raises(RuntimeError, match="no second derivatives"):
        second.sum().backward()


@once
@pytest.mark.parametrize("layout", [lambda tensor: tensor, permuted])
def test_opcheck(layout, host):
    hidden, weight, bias, labels, predictors = make_entries(9, 5, dtype=torch.float32)
    hidden, weight, grad = layout(hidden), layout(weight), torch.ones(9)
    options = 2.0, 0.7, 1.3
    torch.library.opcheck(
        BACKWARD, (grad, hidden, weight, labels, predictors, bias, *options, [True, False, True], "reference")
    )
    torch.library.opcheck(OF_JACOBIAN, (grad, hidden[:1].expand(9, -1), labels, predictors, 5, ""))
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    for impl in IMPLEMENTATIONS:
        torch.library.opcheck(FORWARD, (*leaves, labels, predictors, bias, *options, False, False, impl))
    # Not test_aot_dynamic_dispatch: it differentiates entropy and Jacobian, which are outputs; that is an error.
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    arguments = (hidden, weight.detach(), labels, predictors, None, *options, True, True, "chunked")
    torch.library.opcheck(FORWARD, arguments, test_utils=tests)


@once
@pytest.mark.parametrize("trained", [False, True])
def test_compiles_twice_at_most(trained, host):
    def step(temperature, *inputs):
        return calls(None, temperature=temperature)(*inputs)

    def leaves(entries, rows):
        hidden, weight, *others = make_entries(entries, rows)
        return 0.7, hidden.requires_grad_(), weight.requires_grad_(trained), *others

    sizes = (90, 21), (80, 23), (95, 30), (20, 40), (77, 12)
    counts = count_compilations(step, [leaves(*each) for each in sizes])
    assert counts[-1] == counts[2] <= 3


@once
@pytest.mark.parametrize("trained", [False, True])
@every_impl
def test_compiled_equals_eager(trained, impl, host):
    torch._dynamo.reset()
    inputs = make_entries()

    def function(hidden, weight, bias, labels, predictors):
        head = (weight, bias) if trained else (weight.detach(), bias.detach())
        log_probs, entropy = calls(impl, return_entropy=True)(hidden, *head, labels, predictors)
        return log_probs + entropy

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    for ours, theirs in zip(run(compiled, inputs, make_grad()), run(function, inputs, make_grad()), strict=True):
        assert torch.equal(ours, theirs)


@once
def test_temperature_may_change_when_compiled(host):
    torch._dynamo.reset()
    inputs = make_entries()

    def function(temperature, *inputs):
        return calls(None, temperature=temperature)(*inputs)

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    for temperature in (1.0, 0.7, 2.0):
        torch.testing.assert_close(compiled(temperature, *inputs), calls(None, temperature=temperature)(*inputs))


@pytest.mark.parametrize("trained", [False, True])
@every_impl
def test_autocast(trained, impl):
    """Hidden and weight are cast, the bias is not."""
    hidden, weight, bias, labels, predictors = make_entries(dtype=torch.float32)
    results = []
    for dtype, enabled in ((torch.float32, True), (torch.bfloat16, False)):
        leaves = [
            hidden.to(dtype).requires_grad_(),
            weight.to(dtype).requires_grad_(trained),
            bias.clone().requires_grad_(trained),
        ]
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            log_probs, entropy = calls(impl, return_entropy=True)(*leaves, labels, predictors)
        wanted = [each for each in leaves if each.requires_grad]
        grads = torch.autograd.grad(log_probs, wanted, make_grad().float())
        assert [each.dtype for each in grads] == [each.dtype for each in wanted]
        results.append([log_probs, entropy, *(each.float() for each in grads)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@every_impl
def test_out_of_range(host, impl):
    for name in ("labels", "predictors"):
        for wrong in (-2, 21):
            inputs = dict(zip(("hidden", "weight", "bias", "labels", "predictors"), make_entries(), strict=True))
            inputs[name][7] = wrong
            error, message = (
                (IndexError, rf"token_log_probs: {name}\[7\] is {wrong}, which is neither ")
                if host == "cpu"
                else (RuntimeError, f"token_log_probs: {name} has a value neither ")
            )
            with pytest.raises(error, match=message):
                token_log_probs(**inputs, impl=impl)


def test_explain_and_unknown_implementation():
    choice = explain(token_log_probs, *make())
    assert choice.name == "chunked"
    assert "written for" in choice.reasons["triton"]
    with pytest.raises(ValueError, match="impl='nonsense' is not an implementation"):
        token_log_probs(*make(), impl="nonsense")


@once
@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"labels": torch.zeros(37, dtype=torch.int32)}, TypeError, "labels is torch.int32"),
        ({"predictors": torch.zeros(37)}, TypeError, "predictors is torch.float32, expected torch.int64 or"),
        ({"hidden": torch.zeros(37, 13, dtype=torch.int64)}, TypeError, "hidden is torch.int64"),
        ({"labels": torch.zeros(36, dtype=torch.int64)}, ValueError, "labels has shape .36,., .*pass predictors"),
        ({"bias": torch.zeros(1)}, ValueError, "bias has shape .1,., expected .19,."),
        ({"temperature": 0.0}, ValueError, "temperature=0.0, expected a finite number above 0"),
        ({"temperature": -1.0}, ValueError, "temperature=-1.0, expected a finite number above 0"),
        ({"temperature": float("nan")}, ValueError, "temperature=nan, expected a finite number above 0"),
        ({"temperature": None}, TypeError, "temperature is a NoneType, expected a finite number above 0"),
        ({"logit_scale": None}, TypeError, "logit_scale is a NoneType, expected a finite number"),
    ],
)  # fmt: skip
def test_errors(changed, error, message, host):
    arguments = dict(zip(("hidden", "weight", "labels"), make(), strict=True))
    with pytest.raises(error, match=f"token_log_probs: {message}"):
        token_log_probs(**{**arguments, **changed})


@once
def test_dtensor_raises(tmp_path, host):
    hidden, weight, labels = make()
    with dtensors(tmp_path) as distribute, pytest.raises(TypeError, match="weight is a DTensor"):
        token_log_probs(hidden, distribute(weight), labels)
