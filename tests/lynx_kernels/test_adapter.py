from functools import partial

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from lynx_kernels.backends import dispatch, onednn
from lynx_kernels.ops.adapter import OPERATION, adapter, reference
from lynx_kernels.ops.adapter.call import AdapterCall
from tests.lynx_kernels.helpers import check, check_results, count_compilations, dtensors, permuted, run
from tests.numbers import assert_within_budget

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
NAMES = ("x", "norm_weight", "norm_bias", "down_weight", "down_bias", "up_weight", "up_bias", "scale")
FORWARD = torch.ops.lynx_kernels.adapter.default
BACKWARD = torch.ops.lynx_kernels.adapter_backward.default
ACTIVATIONS = {"silu": nn.SiLU(), "relu": nn.ReLU(), "gelu": nn.GELU(), "gelu_tanh": nn.GELU("tanh")}
OPTIONAL = [
    (),
    ("norm_bias",),
    ("norm_weight", "norm_bias"),
    ("down_bias",),
    ("up_bias",),
    ("norm_weight", "norm_bias", "down_bias", "up_bias"),
]


def naive(x, norm_weight, norm_bias, down_weight, down_bias, up_weight, up_bias, scale, *, eps=1e-5, activation="silu"):
    normalized = x if norm_weight is None else F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, eps)
    down = F.linear(normalized, down_weight, down_bias)
    return x + scale * F.linear(ACTIVATIONS[activation](down), up_weight, up_bias)


def make(shape=(37,), width=13, bottleneck=5, dtype=torch.float64, absent=(), device="cpu"):
    generator = torch.Generator(device).manual_seed(0)
    normal = partial(torch.randn, generator=generator, dtype=torch.float64, device=device)
    shapes = {
        "x": (*shape, width), "norm_weight": (width,), "norm_bias": (width,), "down_weight": (bottleneck, width),
        "down_bias": (bottleneck,), "up_weight": (width, bottleneck), "up_bias": (width,), "scale": (),
    }  # fmt: skip
    inputs = {name: normal(each) for name, each in shapes.items()}
    grad = normal((*shape, width))
    inputs["down_weight"] *= width**-0.5
    inputs["up_weight"] *= bottleneck**-0.5
    inputs["scale"] = torch.tensor(0.7, dtype=torch.float64, device=device)
    return [None if name in absent else inputs[name].to(dtype) for name in NAMES], grad


def runs(impl, dtype, device="cpu"):
    inputs, _ = make(dtype=dtype, device=device)
    return impl not in dispatch.explain(adapter, *inputs).reasons


# All implementations that can run on this machine, in every dtype they support.
CASES = [(impl, dtype) for impl in OPERATION.names for dtype in DTYPES if runs(impl, dtype)]
FP32 = [impl for impl, dtype in CASES if dtype == torch.float32]


def with_options(function, **options):
    return lambda *inputs: function(*inputs, **options)


def check_adapter(impl, inputs, grad=None, **options):
    """Compare with the composition of PyTorch functions."""
    check_adapter_results(run(with_options(adapter, impl=impl, **options), inputs, grad), inputs, grad, **options)


def check_forward(function, inputs, **options):
    """Check output, statistics and pre-activation of a forward-only implementation. ``function`` takes the arguments of
    ``adapter`` and returns all four."""
    out, mean, rstd, preactivation = function(*inputs, **options)
    wide = [each if each is None else each.double() for each in inputs]
    assert (out.shape, out.dtype) == (inputs[0].shape, inputs[0].dtype)
    assert_within_budget(out, naive(*wide, **options), naive(*inputs, **options))
    given = [each.reshape(-1, each.shape[-1]) if i == 0 else each for i, each in enumerate(inputs)]
    exact, plain = [
        reference.forward(AdapterCall(*tensors, options.get("eps", 1e-5), options.get("activation", "silu")))
        for tensors in ([each if each is None else each.double() for each in given], given)
    ]
    names = ("mean", "rstd", "preactivation")
    for name, ours, truth, theirs in zip(names, (mean, rstd, preactivation), exact[1:], plain[1:], strict=True):
        assert ours.dtype == theirs.dtype, name
        # The terms of a mean may cancel; their rounding errors do not.
        magnitude = inputs[0].double().abs().max().item() if name == "mean" and truth.numel() else 0.0
        assert_within_budget(ours, truth, theirs, name, magnitude)


