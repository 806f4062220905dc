"""From the colours of a file to those of sRGB: by its ICC profile, by PNG's gamma and primaries, or by code points."""

import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from PIL import Image, ImageCms

# x and y of white, red, green and blue.
Primaries = tuple[tuple[float, float], ...]

_D65 = (0.3127, 0.3290)
_SRGB: Primaries = (_D65, (0.640, 0.330), (0.300, 0.600), (0.150, 0.060))
_CODED_PRIMARIES: dict[int, Primaries] = {  # ITU-T H.273, table 2
    1: _SRGB,
    2: _SRGB,  # not specified
    4: ((0.310, 0.316), (0.67, 0.33), (0.21, 0.71), (0.14, 0.08)),
    5: (_D65, (0.64, 0.33), (0.29, 0.60), (0.15, 0.06)),
    6: (_D65, (0.630, 0.340), (0.310, 0.595), (0.155, 0.070)),
    7: (_D65, (0.630, 0.340), (0.310, 0.595), (0.155, 0.070)),
    9: (_D65, (0.708, 0.292), (0.170, 0.797), (0.131, 0.046)),
    11: ((0.314, 0.351), (0.680, 0.320), (0.265, 0.690), (0.150, 0.060)),
    12: (_D65, (0.680, 0.320), (0.265, 0.690), (0.150, 0.060)),
    22: (_D65, (0.630, 0.340), (0.295, 0.605), (0.155, 0.077)),
}
# Table 3: the power of a level that is its light, None for the curve of sRGB. Screens show BT.709 and its kin (1, 6, 7,
# 11, 12, 14, 15) as they show sRGB, and HLG (18) was made for that.
_CODED_CURVES = {1: None, 2: None, 4: 2.2, 5: 2.8, 6: None, 7: None, 8: 1.0} | dict.fromkeys((11, 12, 13, 14, 15, 18))
_PQ = 16
_NEAR_GAMMA = 0.05  # as libpng has it: closer gammas look the same
_NEAR_PRIMARIES = 0.005
_NEAR_LEVELS = 2  # a profile that moves no colour by more is sRGB's, rounded otherwise
_MODES = {
    "GRAY": ("L",),
    "RGB ": ("L", "RGB"),
    "CMYK": ("CMYK",),
}  # of the images that a profile's colours may stand in


@dataclass(frozen=True)
class Encoding:
    """How levels stand for colours.

    Attributes:
        gamma: the power of a level, from 0 to 1, that is its light; None for the curve of sRGB.
        primaries: of the light.
    """

    gamma: float | None = None
    primaries: Primaries = _SRGB

    @classmethod
    def of_png(cls, gamma: float | None, chromaticity: tuple[float, ...] | None) -> "Encoding | None":
        """What the chunks gAMA and cHRM say, as Pillow gives them; None where it is what sRGB is, or nonsense."""
        power = None
        if gamma is not None and 0.01 < gamma < 100 and abs(gamma * 2.2 - 1) > _NEAR_GAMMA:
            power = 1 / gamma
        primaries = _SRGB
        if chromaticity is not None and len(chromaticity) == 8:
            found = tuple(zip(chromaticity[::2], chromaticity[1::2], strict=True))
            if _is_gamut(found) and np.abs(np.subtract(found, _SRGB)).max() > _NEAR_PRIMARIES:
                primaries = found
                power = power if gamma is None or power is not None else 1 / gamma
        return None if power is None and primaries is _SRGB else cls(power, primaries)

    @classmethod
    def of_code_points(cls, primaries: int, transfer: int) -> "Encoding | None":
        """What two code points of ITU-T H.273 say (PNG's cICP, AVIF's nclx); None where it is what sRGB is.

        Raises:
            ValueError: the dynamic range is high (PQ), or a code point is unknown.
        """
        if transfer == _PQ:
            raise ValueError(
                "the image has a high dynamic range (PQ), which needs tone mapping; convert it to a standard range"
            )
        if primaries not in _CODED_PRIMARIES or transfer not in _CODED_CURVES:
            raise ValueError(
                f"the file names colour primaries {primaries} and transfer characteristics {transfer} of ITU-T H.273, "
                "which are not known here; convert it to sRGB"
            )
        found = cls(_CODED_CURVES[transfer], _CODED_PRIMARIES[primaries])
        return None if found == cls() else found

    def greys(self, levels: np.ndarray) -> np.ndarray:
        """Levels of grey from 0 to 1, as those of sRGB."""
        return levels if self.gamma is None else _encoded(levels**self.gamma)

    def colours(self, levels: np.ndarray) -> np.ndarray:
        """(..., 3) levels from 0 to 1, as those of sRGB, float32; a colour outside of sRGB is cut to its range."""
        light = _light(levels) if self.gamma is None else levels**self.gamma
        return _encoded(np.clip(light @ self._matrix, 0, 1))

    @cached_property
    def _matrix(self) -> np.ndarray:
        """(3, 3): from a row of light in these primaries to one in those of sRGB."""
        # Bradford's adaptation: the white of the file becomes that of the screen.
        bradford = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
        there, here = (bradford @ _xyz(each[0]) for each in (self.primaries, _SRGB))
        adapted = np.linalg.inv(bradford) @ np.diag(here / there) @ bradford
        return (np.linalg.inv(_to_xyz(_SRGB)) @ adapted @ _to_xyz(self.primaries)).T.astype(np.float32)


