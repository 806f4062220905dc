"""The adapter's Triton forms, with small tiles, so that a few tokens make several tiles and partial ones."""

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
# One tile holds the whole bottleneck of up to 64.
FUSED = {tile: Plan("fused", *[Launch(tile[0], 64, *tile[2:])] * 2) for tile in (SMALL, FLAT)}
# The second plan has one split. The last one has more splits than steps.
SMALL_M = {
    (*tile, num_splits): Plan("small_m", Launch(*tile, num_splits=num_splits), Launch(*tile))
    for tile, num_splits in [(SMALL, 3), (FLAT, 1), (LARGE, 9)]
}
FORMS = {"tiled": TILED[SMALL], "fused": FUSED[SMALL], "small_m": SMALL_M[(*SMALL, 3)]}
PLANS = [*TILED.values(), *FUSED.values(), *SMALL_M.values()]
interpreted = with_options(adapter, impl="triton")


def use(plan, monkeypatch):
    """Use ``plan`` where its form applies: "small_m" only in forward, "fused" not if only the weights train."""
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
    """With the rules' launches, which choose the fused form here."""
    inputs, grad = make((tokens,), width, max(bottleneck, 1), dtype)
    if bottleneck == 0:
        inputs[3:6] = inputs[3][:0], inputs[4][:0], inputs[5][:, :0]
    check_adapter("triton", inputs, grad)


@pytest.mark.parametrize("tokens", [3, 70])
def test_rules_for_wide_bottlenecks(tokens):
    """With the rules' launches, which choose the small_m and the tiled form here."""
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
    """The smallest tile makes three row tiles: two groups, the second one partial."""
    use(plan, monkeypatch)
    monkeypatch.setattr(implementation, "_GROUP", 2)
    check_adapter("triton", *make((37,), 90, 45, dtype))


def test_more_row_sums_than_one_load_reads(monkeypatch):
    """There is one for each tile of the bottleneck: 19."""
    use(TILED[FLAT], monkeypatch)
    check_adapter("triton", *make((5,), 20, 300, torch.float32))


@pytest.mark.usefixtures("form")
def test_no_partial_tiles():
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
    """All gradients of a call with the current form."""
    _, *gradients = run(interpreted, *make((19,), 35, 37, torch.float32, absent))
    return dict(zip([name for name in NAMES if name not in absent], gradients, strict=True))


