"""Every shipped launch of cross attention's kernels, through the launchers and their heuristic."""

import pytest
import torch

from lynx_kernels.attention import triton_cross as implementation
from lynx_kernels.attention import triton_launches
from tests.compilation.offline import SHARED_MEMORY, TENSOR_CORES, compiling_for

KERNELS = {"forward_kernel", "statistics_kernel", "query_gradient_kernel", "key_gradient_kernel"}
PRODUCTS = KERNELS - {"statistics_kernel"}
# Bytes: of two accumulators of two tiles each, and of 128 x 64 with three stages.
SPILLS = {("key_gradient_kernel", 80, 88): 96, ("forward_kernel", 80, 128): 44}
ARCHS = list(SHARED_MEMORY)
FEW, MANY = (64, 2), (8192, 4)  # queries and segments: latents of two pictures, and long texts


def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


def compile_cross(arch, head_dim, size, dtype=torch.bfloat16):
    queries, segments = size
    q, k, v = meta(queries, 16, head_dim, dtype=dtype), *(meta(4505, 16, head_dim, dtype=dtype) for _ in range(2))
    table = [meta(*shape, dtype=torch.int32) for shape in [(segments + 1, 3), (72,), (80,)]]
    with compiling_for(arch) as compiled:
        out, lse = implementation.forward(q, k, v, *table, 0.1)
        gradients = implementation.backward(out, lse, out, lse, q, k, v, *table, 0.1)
    assert [(each.shape, each.dtype) for each in gradients] == [(each.shape, each.dtype) for each in (q, k, v)]
    assert {each.name for each in compiled} == KERNELS | ({"merge_kernel"} if size == FEW else set())
    for kernel in compiled:
        assert 0 <= kernel.shared <= SHARED_MEMORY[arch], kernel
    return compiled


def test_few_queries_have_launches_of_their_own():
    few = triton_launches.FEW_FORWARD, triton_launches.FEW_QUERY_GRADIENT
    assert triton_launches.choose_launches(128, torch.bfloat16, *FEW, True)[:2] == few
    assert triton_launches.choose_launches(128, torch.bfloat16, *MANY, True)[:2] != few


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(("head_dim", "size"), [(64, FEW), (88, FEW), (128, FEW), (128, MANY)], ids=str)
def test_half_precision(head_dim, size, arch):
    """No spills, tensor cores: with enough queries those that this generation brought."""
    for kernel in compile_cross(arch, head_dim, size):
        assert kernel.spilled <= SPILLS.get((kernel.name, arch, head_dim), 0), kernel
        if kernel.name in PRODUCTS:
            assert kernel.has(TENSOR_CORES[arch]) or (size == FEW and kernel.has("mma.sync")), kernel


def test_single_precision():
    """IEEE: TF32 would show as an instruction of the tensor cores."""
    for kernel in compile_cross(100, 64, FEW, torch.float32):
        assert not any(kernel.has(each) for each in ("mma.sync", *TENSOR_CORES.values())), kernel


def test_wide_heads():
    compile_cross(80, 256, FEW)
