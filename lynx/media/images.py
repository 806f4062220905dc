"""Decoding one image to RGB, and the random crop of training."""

import base64
import io
import math
import os
from pathlib import Path
from urllib.parse import unquote

import numpy as np
from PIL import Image

from lynx.media.regular import not_a_file

# Raster formats that Pillow decodes by itself: EPS, for one, would start another program.
_FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP")
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
    """Decode an image to RGB, upright as its EXIF orientation says.

    Transparent pixels are laid on white. 16-bit grey is scaled to 8 bits. Of an animation the first frame is taken. A
    URL is never fetched.

    Args:
        source: a path, the bytes of a file, base64 of these bytes (as a data URL, or bare if no file has that name), a
            PIL image, or a (height, width, 3) uint8 array.
        max_pixels: larger images are refused, and so are images with a side longer than ``MAX_SIDE``. Files are refused
            by their header, before anything is decoded.

    Raises:
        ImageError: the file is missing, truncated, empty, too large, or not an image of a known format; or its pixels
            have no defined RGB value.
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
    Image.init()
    formats = [each for each in _FORMATS if each in Image.OPEN]
    try:
        image = Image.open(file, formats=formats)
    except Exception as error:  # decoders raise anything: OSError, SyntaxError, struct.error, ...
        raise ImageError(f"{name}: {_reason(error)}") from error
    with image:
        return to_rgb(image, name, max_pixels)


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
    check_size(*image.size, name, max_pixels)
    try:
        image.load()
        turn = _UPRIGHT.get(image.getexif().get(_ORIENTATION_TAG, 1))
        image = _flatten(image)
    except Exception as error:
        raise ImageError(f"{name}: {_reason(error)}") from error
    if turn is not None:
        image = image.transpose(turn)
    image.info = {}  # or the orientation, which is done, would be done again when this image is loaded
    return image


def _flatten(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # "I;16" in its byte orders, and 16 bits inside the 32 of "I"
        levels = np.asarray(image)
        if levels.min() < 0 or levels.max() > 65535:
            raise ValueError(f"grey levels {levels.min()} ... {levels.max()} do not fit 16 bits")
        levels = levels.astype(np.uint32)
        levels += 128  # in place, as such a file may be small and its image huge
        levels //= 257
        return Image.fromarray(levels.astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("floating-point pixels have no defined range")
    if image.has_transparency_data:
        image = image if image.mode == "RGBA" else image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


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
