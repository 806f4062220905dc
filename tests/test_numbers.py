"""The error budget: what it lets pass, and what it does not."""

import pytest
import torch

from benchmarks.checks import assert_near
from tests.numbers import assert_within_budget

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def results(dtype, size=2000):
    """Numbers in fp64, and what plain PyTorch might make of them: rounded once on the way and once at the end."""
    generator = torch.Generator().manual_seed(0)
    exact = torch.randn(size, generator=generator, dtype=torch.float64)
    factor = torch.rand(size, generator=generator, dtype=torch.float64) + 0.5
    return exact, ((exact * factor).to(dtype) / factor.to(dtype)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 3, 50, 2000])
def test_rounding_passes(dtype, size):
    exact, plain = results(dtype, size)
    assert_within_budget(exact.to(dtype), exact, plain)
    assert_within_budget(plain, exact, exact.to(dtype))
    assert_near([exact.to(dtype), plain], [exact, exact])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("factor", [1.01, 0.99, 1.12])
def test_a_constant_factor_does_not(dtype, factor):
    exact, plain = results(dtype)
    wrong = (exact * factor).to(dtype)
    with pytest.raises(AssertionError, match=r"bias|exceeds the budget"):
        assert_within_budget(wrong, exact, plain)
    with pytest.raises(AssertionError, match=r"gradient 0: (bias|error)"):
        assert_near([plain, wrong], [exact, exact])


def test_the_bias_alone_finds_one_percent_in_bf16():
    exact, plain = results(torch.bfloat16)
    exact[0], plain[0] = 3.0, 3.0 * (1 - 2**-6)  # plain's largest error is as large as in bf16 attention
    with pytest.raises(AssertionError, match="output: bias"):
        assert_within_budget((exact * 1.01).bfloat16(), exact, plain)


def test_errors_everywhere_do_not_hide_behind_one_of_plains():
    exact, plain = results(torch.bfloat16)
    exact[0], plain[0] = 3.0, 3.1
    signs = torch.randint(0, 2, (2000,), generator=torch.Generator().manual_seed(1)) * 2 - 1
    with pytest.raises(AssertionError, match="output: RMS error"):
        assert_within_budget((exact + 0.04 * signs).bfloat16(), exact, plain)


def test_a_sum_that_cancels_is_judged_by_its_terms():
    exact, ours = torch.tensor(1e-9, dtype=torch.float64), torch.tensor(1e-7)
    with pytest.raises(AssertionError, match="exceeds the budget"):
        assert_within_budget(ours, exact, torch.tensor(0.0))
    assert_within_budget(ours, exact, torch.tensor(0.0), magnitude=1.0)


def test_nothing_and_zeros():
    for size in (0, 5):
        zeros = torch.zeros(size)
        assert_within_budget(zeros, zeros.double(), zeros)
    assert_near([zeros], [zeros.double()])
