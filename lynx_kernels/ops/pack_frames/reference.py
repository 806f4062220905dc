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
    height, width, *_ = call.grid
    channel_mean = torch.tensor(call.mean, dtype=compute, device=out.device)[:, None, None]  # (3, 1, 1)
    channel_std = torch.tensor(call.std, dtype=compute, device=out.device)[:, None, None]
    for index, (frame, fit) in enumerate(zip(call.frames, fits_of(call), strict=True)):
        top, left, h, w = call.crop_boxes[4 * index : 4 * index + 4]
        crop = frame[top : top + h, left : left + w]  # (h, w, 3)
        rows = _weights(h, fit.resized_height, fit.top, height, call.resample).to(frame.device)  # (H, h)
        columns = _weights(w, fit.resized_width, fit.left, width, call.resample).to(frame.device)  # (W, w)
        planes = crop.permute(2, 0, 1).double()  # (3, h, w)
        if fit.is_vertical_first:
            resized = _to_bytes(_to_bytes(rows @ planes) @ columns.t())  # (3, H, W), integers
        else:
            resized = _to_bytes(rows @ _to_bytes(planes @ columns.t()))
        if call.flips[index]:
            resized = resized.flip(2)
        pixels = resized if out.dtype == torch.uint8 else ((resized / 255).to(compute) - channel_mean) / channel_std
        if call.patch_size is None:
            out[index] = pixels
        else:
            patches = _patchify(pixels, call)
            out[index * len(patches) : (index + 1) * len(patches)] = patches


def _to_bytes(sums: Tensor) -> Tensor:
    return torch.floor((sums + _ONE // 2) / _ONE).clamp(0, 255)


def _patchify(pixels: Tensor, call: PackFramesCall) -> Tensor:
    merge, patch_height, patch_width = call.merge_size, *call.grid[2:]
    rows, columns = pixels.shape[1] // patch_height // merge, pixels.shape[2] // patch_width // merge
    # Channel; block, patch and pixel of the rows; the same of the columns.
    patches = pixels.view(3, rows, merge, patch_height, columns, merge, patch_width)
    patches = patches.permute(1, 4, 2, 5, 0, 3, 6)[..., None, :, :]  # (blocks, patches, channel, 1, row, column)
    copies = patches.expand(*[-1] * 5, call.temporal_patch_size, -1, -1)
    return copies.reshape(rows * columns * merge**2, -1)  # (patches, 3 * T * p * p)


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
