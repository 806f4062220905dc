"""The samples of a decoded image, of whatever depth, as 8 bits; and which of its pixels are see-through."""

from collections.abc import Iterator
from functools import reduce

import numpy as np
from PIL import Image, ImageChops

from lynx.media.colour import Encoding
from lynx.media.containers import Stored

_STRIP = 2**18  # pixels computed at once: such a file may be small and its image huge
_LEVELS_16 = 65535
_KEPT = {"1": "L", "L": "L", "CMYK": "CMYK"}  # modes, and those in which they are given; others become "RGB"


def parts(image: Image.Image, file_says: Stored, encoding: Encoding | None) -> tuple[Image.Image, Image.Image | None]:
    """The colours of a loaded image and its opacity.

    Args:
        image: in any mode of Pillow.
        file_says: more about it.
        encoding: of its levels, to be made sRGB's; None leaves them as they are, but for their depth.

    Returns:
        An image in mode "L", "RGB" or "CMYK"; and an "L" image in which 255 is opaque, or None if all is.

    Raises:
        ValueError: its levels do not have the range that they should.
    """
    if image.mode.startswith("I") or image.mode == "F":
        return _deep_grey(image, file_says, encoding)
    if file_says.band_whites:
        image = image.point([min(255, round(255 * v / white)) for white in file_says.band_whites for v in range(256)])
    alpha = None
    if file_says.transparent is not None:
        alpha = _opaque(image, file_says.transparent, file_says.low)
    elif image.has_transparency_data and not file_says.ignores_alpha:
        image = image.convert("LA" if image.mode in ("La", "LA") else "RGBA")
        alpha = image.getchannel("A")
        if file_says.alpha_may_be_unused and alpha.getextrema() == (0, 0):
            alpha = None
        if image.mode == "LA":
            image = image.getchannel("L")
    mode = _KEPT.get(image.mode, "RGB")
    colours = image if image.mode == mode else image.convert(mode)
    if encoding is not None or file_says.low is not None:
        colours = _recoded(colours, file_says.low, encoding)
    return colours, alpha


def _strips(image: Image.Image) -> Iterator[tuple[int, int, int, int]]:
    rows = max(1, _STRIP // image.width)
    for top in range(0, image.height, rows):
        yield 0, top, image.width, min(image.height, top + rows)


def _opaque(image: Image.Image, key: int | tuple[int, ...], low: Image.Image | None) -> Image.Image:
    """255 where the pixels of an image in mode "1", "L" or "RGB" have another colour than ``key``, else 0."""
    bands = [*image.convert("L" if image.mode == "1" else image.mode).split()]
    keys = [key] if isinstance(key, int) else [*key]
    if low is not None:
        bands += low.split()
        keys = [each >> 8 for each in keys] + [each & 255 for each in keys]
    differing = [band.point([255 * (v != level) for v in range(256)]) for band, level in zip(bands, keys, strict=True)]
    return reduce(ImageChops.lighter, differing)


def _recoded(image: Image.Image, low: Image.Image | None, encoding: Encoding | None) -> Image.Image:
    """An image in mode "L" or "RGB", with the low bytes of its colours if they have 16 bits, in 8 bits of sRGB."""
    if image.mode == "L" and encoding is not None:
        return image.point(np.rint(255 * encoding.greys(np.arange(256) / 255)).astype(np.uint8).tolist())
    made = np.empty((image.height, image.width, 3), np.uint8)
    for box in _strips(image):
        levels = np.asarray(image.crop(box)).astype(np.float32)
        if low is not None:
            levels = 256 * levels + np.asarray(low.crop(box))[..., :3]
        levels /= 255 if low is None else _LEVELS_16
        made[box[1] : box[3]] = np.rint(255 * (levels if encoding is None else encoding.colours(levels)))
    return Image.fromarray(made)


def _deep_grey(
    image: Image.Image, file_says: Stored, encoding: Encoding | None
) -> tuple[Image.Image, Image.Image | None]:
    """An image in mode "I", "I;16" in its byte orders, or "F"."""
    key = file_says.transparent
    made = np.empty((image.height, image.width), np.uint8)
    opaque = None if key is None else np.empty_like(made)

    def in_8_bits(levels: np.ndarray) -> np.ndarray:  # from 0 to 1
        levels = 1 - levels if file_says.is_inverted else levels
        return np.rint(255 * (levels if encoding is None else encoding.greys(levels))).astype(np.uint8)

    table = in_8_bits(np.arange(file_says.white + 1) / file_says.white)
    for box in _strips(image):
        levels = np.asarray(image.crop(box))
        rows = slice(box[1], box[3])
        if image.mode == "F":
            _check_range(levels)
            made[rows] = in_8_bits(levels)
            continue
        if file_says.is_unsigned:
            levels = levels.view(np.uint32) >> 16
        elif image.mode == "I" and (levels.min() < 0 or levels.max() > _LEVELS_16):
            raise ValueError(f"grey levels {levels.min()} ... {levels.max()} do not fit 16 bits")
        made[rows] = table[levels]
        if opaque is not None:
            opaque[rows] = 255 * (levels != key)
    return Image.fromarray(made), None if opaque is None else Image.fromarray(opaque)


def _check_range(levels: np.ndarray) -> None:
    """Raise ValueError for floating-point levels that are not 0 to 1, by more than is rounded away."""
    if not np.isfinite(levels).all():
        raise ValueError("its floating-point levels are not all finite: some are NaN or infinite")
    if levels.min() < -0.5 / 255 or levels.max() > 1 + 0.5 / 255:
        raise ValueError(
            f"floating-point levels {levels.min():g} ... {levels.max():g} are outside of 0 (black) to 1 (white); "
            "scale them"
        )
