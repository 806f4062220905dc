"""The compiled CPU adapter: every instruction set, any number of threads, forked processes."""

from functools import partial

import pytest
import torch
from torch.nn import functional as F

from lynx_kernels.backends import cpu as cpu_backend
from lynx_kernels.ops.adapter import adapter, cpu
from tests.lynx_kernels.helpers import assert_child_ends_well, permuted
from tests.lynx_kernels.test_adapter import (
    ACTIVATIONS,
    BACKWARD,
    FORWARD,
    NAMES,
    OPTIONAL,
    check_adapter,
    check_autocast,
    make,
    naive,
    runs,
)
from tests.numbers import assert_within_budget

if cpu_backend.MISSING is not None:
    pytest.skip(cpu_backend.MISSING, allow_module_level=True)

DTYPES = [dtype for dtype in (torch.float32, torch.bfloat16) if runs("cpu", dtype)]
MIXED = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
ours = partial(adapter, impl="cpu")


pytestmark = pytest.mark.usefixtures("poison")


@pytest.fixture(autouse=True)
def calls(monkeypatch):
    """The arguments of the calls that reached the compiled module."""
    counted = []
    forward = cpu._compiled_forward
    monkeypatch.setattr(cpu, "_compiled_forward", lambda *arguments: counted.append(arguments) or forward(*arguments))
    return counted


def saved(x, norm_weight, norm_bias, down_weight, down_bias, *rest):
    """The values that forward saves for backward."""
    mean = x.mean(-1)
    rstd = ((x - mean[:, None]).square().mean(-1) + 1e-5).rsqrt()
    normalized = F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias)
    return mean, rstd, F.linear(normalized, down_weight, down_bias)


def check_saved(inputs):
    """Check the saved values against the error budget, with the statistics in fp32."""
    exact = saved(*(each.double() for each in inputs))
    plain = [*saved(*(each.float() for each in inputs))[:2], saved(*inputs)[2]]
    _, *actual = FORWARD(*inputs, 1e-5, "silu", "cpu")
    magnitudes = [
        inputs[0].abs().amax().item() if inputs[0].numel() else 0.0,
        0.0,
        0.0,
    ]  # the terms of a mean may cancel to 0
    names = ("mean", "rstd", "preactivation")
    for name, found, truth, theirs, magnitude in zip(names, actual, exact, plain, magnitudes, strict=True):
        assert found.dtype == theirs.dtype
        assert_within_budget(found, truth, theirs, name, magnitude)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [0, 1, 2, 3, 7, 16, 63, 64])
def test_every_instruction_set(instruction_set, dtype, tokens, calls):
    """Blocks of 16 columns, register tiles of 4 rows and 2 or 6 tokens, vectors of 4 to 32 values; with remainders."""
    for width, bottleneck in [(13, 5), (16, 16), (64, 32), (67, 35), (40, 83)]:
        inputs, grad = make((tokens,), width, bottleneck, dtype)
        check_adapter("cpu", inputs, grad)
        check_saved(inputs)
    check_adapter("cpu", *make((tokens,), 1, 3, dtype, ("norm_weight", "norm_bias")))
    assert calls


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_tokens_use_onednn(dtype, calls):
    for tokens, compiled in [(64, True), (65, False)]:
        adapter(*make((tokens,), dtype=dtype)[0], impl="cpu")
        assert bool(calls) == compiled
        calls.clear()


def test_non_contiguous_weights_use_onednn(calls):
    inputs, _ = make((3,), dtype=torch.float32)
    for index in (3, 5):
        spread = [permuted(each) if i == index else each for i, each in enumerate(inputs)]
        torch.testing.assert_close(ours(*spread), ours(*inputs))
        assert len(calls) == 1  # only the contiguous call
        calls.clear()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(7,), (2, 3, 5)])
def test_permuted_arguments(dtype, shape, calls):
    inputs, grad = make(shape, 35, 19, dtype)
    spread = [
        each if name in ("down_weight", "up_weight") else permuted(each)
        for name, each in zip(NAMES, inputs, strict=True)
    ]
    check_adapter("cpu", spread, permuted(grad))
    assert calls
    sliced, grad = make((2, 14), 35, 19, dtype)
    sliced[0], grad = sliced[0][:, ::2], grad[:, ::2]
    check_adapter("cpu", sliced, grad)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("absent", OPTIONAL)
def test_absent_arguments(instruction_set, dtype, absent):
    check_adapter("cpu", *make((9,), 35, 19, dtype, absent))
    _, mean, rstd, _ = FORWARD(*make((9,), 35, 19, dtype, absent)[0], 1e-5, "silu", "cpu")
    assert mean.shape == rstd.shape == ((0,) if "norm_weight" in absent else (9,))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_and_eps(instruction_set, dtype, activation):
    check_adapter("cpu", *make((9,), 35, 19, dtype), activation=activation, eps=0.3)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_everywhere(instruction_set, activation):
    """Near 0, in both tails, and where an exponential would overflow."""
    points = torch.cat([torch.linspace(-15, 15, 601), torch.tensor([-1e4, -300.0, -90.0, 90.0, 300.0, 1e4])])
    zeros, identity = torch.zeros(len(points), len(points)), torch.eye(len(points))
    actual = ours(zeros[:1], None, None, zeros, points, identity, None, torch.tensor(1.0), activation=activation)[0]
    exact = ACTIVATIONS[activation](points.double())
    assert ((actual - exact).abs() <= 1e-6 * exact.abs() + 1e-8).all()
    zero, one, infinity = torch.zeros(1, 1), torch.ones(1, 1), torch.full((1,), float("inf"))
    assert ours(zero, None, None, zero, infinity, one, None, one, activation=activation) == infinity


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_stays_in_its_token(instruction_set, activation):
    inputs, _ = make((9,), 35, 19, torch.float32)
    expected = ours(*inputs, activation=activation)
    inputs[0][4, 7] = float("nan")
    out = ours(*inputs, activation=activation)
    assert out[4].isnan().all()
    others = torch.arange(9) != 4
    assert torch.equal(out[others], expected[others])


