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
from lynx_kernels.ops.pack_frames.fit import fits_of
from lynx_kernels.ops.pack_frames.levels import levels_of

_RESAMPLES = ("bilinear", "bicubic")  # in the order of lynx::frames::Resample


def unsupported_reason(call: PackFramesCall) -> str | None:
    """Why it cannot run."""
    if call.resample not in _RESAMPLES:
        return f"resample={call.resample!r}: a GPU's sine may differ from Pillow's in the last bit"
    if not call.out.is_contiguous():
        return "out is a part of a larger tensor: it writes without gaps"
    if call.out.dtype == torch.uint8:
        return "dtype=torch.uint8: it writes normalised values"
    if call.merge_size != 1 or call.temporal_patch_size != 1:
        return "merge_size and temporal_patch_size: it writes patches row by row, once"
    return cuda_backend.MISSING


def forward(call: PackFramesCall) -> None:
    """Fill ``out``."""
    out = call.out
    cuda_backend.kernels().pack_frames(
        call.frames,
        out,
        _levels_on(out.device, tuple(call.mean), tuple(call.std), out.dtype),
        call.crop_boxes,
        [int(flip) for flip in call.flips],
        [int(value) for fit in fits_of(call) for value in fit],
        list(call.grid),
        _RESAMPLES.index(call.resample),
    )


@lru_cache(maxsize=64)
def _levels_on(device: torch.device, mean: tuple[float, ...], std: tuple[float, ...], dtype: torch.dtype) -> Tensor:
    return levels_of(mean, std, dtype).to(device)