def scale_magnitude(inputs, grad=None, **options):
    """The magnitude for the gradient of scale. It is one inner product, so its error is bounded by the norms of the two
    factors (Cauchy-Schwarz)."""
    exact = [each if each is None else each.double() for each in inputs]
    branch = naive(*exact[:-1], torch.ones_like(exact[-1]), **options) - exact[0]
    return ((torch.ones_like(branch) if grad is None else grad).norm() * branch.norm()).item()


def check_adapter_results(actual, inputs, grad=None, **options):
    magnitude = scale_magnitude(inputs, grad, **options)
    check_results(actual, with_options(naive, **options), inputs, grad, last_magnitude=magnitude)


def check_permuted(impl, inputs, grad):
    inputs, grad = [permuted(each) for each in inputs], permuted(grad)
    check_adapter(impl, inputs, grad)
    assert all(each.is_contiguous() for each in run(with_options(adapter, impl=impl), inputs, grad))


def check_autocast(function, inputs, grad):
    """bf16 products with x and norm in fp32."""
    with torch.autocast(grad.device.type, torch.bfloat16):
        actual, plain = run(function, inputs, grad), run(naive, inputs, grad)
    exact = run(naive, [each.double() for each in inputs], grad)
    for name, ours, theirs, truth in zip(("output", *NAMES), actual, plain, exact, strict=True):
        assert ours.dtype == torch.float32
        assert_within_budget(ours, truth, theirs, name, precision=torch.bfloat16)


def check_autocast_forward(function, inputs):
    """The same check for a forward-only implementation; ``function`` as in check_forward."""
    with torch.autocast(inputs[0].device.type, torch.bfloat16):
        ours, _, _, preactivation = function(*inputs)
        plain = naive(*inputs)
    assert (ours.dtype, preactivation.dtype) == (torch.float32, torch.bfloat16)
    assert_within_budget(ours, naive(*(each.double() for each in inputs)), plain, precision=torch.bfloat16)


@pytest.mark.parametrize(("impl", "dtype"), CASES)
@pytest.mark.parametrize("shape", [(0,), (1,), (37,), (3, 11), (2, 3, 5), (130,)])
def test_equals_the_composition(shape, impl, dtype):
    inputs, grad = make(shape, dtype=dtype)
    output = adapter(*inputs, impl=impl)
    assert output.dtype == dtype
    assert output.shape == (*shape, 13)
    check_adapter(impl, inputs, grad)
    check_adapter(impl, inputs)  # an expanded gradient


@pytest.mark.parametrize(("impl", "dtype"), CASES)
@pytest.mark.parametrize(("tokens", "width", "bottleneck"), [(3, 1024, 512), (70, 1024, 512), (50, 768, 64)])
def test_real_widths(tokens, width, bottleneck, impl, dtype):
    check_adapter(impl, *make((tokens,), width, bottleneck, dtype))


@pytest.mark.parametrize("absent", OPTIONAL)
@pytest.mark.parametrize("tokens", [5, 70])
@pytest.mark.parametrize(("impl", "dtype"), CASES)
def test_optional_arguments(impl, dtype, tokens, absent):
    check_adapter(impl, *make((tokens,), dtype=dtype, absent=absent))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("impl", "dtype"), CASES)
def test_activations_and_eps(activation, impl, dtype):
    check_adapter(impl, *make(dtype=dtype), activation=activation, eps=0.3)


@pytest.mark.parametrize("absent", OPTIONAL)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(activation, absent):
    inputs, _ = make((3,), 4, 3, absent=absent)
    leaves = [each if each is None else each.requires_grad_() for each in inputs]
    assert torch.autograd.gradcheck(with_options(adapter, activation=activation), leaves, fast_mode=True)


