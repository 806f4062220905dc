"""How a frame becomes the output: to what it is resized, what is kept of that, and which pass comes first.

Pillow resizes the rows and the columns in two passes and rounds to bytes between them, so the order shows in the
result. The order has changed between its versions.
"""

import re
from functools import lru_cache
from typing import NamedTuple

from lynx_kernels.ops.pack_frames.call import PackFramesCall


class Fit(NamedTuple):
    """A frame is resized to (resized_height, resized_width), and of that the output is kept, from (top, left) on."""

    resized_height: int
    top: int
    resized_width: int
    left: int
    is_vertical_first: bool


def fits_of(call: PackFramesCall) -> list[Fit]:
    """The fit of every frame's box."""
    heights, widths = (call.crop_boxes[start::4] for start in (2, 3))
    new_heights, new_widths = call.size[::2], call.size[1::2]
    fits = [
        _fit(*sides, call.resize, call.crop_rounding, PILLOW)
        for sides in zip(heights, widths, new_heights, new_widths, strict=False)
    ]
    if not call.windows:
        return fits
    starts = zip(call.windows[::4], call.windows[1::4], strict=True)
    return [fit._replace(top=top, left=left) for fit, (top, left) in zip(fits, starts, strict=True)]


@lru_cache(maxsize=1024)
def _fit(
    height: int, width: int, new_height: int, new_width: int, resize: str, crop_rounding: str, pillow: tuple[int, int]
) -> Fit:
    resized_height, top, resized_width, left = new_height, 0, new_width, 0
    if resize == "short_side":  # to a square
        short_side = min(height, width)
        resized_height, top = _centre(new_height, height, short_side, crop_rounding)
        resized_width, left = _centre(new_width, width, short_side, crop_rounding)
    is_vertical_first = filters_vertically_first(pillow, height, width, resized_height, resized_width)
    return Fit(resized_height, top, resized_width, left, is_vertical_first)


def _centre(size: int, side: int, short_side: int, crop_rounding: str) -> tuple[int, int]:
    """What a side is resized to when the short side becomes ``size``, and where its centre of ``size`` starts."""
    resized = int(size * side / short_side)
    excess = resized - size
    return resized, round(excess / 2) if crop_rounding == "round" else excess // 2


def filters_vertically_first(pillow: tuple[int, int], height: int, width: int, new_height: int, new_width: int) -> bool:
    """Whether ``Image.resize`` of a version of Pillow, (major, minor), resizes the rows before the columns.

    Up to 12.1 never; 12.2 and 12.3 (``Image.resize``) if the rows become fewer and the image is more than 100 times as
    high as wide; 13 (``ImagingResampleInner``) if it loses more than twice as many rows as columns.
    """
    if pillow < (12, 2) or height <= new_height:
        return False
    if pillow < (13, 0):
        return height > 100 * width
    return height - new_height > 2 * (width - new_width)


def version_of(text: str) -> tuple[int, int]:
    """(major, minor) of a version such as 12.3.0 or 13.0.0.dev0."""
    major, minor = re.findall(r"\d+", text)[:2]
    return int(major), int(minor)


def _installed() -> tuple[int, int]:
    """The version of the installed Pillow; without one, the newest whose order is known here."""
    try:
        from PIL import __version__
    except ImportError:
        return 13, 0
    return version_of(__version__)


PILLOW = _installed()
