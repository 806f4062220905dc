import pytest
import torch
from torch.nn import functional as F

from lynx_kernels.backends import dispatch, onednn
from lynx_kernels.ops import linear_cross_entropy as loss
from lynx_kernels.ops.linear_cross_entropy import chunked, linear_cross_entropy, reference, rows
from lynx_kernels.ops.linear_cross_entropy.call import LossCall
from tests.lynx_kernels.helpers import check, count_compilations, dtensors, permuted, run
from tests.numbers import assert_within_budget

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
REDUCTIONS = ["mean", "sum", "none"]
NAMES = ("loss", "gradient of hidden", "gradient of weight")
FORWARD = torch.ops.lynx_kernels.linear_cross_entropy.default
SUM = torch.ops.lynx_kernels.linear_cross_entropy_sum.default
BACKWARD = torch.ops.lynx_kernels.linear_cross_entropy_backward.default


@pytest.fixture(params=["cpu", "device"], autouse=True)
def host(request, monkeypatch):
    """Small chunks. Every test runs twice: as on a CPU, and as on a GPU, over all rows."""
    monkeypatch.setattr(reference, "CHUNK", 7)
    monkeypatch.setattr(chunked, "CHUNK", 7)
    if request.param == "device":
        monkeypatch.setattr(rows, "host_may_read", lambda tensor: False)
    return request.param


@pytest.fixture(params=["chunked", "reference"], autouse=True)
def preferred(request, monkeypatch):
    """Run the test with each implementation that can run it."""
    if request.param == "reference":
        only = dispatch.Implementation("reference", loss._losses)
        operation = dispatch.Operation("linear_cross_entropy", LossCall, None, only, check=loss._check)
        monkeypatch.setattr(loss, "OPERATION", operation)
    return request.param


@pytest.fixture
def products(monkeypatch):
    """Records the shapes (inner, rows, columns) of all products."""
    found = []

    def spy(module, name):
        real = getattr(module, name)

        def run(*args):
            left, right = args[-2:]
            assert left.shape[1] == right.shape[0]
            found.append((left.shape[0], left.shape[1], right.shape[1]))
            return real(*args)

        monkeypatch.setattr(module, name, run)

    def add_product(total, left, right):
        product = chunked._product(left, right)
        return product if total is None else total + product

    monkeypatch.setattr(chunked, "_add_product", add_product)
    for module in (chunked, reference):
        spy(module, "_product")
    return found


def naive(hidden, weight, labels, **options):
    logits = F.linear(hidden, weight)
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels, **options)


def make(rows=37, width=13, vocabulary=19, dtype=torch.float64, ignore_index=-100, supervised=0.4):
    generator = torch.Generator().manual_seed(rows)
    hidden = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    weight = torch.randn(vocabulary, width, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, vocabulary, (rows,), generator=generator)
    labels[torch.rand(rows, generator=generator) > supervised] = ignore_index
    labels[:1], labels[1:2], labels[2:3] = vocabulary - 1, 0, ignore_index
    return hidden.to(dtype), weight.to(dtype), labels


def with_options(function, **options):
    return lambda *inputs: function(*inputs, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 37])
