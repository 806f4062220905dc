"""The reference of frame packing, in plain PyTorch.

    resized = byte(R byte(frame C^T))            byte(s) = clip(floor((s + 2^21) / 2^22), 0, 255)
    out     = (resized / 255 - mean) / std       flipped and cut into patches if requested

C (S, w) and R (S, h) hold Pillow's bicubic weights in units of 2^-22. The horizontal pass comes first, and its result
is rounded to bytes. All entries are integers and all sums are far below 2^53, so the products are exact in fp64 on any
device. If a side keeps its size, its matrix is the identity times 2^22. (Pillow 12.2 and later run the vertical pass
first for some tall frames; here the order never changes.)
Shapes: frames of height h and width w, square outputs of side S, patches of side p.
"""

import torch
from torch import Tensor

from lynx_kernels.backends.dtypes import acc_dtype
from lynx_kernels.ops.pack_frames.call import PackFramesCall

_ONE = 2**22  # 1.0 in Pillow's fixed-point weights


def forward(call: PackFramesCall) -> None:
    """Fill ``out``. Normalisation is in fp32 (fp64 for an fp64 output)."""
    frames, out, crop_boxes, flips, size, patch_size, mean, std, resize, crop_rounding = call
    compute = acc_dtype(out.dtype)
    channel_mean = torch.tensor(mean, dtype=compute, device=out.device)[:, None, None]  # (3, 1, 1)
    channel_std = torch.tensor(std, dtype=compute, device=out.device)[:, None, None]
    for index, frame in enumerate(frames):
        top, left, height, width = crop_boxes[4 * index : 4 * index + 4]
        crop = frame[top : top + height, left : left + width]  # (h, w, 3)
        short_side = min(height, width)
        row_weights, column_weights = (
            _square_weights(side, short_side, size, resize, crop_rounding).to(frame.device) for side in (height, width)
        )  # (S, h) and (S, w)
        resized = torch.stack(
            [_to_bytes(row_weights @ _to_bytes(plane.double() @ column_weights.t())) for plane in crop.unbind(2)]
        )  # (3, S, S), integers
        if flips[index]:
            resized = resized.flip(2)
        pixels = ((resized / 255).to(compute) - channel_mean) / channel_std
        if patch_size is None:
            out[index] = pixels
        else:
            patches = _patchify(pixels, patch_size)
            out[index * len(patches) : (index + 1) * len(patches)] = patches


def _to_bytes(sums: Tensor) -> Tensor:
    return torch.floor((sums + _ONE // 2) / _ONE).clamp(0, 255)


def _patchify(pixels: Tensor, patch_size: int) -> Tensor:
    grid = pixels.shape[1] // patch_size
    patches = pixels.view(3, grid, patch_size, grid, patch_size)  # channel, patch row, row, patch column, column
    return patches.permute(1, 3, 0, 2, 4).reshape(grid * grid, -1)  # (patches, 3 * p * p)


def _square_weights(side: int, short_side: int, size: int, resize: str, crop_rounding: str) -> Tensor:
    """The weights (S, side) that resize one side of a frame and crop its centre."""
    if resize == "exact":
        return _bicubic_weights(side, size, 0, size)
    resized = int(size * side / short_side)
    excess = resized - size
    start = round(excess / 2) if crop_rounding == "round" else excess // 2
    return _bicubic_weights(side, resized, start, size)


def _bicubic_weights(side: int, resized: int, start: int, count: int) -> Tensor:
    """Pillow's weights (count, side) for outputs start ... start + count - 1 of a side resized to ``resized``."""
    scale = side / resized
    stretch = max(scale, 1.0)  # shrinking widens the filter, for antialiasing
    outputs = torch.arange(start, start + count, dtype=torch.float64)[:, None]  # (count, 1)
    inputs = torch.arange(side, dtype=torch.float64)  # (side,)
    centre = (outputs + 0.5) * scale
    weights = _bicubic((inputs - centre + 0.5) * (1.0 / stretch))  # (count, side)
    weights = weights / weights.cumsum(1)[:, -1:]  # cumsum, because Pillow adds from left to right
    return torch.trunc(weights * _ONE + 0.5 * weights.sign())  # half away from zero


def _bicubic(x: Tensor) -> Tensor:
    """Keys' cubic convolution kernel with a = -0.5."""
    a = -0.5
    x = x.abs()
    near = ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0
    far = (((x - 5.0) * x + 8.0) * x - 4.0) * a
    return torch.where(x < 1.0, near, torch.where(x < 2.0, far, 0.0))