@pytest.mark.parametrize(("impl", "dtype"), [case for case in CASES if case[1] != torch.float64])
def test_mean_much_larger_than_std(impl, dtype):
    inputs, grad = make((70,), width=64, dtype=dtype)
    inputs[0] = inputs[0] + 1000
    check_adapter(impl, inputs, grad)


@pytest.mark.parametrize(("impl", "dtype"), [case for case in CASES if case[1] != torch.float64])
def test_layer_norm_gradients_over_many_tokens(impl, dtype):
    """Plain PyTorch accumulates them in bf16, so it cannot serve as a comparison."""
    inputs, grad = make((20000,), 16, 8, dtype)
    actual = run(with_options(adapter, impl=impl), inputs, grad)
    exact = run(naive, [each.double() for each in inputs], grad.to(dtype).double())
    for name, ours, truth in zip(NAMES[1:3], actual[2:4], exact[2:4], strict=True):
        error = (ours.double() - truth).abs().max() / truth.abs().max()
        assert error <= 16 * torch.finfo(dtype).eps, f"{name}: {error:.1e}"


def test_constant_rows():
    inputs, grad = make()
    inputs[0] = torch.full_like(inputs[0], 3.0)
    check(adapter, naive, inputs, grad)


def test_one_element_scale_of_any_shape():
    inputs, grad = make()
    inputs[-1] = inputs[-1].reshape(1, 1)
    assert run(adapter, inputs, grad)[-1].shape == (1, 1)


@pytest.mark.parametrize("shape", [(3, 11), (7, 10)])
@pytest.mark.parametrize(("impl", "dtype"), CASES)
def test_permuted_inputs_and_gradient(impl, dtype, shape):
    check_permuted(impl, *make(shape, dtype=dtype))


def test_expanded_inputs():
    inputs, grad = make()
    inputs = [each[:1].expand_as(each) if each.dim() else each for each in inputs]
    inputs[0] = inputs[0] + torch.arange(13)  # a row that is not constant
    check(adapter, naive, inputs, grad)


@pytest.mark.parametrize("tokens", [37, 70])
@pytest.mark.parametrize("impl", FP32)
def test_fp32_weights_with_bf16_x(impl, tokens):
    """bf16 x and fp32 weights: only the output and the gradient of x are rounded."""
    inputs, grad = make((tokens,), dtype=torch.float32)
    inputs[0], grad = inputs[0].bfloat16(), grad.bfloat16()
    actual = run(with_options(adapter, impl=impl), inputs, grad)
    plain = run(naive, [inputs[0].float(), *inputs[1:]], grad)
    exact = run(naive, [each.double() for each in inputs], grad)
    assert [each.dtype for each in actual] == [inputs[0].dtype, *(each.dtype for each in inputs)]
    for name, ours, theirs, truth in zip(("output", *NAMES), actual, plain, exact, strict=True):
        assert_within_budget(ours, truth, theirs.to(ours.dtype), name)


@pytest.mark.parametrize("absent", [(), ("norm_weight", "norm_bias")])
@pytest.mark.parametrize("trained", NAMES)
@pytest.mark.parametrize("impl", FP32)
def test_only_needed_gradients(impl, trained, absent):
    if trained in absent:
        pytest.skip("an omitted argument has no gradient")
    inputs, grad = make(dtype=torch.float32, absent=absent)
    names = [name for name in NAMES if name not in absent]
    _, *expected = run(with_options(adapter, impl=impl), inputs, grad)
    leaf = inputs[NAMES.index(trained)].requires_grad_()
    adapter(*inputs, impl=impl).backward(grad.float())
    torch.testing.assert_close(leaf.grad, expected[names.index(trained)])
    assert all(each is leaf or each is None or each.grad is None for each in inputs)


