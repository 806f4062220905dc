import pytest
import torch

from lynx_kernels import dispatch
from lynx_kernels.adapter import adapter
from lynx_kernels.adapter import triton as implementation
from lynx_kernels.adapter.triton import Launch
from tests.lynx_kernels.helpers import check, permuted, run
from tests.lynx_kernels.test_adapter import ACTIVATIONS, NAMES, OPTIONAL, check_adapter, make, naive, with_options

DTYPES = [torch.float32, torch.float16]
# One launch for all products, so that a few tokens make several tiles, and ragged ones.
LAUNCHES = [Launch(16, 32, 16, 4, 2), Launch(32, 16, 64, 4, 2), Launch(64, 64, 32, 4, 2)]
interpreted = with_options(adapter, impl="triton")


@pytest.fixture
def _small_tiles(monkeypatch):
    monkeypatch.setattr(implementation, "choose_launch", lambda *shape, **options: LAUNCHES[0])
    monkeypatch.setattr(implementation, "_BLOCK_WIDTH", 16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "width", "bottleneck"), [(0, 77, 45), (1, 16, 16), (37, 77, 45), (70, 130, 20), (19, 40, 1)]
)
def test_equals_the_composition(tokens, width, bottleneck, dtype):
    inputs, grad = make((tokens,), width, bottleneck, dtype)
    check_adapter("triton", inputs, grad)


def test_expanded_gradient():
    check_adapter("triton", make((19,), 35, 37, torch.float32)[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("launch", LAUNCHES, ids=str)
@pytest.mark.parametrize(("tokens", "width", "bottleneck"), [(37, 45, 77), (48, 64, 32)])
def test_tiles(tokens, width, bottleneck, launch, dtype, monkeypatch):
    """Three tiles of rows with the smallest: two groups, the second not full."""
    monkeypatch.setattr(implementation, "choose_launch", lambda *shape, **options: launch)
    monkeypatch.setattr(implementation, "_GROUP", 2)
    monkeypatch.setattr(implementation, "_BLOCK_WIDTH", 32)
    check_adapter("triton", *make((tokens,), width, bottleneck, dtype))


@pytest.mark.usefixtures("_small_tiles")
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_activations_and_eps(activation, dtype):
    options = {"activation": activation, "eps": 0.3}
    inputs, grad = make((19,), 35, 37, dtype)
    check_adapter("triton", inputs, grad, **options)


@pytest.mark.usefixtures("_small_tiles")
@pytest.mark.parametrize("absent", OPTIONAL[1:])
@pytest.mark.parametrize("dtype", DTYPES)
def test_optional_arguments(absent, dtype):
    check_adapter("triton", *make((19,), 35, 37, dtype, absent))


@pytest.mark.usefixtures("_small_tiles")
@pytest.mark.parametrize("absent", [(), ("norm_weight", "norm_bias")])
@pytest.mark.parametrize("trained", NAMES)
def test_only_the_gradients_asked_for(trained, absent):
    if trained in absent:
        pytest.skip("an argument that is absent has no gradient")
    inputs, grad = make((19,), 35, 37, torch.float32, absent)
    names = [name for name in NAMES if name not in absent]
    _, *expected = run(interpreted, inputs, grad)
    leaf = inputs[NAMES.index(trained)].requires_grad_()
    interpreted(*inputs).backward(grad)
    torch.testing.assert_close(leaf.grad, expected[names.index(trained)], rtol=0, atol=0)


@pytest.mark.usefixtures("_small_tiles")
@pytest.mark.parametrize("dtype", DTYPES)
def test_mean_far_above_deviation(dtype):
    inputs, grad = make((19,), 64, 37, dtype)
    inputs[0] = inputs[0] + 1000
    check_adapter("triton", inputs, grad)


def test_constant_rows():
    inputs, grad = make((19,), 64, 37, torch.float32)
    inputs[0] = torch.full_like(inputs[0], 0.1)
    check_adapter("triton", inputs, grad)


@pytest.mark.usefixtures("_small_tiles")
def test_scale_of_zero():
    """How adapters begin: nothing of the branch in the output, and a gradient for scale alone."""
    inputs, grad = make((19,), 35, 37, torch.float32)
    inputs[-1] = torch.zeros(1, 1)
    check(interpreted, naive, inputs, grad)


@pytest.mark.usefixtures("_small_tiles")
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


@pytest.mark.usefixtures("_small_tiles")
def test_expanded_inputs():
    inputs, grad = make((19,), 35, 37, torch.float32)
    inputs = [each[:1].expand_as(each) if each.dim() else each for each in inputs]
    inputs[0] = make((1,), 35, 37, torch.float32)[0][0].expand(19, 35)
    check_adapter("triton", inputs, grad)


@pytest.mark.usefixtures("_small_tiles")
@pytest.mark.parametrize(
    ("stream", "weights"), [(torch.float16, torch.float32), (torch.float32, torch.float16)], ids=str
)
def test_stream_and_weights_of_different_dtypes(stream, weights):
    """Trainable weights wider than the stream, and autocast: as near to the truth as the reference, twice its error."""
    inputs, grad = make((19,), 35, 37, torch.float64)
    narrow = [inputs[0].to(stream), *(each.float() for each in inputs[1:3])]
    narrow += [each.to(weights) for each in inputs[3:7]] + [inputs[7].float()]
    exact = run(naive, [each.double() for each in narrow], grad)
    actual = run(interpreted, narrow, grad)
    plain = run(with_options(adapter, impl="reference"), narrow, grad)
    *not_scale, (ours, _, theirs) = zip(actual, exact, plain, strict=True)
    assert ours.dtype == theirs.dtype
    for ours, truth, theirs in not_scale:  # one number's error says little, and test_tiles has it
        assert ours.dtype == theirs.dtype
        rounding = torch.finfo(ours.dtype).eps * truth.abs().max()
        assert (ours - truth).abs().max() <= 2 * ((theirs - truth).abs().max() + rounding)


def test_three_launches_forward_and_three_backward(monkeypatch):
    launched = []
    for name in (name for name in vars(implementation.kernels) if name.endswith("_kernel")):
        kernel = getattr(implementation.kernels, name)
        monkeypatch.setattr(
            kernel, "run", lambda *a, run=kernel.run, name=name, **k: (launched.append(name), run(*a, **k))
        )
    inputs, grad = make((19,), 35, 37, torch.float32)
    run(interpreted, inputs, grad)
    assert launched == [
        "statistics_kernel", "down_kernel", "up_kernel",
        "weight_rows_kernel", "backward_bottleneck_kernel", "backward_input_kernel",
    ]  # fmt: skip


def test_two_runs_agree_bit_by_bit():
    inputs, grad = make((33,), 35, 37, torch.float16)
    for ours, theirs in zip(run(interpreted, inputs, grad), run(interpreted, inputs, grad), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_the_interpreter_runs_only_when_named():
    inputs, _ = make(dtype=torch.float32)
    assert dispatch.which(adapter, *inputs).name == "cpu"
    assert dispatch.which(adapter, *inputs).refused == {"triton": "the Triton interpreter runs only when named"}
    assert dispatch.which(adapter, *inputs, impl="triton").name == "triton"
