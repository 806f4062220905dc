"""The launches of pack_embeddings, through the launchers."""

import pytest
import torch

from lynx_kernels.embeddings import triton as implementation
from tests.compilation.offline import GFX942, GFX942_SHARED_MEMORY, SHARED_MEMORY, compiling_for

ARCHS = list(SHARED_MEMORY)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
LOAD, STORE = "ld.global.v4.b32", "st.global.v4.b32"  # 16 bytes a thread


def compile_embeddings(arch, table=BF16, vision=BF16, width=4096):
    def meta(*shape, dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    token_ids, index = meta(1000, dtype=torch.int64), meta(1000, dtype=torch.int32)
    rows = meta(300, width, dtype=vision)
    with compiling_for(arch) as compiled:
        out = implementation.forward(token_ids, meta(32000, width, dtype=table), rows, index)
        [gradient] = implementation.backward(out, token_ids, index, 32000, 300, vision, [False, True])
    assert (out.shape, out.dtype) == ((1000, width), table)
    assert (gradient.shape, gradient.dtype) == (rows.shape, vision)
    assert [each.name for each in compiled] == ["pack_kernel", "find_kernel", "sum_kernel"]
    for kernel in compiled:
        assert kernel.spilled == 0, kernel
    return compiled


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(("table", "vision"), [(BF16, BF16), (FP32, BF16), (BF16, FP32), (FP32, FP32)])
def test_wide_accesses(table, vision, arch):
    """Every access to rows moves 16 bytes; of registers so few that 1024 threads share a multiprocessor."""
    pack, find, total = compile_embeddings(arch, table, vision)
    for kernel in (pack, total):
        assert kernel.has(LOAD), kernel
        assert kernel.has(STORE), kernel
        for narrow in ("global.b16", "global.v2.b16", "global.v2.b32", "global.v4.b16"):
            assert narrow not in kernel.assembly, kernel
        assert kernel.registers <= 64, kernel
    assert pack.assembly.count(".b8 assertMessage_") == 2, pack  # ours, and none of integer overflow
    assert find.has("atom") or find.has("red"), find


def test_rows_that_start_anywhere():
    """A width of 77: no access may be wider than a value."""
    for kernel in compile_embeddings(80, FP16, FP16, 77):
        assert not kernel.has(LOAD), kernel


def test_gfx942():
    for kernel in compile_embeddings(GFX942):
        assert 0 <= kernel.shared <= GFX942_SHARED_MEMORY, kernel
