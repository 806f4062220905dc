"""Frame packing in the CUDA C++ of csrc/frames: frames that keep their size take one launch, others two.

Bit for bit what the reference gives: weights are computed on the device as Pillow computes them, in fp64, sums are of
whole numbers, and what becomes of each byte is looked up. Frames and boxes go along with the launch, 32 of them with
each, so nothing is copied to the device and nothing waits for it; only a new mean or std is, once.
"""

from functools import lru_cache

import torch
from torch import Tensor

from lynx_kernels.backends import cuda as cuda_backend
from lynx_kernels.ops.pack_frames.levels import levels_of


def forward(
    frames: list[Tensor],  # N of (height, width, 3) uint8
    out: Tensor,  # (N * patches, 3 * p * p), or (N, 3, S, S) where patch_size is None
    crop_boxes: list[int],  # (4 * N,): top, left, height, width
    flips: list[bool],  # (N,)
    size: int,
    patch_size: int | None,
    mean: list[float],  # (3,)
    std: list[float],  # (3,)
    resize: str,
    crop_rounding: str,
) -> None:
    """Fill ``out``."""
    cuda_backend.kernels().pack_frames(
        frames,
        out,
        _levels_on(out.device, tuple(mean), tuple(std), out.dtype),
        crop_boxes,
        [int(flip) for flip in flips],
        size,
        size if patch_size is None else patch_size,  # one patch as large as the square: (channel, row, column)
        resize == "exact",
        crop_rounding == "floor",
    )


@lru_cache(maxsize=64)
def _levels_on(device: torch.device, mean: tuple[float, ...], std: tuple[float, ...], dtype: torch.dtype) -> Tensor:
    return levels_of(mean, std, dtype).to(device)
