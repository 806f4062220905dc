"""The operations that generation runs for every token: the small-M adapter and decoding attention, forward only."""

from functools import partial

import pytest
import torch

from lynx_kernels import prefix_attention_decode
from lynx_kernels.backends import dispatch
from lynx_kernels.ops import prefix_attention_decode as decode
from lynx_kernels.ops.adapter import OPERATION as ADAPTERS
from lynx_kernels.ops.adapter import adapter
from tests.gpu import bench
from tests.lynx_kernels.attention_cases import (
    assert_case_within_budget,
    assert_results_within_budget,
    decode_case,
    grads_of_case,
    poison_beyond_lengths,
)
from tests.lynx_kernels.helpers import permuted
from tests.lynx_kernels.test_adapter import ACTIVATIONS, FORWARD, OPTIONAL, check_autocast_forward, check_forward
from tests.lynx_kernels.test_adapter import make as make_on

BF16 = torch.bfloat16
ON_GPU = bench.DEVICE == "cuda"
PAPER = {"width": 4096, "bottleneck": 2048} if ON_GPU else {"width": 96, "bottleneck": 48}
DECODERS = decode.OPERATION
# Beams of two images, and an image without beams. OTHER_BEAMS has the same sizes with other lengths.
BEAMS = [0, 2, 0, 0, 2, 0], [576, 33, 0], [3, 70, 64, 128, 5, 17]
OTHER_BEAMS = [2, 1, 1, 0, 0, 2], [576, 0, 500], [128, 3, 70, 64, 5, 9]
HEADS = {"heads": 32, "kv_heads": 32, "dim": 128} if ON_GPU else {"heads": 4, "kv_heads": 4, "dim": 16}


def make(*args, **options):
    return make_on(*args, **options, device=bench.DEVICE)[0]


def decoding(queries, batch=BEAMS, impl=None, dtype=BF16, **options):
    options = {**HEADS, **options}
    case = decode_case(queries, batch=batch, impl=impl, dtype=dtype, device=bench.DEVICE, **options)
    return poison_beyond_lengths(case)


def runs(call, *args):
    return dispatch.explain(call, *args).name is not None


adapters = pytest.mark.parametrize(
    ("impl", "dtype"),
    [
        (impl, dtype)
        for impl in ADAPTERS.names
        for dtype in bench.DTYPES
        if bench.PRESENT and runs(partial(adapter, impl=impl), *make((3,), dtype=dtype))
    ],
)
decoders = pytest.mark.parametrize(
    ("impl", "dtype"),
    [
        (impl, dtype)
        for impl in DECODERS.names
        for dtype in bench.DTYPES
        if bench.PRESENT and runs((case := decoding(1, impl=impl, dtype=dtype)).operation, *case.inputs)
    ],
)


def forward(impl):
    def call(x, *parameters, eps=1e-5, activation="silu"):
        out, *saved = FORWARD(x.reshape(-1, x.shape[-1]), *parameters, eps, activation, impl)
        return out.view(x.shape), *saved

    return call


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("dtype", bench.DTYPES)
def test_default_implementation(dtype):
    assert dispatch.explain(adapter, *make((5,), **PAPER, dtype=dtype)).name == "cuda"
    assert dispatch.explain(adapter, *make((64,), **PAPER, dtype=dtype)).name == "triton"
    case = decoding(1, dtype=dtype)
    assert dispatch.explain(prefix_attention_decode, *case.inputs, *case.table).name == "cuda"


@pytest.mark.parametrize("tokens", [1, 2, 5, 8, 9, 16, 64])
@adapters
def test_size_of_the_paper(impl, dtype, tokens):
    check_forward(forward(impl), make((tokens,), **PAPER, dtype=dtype))


@pytest.mark.parametrize(
    ("tokens", "width", "bottleneck"),
    [(1, 1, 1), (1, 16, 16), (5, 77, 45), (8, 130, 20), (3, 40, 1), (2, 4104, 2056), (64, 257, 65), (7, 1000, 129)],
)
@adapters
def test_odd_sizes(impl, dtype, tokens, width, bottleneck):
    check_forward(forward(impl), make((tokens,), width, bottleneck, dtype))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@adapters
def test_activations_and_eps(impl, dtype, activation):
    check_forward(forward(impl), make((5,), 256, 128, dtype), activation=activation, eps=0.3)


@pytest.mark.parametrize("absent", OPTIONAL[1:], ids=" ".join)
@adapters
def test_optional_arguments(impl, dtype, absent):
    check_forward(forward(impl), make((5,), 256, 128, dtype, absent))