@pytest.mark.parametrize(("reduction", "label_smoothing"), [("mean", 0.0), ("sum", 0.1), ("none", 0.1)])
def test_equals_cross_entropy(rows, dtype, reduction, label_smoothing):
    options = {"reduction": reduction, "label_smoothing": label_smoothing}
    inputs = make(rows, dtype=dtype)
    check(with_options(linear_cross_entropy, **options), with_options(naive, **options), inputs)
    if reduction == "none":
        grad = torch.randn(rows, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        check(with_options(linear_cross_entropy, **options), with_options(naive, **options), inputs, grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_weight(dtype):
    """In fp32 on CPUs, products with a large weight use oneDNN."""
    inputs = make(37, 70, 2000, dtype=dtype)
    assert inputs[1].numel() > onednn.SMALL_WEIGHT
    check(linear_cross_entropy, naive, inputs)


@pytest.mark.parametrize("has_bf16", [False, True])
def test_sums_over_many_chunks(has_bf16, monkeypatch):
    """Each of 1100 chunks adds the same, which a sum in bf16 no longer takes after 512 at most."""
    monkeypatch.setattr(chunked, "CHUNK", 2)
    monkeypatch.setattr(reference, "CHUNK", 2)
    monkeypatch.setattr(onednn, "HAS_BF16", has_bf16)  # products of CPUs with and without bf16 of their own
    hidden, weight, labels = make(2, 8, 3, torch.bfloat16)
    inputs = hidden.repeat(1100, 1), weight, labels.repeat(1100)
    summed, plain = (with_options(each, reduction="sum") for each in (linear_cross_entropy, naive))
    exact = run(plain, [hidden.double().repeat(1100, 1), weight.double(), inputs[2]], None)
    for ours, truth in zip(run(summed, inputs, None), exact, strict=True):
        torch.testing.assert_close(ours.double(), truth, rtol=0, atol=0.02 * truth.abs().max().item())


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2, 1.0])
def test_gradcheck(label_smoothing):
    hidden, weight, labels = make(9, 4, 5)
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    for reduction in REDUCTIONS:
        options = {"reduction": reduction, "label_smoothing": label_smoothing}
        assert torch.autograd.gradcheck(
            lambda h, w, o=options: linear_cross_entropy(h, w, labels, **o), leaves, fast_mode=True
        )


@pytest.mark.parametrize("ignore_index", [-100, -1, 0, 5])
def test_ignore_index(ignore_index):
    hidden, weight, labels = make(ignore_index=ignore_index)
    labels[3] = 4
    options = {"ignore_index": ignore_index, "reduction": "none"}
    check(with_options(linear_cross_entropy, **options), with_options(naive, **options), (hidden, weight, labels))
    losses = linear_cross_entropy(hidden, weight, labels, **options)
    assert losses[labels == ignore_index].eq(0).all()
    assert losses[3] > 0


def test_no_supervised_rows():
    hidden, weight, labels = make()
    for reduction in REDUCTIONS:
        for results in (
            run(with_options(linear_cross_entropy, reduction=reduction), (hidden, weight, labels.fill_(-100)), None),
            run(with_options(linear_cross_entropy, reduction=reduction), (hidden[:0], weight, labels[:0]), None),
        ):
            for each in results:
                torch.testing.assert_close(each, torch.zeros_like(each))
    assert linear_cross_entropy(hidden, weight, labels, num_items=0) == 0


