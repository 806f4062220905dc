"""oneDNN's fused linear, as PyTorch carries it on CPUs."""

import torch
from torch import Tensor

# Asked once: torch.compile cannot trace the questions.
HAS_LINEAR = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
HAS_BF16 = HAS_LINEAR and torch.ops.mkldnn._is_mkldnn_bf16_supported()
# Preparing a call costs about 10 us. On Zen 4 in fp32, PyTorch's own product takes 0.3-0.9 of oneDNN's time for weights
# below this and few rows, and 1.1-3.9 above; in bf16 it calls oneDNN itself and never wins.
SMALL_WEIGHT = 2**17


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (n, i) times the transpose of the weight (o, i), plus the bias (o,): (n, o), all of one dtype."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def linear_add(x: Tensor, weight: Tensor, bias: Tensor | None, summand: Tensor) -> Tensor:
    """The same plus the summand (n, o), in one pass over the output."""
    return torch.ops.mkldnn._linear_pointwise.binary(x, summand, weight, bias, "add")
