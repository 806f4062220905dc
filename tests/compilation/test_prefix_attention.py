"""Every shipped launch of prefix attention, through the launchers and their heuristic."""

import pytest
import torch

from lynx_kernels.attention import triton as implementation
from lynx_kernels.attention import triton_launches
from tests.compilation.offline import SHARED_MEMORY, TENSOR_CORES, compiling_for

KERNELS = ["forward_kernel", "statistics_kernel", "query_gradient_kernel", "key_gradient_kernel"]
ARCHS = list(SHARED_MEMORY)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
LONG, SHORT = 16, 160  # segments of 8192 tokens; multiples of 16, so that launches which both choose compile once


def compile_attention(arch, head_dim, dtype=BF16, segments=LONG, *, tokens=8192, heads=8, kv_heads=4, is_causal=True):
    def meta(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    q, k, v = meta(tokens, heads, head_dim), meta(tokens, kv_heads, head_dim), meta(tokens, kv_heads, head_dim)
    table = meta(segments + 1, 4, dtype=torch.int32), is_causal, 0.1
    with compiling_for(arch) as compiled:
        out, lse = implementation.prefix_forward(q, k, v, *table)
        gradients = implementation.prefix_backward(out, lse, out, lse, q, k, v, *table)
    for result, like in zip((out, *gradients), (q, q, k, v), strict=True):
        assert (result.shape, result.dtype) == (like.shape, like.dtype)
    assert (lse.shape, lse.dtype) == (q.shape[:2], FP32)
    assert [each.name for each in compiled] == KERNELS
    for kernel in compiled:
        assert 0 <= kernel.shared <= SHARED_MEMORY[arch], kernel
    return compiled


def test_the_cases_cover_every_launch():
    """But for those of few queries, which only spans have."""
    chosen = {
        launch
        for head_dim, dtype in [(128, BF16), (256, BF16), (128, FP32)]
        for segments in (LONG, SHORT)
        for launch in triton_launches.choose_launches(head_dim, dtype, 8192, segments, False)
    }
    all_launches = {each for each in vars(triton_launches).values() if isinstance(each, triton_launches.Launch)}
    assert chosen == all_launches - {triton_launches.FEW_FORWARD, triton_launches.FEW_QUERY_GRADIENT}


# Bytes stored and loaded, for (kernel, architecture, head_dim); 0 elsewhere.
SPILLS = {
    ("forward_kernel", 80, 128): 52,
    ("query_gradient_kernel", 100, 64): 16,
    ("key_gradient_kernel", 80, 88): 96,
    ("key_gradient_kernel", 100, 88): 32,
}

CASES = [
    *((arch, head_dim, BF16, LONG) for arch in ARCHS for head_dim in (64, 88, 128)),
    *((arch, 128, BF16, SHORT) for arch in ARCHS),
    (90, 128, FP16, LONG),
]


@pytest.mark.parametrize(("arch", "head_dim", "dtype", "segments"), CASES, ids=str)
def test_half_precision(arch, head_dim, dtype, segments):
    """No spills, the tensor cores that this generation brought, nothing serialised."""
    for kernel in compile_attention(arch, head_dim, dtype, segments):
        assert kernel.spilled <= SPILLS.get((kernel.name, arch, head_dim), 0), kernel
        if kernel.name != "statistics_kernel":  # no products in it
            assert kernel.has(TENSOR_CORES[arch]), kernel
            assert not kernel.serialized, kernel


@pytest.mark.parametrize(("arch", "head_dim"), [(80, 256), (90, 256)])
def test_wide_heads(arch, head_dim):
    """Twice the sums a thread: the smaller tiles spill too, but within bounds."""
    for kernel in compile_attention(arch, head_dim):
        assert kernel.spilled <= 1200, kernel


@pytest.mark.parametrize(("arch", "head_dim"), [(90, 128), (100, 64), (90, 256)])
def test_single_precision(arch, head_dim):
    """IEEE: TF32 would show as an instruction of the tensor cores. Operands in registers spill where heads are wide."""
    for kernel in compile_attention(arch, head_dim, FP32):
        assert not any(kernel.has(each) for each in ("mma.sync", *TENSOR_CORES.values())), kernel
        assert kernel.spilled <= (1200 if head_dim <= 128 else 12000), kernel


@pytest.mark.parametrize(
    ("tokens", "heads", "head_dim", "is_causal"), [(1, 1, 1, True), (77, 3, 7, False), (300, 1, 32, False)]
)
def test_sizes_that_become_constants_or_break_alignment(tokens, heads, head_dim, is_causal):
    """Triton turns an argument of 1 into a constant and knows multiples of 16."""
    compile_attention(80, head_dim, segments=1, tokens=tokens, heads=heads, kv_heads=1, is_causal=is_causal)
