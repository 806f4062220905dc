import subprocess
import sys

import pytest
import torch

from lynx_kernels.backends import dispatch
from lynx_kernels.ops.linear_cross_entropy import OPERATION, chunked, linear_cross_entropy
from tests.gpu import bench
from tests.lynx_kernels.helpers import check, check_results, count_compilations, permuted, run
from tests.lynx_kernels.test_linear_cross_entropy import make as make_on
from tests.lynx_kernels.test_linear_cross_entropy import naive, with_options

BF16 = torch.bfloat16
CASES = [(impl, dtype) for impl in OPERATION.names for dtype in bench.DTYPES]
IMPLEMENTATIONS = list(OPERATION.names)
LLAMA = {"width": 4096, "vocabulary": 32000} if bench.DEVICE == "cuda" else {"width": 64, "vocabulary": 500}


def make(*args, **options):
    return [each.to(bench.DEVICE) for each in make_on(*args, **options)]


def calls(impl, **options):
    return with_options(linear_cross_entropy, impl=impl, **options)


def num_supervised(labels):
    return int((labels != -100).sum())


@pytest.mark.parametrize(("reduction", "name"), [("mean", "chunked"), ("sum", "chunked"), ("none", "reference")])
def test_default_implementation(reduction, name):
    assert dispatch.explain(linear_cross_entropy, *make(), reduction=reduction).name == name


@pytest.mark.parametrize("rows", [3, 1000, 4096])
@pytest.mark.parametrize(("impl", "dtype"), CASES)
def test_size_of_llama(impl, dtype, rows):
    check(calls(impl), naive, make(rows, **LLAMA, dtype=dtype))


@pytest.mark.parametrize(("rows", "width", "vocabulary"), [(3, 1, 2), (37, 13, 19), (513, 65, 1000), (1025, 130, 33)])
@pytest.mark.parametrize(("impl", "dtype"), CASES)
def test_odd_sizes(impl, dtype, rows, width, vocabulary):
    for supervised in (0.4, 1.0):
        inputs = make(rows, width, vocabulary, dtype, supervised=supervised)
        for options in ({}, {"reduction": "sum", "label_smoothing": 0.1}):
            check(calls(impl, **options), with_options(naive, **options), inputs)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_no_supervised_rows(impl):
    hidden, weight, labels = make(dtype=BF16)
    for inputs in ((hidden, weight, labels.fill_(-100)), (hidden[:0], weight, labels[:0])):
        for bound in (None, 0):
            for each in run(calls(impl, max_supervised=bound), inputs, None):
                assert each.eq(0).all()


@pytest.mark.parametrize("dtype", bench.DTYPES)
def test_each_row(dtype):
    inputs = make(300, 128, 1000, dtype)
    grad = torch.randn(300, dtype=torch.float64).to(bench.DEVICE)
    check(calls(None, reduction="none"), with_options(naive, reduction="none"), inputs, grad)


