"""The reference of frame packing, in plain PyTorch.

    resized = byte(R byte(frame C^T))            byte(s) = clip(floor((s + 2^21) / 2^22), 0, 255)
    out     = (resized / 255 - mean) / std       flipped and cut into patches if requested

C (W, w) and R (H, h) hold Pillow's weights in units of 2^-22. Here the horizontal pass comes first, and its result is
rounded to bytes. Where Pillow's vertical pass does (fit.py), resized = byte(byte(R frame) C^T). All entries are
integers and all sums are far below 2^53, so the products are exact in fp64 on any device. If a side keeps its size, its
matrix is the identity times 2^22.
Shapes: frames of height h and width w, outputs of height H and width W, patches of side p.
"""

import math

import torch
from torch import Tensor

from lynx_kernels.backends.dtypes import acc_dtype
from lynx_kernels.ops.pack_frames.call import PackFramesCall
from lynx_kernels.ops.pack_frames.fit import fits_of

_ONE = 2**22  # 1.0 in Pillow's fixed-point weights


def forward(call: PackFramesCall) -> None:
    """Fill ``out``. Normalisation is in fp32 (fp64 for an fp64 output)."""
    out = call.out
    compute = acc_dtype(out.dtype)
    channel_mean = torch.tensor(call.mean, dtype=compute, device=out.device)[:, None, None]  # (3, 1, 1)
    channel_std = torch.tensor(call.std, dtype=compute, device=out.device)[:, None, None]
    for index, (frame, fit) in enumerate(zip(call.frames, fits_of(call), strict=True)):
        top, left, height, width = call.crop_boxes[4 * index : 4 * index + 4]
        crop = frame[top : top + height, left : left + width]  # (h, w, 3)
        rows = _weights(height, fit.resized_height, fit.top, call.size[0], call.resample).to(frame.device)  # (H, h)
        columns = _weights(width, fit.resized_width, fit.left, call.size[1], call.resample).to(frame.device)  # (W, w)
        planes = crop.permute(2, 0, 1).double()  # (3, h, w)
        if fit.is_vertical_first:
            resized = _to_bytes(_to_bytes(rows @ planes) @ columns.t())  # (3, H, W), integers
        else:
            resized = _to_bytes(rows @ _to_bytes(planes @ columns.t()))
        if call.flips[index]:
            resized = resized.flip(2)
        pixels = ((resized / 255).to(compute) - channel_mean) / channel_std
        if call.patch_size is None:
            out[index] = pixels
        else:
            patches = _patchify(pixels, call.patch_size)
            out[index * len(patches) : (index + 1) * len(patches)] = patches


def _to_bytes(sums: Tensor) -> Tensor:
    return torch.floor((sums + _ONE // 2) / _ONE).clamp(0, 255)


def _patchify(pixels: Tensor, patch_size: int) -> Tensor:
    rows, columns = (side // patch_size for side in pixels.shape[1:])
    patches = pixels.view(3, rows, patch_size, columns, patch_size)  # channel, patch row, row, patch column, column
    return patches.permute(1, 3, 0, 2, 4).reshape(rows * columns, -1)  # (patches, 3 * p * p)


def _weights(side: int, resized: int, start: int, count: int, resample: str) -> Tensor:
    """Pillow's weights (count, side) for outputs start ... start + count - 1 of a side resized to ``resized``."""
    scale = side / resized
    stretch = max(scale, 1.0)  # shrinking widens the filter, for antialiasing
    outputs = torch.arange(start, start + count, dtype=torch.float64)[:, None]  # (count, 1)
    inputs = torch.arange(side, dtype=torch.float64)  # (side,)
    centre = (outputs + 0.5) * scale
    weights = _FILTERS[resample]((inputs - centre + 0.5) * (1.0 / stretch))  # (count, side)
    weights = weights / weights.cumsum(1)[:, -1:]  # cumsum, because Pillow adds from left to right
    return torch.trunc(weights * _ONE + 0.5 * weights.sign())  # half away from zero


def _bicubic(x: Tensor) -> Tensor:
    """Keys' cubic convolution kernel with a = -0.5."""
    a = -0.5
    x = x.abs()
    near = ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0
    far = (((x - 5.0) * x + 8.0) * x - 4.0) * a
    return torch.where(x < 1.0, near, torch.where(x < 2.0, far, 0.0))


def _bilinear(x: Tensor) -> Tensor:
    return (1.0 - x.abs()).clamp(min=0.0)


def _lanczos(x: Tensor) -> Tensor:
    """A sinc, windowed by one of three times its width."""
    return torch.where((x >= -3.0) & (x < 3.0), _sinc(x) * _sinc(x / 3), 0.0)


def _sinc(x: Tensor) -> Tensor:
    x = x * math.pi
    # By the C library's sine, as Pillow: torch's own may differ in the last bit.
    return torch.where(x == 0.0, 1.0, x.clone().apply_(math.sin) / x)


_FILTERS = {"bilinear": _bilinear, "bicubic": _bicubic, "lanczos": _lanczos}
