"""Every shipped launch of the adapter's kernels, at the paper's width, through the launchers and their rules."""

from dataclasses import replace

import pytest
import torch

from lynx_kernels.adapter import triton as implementation
from lynx_kernels.adapter import triton_launches as launches
from lynx_kernels.adapter.triton_launches import Call, Launch, plan_by_rule
from tests.compilation.offline import SHARED_MEMORY, TENSOR_CORES, compiling_for

ARCHS = list(SHARED_MEMORY)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# What is compiled for sm_80 also runs on sm_86, 89 and 120, which have less.
SHARED = {**SHARED_MEMORY, 80: 99 << 10}

FORWARD = {
    "tiled": ["statistics_kernel", "down_kernel", "up_kernel"],
    "fused": ["fused_kernel"],
    "few": ["part_kernel", "join_kernel", "up_kernel"],
}
BACKWARD = {
    "tiled": ["weight_rows_kernel", "backward_bottleneck_kernel", "backward_input_kernel"],
    "fused": ["weight_rows_kernel", "backward_fused_kernel"],
    None: [],
}
WITHOUT_PRODUCTS = {"statistics_kernel", "join_kernel", "weight_rows_kernel"}
# What each case adds: launches of another kind, chosen by the rules. Tokens, bottleneck, dtypes of stream and weights,
# the forms of forward and backward (None: another case has it). Of the fused form, the widest on 4 and on 8 warps.
CASES = {
    "large": (8192, 2048, BF16, BF16, "tiled", "tiled"),
    "medium": (512, 2048, BF16, BF16, "tiled", "tiled"),
    "fused 64": (8192, 64, BF16, BF16, "fused", "fused"),
    "fused 128": (8192, 128, BF16, BF16, "fused", "fused"),
    "fused 256": (8192, 256, BF16, BF16, "fused", None),
    "fused 256, 16 rows": (128, 256, BF16, BF16, "fused", None),
    "fused 128, 16 rows": (128, 128, BF16, BF16, "fused", "fused"),
    "few 16": (8, 2048, BF16, BF16, "few", "tiled"),
    "few 32": (32, 2048, BF16, BF16, "few", "tiled"),
    "few 64": (64, 2048, BF16, BF16, "few", "tiled"),
}
NARROW = ("fused 256, 16 rows", "fused 128, 16 rows", "few 16", "few 32")  # fewer than 64 rows
AUTOCAST = {
    "large": (8192, 2048, FP32, BF16, "tiled", "tiled"),
    "medium": (512, 2048, FP32, BF16, "tiled", None),
    "fused 64": (8192, 64, FP32, BF16, "fused", "fused"),
    "fused 256": (8192, 256, FP32, BF16, "fused", None),
    "few 64": (64, 2048, FP32, FP16, "few", "tiled"),
}
SINGLE = {
    "tiled": (8192, 2048, FP32, FP32, "tiled", "tiled"),
    "tiled, bf16 stream": (8192, 2048, BF16, FP32, "tiled", "tiled"),
    "fused 64": (8192, 64, BF16, FP32, "fused", "fused"),
    "few": (64, 2048, BF16, FP32, "few", None),
}
ODD = {
    "one": (1, 1, 1, BF16, "fused", "fused"),
    "tiny": (1, 77, 45, BF16, "fused", "fused"),
    "tiled": (8192, 1000, 1000, BF16, "tiled", "tiled"),
    "fused": (8192, 1000, 255, BF16, "fused", None),
    "few": (40, 1000, 1000, FP32, "few", None),
}


def compile_adapter(arch, tokens, bottleneck, stream, weights, forward, backward, *, width=4096, activation="silu"):
    def meta(*shape, dtype=weights):
        return torch.empty(shape, dtype=dtype, device="meta")

    inputs = [
        meta(tokens, width, dtype=stream), meta(width), meta(width), meta(bottleneck, width), meta(bottleneck),
        meta(width, bottleneck), meta(width), meta(dtype=FP32),
    ]  # fmt: skip
    with compiling_for(arch) as compiled:
        out, *saved = implementation.forward(*inputs, 1e-5, activation)
        if backward is not None:
            gradients = implementation.backward(out, *inputs, *saved, activation, [True] * 8)
            assert [each.shape for each in gradients] == [each.shape for each in inputs]
            assert [each.dtype for each in gradients] == [each.dtype for each in inputs]
    assert [each.name for each in compiled] == FORWARD[forward] + BACKWARD[backward]
    for kernel in compiled:
        assert 0 <= kernel.shared <= SHARED[arch], kernel
        assert kernel.spilled == 0, kernel
    return compiled