def _is_gamut(primaries: Primaries) -> bool:
    """Whether they are points from which colours can be computed."""
    return all(0 <= x <= 1 and 0 < y <= 1 for x, y in primaries) and abs(np.linalg.det(_columns(primaries))) > 1e-3


def _xyz(point: tuple[float, float]) -> np.ndarray:
    x, y = point
    return np.array([x / y, 1, (1 - x - y) / y])


def _columns(primaries: Primaries) -> np.ndarray:
    return np.stack([_xyz(each) for each in primaries[1:]], axis=1)


def _to_xyz(primaries: Primaries) -> np.ndarray:
    columns = _columns(primaries)
    return columns * np.linalg.solve(columns, _xyz(primaries[0]))


def _light(levels: np.ndarray) -> np.ndarray:
    """Of the levels of sRGB; IEC 61966-2-1."""
    return np.where(levels <= 0.04045, levels / 12.92, ((levels + 0.055) / 1.055) ** 2.4)


def _encoded(light: np.ndarray) -> np.ndarray:
    """As levels of sRGB."""
    return np.where(light <= 0.0031308, light * 12.92, 1.055 * light ** (1 / 2.4) - 0.055)


def by_profile(image: Image.Image, profile: bytes) -> Image.Image | None:
    """An image in mode "L", "RGB" or "CMYK" as one in sRGB, with the intent "perceptual".

    None where there is nothing to do: the profile says what sRGB says, to within rounding. Or there is nothing to go
    by: it is broken, or is of other colours than the image has. Viewers ignore such a profile.
    """
    made = _transform(profile, image.mode)
    return None if made is None else made(image)


@lru_cache(maxsize=16)
def _transform(profile: bytes, mode: str) -> Callable[[Image.Image], Image.Image] | None:
    """What makes sRGB of an image in this mode."""
    try:
        opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        space = opened.profile.xcolor_space
        if mode not in _MODES.get(space, ()):
            return None
        mode = "RGB" if space == "RGB " else mode
        # Without its optimisation LittleCMS is slow, but exact: of grey, 256 levels are enough.
        flags = ImageCms.Flags.NOOPTIMIZE if mode == "L" else ImageCms.Flags.NONE
        transform = ImageCms.buildTransform(opened, ImageCms.createProfile("sRGB"), mode, "RGB", flags=flags)
    except (ImageCms.PyCMSError, OSError, ValueError):
        return None
    if mode == "CMYK":
        return transform.apply
    some = np.linspace(0, 255, 9 if mode == "RGB" else 256).astype(np.uint8)
    colours = np.stack(np.meshgrid(some, some, some), axis=-1).reshape(1, -1, 3) if mode == "RGB" else some[None]
    tried = Image.fromarray(colours)
    found = np.asarray(transform.apply(tried))
    if np.abs(found.astype(int) - np.asarray(tried.convert("RGB"))).max() <= _NEAR_LEVELS:
        return None
    if mode == "RGB":
        return lambda image: transform.apply(image.convert("RGB") if image.mode == "L" else image)
    tables = [band.tolist() for band in found[0].T]
    return lambda image: Image.merge("RGB", [image.point(table) for table in tables])
