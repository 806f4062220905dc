"""Decoding one image to RGB, as a person sees it, and the random crop of training."""

import base64
import io
import math
import os
import struct
from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote

import numpy as np
from PIL import IcoImagePlugin, Image

from lynx.media.colour import by_profile
from lynx.media.containers import Stored, stored
from lynx.media.regular import not_a_file
from lynx.media.samples import parts

# Raster formats that Pillow decodes by itself: EPS, for one, would start another program. TGA, which has no mark of its
# own, is tried last.
_FORMATS = (
    "AVIF", "BMP", "DDS", "GIF", "JPEG", "JPEG2000", "MPO", "PCX", "PNG", "PPM", "QOI", "SGI", "TIFF", "WEBP",
    "TGA",
)  # fmt: skip
_ICON = b"\0\0\1\0"
_ORIENTATION_TAG = 0x0112
_UPRIGHT = {  # for each EXIF orientation, what turns the image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
DEFAULT_MAX_PIXELS = 1024**3 // 4 // 3  # 89 million, where Pillow starts to warn: a quarter of a GiB in RGB
MAX_SIDE = 2**15  # a side of millions fits the pixel limit, but not the memory of a resize

ImageSource = str | os.PathLike | bytes | Image.Image | np.ndarray


class ImageError(ValueError):
    """An image cannot be used; the message names the image and says why."""


def load_image(source: ImageSource, *, max_pixels: int = DEFAULT_MAX_PIXELS) -> Image.Image:
    """Decode an image to RGB as a person sees it in a viewer: upright by its EXIF orientation, on white, in sRGB.

    8 bits of sRGB, or of a file that says nothing of its colours, are as Pillow's ``convert("RGB")`` gives them. Else:

    - A level counts in the range of its depth, 0 to 2^bits - 1 (in a PGM or PPM to what its header says), whichever end
      is black. Signed integers of 32 bits hold the 16 bits that Pillow writes so; other signed ones are refused.
    - Of floating-point levels 0 is black and 1 is white, on the curve that integers have. Levels beyond these, NaN and
      infinity are refused.
    - See-through pixels, in any depth, lie on white.
    - An ICC profile is followed (intent: perceptual), unless it is broken or is of other colours than the image has.
      Where there is none, PNG's cICP, or else its gAMA and cHRM, and the code points of AVIF are followed. A high
      dynamic range (PQ) is refused. CMYK without a profile becomes RGB by the plain formula; in JPEG it is inverted,
      as Adobe has it. What EXIF says of colours is not followed.
    - Of an animation the first frame is taken, and of an icon the largest image.

    A URL is never fetched.

    Args:
        source: a path, the bytes of a file, base64 of these bytes (as a data URL, or bare if no file has that name), a
            PIL image, or a (height, width, 3) uint8 array.
        max_pixels: larger images are refused, and so are images with a side longer than ``MAX_SIDE``. Files are refused
            by their header, before anything is decoded.

    Raises:
        ImageError: the file is missing, truncated, empty, too large, or not an image of a known format; or its samples
            have no defined look, as above, or are of a kind that Pillow does not read, or reads wrongly.
        TypeError: ``source`` is of another type.
    """
    if isinstance(source, np.ndarray):
        return _from_array(source, max_pixels)
    if isinstance(source, Image.Image):
        return to_rgb(source, getattr(source, "filename", "") or "PIL image", max_pixels)
    file: io.BytesIO | Path
    if isinstance(source, bytes):
        name, file = f"image of {len(source)} bytes", io.BytesIO(source)
    elif isinstance(source, str | os.PathLike):
        name, file = _shortened(os.fspath(source)), Path(source)
        data = decode_base64(source) if isinstance(source, str) and not os.path.exists(source) else None
        if data:
            name, file = f"{name} (no such file, so read as base64)", io.BytesIO(data)
        elif name.startswith("data:"):
            raise ImageError(f"{name}: a data URL of an image must hold valid base64")
        elif "://" in name:
            raise ImageError(f"{name}: a URL is never fetched; download the image and pass its path or bytes")
    else:
        raise TypeError(f"an image must be a path, bytes, a PIL image or a numpy array, got {type(source).__name__}")
    if isinstance(file, Path) and (kind := not_a_file(file)):
        raise ImageError(f"{name}: cannot be decoded: it is {kind}, not an image file")
    try:
        with file.open("rb") if isinstance(file, Path) else file as opened, _opened(opened, name, max_pixels) as image:
            return to_rgb(image, name, max_pixels)
    except ImageError:
        raise
    except Exception as error:  # decoders raise anything: OSError, SyntaxError, struct.error, ...
        raise ImageError(f"{name}: {_reason(error)}") from error


def _opened(file: BinaryIO, name: str, max_pixels: int) -> Image.Image:
    """The image of a file, not decoded yet."""
    Image.init()
    start = file.read(16)
    file.seek(0)
    if start.startswith(_ICON):
        return _icon(file, name, max_pixels)
    formats = [each for each in _FORMATS if each in Image.OPEN]
    try:
        return Image.open(file, formats=formats)
    except Image.UnidentifiedImageError as error:
        for each in formats:
            if (accepts := Image.OPEN[each][1]) is not None and start and accepts(start) is True:
                raise ImageError(
                    f"{name}: a {each} file, but damaged or of a kind that cannot be read; convert it"
                ) from error
        raise


def _icon(file: BinaryIO, name: str, max_pixels: int) -> Image.Image:
    """The largest image of an icon; ``Image.open`` would decode it before its size can be checked."""
    icon = IcoImagePlugin.IcoFile(file)
    file.seek(icon.entry[0].offset)
    head = file.read(24)
    is_png = head.startswith(b"\x89PNG")
    width, height = struct.unpack(">II", head[16:24]) if is_png else struct.unpack("<II", head[4:12])
    check_size(width, height if is_png else height // 2, name, max_pixels)
    return icon.frame(0)


def is_image_file(source: str | os.PathLike) -> bool:
    """Whether this is a path with the suffix of an image file of a known format."""
    Image.init()
    kind = Image.EXTENSION.get(os.path.splitext(os.fspath(source))[1].lower())
    return kind in (*_FORMATS, "ICO")


def decode_base64(text: str) -> bytes | None:
    """The bytes of a base64 text, bare or in a data URL, line breaks allowed; None if it is not valid base64."""
    if text.startswith("data:"):
        header, _, text = text.partition(",")
        if not header.endswith(";base64"):
            return None
        text = unquote(text)
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except ValueError:
        return None


def _shortened(name: str) -> str:
    return name if len(name) <= 300 else f"{name[:40]}... ({len(name)} characters)"


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if isinstance(error, Image.UnidentifiedImageError):
        return "not an image of a known format, or empty"
    return f"cannot be decoded: {error or type(error).__name__}"


def _from_array(array: np.ndarray, max_pixels: int) -> Image.Image:
    name = f"array of shape {array.shape} and dtype {array.dtype}"
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        raise ImageError(f"{name}: expected (height, width, 3) and uint8")
    check_size(array.shape[1], array.shape[0], name, max_pixels)
    return Image.fromarray(array)


def check_size(width: int, height: int, name: str, max_pixels: int) -> None:
    """Raise ImageError, naming ``name``, for an image that is empty or too large."""
    if width * height == 0:
        raise ImageError(f"{name}: the image is empty, {width} x {height} pixels")
    if width * height > max_pixels:
        raise ImageError(f"{name}: {width} x {height} pixels are more than the limit of {max_pixels}")
    if max(width, height) > MAX_SIDE:
        raise ImageError(f"{name}: {width} x {height} pixels have a side longer than the limit of {MAX_SIDE}")


def to_rgb(image: Image.Image, name: str, max_pixels: int) -> Image.Image:
    """An image as ``load_image`` returns it; raises ImageError, naming ``name``."""
    try:
        check_size(*image.size, name, max_pixels)
        file_says = stored(image)
        image.load()
        turn = _UPRIGHT.get(image.getexif().get(_ORIENTATION_TAG, 1))
        image = _flatten(image, file_says)
    except ImageError:
        raise
    except Exception as error:
        raise ImageError(f"{name}: {_reason(error)}") from error
    if turn is not None:
        image = image.transpose(turn)
    image.info = {}  # or the orientation, which is done, would be done again when this image is loaded
    return image


def _flatten(image: Image.Image, file_says: Stored) -> Image.Image:
    """The loaded image in RGB, as sRGB has its colours, on white."""
    profile = None if file_says.overrides_profile else image.info.get("icc_profile") or file_says.profile
    colours, alpha = parts(image, file_says, None if profile else file_says.encoding)
    managed = by_profile(colours, profile) if profile else None
    colours = colours.convert("RGB") if managed is None else managed
    if alpha is None:
        return colours
    colours.putalpha(alpha)
    return Image.alpha_composite(Image.new("RGBA", colours.size, "white"), colours).convert("RGB")


def random_resized_crop_box(
    height: int,
    width: int,
    generator: np.random.Generator,
    *,
    scale: tuple[float, float] = (0.9, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> tuple[int, int, int, int]:
    """Draw the box (top, left, height, width) of a random resized crop; the defaults are those of Lynx.

    Its share of the area is uniform in ``scale``, and its width / height is log-uniform in ``ratio``. If ten draws do
    not fit (in a long, narrow image), it is the largest centred box whose width / height lies in ``ratio``. This is
    Inception's augmentation (arXiv 1409.4842, section 6) as torchvision does it.
    """
    for _ in range(10):
        area = height * width * generator.uniform(*scale)
        aspect = math.exp(generator.uniform(math.log(ratio[0]), math.log(ratio[1])))
        box_height, box_width = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
        if 0 < box_height <= height and 0 < box_width <= width:
            top = int(generator.integers(height - box_height + 1))
            left = int(generator.integers(width - box_width + 1))
            return top, left, box_height, box_width
    box_height = min(height, max(1, round(width / ratio[0])))
    box_width = min(width, max(1, round(height * ratio[1])))
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width
