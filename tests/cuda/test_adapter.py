"""The CUDA kernels of the adapter for a few tokens, run on a CPU through the implementation that launches them."""

from functools import partial

import pytest
import torch

from lynx_kernels.backends.dispatch import explain
from lynx_kernels.ops.adapter import adapter
from tests.cuda.host_kernels import launches
from tests.lynx_kernels.helpers import permuted, shifted
from tests.lynx_kernels.test_adapter import ACTIVATIONS, FORWARD, OPTIONAL, check_autocast_forward, check_forward, make

pytestmark = pytest.mark.usefixtures("on_host")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BLOCK_M = (1, 4, 8)  # tokens of a block


def kernels(x, *parameters, eps=1e-5, activation="silu"):
    """As ``adapter``, with everything that the operator returns."""
    out, *saved = FORWARD(x.reshape(-1, x.shape[-1]), *parameters, eps, activation, "cuda")
    return out.view(x.shape), *saved


def check(*args, absent=(), **options):
    inputs, _ = make(*args, absent=absent)
    check_forward(kernels, inputs, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 2, 4, 5, 8, 9])
def test_tokens(tokens, dtype):
    """One and two tiles of each size, full or not."""
    check((tokens,), 72, 40, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "width", "bottleneck"), [(1, 4104, 24), (3, 2056, 80), (7, 1032, 136), (64, 40, 24)]
)
def test_several_tiles_of_rows_and_columns(tokens, width, bottleneck, dtype):
    """Rows and columns that end inside a tile; the most tokens."""
    check((tokens,), width, bottleneck, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "width", "bottleneck"), [(1, 1, 1), (3, 13, 5), (2, 77, 45), (5, 1, 9), (4, 9, 1), (9, 1031, 4)]
)
def test_widths_that_loads_do_not_divide(tokens, width, bottleneck, dtype):
    check((tokens,), width, bottleneck, dtype)


@pytest.mark.parametrize(("width", "bottleneck"), [(64, 33), (33, 64)])
def test_one_aligned_product_and_one_not(width, bottleneck):
    check((3,), width, bottleneck, torch.bfloat16)


@pytest.mark.parametrize("multiprocessors", [1, 2, 5, 108, 132, 148])
def test_any_number_of_multiprocessors(multiprocessors, on_host):
    """Blocks with one row, with a part of a tile, with several tiles of different sizes."""
    on_host.multiprocessors = multiprocessors
    check((4,), 40, 73, torch.float32)
    check((11,), 40, 73, torch.bfloat16)


@pytest.mark.parametrize("absent", OPTIONAL)
@pytest.mark.parametrize("tokens", BLOCK_M)
def test_optional_arguments(tokens, absent):
    check((tokens,), 48, 24, torch.float32, absent=absent)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_activations_and_eps(activation, dtype):
    check((5,), 48, 24, dtype, activation=activation, eps=0.3)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_of_extreme_values(activation):
    """Pre-activations for which exp overflows, and NaN."""
    x = torch.tensor([[200.0, -200.0, 1e30, -1e30, torch.nan, 0.0, 1.0, -1.0]])
    eye, scale = torch.eye(8), torch.tensor(1.0)
    _, _, _, preactivation = kernels(x, None, None, eye[:4], None, eye[:, :4].contiguous(), None, scale)
    assert torch.equal(preactivation.isnan(), torch.ones(1, 4).bool())  # 0 * NaN
    finite = torch.where(x.isnan(), 0, x)
    out, *_ = kernels(finite, None, None, eye, None, eye, None, scale, activation=activation)
    torch.testing.assert_close(out, finite + ACTIVATIONS[activation](finite))
    nans = torch.full((8,), torch.nan)
    out, *_ = kernels(torch.ones(1, 8), None, None, eye, nans, eye, None, scale, activation=activation)
    assert out.isnan().all()


@pytest.mark.parametrize("tokens", [1, 3, 8])
@pytest.mark.parametrize(("dtype", "mean"), [*((dtype, 1e3) for dtype in DTYPES), (torch.float32, 1e6)])
def test_mean_far_above_deviation(dtype, mean, tokens):
    """In the last case the first sum of a row is not exact enough."""
    inputs, _ = make((tokens,), 520, 16, dtype)
    inputs[0] = inputs[0] + mean
    check_forward(kernels, inputs)


def test_the_activation_is_of_what_backward_reads():
    """-20.06 in bf16 is -20, whose silu is 6% larger."""
    eye, bias = torch.eye(8, dtype=torch.bfloat16), torch.full((8,), -20.06)
    out, *_, preactivation = kernels(torch.zeros(1, 8), None, None, eye, bias, eye, None, torch.tensor(1.0))
    torch.testing.assert_close(out, ACTIVATIONS["silu"](preactivation.float()), rtol=0.01, atol=0)


