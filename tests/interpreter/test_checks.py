"""Tests of the checks themselves: each fault is made on purpose and must be found."""

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError


@triton.jit
def copy_kernel(p_from, p_to, n, shift, BLOCK: tl.constexpr, STEP: tl.constexpr):
    o_n = tl.program_id(0) * STEP + tl.arange(0, BLOCK)
    tl.store(p_to + o_n, tl.load(p_from + o_n + shift, mask=o_n < n), mask=o_n < n)


@triton.jit
def product_kernel(p_left, p_out, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    b_left = tl.load(p_left + o)
    tl.store(p_out + o, tl.dot(b_left, b_left))


@triton.jit
def pack_embeddings_bwd_sum_kernel(p_values, p_out, BLOCK: tl.constexpr, RUNNING: tl.constexpr):
    o = tl.arange(0, BLOCK)
    b_values = tl.load(p_values + o)
    tl.store(p_out + o, tl.cumsum(b_values, 0) if RUNNING else tl.zeros_like(b_values) + tl.sum(b_values, 0))


def copy(length=20, shift=0, source=None, step=16):
    source = torch.arange(20.0) if source is None else source
    target = torch.empty(20)
    copy_kernel[(2,)](source, target, length, shift, BLOCK=16, STEP=step)
    return target


def test_correct_kernel_passes():
    torch.testing.assert_close(copy(), torch.arange(20.0))


@pytest.mark.parametrize("fault", [{"shift": 1}, {"shift": -1}, {"length": 21}, {"source": torch.zeros(40)[:19]}])
def test_out_of_bounds(fault):
    with pytest.raises(InterpreterError, match=r"1 of \d+ lanes out of bounds"):
        copy(**fault)


def test_unwritten_memory_is_nan():
    assert copy(length=19).isnan().tolist() == [False] * 19 + [True]


def test_programs_that_store_to_one_address():
    with pytest.raises(RuntimeError, match="12 addresses are stored to by more than one program"):
        copy(step=4)


def test_products_that_do_not_compile():
    with pytest.raises(InterpreterError, match="each must be at least 16"):
        product_kernel[(1,)](torch.ones(8, 8), torch.empty(8, 8), BLOCK=8)


# Triton itself accumulates cumulative sums of bf16 in fp32.
@pytest.mark.parametrize(("dtype", "running"), [(torch.float16, False), (torch.bfloat16, False), (torch.float16, True)])
def test_sums_in_half_precision(dtype, running):
    with pytest.raises(InterpreterError, match=r"a sum of (fp|bf)16 values"):
        pack_embeddings_bwd_sum_kernel[(1,)](torch.ones(16, dtype=dtype), torch.empty(16), BLOCK=16, RUNNING=running)
    pack_embeddings_bwd_sum_kernel[(1,)](torch.ones(16), total := torch.empty(16), BLOCK=16, RUNNING=running)
    assert total[-1] == 16
