"""Frames for the tests of pack_frames, and Pillow's results for them."""

import numpy as np
import torch
from PIL import Image

from lynx_kernels.ops.pack_frames import pack_frames

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
OPTIONS = {"size": 28, "patch_size": 14, "mean": MEAN, "std": STD}


def random_frame(generator: np.random.Generator, height: int, width: int, *, harsh: bool = False) -> np.ndarray:
    """Uniform noise. ``harsh``: only black and white, so that the filter overshoots and values are clipped."""
    noise = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
    return np.where(noise < 128, 0, 255).astype(np.uint8) if harsh else noise


def pack_bytes(frames, *, size: int | tuple[int, int], **options) -> np.ndarray:
    """The (N, H, W, 3) bytes before normalisation, recovered from the result with mean 0 and std 1."""
    pixels = pack_frames(
        frames,
        size=size,
        patch_size=None,
        mean=(0, 0, 0),
        std=(1, 1, 1),
        dtype=torch.float64,
        output="pixels",
        **options,
    )
    return (pixels * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def pillow_resize(frame: np.ndarray, height: int, width: int, resample: str = "bicubic") -> np.ndarray:
    """The resize of the installed Pillow."""
    image = Image.fromarray(np.ascontiguousarray(frame))
    return np.asarray(image.resize((width, height), Image.Resampling[resample.upper()]))


def pillow_short_side(frame: np.ndarray, size: int, crop_rounding: str = "round") -> np.ndarray:
    short = min(frame.shape[:2])
    height, width = (int(size * side / short) for side in frame.shape[:2])
    resized = pillow_resize(frame, height, width)
    top, left = (
        round((side - size) / 2) if crop_rounding == "round" else (side - size) // 2 for side in (height, width)
    )
    return resized[top : top + size, left : left + size]


def random_shapes(generator: np.random.Generator, count: int) -> list[tuple[int, int]]:
    shapes = [(1, 1), (1, 40), (40, 1), (300, 30), (30, 300), (2, 3), (500, 333)]
    for index in range(count - len(shapes)):
        limit = (12, 60, 300)[index % 3]
        shapes.append(tuple(int(side) for side in generator.integers(1, limit, 2)))
    return shapes
