"""Results in bf16 are rounded to nearest, ties to even: exact ties, on every instruction set.

Sums are exact here, so that every result lies halfway between two neighbours, and the rule alone decides.
"""

import pytest
import torch

from lynx_kernels import SpanLayout, adapter, cross_attention, prefix_attention_decode
from lynx_kernels.backends import cpu as cpu_backend

if cpu_backend.MISSING is not None:
    pytest.skip(cpu_backend.MISSING, allow_module_level=True)

BF16 = torch.bfloat16
HEAD_DIM = 64


def neighbours():
    """All normal numbers whose doubles are finite, those above them in size, and the even ones of both, (n, 64)."""
    positive = torch.arange(0x0080, 0x7E00, dtype=torch.int32)
    bits = torch.stack([positive, positive + 1, positive + positive % 2])
    signed = torch.cat([bits, bits | 0x8000], 1).to(torch.uint16).view(BF16)
    return signed[:, : signed.shape[1] // HEAD_DIM * HEAD_DIM].unflatten(1, (-1, HEAD_DIM))


def test_the_numbers_are_ties():
    low, high, even = neighbours()
    middle = (low.float() + high.float()) / 2
    assert torch.equal(middle.double(), (low.double() + high.double()) / 2)
    assert torch.equal(middle.to(BF16), even)
    assert 0.49 < (even == low).float().mean() < 0.51


def test_means_of_two_values(instruction_set):
    """A query of zeros weighs all keys alike."""
    low, high, even = neighbours()
    q, values = torch.zeros_like(low)[None], torch.stack([low, high])  # (1, H, D), (2, H, D)
    layout = SpanLayout.from_spans([1], [(0, 2)], 2)
    assert torch.equal(cross_attention(q, torch.ones_like(values), values, layout, impl="cpu")[0], even)
    ranges, lengths = torch.tensor([[[0, 1]]]), torch.ones(1, dtype=torch.int32)
    shared, branch = low[None], high[None, None]
    keys = torch.ones_like(branch)
    out = prefix_attention_decode(q[None], keys[0], shared, keys, branch, ranges, lengths, impl="cpu")
    assert torch.equal(out[0, 0], even)


@pytest.mark.parametrize("sign", [1, -1])
def test_sums_of_an_adapter(instruction_set, sign):
    """The branch is its bias alone, half of a step: a column has one exponent, its rows all fractions."""
    fraction, exponent = torch.arange(128)[:, None], torch.arange(20, 250)
    bits = (exponent << 7 | fraction).to(torch.int32)
    x, even = (sign * each.to(torch.uint16).view(BF16) for each in (bits, bits + bits % 2))
    half = sign * torch.exp2(exponent - 127 - 8.0)
    weight = torch.zeros(3, len(exponent))
    branch = None, None, weight, None, weight.t().contiguous(), half, torch.ones(1)
    for rows in (slice(0, 64), slice(64, 128)):  # as many as the compiled form takes
        assert torch.equal(adapter(x[rows], *branch, impl="cpu"), even[rows])
