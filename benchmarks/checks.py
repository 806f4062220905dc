"""What a benchmark's check needs: a call with every gradient, and how near to the truth it must come."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# These keep a wrong provider from being timed, peers included. The tests hold ours to a tighter budget.
_TOLERANCE = 16  # eps
# How far <value, exact> / <exact, exact> may be from 1. A result that is 1 % too large everywhere stays within 16 eps
# of bf16. It does not stay within this.
BIAS = {torch.float64: 1e-11, torch.float32: 1e-5, torch.float16: 5e-4, torch.bfloat16: 3e-3}


def forward(function: Callable[..., Tensor], grad: Tensor, inputs: Sequence[Tensor]) -> list[Tensor]:
    """The output."""
    with torch.no_grad():
        return [function(*inputs)]


def train(function: Callable[..., Tensor], grad: Tensor, inputs: Sequence[Tensor]) -> list[Tensor]:
    """The output, and the gradient of every input."""
    output = function(*inputs)
    return [output.detach(), *torch.autograd.grad(output, inputs, grad)]


def assert_near(values: Sequence[Tensor], exact: Sequence[Tensor], magnitudes: Sequence[float] | None = None) -> None:
    """Raise AssertionError unless every value is within 16 eps of the largest number of its exact one, and unbiased.

    Args:
        values: the output, then gradients, in the dtype that is measured.
        exact: what they should be, in fp64.
        magnitudes: for each a number that takes the place of the largest where it is larger.
    """
    for index, (value, truth) in enumerate(zip(values, exact, strict=True)):
        largest = max(truth.abs().max().item(), magnitudes[index] if magnitudes else 0.0)
        error = (value.double() - truth).abs().max().item()
        allowed = _TOLERANCE * torch.finfo(value.dtype).eps * largest
        what = "output" if index == 0 else f"gradient {index - 1}"
        assert error <= allowed, f"{what}: error {error:.1e} exceeds {allowed:.1e}"
        bias, allowed = _bias(value, truth, magnitudes[index] if magnitudes else 0.0)
        assert bias <= allowed, f"{what}: bias {bias:.1e} exceeds {allowed:.1e}"


def _bias(value: Tensor, exact: Tensor, magnitude: float) -> tuple[float, float]:
    """How much larger or smaller the value is on the whole, and what is allowed: more where numbers are few."""
    square = max(exact.square().mean().item(), magnitude**2, torch.finfo(torch.float64).tiny)
    noise = min(1.0, 16 / value.numel() ** 0.5) * torch.finfo(value.dtype).eps
    return abs(((value.double() - exact) * exact).mean().item()) / square, 2 * BIAS[value.dtype] + noise
