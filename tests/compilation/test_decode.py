"""The launches of decoding, through the launcher and its heuristic."""

import pytest
import torch

from lynx_kernels.attention import triton_decode as implementation
from tests.compilation.offline import SHARED_MEMORY, TENSOR_CORES, compiling_for

ARCHS = list(SHARED_MEMORY)
BEAMS, GROUPED = (5, 32, 32), (5, 32, 4)  # branches of one root, heads, heads of the keys: tiles of 16 and of 64 rows


def compile_decode(arch, head_dim, size, dtype=torch.bfloat16):
    branches, heads, kv_heads = size

    def meta(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    q = meta(branches, 1, heads, head_dim)
    root, branch = meta(1, kv_heads, 901, head_dim), meta(branches, kv_heads, 64, head_dim)
    indices = [meta(length, dtype=torch.int32) for length in (branches, 1, branches)]
    with compiling_for(arch) as compiled:
        root, branch = root.transpose(1, 2), branch.transpose(1, 2)  # heads outside, as transformers keeps them
        out, lse = implementation.forward(q, root, root, branch, branch, *indices, 0.1)
    assert (out.shape, out.dtype) == (q.shape, dtype)
    assert (lse.shape, lse.dtype) == (q.shape[:3], torch.float32)
    assert [each.name for each in compiled] == ["decode_kernel", "merge_kernel"]
    for kernel in compiled:
        assert 0 <= kernel.shared <= SHARED_MEMORY[arch], kernel
    return compiled


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(("head_dim", "size"), [(64, BEAMS), (88, BEAMS), (128, BEAMS), (128, GROUPED)], ids=str)
def test_half_precision(head_dim, size, arch):
    """No spills, tensor cores even for 16 rows, and wide loads of the keys that do not wait for each other."""
    decode, merge = compile_decode(arch, head_dim, size)
    assert decode.spilled == merge.spilled == 0, (decode, merge)
    assert decode.has("mma.sync") or decode.has(TENSOR_CORES[arch]), decode
    assert decode.has("cp.async.cg.shared.global"), decode  # 16 bytes: the cache's strides are known to be multiples


def test_single_precision():
    """IEEE: TF32 would show as an instruction of the tensor cores."""
    decode, _ = compile_decode(100, 64, BEAMS, torch.float32)
    assert not any(decode.has(each) for each in ("mma.sync", *TENSOR_CORES.values())), decode


def test_wide_heads():
    compile_decode(80, 256, GROUPED)