def test_ignored_rows_may_hold_anything():
    hidden, weight, labels = make()
    expected = run(linear_cross_entropy, (hidden, weight, labels), None)
    hidden[labels == -100] = float("nan")
    for ours, theirs in zip(run(linear_cross_entropy, (hidden, weight, labels), None), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("num_items", [5, torch.tensor(5), torch.tensor(5.0)])
def test_num_items(num_items):
    inputs = make()
    actual = run(with_options(linear_cross_entropy, num_items=num_items), inputs, None)
    expected = run(lambda *inputs: naive(*inputs, reduction="sum") / 5, inputs, None)
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_huge_logits(dtype):
    hidden, weight, labels = make(dtype=dtype)
    hidden = hidden * (2e4 / F.linear(hidden, weight).abs().max())
    for label_smoothing in (0.0, 0.1):
        options = {"label_smoothing": label_smoothing, "reduction": "none"}
        check(with_options(linear_cross_entropy, **options), with_options(naive, **options), (hidden, weight, labels))


def test_logits_beyond_fp16():
    hidden = torch.full((2, 4), 300.0, dtype=torch.float16)
    weight = torch.tensor([[300.0] * 4, [299.0] * 4], dtype=torch.float16)
    for reduction, expected in (("none", [0.0, 1200.0]), ("sum", 1200.0)):
        losses = linear_cross_entropy(hidden, weight, torch.tensor([0, 1]), reduction=reduction)
        torch.testing.assert_close(losses, torch.tensor(expected))


def test_sums_of_gradients_beyond_fp16():
    """The gradient of the mean fits into fp16 where the gradient of the sum does not."""
    rows = 400
    hidden = torch.full((rows, 4), 300.0, dtype=torch.float16)
    weight = torch.zeros(2, 4, dtype=torch.float16, requires_grad=True)
    linear_cross_entropy(hidden, weight, torch.zeros(rows, dtype=torch.int64)).backward()
    torch.testing.assert_close(weight.grad, torch.tensor([[-150.0] * 4, [150.0] * 4], dtype=torch.float16))


def test_permuted_inputs_and_gradient():
    inputs = make()
    grad = torch.randn(37, dtype=torch.float64)
    function = with_options(linear_cross_entropy, reduction="none")
    actual = run(function, [permuted(each) for each in inputs], permuted(grad))
    for ours, theirs in zip(actual, run(function, inputs, grad), strict=True):
        torch.testing.assert_close(ours, theirs)
        assert ours.is_contiguous()


def test_expanded_inputs():
    hidden, weight, labels = make()
    inputs = (hidden[:1].expand_as(hidden), weight[:, :1].expand_as(weight), labels[1:2].expand_as(labels))
    check(linear_cross_entropy, naive, inputs)


def test_mixed_dtypes():
    """The result is as if all were in the wider dtype. Each gradient has the dtype of its input."""
    hidden, weight, labels = make()
    inputs = (hidden.float(), weight.bfloat16(), labels)
    actual = run(linear_cross_entropy, inputs, None)
    exact = run(naive, (hidden.float().double(), weight.bfloat16().double(), labels), None)
    plain = run(naive, (hidden.float(), weight.bfloat16().float(), labels), None)
    assert [each.dtype for each in actual] == [torch.float32, torch.float32, torch.bfloat16]
    for name, ours, truth, theirs in zip(NAMES, actual, exact, plain, strict=True):
        assert_within_budget(ours, truth, theirs.to(ours.dtype), name)


@pytest.mark.parametrize("trained", ["hidden", "weight"])
def test_only_needed_gradients(trained, products, preferred):
    hidden, weight, labels = make(7)
    _, *expected = run(linear_cross_entropy, (hidden, weight, labels), None)
    leaf = (hidden if trained == "hidden" else weight).requires_grad_()
    products.clear()
    linear_cross_entropy(hidden, weight, labels).backward()
    torch.testing.assert_close(leaf.grad, expected[trained == "weight"])
    logits, gradient = products[0], products[-1]
    assert gradient == ((logits[0], 19, 13) if trained == "hidden" else (19, logits[0], 13))
    assert products == [logits] * (1 if preferred == "chunked" else 2) + [gradient]
    products.clear()
    with torch.no_grad():
        linear_cross_entropy(hidden, weight, labels)
    linear_cross_entropy(hidden.detach(), weight.detach(), labels)
    assert products == [logits] * 2


def test_logits_never_exist_for_all_rows(products, host):
    hidden, weight, labels = make(130)
    linear_cross_entropy(hidden, weight, labels)
    assert max(shape[0] for shape in products) <= 7
    assert sum(shape[0] for shape in products) == (130 if host == "device" else (labels != -100).sum())


def test_max_supervised_limits_the_rows_on_a_gpu(products, host, preferred):
    inputs = make(130)
    count = int((inputs[2] != -100).sum())
    expected = run(linear_cross_entropy, inputs, None)
    for bound in (count, count + 5, 130, 200):
        products.clear()
        actual = run(with_options(linear_cross_entropy, max_supervised=bound), inputs, None)
        for ours, theirs in zip(actual, expected, strict=True):
            torch.testing.assert_close(ours, theirs)
        if preferred == "chunked":
            rows_seen = sum(shape[0] for shape in products if shape[1:] == (13, 19))
            assert rows_seen == (min(bound, 130) if host == "device" else count)
    if preferred == "chunked":
        error = RuntimeError if host == "device" else ValueError
        with pytest.raises(error, match=f"more.* than max_supervised={count - 1}"):
            linear_cross_entropy(*inputs, max_supervised=count - 1)
        hidden, weight, labels = inputs
        assert linear_cross_entropy(hidden, weight, torch.full_like(labels, -100), max_supervised=0) == 0


def test_backward_twice_and_no_second_derivative(preferred):
    hidden, weight, labels = make()
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    output = linear_cross_entropy(hidden, weight, labels)
    first = torch.autograd.grad(output, leaves, retain_graph=True)
    second = torch.autograd.grad(output, leaves, torch.tensor(2.0), create_graph=True)
    for once, twice in zip(first, second, strict=True):
        torch.testing.assert_close(2 * once, twice.detach())
    with pytest.raises(RuntimeError, match="no second derivatives"):
        second[0].sum().backward()


def test_saved_tensors(preferred):
    for dtype, trained, expected in (
        (torch.bfloat16, False, 37 * 13 * 2),
        (torch.bfloat16, True, 37 * 13 * 2 + 19 * 13 * 2),
        (torch.float16, True, 37 * 13 * 2 + 19 * 13 * 4),
        (torch.float32, True, 37 * 13 * 4 + 19 * 13 * 4),
    ):
        kept = []
        hidden, weight, labels = make(dtype=dtype)
        weight.requires_grad_(trained)
        with torch.autograd.graph.saved_tensors_hooks(
            lambda each, kept=kept: kept.append(each) or each, lambda each: each
        ):
            linear_cross_entropy(hidden.requires_grad_(), weight, labels, reduction="sum")
        if preferred == "chunked":
            assert sum(each.nbytes for each in kept) == expected
        else:
            assert {each.data_ptr() for each in kept} == {each.data_ptr() for each in (hidden, weight, labels)}


@pytest.mark.parametrize("layout", [lambda tensor: tensor, permuted])
def test_opcheck(layout):
    hidden, weight, labels = make(9, dtype=torch.float32)
    hidden, weight = layout(hidden), layout(weight)
    options = (0.1, -100)
    torch.library.opcheck(BACKWARD, (torch.ones(9), hidden, weight, labels, *options, [True, True], "reference"))
    torch.library.opcheck(
        BACKWARD, (torch.ones(9), hidden, weight.bfloat16(), labels, *options, [False, True], "reference")
    )
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    torch.library.opcheck(FORWARD, (*leaves, labels, *options, "reference"))
    for needs in ([True, True], [True, False], [False, True]):
        inputs = [each.detach().requires_grad_(needed) for each, needed in zip(leaves, needs, strict=True)]
        # Not test_aot_dynamic_dispatch: it differentiates the gradients, which are outputs here; that is an error.
        tests = ("test_schema", "test_autograd_registration", "test_faketensor")
        torch.library.opcheck(SUM, (*inputs, labels, *options, 9, needs, "chunked"), test_utils=tests)


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


@pytest.mark.parametrize("compiled", [False, True])
def test_autocast(compiled, preferred):
    hidden, weight, labels = make(dtype=torch.float32)
    function = linear_cross_entropy
    if compiled:
        function = torch.compile(linear_cross_entropy, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16):
        actual = run(function, (hidden, weight, labels), None)
    rounded = hidden.bfloat16(), weight.bfloat16()
    logits = torch.bfloat16 if preferred == "chunked" and onednn.HAS_BF16 else torch.float32
    exact = run(naive, (*(each.double() for each in rounded), labels), None)
    plain = run(naive, (*(each.to(logits) for each in rounded), labels), None)
    precisions = logits, torch.bfloat16, torch.bfloat16  # gradients are products in bf16
    for name, ours, truth, theirs, precision in zip(NAMES, actual, exact, plain, precisions, strict=True):
        assert ours.dtype == torch.float32
        assert_within_budget(ours, truth, theirs, name, precision=precision)


def test_autocast_leaves_fp64_alone():
    inputs = make()
    with torch.autocast("cpu", torch.bfloat16):
        actual = run(linear_cross_entropy, inputs, None)
    for ours, theirs in zip(actual, run(linear_cross_entropy, inputs, None), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_backward_inside_autocast():
    hidden, weight, labels = make(dtype=torch.float32)
    hidden.requires_grad_()
    loss = linear_cross_entropy(hidden, weight, labels)
    (expected,) = torch.autograd.grad(loss, hidden, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        (actual,) = torch.autograd.grad(loss, hidden)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("wrong", [-1, 19, -101])
def test_labels_out_of_range(wrong, host):
    hidden, weight, labels = make()
    labels[5] = wrong
    if host == "cpu":
        with pytest.raises(
            IndexError, match=rf"shift_labels\[5\] is {wrong}, which is neither in \[0, 19\) nor ignore_index=-100"
        ):
            linear_cross_entropy(hidden, weight, labels)
    else:
        with pytest.raises(RuntimeError, match="shift_labels has a value neither in"):
            linear_cross_entropy(hidden, weight, labels)


def test_explain_and_unknown_implementation(preferred):
    inputs = make()
    assert loss.OPERATION.explain(None, LossCall(*inputs)).name == preferred
    if preferred == "chunked":
        choice = dispatch.explain(linear_cross_entropy, *inputs, reduction="none")
        assert str(choice) == "reference\n  not chunked: it returns only the sum of the losses, not reduction='none'"
    with pytest.raises(ValueError, match="impl='nonsense' is not an implementation"):
        linear_cross_entropy(*inputs, impl="nonsense")


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"shift_labels": torch.zeros(37, dtype=torch.int32)}, TypeError, "shift_labels is torch.int32"),
        ({"hidden": torch.zeros(37, 13, dtype=torch.int64)}, TypeError, "hidden is torch.int64"),
        ({"weight": torch.zeros(19, 13, dtype=torch.int64)}, TypeError, "weight is torch.int64"),
        ({"hidden": torch.zeros(1, 37, 13)}, ValueError, "hidden has shape .1, 37, 13., expected .T, d."),
        ({"weight": torch.zeros(13)}, ValueError, "weight has shape .13,., expected .V, 13."),
        ({"weight": torch.zeros(19, 12)}, ValueError, "weight has shape .19, 12., expected .V, 13."),
        ({"shift_labels": torch.zeros(1, 37, dtype=torch.int64)}, ValueError, "shift_labels has shape .1, 37."),
        ({"shift_labels": torch.zeros(36, dtype=torch.int64)}, ValueError, "shift_labels has shape .36,."),
        ({"weight": torch.zeros(19, 13, device="meta")}, ValueError, "weight is on meta, expected cpu"),
        ({"label_smoothing": 1.5}, ValueError, "label_smoothing=1.5, expected 0 to 1"),
        ({"label_smoothing": -0.1}, ValueError, "label_smoothing=-0.1, expected 0 to 1"),
        ({"reduction": "max"}, ValueError, "reduction='max', expected one of"),
        ({"reduction": "sum", "num_items": 3}, ValueError, "num_items needs reduction='mean', got 'sum'"),
        ({"num_items": -3}, ValueError, "num_items=-3, expected at least 0"),
        ({"num_items": torch.ones(1)}, ValueError, "num_items has shape .1,., expected .. or a number"),
        ({"max_supervised": -1}, ValueError, "max_supervised=-1, expected at least 0"),
    ],
)  # fmt: skip
def test_errors(changed, error, message):
    arguments = dict(zip(("hidden", "weight", "shift_labels"), make(), strict=True))
    with pytest.raises(error, match=message):
        linear_cross_entropy(**{**arguments, **changed})


def test_dtensor_raises(tmp_path):
    hidden, weight, labels = make()
    with dtensors(tmp_path) as distribute, pytest.raises(TypeError, match="weight is a DTensor"):
        linear_cross_entropy(hidden, distribute(weight), labels)