@pytest.mark.parametrize(("impl", "dtype"), CASES)
def test_ignored_rows_may_hold_anything(impl, dtype):
    hidden, weight, labels = make(600, 128, 1000, dtype)
    expected = run(calls(impl), (hidden, weight, labels), None)
    hidden[labels == -100] = torch.nan
    bound = num_supervised(labels)
    for options in ({}, {"max_supervised": bound}, {"max_supervised": bound + 70}):
        for ours, theirs in zip(run(calls(impl, **options), (hidden, weight, labels), None), expected, strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(("impl", "dtype"), CASES)
def test_max_supervised_does_not_change_the_result(impl, dtype):
    inputs = make(1300, 128, 1000, dtype)
    for bound in (num_supervised(inputs[2]), 1000, 1300, 2000):
        check(calls(impl, max_supervised=bound), naive, inputs)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_permuted_inputs(impl):
    inputs = make(70, 64, 100, BF16)
    expected = run(calls(impl), inputs, None)
    for ours, theirs in zip(run(calls(impl), [permuted(each) for each in inputs], None), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_logits_beyond_fp16(impl):
    hidden = torch.full((2, 4), 300.0, dtype=torch.float16, device=bench.DEVICE)
    weight = torch.tensor([[300.0] * 4, [299.0] * 4], dtype=torch.float16, device=bench.DEVICE)
    labels = torch.tensor([0, 1], device=bench.DEVICE)
    assert linear_cross_entropy(hidden, weight, labels, reduction="sum", impl=impl).item() == 1200


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_autocast(impl):
    hidden, weight, labels = make(70, 64, 100, torch.float32)
    with torch.autocast(bench.DEVICE, BF16):
        loss, grad_hidden, grad_weight = run(calls(impl), (hidden, weight, labels), None)
    rounded = hidden.to(BF16), weight.to(BF16), labels
    expected = run(calls(impl), rounded, None)
    torch.testing.assert_close(loss, expected[0])
    for ours, theirs in ((grad_hidden, expected[1]), (grad_weight, expected[2])):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs.float())


@pytest.mark.parametrize("trained", [0, 1])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_only_needed_gradients(impl, trained):
    inputs = make(600, 128, 1000, BF16)
    results = run(calls(impl), inputs, None)
    leaf = inputs[trained].requires_grad_()
    linear_cross_entropy(*inputs, impl=impl).backward()
    torch.testing.assert_close(leaf.grad, results[1 + trained], rtol=0, atol=0)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_compiled(impl):
    inputs = make(600, 128, 1000, BF16)
    torch._dynamo.reset()
    function = torch.compile(calls(impl, max_supervised=num_supervised(inputs[2])), fullgraph=True)
    check_results(run(function, inputs, None), naive, inputs)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_compiles_twice_at_most(impl):
    def step(hidden, weight, labels, bound):
        return linear_cross_entropy(hidden, weight, labels, max_supervised=bound, impl=impl)

    def leaves(rows):
        hidden, weight, labels = make(rows, dtype=BF16)
        return hidden.requires_grad_(), weight, labels, num_supervised(labels)

    counts = count_compilations(step, [leaves(rows) for rows in (37, 50, 61, 20, 77)], "inductor")
    assert counts[-1] == counts[2] <= 3


@pytest.mark.parametrize(("impl", "dtype"), CASES)
def test_deterministic(impl, dtype):
    inputs = make(2000, 256, 1000, dtype)
    bench.check_deterministic(lambda: run(calls(impl), inputs, None))


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("bounded", [False, True])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_never_synchronises(impl, bounded):
    inputs = make(2000, 256, 1000, BF16)
    options = {"max_supervised": num_supervised(inputs[2])} if bounded else {}
    bench.check_never_synchronises(lambda: run(calls(impl, **options), inputs, None))


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_graph_replays_with_new_inputs(impl):
    inputs = make(2000, 256, 1000, BF16)
    new = [each.flip(0) * factor for each, factor in zip(inputs, (0.5, -1, 1), strict=True)]
    call = calls(impl, max_supervised=num_supervised(inputs[2]) + 9)
    check_results(bench.replayed(lambda: run(call, inputs, None), inputs, new), naive, new)


@pytest.mark.usefixtures("cuda")
def test_memory():
    """Logits exist only for a chunk of rows, and a frozen head has no gradient."""
    hidden, weight, labels = make(8192, **LLAMA, dtype=BF16)
    hidden.requires_grad_()
    peak, kept = bench.memory_of(lambda: linear_cross_entropy(hidden, weight, labels, impl="chunked"))
    assert kept <= hidden.nbytes + 8 * bench.ROUNDING
    assert peak <= 2 * hidden.nbytes + 4 * chunked.CHUNK * weight.shape[0] * 4
    assert peak < labels.shape[0] * weight.shape[0] * 4 / 2


@pytest.mark.usefixtures("cuda")
def test_more_than_2_to_the_31_elements():
    """In hidden and its gradient. Only the last rows are supervised."""
    bench.need_free(24)
    tail = make(100, 4096, 1000, BF16, supervised=1.0)
    rows = 2**19 + 100
    hidden = torch.zeros(rows, 4096, device=bench.DEVICE, dtype=BF16)
    hidden[-100:] = tail[0]
    labels = torch.full((rows,), -100, device=bench.DEVICE)
    labels[-100:] = tail[2]
    loss, grad_hidden, grad_weight = run(calls("chunked", max_supervised=100), (hidden, tail[1], labels), None)
    assert not grad_hidden[:-100].any()
    check_results([loss, grad_hidden[-100:], grad_weight], naive, tail)


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("wrong", ["label", "bound"])
def test_device_assertions(wrong):
    """Runs in a separate process, because a device assertion makes CUDA unusable."""
    code = f"""
import torch
from lynx_kernels import linear_cross_entropy
hidden, weight, labels = torch.ones(3, 8).cuda(), torch.ones(4, 8).cuda(), torch.tensor([0, -100, 3]).cuda()
linear_cross_entropy(hidden, weight, labels, max_supervised=2)
torch.cuda.synchronize()
print("right")
if {wrong!r} == "label":
    labels[0] = 4
linear_cross_entropy(hidden, weight, labels, max_supervised=2 if {wrong!r} == "label" else 1)
torch.cuda.synchronize()
print("wrong")
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout == "right\n", result.stderr
    assert "assert" in result.stderr
