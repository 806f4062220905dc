"""The accumulation dtype that all reference implementations share."""

import torch


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics, scores, sums and losses: fp32, or fp64 for fp64 inputs."""
    return torch.promote_types(dtype, torch.float32)