def test_constant_rows():
    inputs, _ = make((3,), 40, 8, torch.float32)
    inputs[0] = torch.full_like(inputs[0], 3.0)
    check_forward(kernels, inputs)


@pytest.mark.parametrize("width", [40, 77])
def test_constant_rows_of_large_numbers(width):
    """Normalising a 0 behind the end of such a row would give infinity."""
    x, *parameters = make((3,), width, 8, torch.float32)[0]
    *_, preactivation = kernels(torch.full_like(x, 3e36), *parameters)
    assert torch.equal(preactivation, kernels(torch.zeros_like(x), *parameters)[3])


@pytest.mark.parametrize("tokens", [1, 6])
def test_autocast(tokens):
    """bf16 products between an fp32 stream and fp32 norms."""
    check_autocast_forward(kernels, make((tokens,), 264, 40, torch.float32)[0])


@pytest.mark.parametrize("stream", DTYPES)
@pytest.mark.parametrize("weights", DTYPES)
def test_streams_and_weights_of_any_dtypes(stream, weights):
    """Norms and biases have a third dtype."""
    (x, *parameters), _ = make((3,), 40, 16, torch.float64)
    norms = DTYPES[(DTYPES.index(weights) + 1) % 3]
    inputs = [x.to(stream), *(each.to(weights if each.dim() == 2 else norms) for each in parameters)]
    out, *_ = kernels(*inputs)
    exact, *_ = FORWARD(*(each.double() for each in inputs), 1e-5, "silu", "reference")
    eps = torch.finfo(stream).eps + torch.finfo(weights).eps
    assert out.dtype == stream
    assert (out.double() - exact).abs().max() <= 4 * eps * exact.abs().max()


@pytest.mark.parametrize("weights", DTYPES)
def test_sums_are_fp32(weights):
    """For weights of every dtype. An fp32 stream shows it."""
    inputs, _ = make((3,), 40, 1032, torch.float32)
    inputs = [each.to(weights) if i in (3, 5) else each for i, each in enumerate(inputs)]
    out, *_, preactivation = kernels(*inputs, activation="relu")
    x, *_, up_weight, up_bias, scale = (each.double() for each in inputs)
    exact = x + scale * (preactivation.double().relu() @ up_weight.t() + up_bias)
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=1e-5)


