"""Frame packing in the CUDA C++ of csrc/pack_frames: one launch for frames that keep their size, two for others.

The result equals the reference bit for bit: weights are computed on the device in fp64 like Pillow's, sums are of
integers, and normalised values come from a table. Frame addresses and boxes are kernel arguments, 32 frames per launch.
So nothing is copied to the device and nothing waits, except that the table for a new mean or std is copied once.
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
        size if patch_size is None else patch_size,  # pixels: one patch of size S, in the order (channel, row, column)
        call.resize == "exact",
        call.crop_rounding == "floor",
    )


@lru_cache(maxsize=64)
def _levels_on(device: torch.device, mean: tuple[float, ...], std: tuple[float, ...], dtype: torch.dtype) -> Tensor:
    return levels_of(mean, std, dtype).to(device)