def test_the_cases_cover_every_launch():
    def chosen(tokens, bottleneck, stream, weights, *forms, width=4096):
        aligned = width % 16 == bottleneck % 16 == 0
        for direction in ("forward", "backward", "weights"):
            plan = plan_by_rule(Call(direction, tokens, width, bottleneck, stream, weights, aligned))
            yield from (plan.inward, plan.outward)

    cases = [*CASES.values(), *AUTOCAST.values(), *SINGLE.values()]
    found = {launch for case in cases for launch in chosen(*case)}
    for tokens, width, bottleneck, stream, *forms in ODD.values():
        found |= set(chosen(tokens, bottleneck, stream, BF16, *forms, width=width))
    found = {replace(each, parts=1) for each in found if each is not None}
    tables = [each for each in vars(launches).values() if isinstance(each, dict)]
    shipped = {each for table in tables for each in table.values() if isinstance(each, Launch)}
    assert shipped | {each for each in vars(launches).values() if isinstance(each, Launch)} <= found


@pytest.mark.parametrize("multiprocessors", [108, 132, 148])
@pytest.mark.parametrize("tokens", [1, 16, 17, 64])
@pytest.mark.parametrize(("width", "bottleneck"), [(4096, 2048), (4096, 256), (1024, 512), (8192, 4096)])
def test_a_few_tokens_occupy_the_gpu(width, bottleneck, tokens, multiprocessors):
    """Every weight in one tile of one part, and a program for nearly every multiprocessor."""
    call = Call("forward", tokens, width, bottleneck, BF16, BF16, True, multiprocessors=multiprocessors)
    plan = plan_by_rule(call)
    assert plan.form == "few"
    assert plan.inward.block_rows >= tokens
    assert plan.outward.block_rows >= tokens
    steps = width // plan.inward.block_inner
    tiles = bottleneck // plan.inward.block_columns
    assert plan.inward.programs(tokens, bottleneck) >= min(2 * multiprocessors, tiles * steps)
    assert plan.inward.parts <= steps


def assert_tensor_cores(compiled, arch):
    for kernel in compiled:
        if kernel.name not in WITHOUT_PRODUCTS:
            assert any(kernel.has(each) for each in ("mma.sync", TENSOR_CORES[arch])), kernel
            assert not kernel.serialized, kernel


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("case", CASES)
def test_half_precision(case, arch):
    """No spills, nothing serialised, and from tiles of 64 rows on the tensor cores that this generation brought."""
    compiled = compile_adapter(arch, *CASES[case])
    assert_tensor_cores(compiled, arch)
    if case not in NARROW:
        assert all(kernel.has(TENSOR_CORES[arch]) for kernel in compiled if kernel.name not in WITHOUT_PRODUCTS)


@pytest.mark.parametrize(
    ("case", "arch"),  # sm_80 is where they spill, sm_90 where ptxas serialises them
    [*((case, 80) for case in AUTOCAST), *((case, 90) for case in ("large", "fused 64", "fused 256"))],
)
def test_stream_wider_than_the_weights(case, arch):
    """Autocast: an fp32 residual stream through half-precision products."""
    assert_tensor_cores(compile_adapter(arch, *AUTOCAST[case]), arch)


@pytest.mark.parametrize(
    ("case", "arch"),  # sm_100 is where a widened stream was compiled to TF32
    [("tiled", 80), ("tiled", 90), ("tiled, bf16 stream", 100), ("fused 64", 80), ("fused 64", 100), ("few", 100)],
)
def test_single_precision(case, arch):
    """IEEE: TF32 would show as an instruction of the tensor cores."""
    for kernel in compile_adapter(arch, *SINGLE[case]):
        assert not any(kernel.has(each) for each in ("mma.sync", *TENSOR_CORES.values())), kernel


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh"])
def test_activations(activation):
    compile_adapter(90, *CASES["large"], activation=activation)


@pytest.mark.parametrize("case", ODD)
def test_sizes_that_become_constants_or_break_alignment(case):
    """Triton turns an argument of 1 into a constant and knows multiples of 16."""
    tokens, width, bottleneck, stream, *forms = ODD[case]
    compile_adapter(80, tokens, bottleneck, stream, BF16, *forms, width=width)