@pytest.mark.parametrize("form", ["tiled", "fused"], indirect=True)  # the forms of backward
@pytest.mark.parametrize("absent", [(), ("norm_weight", "norm_bias")])
@pytest.mark.parametrize("trained", NAMES)
def test_only_needed_gradients(trained, absent, form):
    if trained in absent:
        pytest.skip("an omitted argument has no gradient")
    inputs, grad = make((19,), 35, 37, torch.float32, absent)
    leaf = inputs[NAMES.index(trained)].requires_grad_()
    interpreted(*inputs).backward(grad)
    # Not bit by bit: without the gradient of x, the tiled form replaces the fused one and sums in another order.
    torch.testing.assert_close(leaf.grad, _all_gradients(form, absent)[trained], rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("width", [64, 10])  # several steps, and less than one
@pytest.mark.parametrize("dtype", DTYPES)
def test_mean_much_larger_than_std(dtype, width):
    inputs, grad = make((19,), width, 37, dtype)
    inputs[0] = inputs[0] + 1000
    check_adapter("triton", inputs, grad)


@pytest.mark.usefixtures("form")
def test_variance_only_in_the_first_columns():
    """The worst case for sums shifted by the mean of the first columns, and for splits, which differ most here."""
    inputs, grad = make((19,), 64, 37, torch.float32)
    inputs[0] = inputs[0] * 0.01
    inputs[0][:, :16] += 1000
    check_adapter("triton", inputs, grad)


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("eps", [1e-5, 0.0])
@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")  # from numpy, for rows and splits that a mask discards
def test_rows_with_a_constant_split(eps):
    """With eps = 0 LayerNorm is undefined for a constant row, but not for a row with one constant split."""
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
    """The gradient of x through LayerNorm is exactly 0, without rounding errors times 1 / sqrt(eps)."""
    inputs, grad = make((19,), 1, 37, torch.float32)
    _, grad_x, *_ = run(interpreted, inputs, grad)
    torch.testing.assert_close(grad_x, grad.float(), rtol=0, atol=0)


@pytest.mark.usefixtures("form")
def test_scale_of_zero():
    """As at the start of training: the output is x, and only scale has a gradient besides x."""
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
    """The same values in rows with gaps, as in a slice of a wider tensor, with NaN in the gaps."""
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
    """Weights wider than x, and the reverse, as under autocast."""
    inputs, grad = make((19,), 35, 37, torch.float64)
    narrow = [inputs[0].to(stream), *(each.float() for each in inputs[1:3])]
    narrow += [each.to(weights) for each in inputs[3:7]] + [inputs[7].float()]
    _assert_as_exact_as_the_reference(narrow, grad)


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("scale", [0.01, 0.0])
def test_gradients_beyond_fp16(scale):
    """The reference multiplies by scale before it casts a wider gradient to fp16: 1e5 * 0.01 fits."""
    inputs, grad = make((19,), 35, 37, torch.float64)
    narrow = [each.float() for each in inputs[:3]] + [each.half() for each in inputs[3:7]] + [torch.tensor(scale)]
    narrow[4], narrow[6] = (
        narrow[4].float(),
        narrow[6].float(),
    )  # biases in fp32, because such large gradients do not fit fp16
    _assert_as_exact_as_the_reference([*narrow[:5], narrow[5] / 16, *narrow[6:]], grad * 1e5)


def _assert_as_exact_as_the_reference(inputs, grad):
    """Within the error budget where the reference is finite. Products are in the dtype of the weights."""
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
    """2^20 tokens and more. Only the last programs of each launch run, so most pages are never accessed."""
    tokens, width, bottleneck = 2**20 + 3, 2064, 2064 if form == "tiled" else 16
    tile = Launch(16, 1024 if form == "tiled" else 16, 1024, 4, 2)
    use(Plan(form, tile, tile), monkeypatch)
    monkeypatch.setattr(implementation, "_BLOCK_WIDTH", 2048)
    monkeypatch.setattr(implementation, "_GROUP", 1)  # so that the last programs compute the last rows
    run_only(monkeypatch, _last_three)
    small, grad = make((3,), width, bottleneck, torch.float16, absent)
    x, wide_grad = torch.empty(2, tokens, width, dtype=torch.float16)
    x[-3:], wide_grad[-3:] = small[0], grad
    inputs = [x, *small[1:]]
    out, *saved = implementation.forward(AdapterCall(*inputs, 1e-5, "silu"))
    expected, expected_grad, *_ = run(naive, small, grad)
    torch.testing.assert_close(out[-3:], expected, rtol=1e-2, atol=1e-2)
    if form == "tiled" and not absent:
        return  # backward would loop over all 2064 rows of the weights
    (grad_x,) = implementation.backward(AdapterBackwardCall(wide_grad, *inputs, *saved, "silu", [True] + [False] * 7))
    torch.testing.assert_close(grad_x[-3:], expected_grad, rtol=1e-2, atol=1e-2)


def _last_three(kernel, programs):
    # adapter_bwd_weight_rows_kernel must run completely: the last programs of the next launch need all of its results.
    return range(0 if kernel == "adapter_bwd_weight_rows_kernel" else max(programs - 3, 0), programs)


def test_interpreter_runs_only_when_named():
    inputs, _ = make(dtype=torch.float32)
    assert dispatch.explain(adapter, *inputs).name == "cpu"
    assert (
        dispatch.explain(adapter, *inputs).reasons["triton"] == "the Triton interpreter runs only when named by impl="
    )
    assert dispatch.explain(adapter, *inputs, impl="triton").name == "triton"


@pytest.mark.parametrize("form", ["tiled", "fused"])
def test_unknown_activation_raises(form):
    """The kernels check it too, instead of using another activation."""
    inputs, grad = make((5,), 16, 16 if form == "fused" else 300, torch.float32)
    with pytest.raises(Exception, match="unknown activation"):
        implementation.forward(AdapterCall(*inputs, 1e-5, "nonsense"))
    _, *saved = implementation.forward(AdapterCall(*inputs, 1e-5, "silu"))
    with pytest.raises(Exception, match="unknown activation"):
        implementation.backward(AdapterBackwardCall(grad, *inputs, *saved, "nonsense", [True] * 8))
