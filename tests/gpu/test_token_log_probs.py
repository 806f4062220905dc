from functools import partial

import pytest
import torch

from lynx_kernels import explain, token_log_probs
from lynx_kernels.ops.head_common import chunked
from lynx_kernels.ops.token_log_probs import OPERATION
from tests.gpu import bench
from tests.lynx_kernels.head_cases import make_entries
from tests.lynx_kernels.helpers import check, check_results, run
from tests.lynx_kernels.test_token_log_probs import calls, frozen, make_grad, naive, naive_entropy
from tests.numbers import assert_within_budget

BF16 = torch.bfloat16
OPTIONS = {"softcap": 3.0, "logit_scale": 0.7, "temperature": 0.8}
LLAMA = (4096, 32000) if bench.DEVICE == "cuda" else (64, 500)


def make(*sizes, dtype=BF16):
    return [each.to(bench.DEVICE) for each in make_entries(*sizes, dtype=dtype)]


def make_grads(entries):
    return make_grad(entries).to(bench.DEVICE)


def runs(impl):
    hidden, weight, bias, labels, predictors = make()
    reasons = explain(token_log_probs, hidden, weight, labels, predictors=predictors, bias=bias).reasons
    return impl not in reasons


IMPLEMENTATIONS = [impl for impl in OPERATION.names if bench.PRESENT and runs(impl)]
CASES = [(impl, dtype) for impl in IMPLEMENTATIONS for dtype in bench.DTYPES]


def check_both_heads(impl, inputs, grad, **options):
    """One that trains, and a frozen one."""
    hidden, weight, bias, labels, predictors = inputs
    check(calls(impl, **options), partial(naive, **options), inputs, grad)
    ours, theirs = (frozen(each, weight, bias) for each in (calls(impl, **options), partial(naive, **options)))
    check(ours, theirs, (hidden, labels, predictors), grad)


@pytest.mark.usefixtures("cuda")
def test_default_implementation():
    hidden, weight, _, labels, predictors = make()
    assert explain(token_log_probs, hidden, weight, labels, predictors=predictors).name == "triton"


@pytest.mark.parametrize(("impl", "dtype"), CASES)
def test_size_of_llama(impl, dtype):
    check_both_heads(impl, make(1500, 900, *LLAMA, dtype=dtype), make_grads(1500))


@pytest.mark.parametrize(("entries", "rows"), [(90, 21), (2000, 700), (1500, 3000)])
@pytest.mark.parametrize(("impl", "dtype"), CASES)
def test_entries(impl, dtype, entries, rows):
    inputs = make(entries, rows, 130, 1003, dtype=dtype)
    check_both_heads(impl, inputs, make_grads(entries), **OPTIONS)
    exact, plain = (
        naive_entropy(*(each.to(wanted) if each.is_floating_point() else each for each in inputs), **OPTIONS)
        for wanted in (torch.float64, dtype)
    )
    _, entropy = calls(impl, return_entropy=True, **OPTIONS)(*inputs)
    assert_within_budget(entropy, exact, plain, "entropy")


@pytest.mark.parametrize(("impl", "dtype"), CASES)
def test_deterministic(impl, dtype):
    hidden, weight, bias, labels, predictors = make(2000, 30, 256, 1000, dtype=dtype)
    function, grad = frozen(calls(impl), weight, bias), make_grads(2000)
    bench.check_deterministic(lambda: run(function, (hidden, labels, predictors), grad))
    bench.check_deterministic(lambda: run(calls(impl), (hidden, weight, bias, labels, predictors), grad))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_compiled(impl):
    torch._dynamo.reset()
    inputs, grad = make(900, 400, 128, 1000), make_grads(900)
    function = torch.compile(calls(impl), fullgraph=True)
    check_results(run(function, inputs, grad), naive, inputs, grad)


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_never_synchronises(impl):
    hidden, weight, bias, labels, predictors = make(2000, 900, 256, 1000)
    function, grad = frozen(calls(impl), weight, bias), make_grads(2000)
    bench.check_never_synchronises(lambda: run(function, (hidden, labels, predictors), grad))
    bench.check_never_synchronises(lambda: run(calls(impl), (hidden, weight, bias, labels, predictors), grad))


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_graph_replays_with_new_inputs(impl):
    inputs, grad = make(2000, 900, 256, 1000), make_grads(2000)
    new = [each.flip(0) for each in inputs]
    check_results(bench.replayed(lambda: run(calls(impl), inputs, grad), inputs, new), naive, new, grad)


@pytest.mark.usefixtures("cuda")
def test_memory():
    """A frozen head: logits exist for a chunk of entries, and a row of the Jacobian for each entry."""
    hidden, weight, _, labels, predictors = make(8192, 6000, *LLAMA)
    hidden.requires_grad_()
    jacobian = labels.shape[0] * hidden.shape[1] * 2
    peak, kept = bench.memory_of(lambda: token_log_probs(hidden, weight, labels, predictors=predictors))
    assert kept <= jacobian + labels.shape[0] * 4 + 8 * bench.ROUNDING
    assert peak <= jacobian + hidden.nbytes + 2 * chunked.CHUNK * weight.shape[0] * 4