@pytest.mark.parametrize("offset", [1, 2, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_do_not_start_at_16_bytes(offset, dtype):
    """All arguments, and each by itself. The sanitizer stops wide accesses at other addresses."""
    inputs, _ = make((3,), 40, 16, dtype)
    expected = kernels(*inputs)
    for some in (range(8), *([i] for i in range(8))):
        actual = kernels(*(shifted(each, offset) if i in some else each for i, each in enumerate(inputs)))
        for ours, theirs in zip(actual, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize(("width", "bottleneck"), [(40, 16), (13, 13)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_strides(dtype, width, bottleneck):
    """Rows further apart than they are wide, by strides that allow wide loads and others; columns that are not
    contiguous."""
    inputs, _ = make((2, 3), width, bottleneck, dtype)
    expected = kernels(*inputs)

    def spread(tensor, by):
        return torch.cat([tensor, tensor.new_full((*tensor.shape[:-1], by), torch.nan)], -1)[..., : tensor.shape[-1]]

    for change in (*(partial(spread, by=by) for by in (8, 4, 3)), permuted):
        changed = [change(each) if each is not None and each.dim() >= 2 else each for each in inputs]
        for ours, theirs in zip(kernels(*changed), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
            assert ours.is_contiguous()
    one_axis = [permuted(each.flatten(0, -2)) if i == 0 else each for i, each in enumerate(inputs)]
    assert torch.equal(kernels(*one_axis)[0].view(expected[0].shape), expected[0])
    permuted_vectors = [permuted(each) if each.dim() == 1 else each for each in inputs]
    assert torch.equal(kernels(*permuted_vectors)[0], expected[0])
    assert torch.equal(kernels(inputs[0][:1, :1].expand(2, 3, width), *inputs[1:])[0][1, 2], expected[0][0, 0])


@pytest.mark.parametrize("tokens", [1, 6, 12])
def test_the_order_of_threads_changes_nothing(tokens, on_host):
    inputs, _ = make((tokens,), 1040, 24, torch.float32)
    results = []
    for seed in range(3):
        on_host.seed = seed
        results.append(kernels(*inputs))
    for others in results[1:]:
        for ours, theirs in zip(results[0], others, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_tokens_do_not_affect_each_other():
    """The same bits beside tokens of numbers and of NaNs, in tiles of the same size."""
    inputs, _ = make((7,), 72, 24, torch.float32)
    expected, *_ = kernels(*inputs)
    inputs[0][[0, 2, 3, 4, 5, 6]] = torch.nan
    assert torch.equal(kernels(*inputs)[0][1], expected[1])


def test_no_tokens():
    inputs, _ = make((0,), 16, 8, torch.float32)
    assert [each.shape for each in kernels(*inputs)] == [(0, 16), (0,), (0,), (0, 8)]


def test_scales_of_any_shape():
    inputs, _ = make((2,), 16, 8, torch.bfloat16)
    expected = kernels(*inputs)[0]
    assert torch.equal(kernels(*inputs[:-1], inputs[-1].reshape(1, 1))[0], expected)


@pytest.mark.parametrize("tokens", [5, 12])
def test_compiled(tokens):
    """The choice is traced, for as many tokens as run without being named and for more."""
    inputs, _ = make((tokens,), 16, 8, torch.bfloat16)
    torch._dynamo.reset()
    actual = torch.compile(adapter, backend="aot_eager", fullgraph=True)(*inputs)
    assert torch.equal(actual, adapter(*inputs, impl="cuda" if tokens == 5 else None))


def reason(inputs):
    return explain(adapter, *inputs).reasons.get("cuda")


def test_what_is_refused(on_host, monkeypatch):
    inputs, _ = make((3,), 16, 8, torch.bfloat16)
    assert explain(adapter, *inputs).name == "cuda"
    for fp64 in ([0], [1], [2], [3, 5], [4], [6], [7]):
        assert reason([each.double() if i in fp64 else each for i, each in enumerate(inputs)]).endswith("is fp64")
    assert reason(make((5, 13), 16, 8, torch.bfloat16)[0]) == "the CUDA kernels take at most 64 tokens, and x has 65"
    assert reason([*inputs[:3], torch.zeros(0, 16).bfloat16(), None, torch.zeros(16, 0).bfloat16(), *inputs[6:]]) == (
        "down_weight is empty: (0, 16)"
    )
    for tensor in inputs:
        tensor.requires_grad_()
        assert reason(inputs) == "the CUDA kernels of the adapter have no gradient, and an argument requires one"
        with torch.no_grad():
            assert explain(adapter, *inputs).name == "cuda"
        tensor.requires_grad_(False)


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 16), (torch.float16, 8), (torch.bfloat16, 8)])
def test_more_tokens_than_plain_products_are_for(dtype, most):
    assert explain(adapter, *make((most,), 16, 8, dtype)[0]).name == "cuda"
    inputs, _ = make((most + 1,), 16, 8, dtype)
    assert reason(inputs).startswith(f"x has {most + 1} tokens, and above {most} tensor cores")
    assert explain(adapter, *inputs, impl="cuda").name == "cuda"
    if dtype == torch.float32:
        with torch.autocast("cpu", torch.bfloat16):
            assert reason(make((9,), 16, 8, dtype)[0]).startswith("x has 9 tokens, and above 8 tensor cores")


# Tokens, width, bottleneck: of the paper, small, huge, 1.
SHAPES = [
    (1, 4096, 2048), (5, 4096, 2048), (8, 1024, 512), (64, 4096, 64), (17, 8192, 28672), (1, 1, 1), (3, 2**20, 8),
]  # fmt: skip


@pytest.mark.parametrize("multiprocessors", [1, 82, 108, 132, 148])
@pytest.mark.parametrize(("tokens", "width", "bottleneck"), SHAPES)
@pytest.mark.parametrize("dtype", [0, 2])
def test_launches(tokens, width, bottleneck, dtype, multiprocessors):
    """Two blocks a multiprocessor if there are enough rows, in one wave. Tiles cover everything."""
    given = {"tokens": tokens, "width": width, "bottleneck": bottleneck, "down_dtype": dtype}
    down, up = launches("adapter_driver.cpp", **given, multiprocessors=multiprocessors)
    for (blocks, grid_n, grid_m, n_tiles, tile_n, k_tiles, block_m, block_k), rows, columns in (
        (down, bottleneck, width),
        (up, width, bottleneck),
    ):
        assert blocks == grid_n * grid_m
        assert grid_m == -(-tokens // block_m)
        assert grid_n == min(max(1, 2 * multiprocessors // grid_m), rows)
        most = -(-rows // grid_n)
        assert tile_n <= 8
        assert (n_tiles - 1) * tile_n < most <= n_tiles * tile_n
        assert n_tiles == -(-most // 8)
        assert (k_tiles - 1) * block_k < columns <= k_tiles * block_k


def test_blocks_of_the_paper_occupy_an_h200():
    (down, *_), (up, *_) = launches(
        "adapter_driver.cpp", tokens=5, width=4096, bottleneck=2048, down_dtype=2, multiprocessors=132
    )
    assert down == up == 2 * 132


def test_sizes_that_do_not_fit():
    with pytest.raises(RuntimeError, match="a side of a weight is 1073741824, and the CUDA kernels take less than"):
        launches("adapter_driver.cpp", tokens=1, width=2**30, bottleneck=8, down_dtype=2, multiprocessors=132)