@pytest.mark.parametrize("absent", [(), ("norm_weight", "norm_bias", "down_bias", "up_bias")])
@pytest.mark.parametrize("layout", [lambda tensor: tensor, permuted])
@pytest.mark.parametrize("impl", FP32)
def test_opcheck(impl, layout, absent):
    inputs, grad = make((7,), dtype=torch.float32, absent=absent)
    inputs = [each if each is None else layout(each) for each in inputs]
    _, *saved = FORWARD(*inputs, 1e-5, "silu", impl)
    needs = [each is not None for each in inputs]
    torch.library.opcheck(BACKWARD, (layout(grad.float()), *inputs, *saved, "silu", needs, impl))
    only_x = [True] + [False] * 7
    torch.library.opcheck(BACKWARD, (layout(grad.float()), *inputs, *saved, "silu", only_x, impl))
    leaves = [each if each is None else each.requires_grad_() for each in inputs]
    torch.library.opcheck(FORWARD, (*leaves, 1e-5, "silu", impl))


def test_compiles_twice_at_most():
    def leaves(shape):
        inputs, _ = make(shape, dtype=torch.float32)
        inputs[3].requires_grad_()
        return inputs

    counts = count_compilations(adapter, [leaves((rows,)) for rows in (37, 50, 61, 20, 77)])
    assert counts[-1] == counts[2] <= 3


@pytest.mark.parametrize("impl", FP32)
def test_compiled_equals_eager(impl):
    inputs, grad = make((3, 11), dtype=torch.float32)
    function = with_options(adapter, impl=impl)
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    for ours, theirs in zip(run(compiled, inputs, grad), run(function, inputs, grad), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("impl", FP32)
def test_autocast(impl, compiled):
    """Products are in bf16; x and the norm stay in fp32."""
    if impl == "cpu" and not onednn.HAS_BF16:
        pytest.skip("this CPU has no products in bf16")
    inputs, grad = make(dtype=torch.float32)
    function = with_options(adapter, impl=impl)
    if compiled:
        function = torch.compile(function, backend="aot_eager", fullgraph=True)
    check_autocast(function, inputs, grad)
    with torch.autocast("cpu", torch.bfloat16):
        *_, preactivation = FORWARD(*inputs, 1e-5, "silu", impl)
    assert preactivation.dtype == torch.bfloat16


def test_autocast_casts_fake_tensors_too():
    """A compiler runs fake tensors through the operator, not through the kernel."""
    inputs, _ = make(dtype=torch.float32)
    with FakeTensorMode() as fake, torch.autocast("cpu", torch.bfloat16):
        *_, preactivation = FORWARD(*(fake.from_tensor(each) for each in inputs), 1e-5, "silu", "reference")
    assert preactivation.dtype == torch.bfloat16


def test_autocast_leaves_fp64_alone():
    inputs, grad = make()
    with torch.autocast("cpu", torch.bfloat16):
        actual = run(adapter, inputs, grad)
    for ours, theirs in zip(actual, run(adapter, inputs, grad), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_backward_inside_autocast():
    """Forward fixes the dtypes. An autocast region around backward does not change them."""
    inputs, grad = make(dtype=torch.float32)
    leaves = [each.requires_grad_() for each in inputs]
    output = adapter(*leaves)
    expected = torch.autograd.grad(output, leaves, grad.float(), retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        actual = torch.autograd.grad(output, leaves, grad.float())
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_second_derivative_raises():
    (x, *weights), _ = make()
    [gradient] = torch.autograd.grad(adapter(x.requires_grad_(), *weights).sum(), [x], create_graph=True)
    with pytest.raises(RuntimeError, match="have no second derivatives"):
        gradient.sum().backward()


def test_triton_rejects_fp64(monkeypatch):
    monkeypatch.setattr(dispatch, "architecture", lambda device: "sm_90")
    assert dispatch.explain(adapter, *make()[0]).reasons["triton"].endswith("an argument is fp64")


def test_explain_and_unknown_implementation():
    inputs, _ = make()
    choice = dispatch.explain(adapter, *inputs)
    assert choice.name == "reference"
    assert choice.reasons["cpu"] == "it computes in fp32 and bf16, and x would be torch.float64"
    assert choice.reasons["triton"].startswith("it is written for sm_80, sm_90, sm_100, gfx942, and the tensors")
    assert dispatch.explain(adapter, *make(dtype=torch.float32)[0]).name == "cpu"
    with pytest.raises(RuntimeError, match="impl='triton' cannot run this call: it is written for sm_80"):
        adapter(*(each.float() for each in inputs), impl="triton")
    with pytest.raises(ValueError, match="impl='nonsense' is not an implementation"):
        adapter(*inputs, impl="nonsense")


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"x": torch.zeros(3, 13, dtype=torch.int64)}, TypeError, "x is torch.int64"),
        ({"scale": torch.tensor(1)}, TypeError, "scale is torch.int64"),
        ({"x": torch.tensor(1.0)}, ValueError, "x must be .*, d. and down_weight .r, d., got .. and .5, 13."),
        ({"down_weight": torch.zeros(13)}, ValueError, "down_weight .r, d., got .37, 13. and .13,."),
        ({"norm_weight": torch.zeros(12)}, ValueError, "norm_weight has shape .12,., expected .13,."),
        ({"norm_bias": torch.zeros(1)}, ValueError, "norm_bias has shape .1,., expected .13,."),
        ({"down_weight": torch.zeros(5, 12)}, ValueError, "down_weight has shape .5, 12., expected .5, 13."),
        ({"down_bias": torch.zeros(13)}, ValueError, "down_bias has shape .13,., expected .5,."),
        ({"up_weight": torch.zeros(5, 13)}, ValueError, "up_weight has shape .5, 13., expected .13, 5."),
        ({"up_bias": torch.zeros(5)}, ValueError, "up_bias has shape .5,., expected .13,."),
        ({"scale": torch.zeros(2)}, ValueError, "scale must have one element, got shape .2,."),
        ({"norm_weight": None}, ValueError, "norm_bias is given without norm_weight"),
        ({"up_weight": torch.zeros(13, 5)}, TypeError, "up_weight is torch.float32, down_weight torch.float64"),
        ({"up_bias": torch.zeros(13, device="meta")}, ValueError, "up_bias is on meta, expected cpu"),
        ({"activation": "nonsense"}, ValueError, "activation='nonsense', expected one of"),
    ],
)  # fmt: skip
def test_errors(changed, error, message):
    inputs, _ = make()
    with pytest.raises(error, match=message):
        adapter(**{**dict(zip(NAMES, inputs, strict=True)), **changed})


