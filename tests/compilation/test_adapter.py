"""Every shipped launch of the adapter's kernels, at the paper's size, through the launchers and their heuristic."""

import pytest
import torch

from lynx_kernels.adapter import triton as implementation
from tests.compilation.offline import SHARED_MEMORY, TENSOR_CORES, compiling_for

ROW_KERNELS = {"statistics_kernel", "weight_rows_kernel"}  # no products in them
KERNELS = ROW_KERNELS | {"down_kernel", "up_kernel", "backward_bottleneck_kernel", "backward_input_kernel"}
ARCHS = list(SHARED_MEMORY)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def compile_adapter(arch, tokens, stream, weights=None, *, width=4096, bottleneck=2048, activation="silu"):
    def meta(*shape, dtype=weights or stream):
        return torch.empty(shape, dtype=dtype, device="meta")

    inputs = [
        meta(tokens, width, dtype=stream), meta(width), meta(width), meta(bottleneck, width), meta(bottleneck),
        meta(width, bottleneck), meta(width), meta(dtype=FP32),
    ]  # fmt: skip
    with compiling_for(arch) as compiled:
        out, *saved = implementation.forward(*inputs, 1e-5, activation)
        gradients = implementation.backward(out, *inputs, *saved, activation, [True] * 8)
    assert [each.shape for each in gradients] == [each.shape for each in inputs]
    assert [each.dtype for each in gradients] == [each.dtype for each in inputs]
    assert {each.name for each in compiled} == KERNELS
    assert len(compiled) == len(KERNELS)
    for kernel in compiled:
        assert 0 <= kernel.shared <= SHARED_MEMORY[arch], kernel
    return compiled


def test_the_cases_cover_every_launch():
    chosen = {
        implementation.choose_launch(tokens, columns, dtype, backward=backward)
        for tokens, dtype in [(8192, BF16), (512, BF16), (8, BF16), (8192, FP32)]
        for columns in (2048, 4096)
        for backward in (False, True)
    }
    assert chosen == {each for each in vars(implementation).values() if isinstance(each, implementation.Launch)}


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(("tokens", "dtype"), [(8192, BF16), (8192, FP16), (512, BF16), (8, BF16)], ids=str)
def test_half_precision(tokens, dtype, arch):
    """No spills, tensor cores (from 64 rows on those that this generation brought), nothing serialised."""
    for kernel in compile_adapter(arch, tokens, dtype):
        assert kernel.spilled == 0, kernel
        if kernel.name not in ROW_KERNELS:
            assert kernel.has(TENSOR_CORES[arch] if tokens >= 64 else "mma.sync"), kernel
            assert not kernel.serialized, kernel


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("stream", [FP32, BF16, FP16], ids=str)
def test_single_precision(stream, arch):
    """IEEE: TF32 would show as an instruction of the tensor cores."""
    for kernel in compile_adapter(arch, 8192, stream, FP32):
        assert kernel.spilled == 0, kernel
        assert not any(kernel.has(each) for each in ("mma.sync", *TENSOR_CORES.values())), kernel


@pytest.mark.parametrize("arch", ARCHS)
def test_stream_wider_than_the_weights(arch):
    """Autocast: an fp32 residual stream through bf16 products. Twice the bytes of x may cost a few registers."""
    for kernel in compile_adapter(arch, 8192, FP32, BF16):
        assert kernel.spilled <= 128, kernel
        assert kernel.name in ROW_KERNELS or kernel.has(TENSOR_CORES[arch]), kernel


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh"])
def test_activations(activation):
    assert all(kernel.spilled == 0 for kernel in compile_adapter(90, 8192, BF16, activation=activation))


@pytest.mark.parametrize(("tokens", "width", "bottleneck"), [(1, 1, 1), (1, 77, 45), (300, 1000, 1)])
def test_sizes_that_become_constants_or_break_alignment(tokens, width, bottleneck):
    """Triton turns an argument of 1 into a constant and knows multiples of 16; odd sizes run, but they spill."""
    compile_adapter(80, tokens, BF16, width=width, bottleneck=bottleneck)
