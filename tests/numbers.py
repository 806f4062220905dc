"""The one error budget every implementation is held to."""

import torch
from torch import Tensor


def assert_within_budget(
    actual: Tensor,
    exact: Tensor,
    plain: Tensor,
    what: str = "output",
    magnitude: float = 0.0,
    precision: torch.dtype | None = None,
) -> None:
    """Fail unless ``actual`` is about as near to the truth as PyTorch itself in the same precision.

    The budget is ``2 * (error of plain + eps * max|exact|)``, errors being the largest absolute differences.

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
    error = (actual.double() - exact).abs().max().item()
    plain_error = (plain.double() - exact).abs().max().item()
    eps = torch.finfo(precision or actual.dtype).eps
    budget = 2 * (plain_error + eps * max(exact.abs().max().item(), magnitude))
    assert error <= budget, f"{what}: error {error:.3e} exceeds the budget {budget:.3e} (plain: {plain_error:.3e})"
