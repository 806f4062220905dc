"""The adapter's Triton forms, each with tiles small enough that a few tokens make several, and ragged ones."""

from functools import cache

import pytest
import torch

from lynx_kernels.backends import dispatch
from lynx_kernels.ops.adapter import adapter
from lynx_kernels.ops.adapter import triton as implementation
from lynx_kernels.ops.adapter.call import AdapterBackwardCall, AdapterCall
from lynx_kernels.ops.adapter.triton.launches import Launch, Plan
from tests.interpreter import DTYPES
from tests.interpreter.sparse import run_only
from tests.lynx_kernels.helpers import check, permuted, run
from tests.lynx_kernels.test_adapter import (
    ACTIVATIONS,
    NAMES,
    OPTIONAL,
    check_adapter,
    make,
    naive,
    scale_magnitude,
    with_options,
)
from tests.numbers import assert_within_budget

SMALL, FLAT, LARGE = (16, 32, 16, 4, 2), (32, 16, 64, 4, 2), (64, 64, 32, 4, 2)
TILED = {tile: Plan("tiled", Launch(*tile), Launch(*tile)) for tile in (SMALL, FLAT, LARGE)}
# All of a bottleneck of up to 64 in one tile.
FUSED = {tile: Plan("fused", *[Launch(tile[0], 64, *tile[2:])] * 2) for tile in (SMALL, FLAT)}
# The second is a single split, the last more splits than there are steps.
SMALL_M = {
    (*tile, num_splits): Plan("small_m", Launch(*tile, num_splits=num_splits), Launch(*tile))
    for tile, num_splits in [(SMALL, 3), (FLAT, 1), (LARGE, 9)]
}
FORMS = {"tiled": TILED[SMALL], "fused": FUSED[SMALL], "small_m": SMALL_M[(*SMALL, 3)]}
PLANS = [*TILED.values(), *FUSED.values(), *SMALL_M.values()]
interpreted = with_options(adapter, impl="triton")


def use(plan, monkeypatch):
    """``plan`` wherever its form serves: "small_m" forward only, "fused" not where only the weights train."""
    serves = {"tiled": ("forward", "backward", "weights"), "fused": ("forward", "backward"), "small_m": ("forward",)}
    monkeypatch.setattr(
        implementation, "choose_plan", lambda call: plan if call.direction in serves[plan.form] else TILED[SMALL]
    )
    monkeypatch.setattr(implementation, "_BLOCK_WIDTH", 16)
    monkeypatch.setattr(implementation, "_COMBINE_COLUMNS", 16)


@pytest.fixture(params=FORMS)
def form(request, monkeypatch):
    use(FORMS[request.param], monkeypatch)
    return request.param


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "width", "bottleneck"), [(0, 77, 45), (1, 16, 16), (37, 77, 45), (70, 130, 20), (19, 40, 1), (5, 9, 0)]
)
def test_equals_the_composition(tokens, width, bottleneck, dtype):
    """By the rules for launches, which choose the fused form."""
    inputs, grad = make((tokens,), width, max(bottleneck, 1), dtype)
    if bottleneck == 0:
        inputs[3:6] = inputs[3][:0], inputs[4][:0], inputs[5][:, :0]
    check_adapter("triton", inputs, grad)


@pytest.mark.parametrize("tokens", [3, 70])
def test_rules_for_wide_bottlenecks(tokens):
    """By the rules, which choose the form for a few tokens and the tiled one."""
    check_adapter("triton", *make((tokens,), 512, 272, torch.float16))


@pytest.mark.usefixtures("form")
def test_expanded_gradient():
    check_adapter("triton", make((19,), 35, 37, torch.float32)[0])


@pytest.mark.parametrize(
    ("plan", "dtype"),
    [(plan, dtype) for plan in PLANS for dtype in (DTYPES if plan in FORMS.values() else DTYPES[:1])],
    ids=str,
)
def test_tiles(plan, dtype, monkeypatch):
    """Three tiles of rows with the smallest: two groups, the second not full."""
    use(plan, monkeypatch)
    monkeypatch.setattr(implementation, "_GROUP", 2)
    check_adapter("triton", *make((37,), 90, 45, dtype))


