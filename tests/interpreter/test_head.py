"""The Triton kernel of linear_cross_entropy and token_log_probs, with small tiles: a row of logits takes several."""

from functools import partial

import pytest
import torch
import triton
import triton.language as tl
from torch.nn import functional as F

from lynx_kernels import explain, linear_cross_entropy, token_log_probs
from lynx_kernels.backends import onednn
from lynx_kernels.ops.head_common import chunked, entries
from lynx_kernels.ops.head_common import triton as implementation
from lynx_kernels.ops.head_common.triton import fwd
from tests.interpreter import DTYPES
from tests.lynx_kernels import test_linear_cross_entropy as loss
from tests.lynx_kernels import test_token_log_probs as log_probs
from tests.lynx_kernels.head_cases import OPTIONS, make, make_entries
from tests.lynx_kernels.helpers import check, permuted, run
from tests.numbers import assert_within_budget

EVERY_OPTION = {"label_smoothing": 0.1, "softcap": 3.0, "logit_scale": 0.7}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(implementation, "_COLUMNS", 16)
    monkeypatch.setattr(chunked, "CHUNK", 7)
    monkeypatch.setattr(onednn, "HAS_BF16", False)  # a GPU's products keep logits in fp32, and so must a CPU's here


@pytest.fixture(params=["cpu", "device"])
def host(request, monkeypatch):
    if request.param == "device":
        monkeypatch.setattr(entries, "host_may_read", lambda tensor: False)


def few(dtype=torch.float32):
    return make_entries(40, 12, 5, dtype=dtype)


# What needs the device's way of finding entries is tried in one dtype.
ON = [("cpu", dtype) for dtype in DTYPES] + [("device", torch.float32)]
everywhere = pytest.mark.parametrize(("host", "dtype"), ON, indirect=["host"])


@pytest.mark.usefixtures("host")
@pytest.mark.parametrize("options", [*OPTIONS[:2], EVERY_OPTION])
@everywhere
def test_entries(dtype, options):
    """Weighted, of rows that predict none, one, or many, with a bias that trains."""
    options, inputs = {"weights": loss.make_weights(40), **options}, few(dtype)
    check(loss.entry_calls("triton", **options), partial(loss.naive_entries, **options), inputs)
    options["reduction"], grad = "none", loss.make_weights(40) - 0.5
    check(loss.entry_calls("triton", **options), partial(loss.naive_entries, **options), inputs, grad)


@pytest.mark.parametrize("vocabulary", [1, 15, 16, 17, 50])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_in_order(dtype, vocabulary):
    inputs = make(20, vocabulary=vocabulary, dtype=dtype)
    check(loss.calls("triton"), loss.naive, inputs)
    options = {"label_smoothing": 0.1, "reduction": "sum"}
    check(loss.calls("triton", **options), partial(loss.naive, **options), inputs)


@pytest.mark.usefixtures("host")
@pytest.mark.parametrize("options", [{}, {"temperature": 0.6, **OPTIONS[1]}])
@everywhere
def test_log_probs(dtype, options):
    """With a head that trains, a frozen one, and their entropies."""
    hidden, weight, bias, labels, predictors = inputs = few(dtype)
    grad = log_probs.make_grad(40)
    ours, theirs = log_probs.calls("triton", **options), partial(log_probs.naive, **options)
    check(ours, theirs, inputs, grad)
    frozen = [log_probs.frozen(each, weight, bias) for each in (ours, theirs)]
    check(*frozen, (hidden, labels, predictors), grad)
    exact, plain = (
        log_probs.naive_entropy(*(each.to(wanted) if each.is_floating_point() else each for each in inputs), **options)
        for wanted in (torch.float64, dtype)
    )
    with torch.no_grad():
        _, entropy = log_probs.calls("triton", return_entropy=True, **options)(*inputs)
    assert_within_budget(entropy, exact, plain, "entropy")


