"""Frame packing on CPUs, in the C++ of csrc/pack_frames. This file passes addresses and the table of levels.

The result equals the reference bit for bit: weights are Pillow's, sums are exact, and normalised values come from a
table that is computed like the reference. Frames may have any strides. Interleaved channels (RGBRGB...) and separate
planes are fast.
"""

import operator

import torch

from lynx_kernels.backends import cpu as cpu_backend
from lynx_kernels.ops.pack_frames.call import PackFramesCall
from lynx_kernels.ops.pack_frames.fit import fits_of
from lynx_kernels.ops.pack_frames.levels import levels_of

# That many take about a millisecond. Where cores are busy, waiting for another thread costs more than it would save.
_BYTES_OF_A_THREAD = 2**19


def forward(call: PackFramesCall) -> None:
    """Fill ``out``."""
    frames, out, crop_boxes, mean, std = call.frames, call.out, call.crop_boxes, call.mean, call.std
    levels = None if out.dtype == torch.uint8 else levels_of(tuple(mean), tuple(std), out.dtype)
    dtype = torch.float32 if levels is None else levels.dtype
    cpu_backend.module.pack_frames(
        [(frame.data_ptr(), *frame.stride()) for frame in frames],
        [tuple(crop_boxes[4 * index : 4 * index + 4]) for index in range(len(frames))],
        call.flips,
        fits_of(call),
        (*call.grid, call.merge_size, call.temporal_patch_size),
        getattr(cpu_backend.module.Resample, call.resample),
        getattr(cpu_backend.module.Dtype, str(dtype).removeprefix("torch.")),
        0 if levels is None else levels.data_ptr(),
        mean,
        std,
        out.data_ptr(),
        _strides(call),
        min(torch.get_num_threads(), max(1, _bytes(call) // _BYTES_OF_A_THREAD)),
    )


def _strides(call: PackFramesCall) -> tuple[int, int, int]:
    """Of the frames, of their channels and of the rows of a patch in ``out``."""
    if call.patch_size is None:
        frame, channel, row, _ = call.out.stride()
        return frame, channel, row
    height, width, patch_height, patch_width = call.grid
    channel = call.temporal_patch_size * patch_height * patch_width
    return 3 * call.temporal_patch_size * height * width, channel, patch_width


def _bytes(call: PackFramesCall) -> int:
    """What is read, or written if that is more, one byte for each channel of a pixel."""
    read = 3 * sum(map(operator.mul, call.crop_boxes[2::4], call.crop_boxes[3::4]))
    return max(read, call.out.numel())
