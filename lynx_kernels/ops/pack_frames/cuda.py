"""Frame packing in the CUDA C++ of csrc/pack_frames: frames that keep their size take one launch, others two.

Bit for bit what the reference gives: weights are computed on the device as Pillow computes them, in fp64, sums are of
whole numbers, and what becomes of each byte is looked up. Frames and boxes go along with the launch, 32 of them with
each, so nothing is copied to the device and nothing waits for it; only a new mean or std is, once.
"""

from functools import lru_cache

import torch
from torch import Tensor

from lynx_kernels.backends import cuda as cuda_backend
from lynx_kernels.ops.pack_frames.call import PackFramesCall
from lynx_kernels.ops.pack_frames.levels import levels_of


def forward(call: PackFramesCall) -> None:
    """Fill ``out``."""
    out, size, patch_size = call.out, call.size, call.patch_size
    cuda_backend.kernels().pack_frames(
        call.frames,
        out,
        _levels_on(out.device, tuple(call.mean), tuple(call.std), out.dtype),
        call.crop_boxes,
        [int(flip) for flip in call.flips],
        size,
        size if patch_size is None else patch_size,  # one patch as large as the square: (channel, row, column)
        call.resize == "exact",
        call.crop_rounding == "floor",
    )


@lru_cache(maxsize=64)
def _levels_on(device: torch.device, mean: tuple[float, ...], std: tuple[float, ...], dtype: torch.dtype) -> Tensor:
    return levels_of(mean, std, dtype).to(device)
