import subprocess
import sys
from functools import partial

import pytest
import torch

from lynx_kernels.backends import dispatch
from lynx_kernels.ops.head_common import chunked
from lynx_kernels.ops.linear_cross_entropy import OPERATION, linear_cross_entropy
from tests.gpu import bench
from tests.lynx_kernels.head_cases import make as make_on
from tests.lynx_kernels.head_cases import make_entries
from tests.lynx_kernels.helpers import check, check_results, count_compilations, permuted, run
from tests.lynx_kernels.test_linear_cross_entropy import calls, entry_calls, make_weights, naive, naive_entries

BF16 = torch.bfloat16
LLAMA = {"width": 4096, "vocabulary": 32000} if bench.DEVICE == "cuda" else {"width": 64, "vocabulary": 500}


def on_device(tensors):
    return [each.to(bench.DEVICE) for each in tensors]


def make(*args, **options):
    return on_device(make_on(*args, **options))


def runs(impl):
    return bench.PRESENT and impl not in dispatch.explain(linear_cross_entropy, *make(dtype=BF16)).reasons


IMPLEMENTATIONS = [impl for impl in OPERATION.names if runs(impl)]
CASES = [(impl, dtype) for impl in IMPLEMENTATIONS for dtype in bench.DTYPES]


def num_supervised(labels):
    return int((labels != -100).sum())


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize(("dtype", "name"), [(BF16, "triton"), (torch.float32, "triton"), (torch.float64, "chunked")])
def test_default_implementation(dtype, name):
    choice = dispatch.explain(linear_cross_entropy, *make(dtype=dtype))
    assert choice.name == name, choice


@pytest.mark.parametrize(("rows", "entries"), [(21, 90), (700, 2000), (3000, 1500)])
@pytest.mark.parametrize(("impl", "dtype"), CASES)
def test_entries(impl, dtype, rows, entries):
    """Of rows that predict none, one, or many; weighted; a bias that trains; every option."""
    inputs = on_device(make_entries(entries, rows, 130, 1003, dtype))
    options = {"weights": make_weights(entries).to(bench.DEVICE), "softcap": 3.0, "logit_scale": 0.7}
    check(entry_calls(impl, **options), partial(naive_entries, **options), inputs)
    options |= {"reduction": "none", "label_smoothing": 0.1}
    grad = (make_weights(entries) - 0.5).to(bench.DEVICE)
    check(entry_calls(impl, **options), partial(naive_entries, **options), inputs, grad)


@pytest.mark.usefixtures("cuda")
def test_fp64():
    inputs = on_device(make_entries())
    check(entry_calls(None), naive_entries, inputs)


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
            check(calls(impl, **options), partial(naive, **options), inputs)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_no_supervised_rows(impl):
    hidden, weight, labels = make(dtype=BF16)
    for inputs in ((hidden, weight, labels.fill_(-100)), (hidden[:0], weight, labels[:0])):
        for bound in (None, 0):
            for each in run(calls(impl, max_supervised=bound), inputs, None):
                assert each.eq(0).all()


@pytest.mark.parametrize(("impl", "dtype"), CASES)
def test_each_row(impl, dtype):
    inputs = make(300, 128, 1000, dtype)
    grad = torch.randn(300, dtype=torch.float64).to(bench.DEVICE)
    check(calls(impl, reduction="none"), partial(naive, reduction="none"), inputs, grad)


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
    inputs = on_device(make_entries(2000, 30, 256, 1000, dtype))
    for reduction in ("sum", "none"):
        bench.check_deterministic(lambda r=reduction: run(entry_calls(impl, reduction=r), inputs, None))


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("bounded", [False, True])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_never_synchronises(impl, bounded):
    inputs = make(2000, 256, 1000, BF16)
    options = {"max_supervised": num_supervised(inputs[2])} if bounded else {}
    bench.check_never_synchronises(lambda: run(calls(impl, **options), inputs, None))
    inputs = on_device(make_entries(2000, 900, 256, 1000, BF16))
    options = {"weights": make_weights(2000).to(bench.DEVICE), "max_supervised": 1500 if bounded else None}
    bench.check_never_synchronises(lambda: run(entry_calls(impl, **options), inputs, None))


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_graph_replays_with_new_inputs(impl):
    inputs = make(2000, 256, 1000, BF16)
    new = [each.flip(0) * factor for each, factor in zip(inputs, (0.5, -1, 1), strict=True)]
    call = calls(impl, max_supervised=num_supervised(inputs[2]) + 9)
    check_results(bench.replayed(lambda: run(call, inputs, None), inputs, new), naive, new)

    inputs = on_device(make_entries(2000, 900, 256, 1000, BF16))
    new = [each.flip(0) for each in inputs]
    call = entry_calls(impl)
    check_results(bench.replayed(lambda: run(call, inputs, None), inputs, new), naive_entries, new)


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize(("impl", "logits"), [("triton", 1.5), ("chunked", 4)])
def test_memory(impl, logits):
    """Logits exist only for a chunk of rows, in so many copies, and a frozen head has no gradient."""
    hidden, weight, labels = make(8192, **LLAMA, dtype=BF16)
    hidden.requires_grad_()
    peak, kept = bench.memory_of(lambda: linear_cross_entropy(hidden, weight, labels, impl=impl))
    assert kept <= hidden.nbytes + 8 * bench.ROUNDING
    assert peak <= 2 * hidden.nbytes + (logits + 0.5) * chunked.CHUNK * weight.shape[0] * 4
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
    loss, grad_hidden, grad_weight = run(calls(None, max_supervised=100), (hidden, tail[1], labels), None)
    assert not grad_hidden[:-100].any()
    check_results([loss, grad_hidden[-100:], grad_weight], naive, tail)


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("wrong", ["label", "predictor", "weight", "bound"])
def test_device_assertions(wrong):
    """Runs in a separate process, because a device assertion makes CUDA unusable."""
    code = f"""
import torch
from lynx_kernels import linear_cross_entropy
hidden, weight, labels = torch.ones(3, 8).cuda(), torch.ones(4, 8).cuda(), torch.tensor([0, -100, 3]).cuda()
options = dict(predictors=torch.tensor([0, -1, 2]).cuda(), weights=torch.ones(3).cuda(), max_supervised=2)
linear_cross_entropy(hidden, weight, labels, **options)
torch.cuda.synchronize()
print("right")
if {wrong!r} == "label":
    labels[0] = 4
elif {wrong!r} == "predictor":
    options["predictors"][1] = 3
elif {wrong!r} == "weight":
    options["weights"][0] = -1
else:
    options["max_supervised"] = 1
linear_cross_entropy(hidden, weight, labels, **options)
torch.cuda.synchronize()
print("wrong")
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout == "right\n", result.stderr
    assert "assert" in result.stderr
