"""The dtype arithmetic of every definition."""

import torch


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics, scores, sums and losses: at least fp32, and never narrower than the input."""
    return torch.promote_types(dtype, torch.float32)
