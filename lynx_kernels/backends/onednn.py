"""oneDNN's fused linear, as PyTorch carries it on CPUs."""

import torch
from torch import Tensor

# Asked once: torch.compile cannot trace the questions.
HAS_LINEAR = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
HAS_BF16 = HAS_LINEAR and torch.ops.mkldnn._is_mkldnn_bf16_supported()
# Preparing a call costs about 10 us. On Zen 4 in fp32, PyTorch's own product takes 0.3-0.9 of oneDNN's time for weights
# below this and few rows, and 1.1-3.9 above; in bf16 it calls oneDNN itself and never wins.
SMALL_WEIGHT = 2**17


def is_quicker(x: Tensor, weight: Tensor) -> bool:
    """Whether the product of rows (n, i) with a large weight is quicker here than PyTorch's own, which calls MKL.

    In fp32, on Zen 4 with two threads, V=49152 and i=576: 2.4 times as fast for one row, 2.5 for 8, 1.6 for 128.
    """
    is_fp32 = x.dtype == weight.dtype == torch.float32 and x.is_cpu
    return is_fp32 and HAS_LINEAR and weight.numel() > SMALL_WEIGHT


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (n, i) times the transpose of the weight (o, i), plus the bias (o,): (n, o), all of one dtype."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def linear_add(x: Tensor, weight: Tensor, bias: Tensor | None, summand: Tensor) -> Tensor:
    """The same plus the summand (n, o), in one pass over the output."""
    return torch.ops.mkldnn._linear_pointwise.binary(x, summand, weight, bias, "add")