@adapters
def test_permuted_inputs(impl, dtype):
    inputs = [permuted(each) for each in make((5,), 256, 128, dtype)]
    check_forward(forward(impl), inputs)
    assert all(each.is_contiguous() for each in forward(impl)(*inputs))


@adapters
def test_mean_much_larger_than_std(impl, dtype):
    inputs = make((5,), **PAPER, dtype=dtype)
    inputs[0] = inputs[0] + 1000
    check_forward(forward(impl), inputs)


@pytest.mark.parametrize("impl", ADAPTERS.names)
def test_autocast(impl):
    inputs = make((5,), **PAPER, dtype=torch.float32)
    if not runs(partial(adapter, impl=impl), *inputs):
        pytest.skip(f"{impl} does not run here")
    check_autocast_forward(forward(impl), inputs)


@pytest.mark.parametrize("tokens", [1, 5, 64])
@adapters
def test_adapter_is_deterministic(impl, dtype, tokens):
    inputs = make((tokens,), **PAPER, dtype=dtype)
    bench.check_deterministic(lambda: forward(impl)(*inputs))


@pytest.mark.usefixtures("cuda")
@adapters
def test_adapter_never_synchronises(impl, dtype):
    inputs = make((5,), **PAPER, dtype=dtype)
    bench.check_never_synchronises(lambda: forward(impl)(*inputs))


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("tokens", [1, 4, 5, 64])
@adapters
def test_adapter_graph_replays_with_new_inputs(impl, dtype, tokens):
    inputs = make((tokens,), **PAPER, dtype=dtype)
    new = [each.flip(0) if each.dim() else each * 0.5 for each in inputs]
    actual = bench.replayed(lambda: forward(impl)(*inputs), inputs, new)
    check_forward(lambda *_: actual, new)


@pytest.mark.parametrize("dim", [64, 80, 128])
@pytest.mark.parametrize("queries", [1, 3])
@decoders
def test_beams(impl, dtype, queries, dim):
    assert_case_within_budget(decoding(queries, impl=impl, dtype=dtype, dim=dim), gradients=False)


@pytest.mark.parametrize(("heads", "kv_heads"), [(32, 8), (8, 1), (14, 2)])
@decoders
def test_heads_that_share_keys(impl, dtype, heads, kv_heads):
    assert_case_within_budget(decoding(2, impl=impl, dtype=dtype, heads=heads, kv_heads=kv_heads), gradients=False)


@decoders
def test_strides_of_caches(impl, dtype):
    """Heads as the outer dimension, as in transformers' caches; and other strides."""
    case = decoding(1, impl=impl, dtype=dtype)
    q, *caches = case.inputs
    for change in (lambda each: each.transpose(1, 2).contiguous().transpose(1, 2), permuted):
        actual = case.operation(q, *map(change, caches))
        assert_results_within_budget(actual, case, grads_of_case(case))


@decoders
def test_decoding_is_deterministic(impl, dtype):
    case = decoding(1, impl=impl, dtype=dtype)
    bench.check_deterministic(lambda: case.operation(*case.inputs))


@pytest.mark.usefixtures("cuda")
@decoders
def test_decoding_never_synchronises(impl, dtype):
    if impl == "reference":
        pytest.skip("the reference may synchronise")
    case = decoding(1, impl=impl, dtype=dtype)
    bench.check_never_synchronises(lambda: case.operation(*case.inputs))


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("queries", [1, 3])
@decoders
def test_decoding_graph_replays_with_new_lengths(impl, dtype, queries):
    if impl == "reference":
        pytest.skip("the reference may synchronise")
    case, other = (decoding(queries, batch, impl=impl, dtype=dtype) for batch in (BEAMS, OTHER_BEAMS))
    call = lambda: case.operation(*case.inputs)  # noqa: E731
    actual = bench.replayed(call, [*case.inputs, *case.table], [*other.inputs, *other.table])
    assert_results_within_budget(actual, other, grads_of_case(other))


@pytest.mark.usefixtures("cuda")
def test_a_cache_of_more_than_2_to_the_31_elements():
    """Only the last root has a branch."""
    bench.need_free(12)
    case = decoding(2, ([0], [576], [9]), impl="cuda")
    q, shared_k, shared_v, branch_k, branch_v = case.inputs
    before = 2**19

    def behind_zeros(shared):
        return torch.cat([shared.new_zeros(before, *shared.shape[1:]), shared])

    ranges, branch_lengths = case.table
    caches = behind_zeros(shared_k), behind_zeros(shared_v), branch_k, branch_v
    actual = prefix_attention_decode(q, *caches, ranges + before, branch_lengths, return_lse=True, impl="cuda")
    assert caches[0].numel() > 2**31
    assert_results_within_budget(actual, case, grads_of_case(case))
