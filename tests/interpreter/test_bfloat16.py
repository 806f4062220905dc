"""bf16 in the interpreter equals PyTorch's bf16: every operation is exact, then rounded to nearest even."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

from tests.interpreter.bfloat16 import rounded

BF16 = torch.bfloat16


@triton.jit
def arithmetic_kernel(p_left, p_right, p_out, n, BLOCK: tl.constexpr, OPERATION: tl.constexpr):
    o = tl.arange(0, BLOCK)
    b_left = tl.load(p_left + o, mask=o < n, other=3.0)
    b_right = tl.load(p_right + o, mask=o < n, other=-7.0)
    if OPERATION == "add":
        b_out = b_left + b_right
    elif OPERATION == "multiply":
        b_out = b_left * b_right
    elif OPERATION == "scalar":
        b_out = b_left * 0.1
    elif OPERATION == "absolute":
        b_out = tl.abs(b_left)
    elif OPERATION == "choose":
        b_out = tl.where(b_left < b_right, b_left, -b_right)
    elif OPERATION == "largest":
        b_out = tl.maximum(b_left, b_right)
    elif OPERATION == "constant":
        b_out = b_left + tl.full([BLOCK], 1.7, tl.bfloat16)
    elif OPERATION == "bits":
        b_out = (b_left.to(tl.int16, bitcast=True) + 1).to(tl.int16).to(tl.bfloat16, bitcast=True)
    elif OPERATION == "half":
        b_out = b_left.to(tl.float16).to(tl.bfloat16)
    elif OPERATION == "whole":
        b_out = b_left.to(tl.int32).to(tl.bfloat16)
    else:
        b_out = tl.exp(b_left.to(tl.float32)).to(tl.bfloat16)
    tl.store(p_out + o, b_out)


@triton.jit
def product_kernel(p_left, p_right, p_out, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    tl.store(p_out + o, tl.dot(tl.load(p_left + o), tl.load(p_right + o)))


@triton.jit
def forbidden_kernel(p, OPERATION: tl.constexpr):
    if OPERATION == "add":
        tl.atomic_add(p, tl.load(p))
    elif OPERATION == "exchange":
        tl.atomic_cas(p, tl.load(p), tl.load(p))
    else:
        tl.store(p, tl.load(p).to(tl.float32).to(tl.bfloat16, fp_downcast_rounding="rtz"))


EXPECTED = {
    "add": lambda left, right: left + right,
    "multiply": lambda left, right: left * right,
    "scalar": lambda left, right: left * torch.tensor(0.1, dtype=BF16),
    "absolute": lambda left, right: left.abs(),
    "choose": lambda left, right: torch.where(left < right, left, -right),
    "largest": torch.maximum,
    "constant": lambda left, right: left + torch.tensor(1.7, dtype=BF16),
    "bits": lambda left, right: (left.view(torch.int16) + 1).view(BF16),
    "half": lambda left, right: left.half().to(BF16),
    "whole": lambda left, right: left.int().to(BF16),
    "exp": lambda left, right: left.float().exp().to(BF16),
}


@pytest.mark.parametrize("operation", EXPECTED)
def test_as_in_pytorch(operation):
    generator = torch.Generator().manual_seed(0)
    left, right = (10 * torch.randn(128, generator=generator).to(BF16) for _ in range(2))
    out = torch.empty(128, dtype=BF16)
    arithmetic_kernel[(1,)](left, right, out, 100, BLOCK=128, OPERATION=operation)
    left[100:], right[100:] = 3.0, -7.0
    assert out.equal(EXPECTED[operation](left, right))


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_products(dtype):
    """Factors are exact, sums are in fp32, and the result is rounded once or not at all."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(32, 32, generator=generator).to(BF16) for _ in range(2))
    out = torch.empty(32, 32, dtype=dtype)
    product_kernel[(1,)](left, right, out, BLOCK=32)
    torch.testing.assert_close(out, (left.double() @ right.double()).to(dtype), atol=1e-5, rtol=2**-8)


def test_rounding():
    """Every kind of fp32 value: random bit patterns, halfway values, infinities, subnormal values, NaN."""
    patterns = np.random.default_rng(0).integers(0, 1 << 32, size=1 << 20, dtype=np.uint32)
    patterns[: 1 << 18] = patterns[: 1 << 18] & 0xFFFF0000 | 0x8000
    patterns[:6] = 0x7F800000, 0xFF800000, 0x7F800001, 0xFFFFFFFF, 0x7F7FFFFF, 1
    values = patterns.view(np.float32)
    expected = torch.from_numpy(values).to(BF16).float()
    torch.testing.assert_close(torch.from_numpy(rounded(values)), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("operation", ["add", "exchange", "truncate"])
def test_unsupported_operations_raise(operation):
    with pytest.raises(InterpreterError, match="of bf16 is not interpreted"):
        forbidden_kernel[(1,)](torch.ones(1, dtype=BF16), OPERATION=operation)