@pytest.mark.parametrize("dtype", DTYPES)
def test_mean_much_larger_than_std(instruction_set, dtype):
    inputs, grad = make((9,), 67, 19, dtype)
    inputs[0] = inputs[0] + 1000
    check_adapter("cpu", inputs, grad)
    if dtype == torch.float32:
        check_saved(inputs)


@pytest.mark.parametrize("stream", DTYPES)
@pytest.mark.parametrize("weights", DTYPES)
@pytest.mark.parametrize("others", MIXED)
def test_mixed_dtypes(instruction_set, stream, weights, others):
    """Every argument in its own dtype. Dtypes that the kernels do not support are cast."""
    inputs, _ = make((9,), 35, 19, torch.float32)
    mixed = [each.to(others) for each in inputs]
    mixed[0] = inputs[0].to(stream)
    mixed[3], mixed[5] = inputs[3].to(weights), inputs[5].to(weights)
    actual = ours(*mixed)
    assert actual.dtype == stream
    exact = naive(*(each.double() for each in mixed))
    plain = naive(*(each.float() for each in mixed)).to(stream)
    precision = torch.bfloat16 if torch.bfloat16 in (stream, weights) else None
    assert_within_budget(actual, exact, plain, precision=precision)


@pytest.mark.skipif(len(DTYPES) == 1, reason="this CPU has no bf16")
def test_autocast(instruction_set, calls):
    check_autocast(ours, *make((9,), dtype=torch.float32))
    assert calls


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "width", "bottleneck"), [(1, 200, 35), (7, 67, 130), (64, 40, 83)])
def test_result_does_not_depend_on_threads(instruction_set, dtype, tokens, width, bottleneck, restore_threads):
    inputs, _ = make((tokens,), width, bottleneck, dtype)
    results = []
    for threads in (1, 2, 3, 40):
        torch.set_num_threads(threads)
        results.append(FORWARD(*inputs, 1e-5, "silu", "cpu"))
    for others in results[1:]:
        for first, second in zip(results[0], others, strict=True):
            assert torch.equal(first, second)


# LayerNorm's gradients are summed over blocks of 256 tokens.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "width"), [(255, 67), (256, 16), (257, 13), (600, 35)])
def test_backward_over_several_blocks(instruction_set, dtype, tokens, width, restore_threads):
    inputs, grad = make((tokens,), width, 19, dtype)
    check_adapter("cpu", inputs, grad)
    grads = []
    for threads in (1, 2, 3, 40):
        torch.set_num_threads(threads)
        _, *saved = FORWARD(*inputs, 1e-5, "silu", "cpu")
        grads.append(BACKWARD(grad, *inputs, *saved, "silu", [i < 3 for i in range(8)], "cpu"))
    for others in grads[1:]:
        for first, second in zip(grads[0], others, strict=True):
            torch.testing.assert_close(first, second, rtol=1e-6 if dtype == torch.float32 else 1e-2, atol=1e-5)


@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (0, 2), (1, 2)])
def test_only_needed_gradients_of_layer_norm(needed):
    inputs, grad = make((300,), 35, 19, torch.float32)
    _, *saved = FORWARD(*inputs, 1e-5, "silu", "cpu")
    every = BACKWARD(grad, *inputs, *saved, "silu", [True] * 8, "cpu")
    some = BACKWARD(grad, *inputs, *saved, "silu", [i in needed for i in range(8)], "cpu")
    assert len(some) == len(needed)
    for index, found in zip(needed, some, strict=True):
        assert torch.equal(found, every[index])


def test_forked_child_does_not_hang(restore_threads):
    torch.set_num_threads(2)
    inputs, _ = make((7,), 200, 35, torch.float32)
    expected = ours(*inputs)
    assert_child_ends_well(lambda: torch.equal(ours(*inputs), expected))


def test_backward_of_layer_norm_in_a_forked_child(restore_threads):
    """Only LayerNorm, because PyTorch's own products do hang in a forked child."""
    torch.set_num_threads(2)
    (x, weight, bias, *_), grad = make((700,), 20, 35, torch.float32)  # PyTorch compares larger tensors with threads
    mean, rstd, grad = x.mean(-1), x.var(-1).rsqrt(), grad.float()

    def both():
        normalized = cpu._normalize(x, mean, rstd, weight, bias, torch.float32)
        grads = cpu._norm_backward(normalized, grad, x, mean, rstd, weight, bias, (True, True, True))
        return [normalized, *grads.values()]

    expected = both()
    assert_child_ends_well(lambda: all(map(torch.equal, both(), expected)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("absent", [(), ("norm_bias",), ("norm_weight", "norm_bias")])
def test_without_the_compiled_module(monkeypatch, dtype, absent, calls):
    monkeypatch.setattr(cpu_backend, "module", None)
    check_adapter("cpu", *make((7,), 35, 19, dtype, absent))
    check_adapter("cpu", *make((5000,), 16, 8, dtype, absent))  # enough tokens for bf16 accumulation to be far off
    assert not calls
