import pytest
import torch

from lynx_kernels.backends import dispatch
from lynx_kernels.ops.adapter import OPERATION, adapter
from tests.gpu import bench
from tests.lynx_kernels.helpers import count_compilations, run
from tests.lynx_kernels.test_adapter import (
    ACTIVATIONS,
    NAMES,
    OPTIONAL,
    check_adapter,
    check_adapter_results,
    check_autocast,
    check_permuted,
    runs,
    with_options,
)
from tests.lynx_kernels.test_adapter import make as make_on

BF16 = torch.bfloat16
PAPER = {"width": 4096, "bottleneck": 2048} if bench.DEVICE == "cuda" else {"width": 96, "bottleneck": 48}
CASES = [
    (impl, dtype)
    for impl in OPERATION.names
    for dtype in bench.DTYPES
    if bench.PRESENT and runs(impl, dtype, bench.DEVICE)
]
IMPLEMENTATIONS = list(dict.fromkeys(impl for impl, _ in CASES))
ROUNDING = 8 * bench.ROUNDING


def make(*args, **options):
    return make_on(*args, **options, device=bench.DEVICE)


def calls(impl):
    return with_options(adapter, impl=impl)


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("dtype", bench.DTYPES)
def test_default_implementation(dtype):
    assert dispatch.explain(adapter, *make(dtype=dtype)[0]).name == "triton"


@pytest.mark.parametrize("tokens", [1, 17, 512, 8192])
@pytest.mark.parametrize(("impl", "dtype"), CASES)
def test_size_of_the_paper(impl, dtype, tokens):
    check_adapter(impl, *make((tokens,), **PAPER, dtype=dtype))


@pytest.mark.parametrize(
    ("tokens", "width", "bottleneck"),
    [(0, 77, 45), (1, 16, 16), (37, 77, 45), (70, 130, 20), (19, 40, 1), (129, 257, 65), (300, 1000, 129)],
)
@pytest.mark.parametrize(("impl", "dtype"), CASES)
def test_odd_sizes(impl, dtype, tokens, width, bottleneck):
    check_adapter(impl, *make((tokens,), width, bottleneck, dtype))
    check_adapter(impl, make((tokens,), width, bottleneck, dtype)[0])  # an expanded gradient


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("impl", "dtype"), CASES)
def test_activations_and_eps(impl, dtype, activation):
    check_adapter(impl, *make((70,), 256, 128, dtype), activation=activation, eps=0.3)


@pytest.mark.parametrize("absent", OPTIONAL[1:], ids=" ".join)
@pytest.mark.parametrize(("impl", "dtype"), CASES)
def test_optional_arguments(impl, dtype, absent):
    check_adapter(impl, *make((70,), 256, 128, dtype, absent))


@pytest.mark.parametrize("shape", [(3, 11), (7, 70)])
@pytest.mark.parametrize(("impl", "dtype"), CASES)
def test_permuted_inputs_and_gradient(impl, dtype, shape):
    check_permuted(impl, *make(shape, 256, 128, dtype))


@pytest.mark.parametrize("tokens", [17, 512])
@pytest.mark.parametrize(("impl", "dtype"), CASES)
def test_mean_much_larger_than_std(impl, dtype, tokens):
    inputs, grad = make((tokens,), **PAPER, dtype=dtype)
    inputs[0] = inputs[0] + 1000
    check_adapter(impl, inputs, grad)


@pytest.mark.parametrize("tokens", [17, 512])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_autocast(impl, tokens):
    check_autocast(calls(impl), *make((tokens,), **PAPER, dtype=torch.float32))


@pytest.mark.parametrize("trained", NAMES)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_only_needed_gradients(impl, trained):
    inputs, grad = make((70,), 256, 128, BF16)
    results = run(calls(impl), inputs, grad)
    index = NAMES.index(trained)
    leaves = [each.detach().requires_grad_(index == i) for i, each in enumerate(inputs)]
    adapter(*leaves, impl=impl).backward(grad.to(BF16))
    results[1 + index] = leaves[index].grad  # the others come from a call that needs all gradients
    check_adapter_results(results, inputs, grad)


@pytest.mark.parametrize("tokens", [17, 512])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_compiled(impl, tokens):
    inputs, grad = make((tokens,), 256, 128, BF16)
    torch._dynamo.reset()
    check_adapter_results(run(torch.compile(calls(impl), fullgraph=True), inputs, grad), inputs, grad)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_compiles_twice_at_most(impl):
    def leaves(tokens):
        inputs, _ = make((tokens,), 256, 128, BF16)
        inputs[3].requires_grad_()
        return inputs

    counts = count_compilations(calls(impl), [leaves(each) for each in (37, 50, 513, 8, 1024)], "inductor")
    assert counts[-1] == counts[2] <= 3


@pytest.mark.parametrize("tokens", [1, 17, 512])
@pytest.mark.parametrize(("impl", "dtype"), CASES)
def test_deterministic(impl, dtype, tokens):
    inputs, grad = make((tokens,), **PAPER, dtype=dtype)
    bench.check_deterministic(lambda: run(calls(impl), inputs, grad))


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("tokens", [1, 17, 512])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_never_synchronises(impl, tokens):
    inputs, grad = make((tokens,), **PAPER, dtype=BF16)
    grad = grad.to(BF16)
    bench.check_never_synchronises(lambda: run(calls(impl), inputs, grad))


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("tokens", [1, 17, 64, 512])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_graph_replays_with_new_inputs(impl, tokens):
    inputs, grad = make((tokens,), **PAPER, dtype=BF16)
    grad = grad.to(BF16)
    new_inputs, new_grad = [each.flip(0) if each.dim() else each * 0.5 for each in inputs], -grad
    actual = bench.replayed(lambda: run(calls(impl), inputs, grad), [*inputs, grad], [*new_inputs, new_grad])
    check_adapter_results(actual, new_inputs, new_grad)


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("tokens", [512, 8192])
def test_memory_of_forward(tokens):
    """Forward keeps output, pre-activation and two statistics per token. The peak adds one tensor of width r."""
    inputs, _ = make((tokens,), **PAPER, dtype=BF16)
    leaves = [each.requires_grad_() for each in inputs]
    peak, kept = bench.memory_of(lambda: adapter(*leaves, impl="triton"))
    d, r = PAPER["width"], PAPER["bottleneck"]
    saved = 2 * tokens * (d + r) + 8 * tokens
    assert kept <= saved + ROUNDING
    assert peak <= saved + 2 * tokens * r + ROUNDING


@pytest.mark.usefixtures("cuda")
def test_more_than_2_to_the_31_elements():
    """In x and in the pre-activation. Only the last rows have a gradient, so they determine every gradient."""
    bench.need_free(48)
    tokens, width, tail = 2**19 + 100, 4096, 100
    inputs, _ = make((tail,), width, width, BF16)
    grad = torch.randn(tail, width, device=bench.DEVICE, dtype=BF16)
    rows, *weights = inputs
    x = torch.zeros(tokens, width, device=bench.DEVICE, dtype=BF16)
    x[-tail:] = rows
    wide_grad = torch.zeros_like(x)
    wide_grad[-tail:] = grad
    actual = run(calls("triton"), [x, *weights], wide_grad)
    actual[:2] = [each[-tail:] for each in actual[:2]]
    check_adapter_results(actual, inputs, grad)
