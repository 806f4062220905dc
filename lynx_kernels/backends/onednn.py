"""oneDNN's fused linear layer, which PyTorch ships on CPUs."""

import torch
from torch import Tensor

# Computed once, because torch.compile cannot trace these checks.
HAS_LINEAR = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
HAS_BF16 = HAS_LINEAR and torch.ops.mkldnn._is_mkldnn_bf16_supported()
# A oneDNN call costs about 10 us of preparation. Measured on Zen 4 in fp32 with few rows: PyTorch's own matmul takes
# 0.3-0.9 of oneDNN's time for smaller weights, 1.1-3.9 for larger ones. In bf16 it calls oneDNN itself and never wins.
SMALL_WEIGHT = 2**17


def is_quicker(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN multiplies rows (n, i) with this weight faster than PyTorch's own matmul, which calls MKL.

    Measured in fp32 on Zen 4, two threads, V=49152, i=576: 2.4 times as fast for 1 row, 2.5 for 8, 1.6 for 128.
    """
    is_fp32 = x.dtype == weight.dtype == torch.float32 and x.is_cpu
    return is_fp32 and HAS_LINEAR and weight.numel() > SMALL_WEIGHT


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias``: x (n, i), weight (o, i), bias (o,), result (n, o), all of one dtype."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def linear_add(x: Tensor, weight: Tensor, bias: Tensor | None, summand: Tensor) -> Tensor:
    """``linear`` plus the summand (n, o), in one pass over the output."""
    return torch.ops.mkldnn._linear_pointwise.binary(x, summand, weight, bias, "add")
