"""The arguments of pack_frames's operator and implementations.

N frames, outputs of height H and width W, patches of side p that have each channel T times.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class PackFramesCall(NamedTuple):
    """The call. Its result is written to ``out``."""

    frames: list[Tensor]  # N of (height, width, 3) uint8
    out: Tensor  # (N * patches, 3 * T * p * p), or (N, 3, H, W) if patch_size is None
    crop_boxes: list[int]  # (4 * N,): top, left, height, width
    flips: list[bool]  # (N,)
    size: list[int]  # (2 * N,): heights and widths after resizing; of no frames, those that any would have
    windows: list[int]  # (4 * N,): top, left, height, width of what is kept of that, all of one size; [] keeps all
    patch_size: int | None
    merge_size: int
    temporal_patch_size: int  # T
    mean: list[float]  # (3,)
    std: list[float]  # (3,)
    resize: str
    resample: str
    crop_rounding: str

    @property
    def grid(self) -> tuple[int, int, int, int]:
        """H, W, and the height and width of a patch. Pixels are one patch: their order is (channel, row, column)."""
        height, width = self.windows[2:4] or self.size[:2]
        return height, width, self.patch_size or height, self.patch_size or width

    @property
    def device(self) -> torch.device:
        """The device it runs on."""
        return self.out.device