def test_more_row_sums_than_are_read_at_once(monkeypatch):
    """One for each tile of the bottleneck: 19."""
    use(TILED[FLAT], monkeypatch)
    check_adapter("triton", *make((5,), 20, 300, torch.float32))


@pytest.mark.usefixtures("form")
def test_tiles_that_are_all_full():
    check_adapter("triton", *make((32,), 64, 64, torch.float16))


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_and_eps(activation):
    options = {"activation": activation, "eps": 0.3}
    inputs, grad = make((19,), 35, 37, torch.float32)
    check_adapter("triton", inputs, grad, **options)


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("absent", OPTIONAL[1:])
def test_optional_arguments(absent):
    check_adapter("triton", *make((19,), 35, 37, torch.float32, absent))


@cache
def _all_gradients(form, absent):
    """Of the form that is in use."""
    _, *gradients = run(interpreted, *make((19,), 35, 37, torch.float32, absent))
    return dict(zip([name for name in NAMES if name not in absent], gradients, strict=True))


@pytest.mark.parametrize("form", ["tiled", "fused"], indirect=True)  # the forms of backward
@pytest.mark.parametrize("absent", [(), ("norm_weight", "norm_bias")])
@pytest.mark.parametrize("trained", NAMES)
def test_only_the_gradients_asked_for(trained, absent, form):
    if trained in absent:
        pytest.skip("an argument that is absent has no gradient")
    inputs, grad = make((19,), 35, 37, torch.float32, absent)
    leaf = inputs[NAMES.index(trained)].requires_grad_()
    interpreted(*inputs).backward(grad)
    # Not bit by bit: without x, the fused form gives way to the tiled one, which sums in another order.
    torch.testing.assert_close(leaf.grad, _all_gradients(form, absent)[trained], rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("width", [64, 10])  # several steps, and not even one
@pytest.mark.parametrize("dtype", DTYPES)
def test_mean_far_above_deviation(dtype, width):
    inputs, grad = make((19,), width, 37, dtype)
    inputs[0] = inputs[0] + 1000
    check_adapter("triton", inputs, grad)


@pytest.mark.usefixtures("form")
def test_variance_all_in_the_first_columns():
    """The worst for sums around the mean of the first columns, and splits whose means and deviations differ most."""
    inputs, grad = make((19,), 64, 37, torch.float32)
    inputs[0] = inputs[0] * 0.01
    inputs[0][:, :16] += 1000
    check_adapter("triton", inputs, grad)


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("eps", [1e-5, 0.0])
@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")  # numpy's, about the rows and splits that a mask discards
def test_rows_that_are_constant_in_part(eps):
    """Where eps is 0 a constant row has no LayerNorm, but one of which only a split is constant has."""
    inputs, grad = make((19,), 64, 37, torch.float32)
    inputs[0][:, :32] = 0.1
    check_adapter("triton", inputs, grad, eps=eps)


@pytest.mark.usefixtures("form")
def test_constant_rows():
    inputs, grad = make((19,), 64, 37, torch.float32)
    inputs[0] = torch.full_like(inputs[0], 0.1)
    check_adapter("triton", inputs, grad)


@pytest.mark.usefixtures("form")
def test_rows_of_one_value():
    """Nothing reaches x through their LayerNorm, not even rounding errors times 1 / sqrt(eps)."""
    inputs, grad = make((19,), 1, 37, torch.float32)
    _, grad_x, *_ = run(interpreted, inputs, grad)
    torch.testing.assert_close(grad_x, grad.float(), rtol=0, atol=0)


@pytest.mark.usefixtures("form")
def test_scale_of_zero():
    """How adapters begin: nothing of the branch in the output, and a gradient for scale alone."""
    inputs, grad = make((19,), 35, 37, torch.float32)
    inputs[-1] = torch.zeros(1, 1)
    check(interpreted, naive, inputs, grad)


@pytest.mark.usefixtures("form")
def test_layouts():
    inputs, grad = make((3, 11), 35, 37, torch.float16)
    expected = run(interpreted, inputs, grad)
    for layout in (permuted, _with_distant_rows):
        actual = run(interpreted, [layout(each) for each in inputs], layout(grad))
        for ours, theirs in zip(actual, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
            assert ours.is_contiguous()


def _with_distant_rows(tensor):
    """The same values in rows that lie apart, as in a slice of a wider tensor; NaN between them."""
    if tensor.dim() == 0:
        return tensor
    wider = torch.full((*tensor.shape[:-1], tensor.shape[-1] + 3), torch.nan, dtype=tensor.dtype)
    return wider[..., 2:-1].copy_(tensor)


@pytest.mark.usefixtures("form")
def test_expanded_inputs():
    inputs, grad = make((19,), 35, 37, torch.float32)
    inputs = [each[:1].expand_as(each) if each.dim() else each for each in inputs]
    inputs[0] = make((1,), 35, 37, torch.float32)[0][0].expand(19, 35)
    expected = run(interpreted, [each.contiguous() for each in inputs], grad)
    for ours, theirs in zip(run(interpreted, inputs, grad), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize(
    ("stream", "weights"), [(torch.float16, torch.float32), (torch.float32, torch.float16)], ids=str
)
def test_stream_and_weights_of_different_dtypes(stream, weights):
    """Trainable weights wider than the stream, and autocast."""
    inputs, grad = make((19,), 35, 37, torch.float64)
    narrow = [inputs[0].to(stream), *(each.float() for each in inputs[1:3])]
    narrow += [each.to(weights) for each in inputs[3:7]] + [inputs[7].float()]
    _assert_as_near_as_the_reference(narrow, grad)


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("scale", [0.01, 0.0])
def test_gradients_beyond_fp16(scale):
    """The definition multiplies with scale before a wide gradient becomes fp16: 1e5 fits times 0.01."""
    inputs, grad = make((19,), 35, 37, torch.float64)
    narrow = [each.float() for each in inputs[:3]] + [each.half() for each in inputs[3:7]] + [torch.tensor(scale)]
    narrow[4], narrow[6] = narrow[4].float(), narrow[6].float()  # biases, as gradients this large do not fit theirs
    _assert_as_near_as_the_reference([*narrow[:5], narrow[5] / 16, *narrow[6:]], grad * 1e5)


def _assert_as_near_as_the_reference(inputs, grad):
    """By the budget, where the reference's results are finite. Products are in the dtype of the weights."""
    exact = run(naive, [each.double() for each in inputs], grad)
    actual = run(interpreted, inputs, grad)
    plain = run(with_options(adapter, impl="reference"), inputs, grad)
    magnitudes = [0.0] * len(NAMES) + [scale_magnitude(inputs, grad)]
    for name, ours, truth, theirs, magnitude in zip(("output", *NAMES), actual, exact, plain, magnitudes, strict=True):
        assert ours.dtype == theirs.dtype
        if theirs.isfinite().all():
            precision = max(ours.dtype, inputs[3].dtype, key=lambda dtype: torch.finfo(dtype).eps)
            assert_within_budget(ours, truth, theirs, name, magnitude, precision)


LAUNCHED = {
    "tiled": [
        "adapter_fwd_stats_kernel", "adapter_fwd_down_kernel", "adapter_fwd_up_kernel",
        "adapter_bwd_weight_rows_kernel", "adapter_bwd_bottleneck_kernel", "adapter_bwd_input_kernel",
    ],
    "fused": ["adapter_fwd_fused_kernel", "adapter_bwd_weight_rows_kernel", "adapter_bwd_fused_kernel"],
    "small_m": [
        "adapter_fwd_small_m_kernel", "adapter_fwd_small_m_combine_kernel", "adapter_fwd_up_kernel",
        "adapter_bwd_weight_rows_kernel", "adapter_bwd_bottleneck_kernel", "adapter_bwd_input_kernel",
    ],
}  # fmt: skip


def test_launches(form, monkeypatch):
    launched = []
    for module in (implementation.fwd, implementation.small_m, implementation.bwd):
        for name in (name for name in vars(module) if name.endswith("_kernel")):
            kernel = getattr(module, name)
            monkeypatch.setattr(
                kernel, "run", lambda *a, run=kernel.run, name=name, **k: (launched.append(name), run(*a, **k))
            )
    run(interpreted, *make((19,), 35, 37, torch.float32))
    assert launched == LAUNCHED[form]


@pytest.mark.usefixtures("form")
def test_two_runs_agree_bit_by_bit():
    inputs, grad = make((19,), 35, 37, torch.float16)
    for ours, theirs in zip(run(interpreted, inputs, grad), run(interpreted, inputs, grad), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize(("form", "absent"), [("tiled", ()), ("tiled", OPTIONAL[2]), ("fused", ())])
def test_offsets_beyond_int32(form, absent, monkeypatch):
    """2^20 tokens and more. Only the last programs of each launch run, and pages that nobody touches cost nothing."""
    tokens, width, bottleneck = 2**20 + 3, 2064, 2064 if form == "tiled" else 16
    tile = Launch(16, 1024 if form == "tiled" else 16, 1024, 4, 2)
    use(Plan(form, tile, tile), monkeypatch)
    monkeypatch.setattr(implementation, "_BLOCK_WIDTH", 2048)
    monkeypatch.setattr(implementation, "_GROUP", 1)  # the last programs have the last rows
    run_only(monkeypatch, _last_three)
    small, grad = make((3,), width, bottleneck, torch.float16, absent)
    x, wide_grad = torch.empty(2, tokens, width, dtype=torch.float16)
    x[-3:], wide_grad[-3:] = small[0], grad
    inputs = [x, *small[1:]]
    out, *saved = implementation.forward(AdapterCall(*inputs, 1e-5, "silu"))
    expected, expected_grad, *_ = run(naive, small, grad)
    torch.testing.assert_close(out[-3:], expected, rtol=1e-2, atol=1e-2)
    if form == "tiled" and not absent:
        return  # backward would go over all 2064 rows of the weights
    (grad_x,) = implementation.backward(AdapterBackwardCall(wide_grad, *inputs, *saved, "silu", [True] + [False] * 7))
    torch.testing.assert_close(grad_x[-3:], expected_grad, rtol=1e-2, atol=1e-2)


def _last_three(kernel, programs):
    # adapter_bwd_weight_rows_kernel goes over the weights, all of which the last programs of the next launch need.
    return range(0 if kernel == "adapter_bwd_weight_rows_kernel" else max(programs - 3, 0), programs)


def test_the_interpreter_runs_only_when_named():
    inputs, _ = make(dtype=torch.float32)
    assert dispatch.explain(adapter, *inputs).name == "cpu"
    assert dispatch.explain(adapter, *inputs).reasons["triton"] == "the Triton interpreter runs only when named"
    assert dispatch.explain(adapter, *inputs, impl="triton").name == "triton"


@pytest.mark.parametrize("form", ["tiled", "fused"])
def test_an_unknown_activation_is_refused(form):
    """By the kernels too: not one of the known ones in its place."""
    inputs, grad = make((5,), 16, 16 if form == "fused" else 300, torch.float32)
    with pytest.raises(Exception, match="no such activation"):
        implementation.forward(AdapterCall(*inputs, 1e-5, "nonsense"))
    _, *saved = implementation.forward(AdapterCall(*inputs, 1e-5, "silu"))
    with pytest.raises(Exception, match="no such activation"):
        implementation.backward(AdapterBackwardCall(grad, *inputs, *saved, "nonsense", [True] * 8))
