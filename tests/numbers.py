"""The one error budget every implementation is held to: the largest error, the bias and the RMS error."""

import torch
from torch import Tensor

from benchmarks.checks import BIAS


def assert_within_budget(
    actual: Tensor,
    exact: Tensor,
    plain: Tensor,
    what: str = "output",
    magnitude: float = 0.0,
    precision: torch.dtype | None = None,
) -> None:
    """Fail unless ``actual`` is about as near to the truth as PyTorch itself in the same precision.

    - The largest error is at most ``2 * (largest error of plain + eps * max|exact|)``.
    - The RMS error is at most ``2 * RMS error of plain``, and what rounding the result itself costs.
    - The bias ``|<actual, exact> / <exact, exact> - 1|`` is at most ``BIAS`` of the precision and twice that of plain.

    The latter two allow more where there are fewer than some thousand numbers.

    Args:
        actual: what the implementation computed.
        exact: the reference in fp64.
        plain: the same maths in plain PyTorch, in the precision of ``actual``.
        what: the name to report.
        magnitude: takes the place of ``max|exact|`` where larger. A number that sums over everything may cancel down
            to a small value without its rounding errors becoming any smaller.
        precision: the dtype that sets eps, where the maths runs in one coarser than ``actual``'s: under autocast.
    """
    assert actual.shape == exact.shape == plain.shape, f"{what}: shapes {actual.shape} {exact.shape} {plain.shape}"
    assert exact.dtype == torch.float64, f"{what}: the exact value must be fp64, not {exact.dtype}"
    assert actual.isfinite().all(), f"{what}: {int((~actual.isfinite()).sum())} values are not finite"
    if actual.numel() == 0:
        return
    precision = precision or actual.dtype
    eps = torch.finfo(precision).eps
    errors, plain_errors = actual.double() - exact, plain.double() - exact
    error, plain_error = errors.abs().max().item(), plain_errors.abs().max().item()
    budget = 2 * (plain_error + eps * max(exact.abs().max().item(), magnitude))
    assert error <= budget, f"{what}: error {error:.3e} exceeds the budget {budget:.3e} (plain: {plain_error:.3e})"

    # Of few numbers, or of many that share the rounding of a few, both are noisy.
    noise = min(1.0, 16 / exact.numel() ** 0.5)
    size = max(rms(exact), magnitude)
    allowed = (2 + noise) * rms(plain_errors) + (0.5 + noise) * eps * size
    assert rms(errors) <= allowed, f"{what}: RMS error {rms(errors):.3e} exceeds {allowed:.3e}"

    bias, plain_bias = (abs((each * exact).mean().item()) for each in (errors, plain_errors))
    allowed = (BIAS[precision] + noise * eps) * size**2 + 2 * plain_bias
    assert bias <= allowed, f"{what}: bias {bias / max(size, 1e-300) ** 2:.3e} exceeds {BIAS[precision]:.1e}"


def rms(values: Tensor) -> float:
    """The root of the mean square."""
    return values.double().square().mean().sqrt().item()
