"""The arguments of pack_frames's operator and implementations.

N frames, square outputs of side S, patches of side p.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class PackFramesCall(NamedTuple):
    """The call. Its result is written to ``out``."""

    frames: list[Tensor]  # N of (height, width, 3) uint8
    out: Tensor  # (N * patches, 3 * p * p), or (N, 3, S, S) if patch_size is None
    crop_boxes: list[int]  # (4 * N,): top, left, height, width
    flips: list[bool]  # (N,)
    size: int
    patch_size: int | None
    mean: list[float]  # (3,)
    std: list[float]  # (3,)
    resize: str
    crop_rounding: str

    @property
    def device(self) -> torch.device:
        """The device it runs on."""
        return self.out.device