def test_dtensor_raises(tmp_path):
    inputs, _ = make()
    with dtensors(tmp_path) as distribute, pytest.raises(TypeError, match="down_weight is a DTensor"):
        adapter(*inputs[:3], distribute(inputs[3]), *inputs[4:])


def test_cpu_unsupported_reasons(monkeypatch):
    inputs, _ = make(dtype=torch.float32)

    def reason(*given):
        return dispatch.explain(adapter, *given).reasons["cpu"]

    assert reason(*(each.to("meta") for each in inputs)) == "it is written for cpu, and the tensors are on meta"
    empty = [*inputs[:3], torch.zeros(0, 13), None, torch.zeros(13, 0), *inputs[6:]]
    assert reason(*empty) == "down_weight is empty: (0, 13)"
    assert reason(*inputs[:3], inputs[3].half(), None, inputs[5].half(), *inputs[6:]).endswith("would be torch.float16")
    with torch.autocast("cpu", torch.float16):
        assert reason(*inputs).endswith("the products would be torch.float16")
        assert adapter(*inputs).isfinite().all()
    monkeypatch.setattr(onednn, "HAS_BF16", False)
    assert reason(*make(dtype=torch.bfloat16)[0]) == "oneDNN does not support bf16 on this CPU"
    monkeypatch.setattr(onednn, "HAS_LINEAR", False)
    assert "without oneDNN" in reason(*inputs)
    with pytest.raises(RuntimeError, match="impl='cpu' cannot run this call: this PyTorch is built without oneDNN"):
        adapter(*inputs, impl="cpu")