def test_entropy_of_growing_logits():
    """The largest logit changes with every tile."""
    hidden = torch.tensor([[1.0], [-1.0], [1e3]])
    weight = torch.linspace(-9, 9, 70)[:, None].contiguous()
    labels = torch.tensor([3, 4, 69])
    found = token_log_probs(hidden, weight, labels, return_entropy=True, impl="triton")
    exact = (hidden.double() @ weight.double().t()).log_softmax(-1)
    torch.testing.assert_close(found[0].double(), exact.gather(1, labels[:, None])[:, 0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found[1].double(), torch.special.entr(exact.exp()).sum(-1), rtol=1e-6, atol=1e-6)


def test_huge_logits():
    hidden, weight, labels = make(dtype=torch.float32)
    hidden = hidden * (2e4 / F.linear(hidden, weight).abs().max())
    for label_smoothing in (0.0, 0.1):
        options = {"label_smoothing": label_smoothing, "reduction": "none"}
        check(loss.calls("triton", **options), partial(loss.naive, **options), (hidden, weight, labels))


def test_banned_tokens():
    """A bias of -inf, for the whole first tile and one token more."""
    hidden, weight, bias, labels, predictors = few()
    labels[labels >= 0] = labels[labels >= 0] % 2 + 17
    bias[:16] = bias[16] = -torch.inf
    inputs = hidden, weight, bias, labels, predictors
    for ours, theirs in zip(
        run(loss.entry_calls("triton"), inputs, None), run(loss.entry_calls("reference"), inputs, None), strict=True
    ):
        torch.testing.assert_close(ours, theirs)
    ours, theirs = (log_probs.calls(each, return_entropy=True)(*inputs)[1] for each in ("triton", "reference"))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.usefixtures("host")
def test_rows_that_predict_nothing_may_hold_anything():
    inputs = few()
    hidden, *_, labels, predictors = inputs
    expected = run(loss.entry_calls("triton"), inputs, None)
    free = torch.ones(len(hidden), dtype=torch.bool)
    free[predictors[(labels != -100) & (predictors >= 0)]] = False
    hidden[free] = torch.nan
    for ours, theirs in zip(run(loss.entry_calls("triton"), inputs, None), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_nan_is_not_lost():
    hidden, weight, labels = make(dtype=torch.float32)
    hidden[0] = torch.nan
    assert linear_cross_entropy(hidden, weight, labels, impl="triton").isnan()
    assert token_log_probs(hidden, weight, labels, impl="triton").isnan().nonzero().tolist() == [[0]]


def test_permuted_inputs_and_gradient():
    inputs, grad = few(), loss.make_weights(40) - 0.5
    for function in (loss.entry_calls("triton", reduction="none"), log_probs.calls("triton")):
        expected = run(function, inputs, grad)
        for ours, theirs in zip(run(function, [*map(permuted, inputs)], permuted(grad)), expected, strict=True):
            torch.testing.assert_close(ours, theirs)
        expanded = run(function, inputs, torch.ones(()).expand(40))
        for ours, theirs in zip(run(function, inputs, torch.ones(40)), expanded, strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.usefixtures("host")
def test_nothing_is_counted():
    hidden, weight, bias, labels, predictors = few()
    for inputs in (
        (hidden, weight, bias, torch.full_like(labels, -100), predictors),
        (hidden, weight, bias, labels, torch.full_like(predictors, -1)),
        (hidden, weight, bias, labels[:0], labels[:0]),
        (hidden[:0], weight, bias, labels[:0], None),
    ):
        for function in (loss.entry_calls("triton", reduction="none"), log_probs.calls("triton")):
            for each in run(function, inputs, None):
                assert each.eq(0).all()


@triton.jit
def _tanh_kernel(p_x, p_tanh, p_slope, N: tl.constexpr):
    o_x = tl.arange(0, N)
    b_tanh, b_slope = fwd.tanh_and_slope(tl.load(p_x + o_x))
    tl.store(p_tanh + o_x, b_tanh)
    tl.store(p_slope + o_x, b_slope)


def test_tanh():
    """Relative to the result, from tiny to saturated; where the derivative is too small for fp32 it is 0."""
    x = torch.cat([torch.logspace(-30, 2, 512), -torch.logspace(-30, 2, 500), torch.linspace(-1, 1, 1024)])
    x = torch.cat([x, torch.tensor([0.0, -0.0, 0.25, -0.25, torch.inf, -torch.inf]), x[:6]])
    x = x[:2048]
    tanh, derivative = torch.empty(2, 2048)
    _tanh_kernel[(1,)](x, tanh, derivative, N=2048)
    exact = x.double().tanh()
    torch.testing.assert_close(tanh.double(), exact, rtol=4e-7, atol=0)
    torch.testing.assert_close(derivative.double(), 1 / x.double().cosh() ** 2, rtol=2e-5, atol=1e-37)
    assert token_log_probs(
        torch.full((1, 1), torch.nan), x[:3, None], torch.zeros(1).long(), softcap=1.0, impl="triton"
    ).isnan()


def test_bias_in_fp32_of_a_head_in_bf16():
    """Its gradient is that of the logits before they are rounded for the products."""
    hidden, weight, bias, labels, predictors = few(torch.bfloat16)
    inputs = hidden, weight, bias.float(), labels, predictors
    *_, ours = run(loss.entry_calls("triton"), inputs, None)
    *_, exact = run(loss.naive_entries, [each.double() if each.is_floating_point() else each for each in inputs], None)
    torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-6)


def test_runs_only_when_named():
    hidden, weight, labels = make(dtype=torch.float32)
    for operation in (linear_cross_entropy, token_log_probs):
        choice = explain(operation, hidden, weight, labels)
        assert choice.name == "chunked"
        assert "only when named" in choice.reasons["triton"]
        with pytest.raises(RuntimeError, match="accumulate in fp32, and an argument is fp64"):
            operation(hidden, weight.double(), labels, impl="triton")
