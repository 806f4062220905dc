"""The table of normalised values of every byte, computed once, with the reference's arithmetic."""

from functools import lru_cache

import torch
from torch import Tensor

from lynx_kernels.backends.dtypes import acc_dtype


@lru_cache(maxsize=64)
def levels_of(mean: tuple[float, ...], std: tuple[float, ...], dtype: torch.dtype) -> Tensor:
    """The normalised value of every byte of every channel, (3, 256)."""
    compute = acc_dtype(dtype)
    shares = (torch.arange(256, dtype=torch.float64, device="cpu") / 255).to(compute)
    channel_mean, channel_std = (torch.tensor(each, dtype=compute, device="cpu")[:, None] for each in (mean, std))
    return ((shares - channel_mean) / channel_std).to(dtype)
