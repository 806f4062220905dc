"""What a file says of its samples and Pillow does not pass on: what white is, what is see-through, which colours."""

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

from PIL import Image

from lynx.media.colour import Encoding

_BOX = 8  # bytes of a box's length and kind
_NO_COLOURS = ("BC6H", "BC6HS")  # formats of DDS: light of a high dynamic range
_JP2_COLOURS = (12, 15, 16, 17, 18)  # CMYK, black and white, sRGB, grey, and sYCC, which OpenJPEG makes sRGB
_BITS, _COMPRESSION, _PHOTOMETRIC, _STRIP_BYTES, _PLANES, _SAMPLE_FORMAT, _SUBSAMPLING = (
    258,
    259,
    262,
    279,
    284,
    339,
    530,
)
_WHITE_IS_ZERO, _YCBCR, _LAB = 0, 6, 8


@dataclass(frozen=True)
class Stored:
    """The samples of an image as its file has them.

    Attributes:
        white: the level that is white, in grey of more than 8 bits: 65535, or 4095 where there are 12.
        is_inverted: whether 0 is white, and ``white`` black.
        is_unsigned: whether what Pillow holds as signed numbers of 32 bits are unsigned ones, their white the highest.
        band_whites: the level that is white in each band of 8 bits, where it is not 255.
        transparent: the level or the colour that is see-through, in the depth of the file.
        low: the low bytes of colours of 16 bits; of these Pillow keeps the high ones.
        ignores_alpha: whether the file says that its fourth band is no opacity.
        alpha_may_be_unused: whether an opacity of 0 everywhere means that nobody wrote one.
        profile: an ICC profile of which Pillow does not tell.
        encoding: what the file says of its colours where it has no profile.
        overrides_profile: whether ``encoding`` goes before a profile, also where it is None, which is sRGB.
    """

    white: int = 65535
    is_inverted: bool = False
    is_unsigned: bool = False
    band_whites: tuple[int, ...] = ()
    transparent: int | tuple[int, ...] | None = None
    low: Image.Image | None = None
    ignores_alpha: bool = False
    alpha_may_be_unused: bool = False
    profile: bytes | None = None
    encoding: Encoding | None = None
    overrides_profile: bool = False


def stored(image: Image.Image) -> Stored:
    """What the file of an image says. Ask before the image is loaded: then its file is closed.

    Raises:
        ValueError: Pillow would read its samples wrongly, or they have no defined colours.
    """
    return _READERS.get(image.format or "", _any)(image)


def _any(image: Image.Image) -> Stored:
    return Stored(transparent=_transparent(image))


def _transparent(image: Image.Image, scale: int = 1) -> int | tuple[int, ...] | None:
    """The see-through level or colour, scaled to the levels of the image; None where there is none, or a palette."""
    key = image.info.get("transparency")
    if image.mode in ("1", "L") and isinstance(key, int):
        return key * scale
    return key if image.mode.startswith("I") or image.mode == "RGB" else None


def _file(image: Image.Image) -> BinaryIO | None:
    """The file of an image that is not loaded yet."""
    return getattr(image, "fp", None) if getattr(image, "tile", None) else None


def _read(file: BinaryIO, place: int, size: int) -> bytes:
    """``size`` bytes at ``place``, or as many as there are; the file's position stays."""
    before = file.tell()
    try:
        file.seek(place)
        return file.read(size)
    finally:
        file.seek(before)


def _png(image: Any) -> Stored:
    """The depth, its see-through colour in that depth, and cICP, sRGB, gAMA and cHRM; PNG's third edition."""
    encoding = None
    if "srgb" not in image.info:
        encoding = Encoding.of_png(image.info.get("gamma"), image.info.get("chromaticity"))
    file, low, raw_mode, overrides = _file(image), None, image.mode, False
    if file is not None:
        raw_mode = image.tile[0].args
        if raw_mode in ("RGB;16B", "RGBA;16B"):
            before = file.tell()
            file.seek(0)
            low = Image.open(file, formats=["PNG"])
            low.tile = [low.tile[0]._replace(args=raw_mode[:-1] + "L")]  # as if the byte order were the other one
            low.load()
            file.seek(before)
        for kind, place, size in _chunks(file):
            if kind == b"cICP" and size == 4:
                primaries, transfer, matrix, is_full = _read(file, place, 4)
                if matrix or not is_full:
                    raise ValueError("its cICP chunk says that the samples are not RGB of the full range; convert it")
                encoding, overrides = Encoding.of_code_points(primaries, transfer), True
    # Pillow scales the levels of 2 and 4 bits, not the see-through one.
    transparent = _transparent(image, {"L;2": 85, "L;4": 17}.get(raw_mode, 1))
    if isinstance(transparent, tuple) and raw_mode == "RGB":  # of 8 bits, or it is not known any more
        is_deep = file is None and max(transparent) > 255
        transparent = tuple(each >> 8 if is_deep else each & 255 for each in transparent)
    elif raw_mode == "L" and isinstance(transparent, int):
        transparent &= 255
    return Stored(transparent=transparent, low=low, encoding=encoding, overrides_profile=overrides)


def _chunks(file: BinaryIO) -> Iterator[tuple[bytes, int, int]]:
    """Kind, place and size of each chunk of a PNG before its pixels."""
    place = 8
    while len(head := _read(file, place, 8)) == 8:
        size, kind = struct.unpack(">I4s", head)
        if kind in (b"IDAT", b"IEND"):
            return
        yield kind, place + 8, size
        place += size + 12


def _tiff(image: Any) -> Stored:
    """The tags of TIFF 6.0 that Pillow drops where it has no mode for them."""
    tags = image.tag_v2
    photometric = tags.get(_PHOTOMETRIC, _WHITE_IS_ZERO)
    bits = tags.get(_BITS, (1,))[0]
    is_signed = 2 in tags.get(_SAMPLE_FORMAT, ())
    if is_signed and bits < 32:
        raise ValueError(
            f"its samples are signed integers of {bits} bits, of which nothing says what is black and white; convert "
            "them to unsigned ones"
        )
    is_raw = tags.get(_COMPRESSION, 1) == 1
    if is_raw and tags.get(_PLANES) == 2 and (bits > 8 or photometric in (_YCBCR, _LAB)):
        raise ValueError(
            "samples of such a kind in planes without compression are not read; compress it, or convert it"
        )
    if is_raw and photometric == _YCBCR and image.mode == "YCbCr":
        subsampling = tags.get(_SUBSAMPLING, (2, 2))
        is_whole = sum(tags.get(_STRIP_BYTES, ())) >= 3 * image.width * image.height
        if tuple(subsampling) != (1, 1) and not (_SUBSAMPLING not in tags and is_whole):
            raise ValueError("subsampled YCbCr without compression is not read; compress it, or convert it to RGB")
    return Stored(
        white=2**bits - 1 if image.mode.startswith("I;") else 65535,
        is_inverted=photometric == _WHITE_IS_ZERO and (image.mode.startswith("I") or image.mode == "F"),
        is_unsigned=image.mode == "I" and not is_signed,
        transparent=_transparent(image),
    )


def _ppm(image: Image.Image) -> Stored:
    if image.mode == "F" and image.info.get("scale", 1) != 1:
        raise ValueError(f"it is in units of {image.info['scale']}; scale it so that 0 is black and 1 is white")
    return _any(image)


def _dds(image: Any) -> Stored:
    if getattr(image, "pixel_format", None) in _NO_COLOURS:
        raise ValueError("the image has a high dynamic range (BC6H), which needs tone mapping; convert it to 8 bits")
    return _any(image)


def _tga(image: Image.Image) -> Stored:
    file = _file(image)
    opacity_bits = 8 if file is None else _read(file, 17, 1)[0] & 15
    return Stored(ignores_alpha=not opacity_bits, alpha_may_be_unused=True)


def _bmp(image: Image.Image) -> Stored:
    """The profile of a bitmap with the fifth version of the header."""
    file = _file(image)
    header = _read(file, 14, 124) if file is not None else b""
    if len(header) < 124 or header[:4] != struct.pack("<I", 124) or header[56:60] != b"DEBM":
        return Stored(alpha_may_be_unused=True)
    place, size = struct.unpack_from("<II", header, 112)
    return Stored(profile=_read(file, 14 + place, size), alpha_may_be_unused=True)  # type: ignore[arg-type]


def _boxes(file: BinaryIO, start: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """Kind, start and end of each box between two places of a file; of JPEG 2000 and of AVIF."""
    while start + _BOX <= end:
        size, kind = struct.unpack(">I4s", _read(file, start, _BOX))
        head = _BOX
        if size == 1:
            size, head = struct.unpack(">Q", _read(file, start + _BOX, 8))[0], 16
        size = size or end - start
        if size < head:
            return
        yield kind, start + head, min(start + size, end)
        start += size


def _within(file: BinaryIO, path: tuple[bytes, ...], start: int, end: int) -> Iterator[tuple[int, int]]:
    """Start and end of the boxes at the end of a path of kinds."""
    first, *rest = path
    for kind, inner, inner_end in _boxes(file, start, end):
        if kind == first and not rest:
            yield inner, inner_end
        elif kind == first:
            yield from _within(file, tuple(rest), inner + 4 * (kind == b"meta"), inner_end)


def _size(file: BinaryIO) -> int:
    before = file.tell()
    size = file.seek(0, 2)
    file.seek(before)
    return size


def _jpeg_2000(image: Any) -> Stored:
    """The depth of each component, to which Pillow's levels are shifted, not scaled; and the profile."""
    file = _file(image)
    if file is None:
        return _any(image)
    end, profile, start = _size(file), None, 0
    for inner, inner_end in _within(file, (b"jp2h", b"colr"), 0, end):
        method = _read(file, inner, 1)
        if method in (b"\x02", b"\x03"):
            profile = _read(file, inner + 3, inner_end - inner - 3)
        elif method == b"\x01" and (colours := int.from_bytes(_read(file, inner + 3, 4))) not in _JP2_COLOURS:
            raise ValueError(f"its colours, number {colours} of JPEG 2000, are not known here; convert it to sRGB")
        break  # a reader takes the first one
    for inner, _ in _within(file, (b"jp2c",), 0, end):
        start = inner
        break
    head = _read(file, start, 42)
    count = int.from_bytes(head[40:42])
    depths = [(each & 127) + 1 for each in _read(file, start + 42, 3 * count)[::3]]
    if image.mode in ("P", "PA") and min(depths) < 8:
        raise ValueError("a palette of JPEG 2000 with fewer than 8 bits is not read; convert it to RGB")
    whites = tuple(255 if depth >= 8 else (2**depth - 1) << 8 - depth for depth in depths)
    return Stored(band_whites=whites if min(whites) < 255 else (), profile=profile)


def _avif(image: Any) -> Stored:
    """The code points of the primary item, ISO/IEC 23008-12; libavif uses them for the matrix alone."""
    file = _file(image)
    if file is None:
        return Stored()
    end, primary = _size(file), None
    for inner, _ in _within(file, (b"meta", b"pitm"), 0, end):
        version = _read(file, inner, 1)[0]
        primary = int.from_bytes(_read(file, inner + 4, 4 if version else 2))
    properties = [
        (kind, inner, inner_end)
        for start, stop in _within(file, (b"meta", b"iprp", b"ipco"), 0, end)
        for kind, inner, inner_end in _boxes(file, start, stop)
    ]
    for inner, inner_end in _within(file, (b"meta", b"iprp", b"ipma"), 0, end):
        for number in _associations(_read(file, inner, inner_end - inner)).get(primary, ()):
            if not 0 < number <= len(properties):
                continue
            kind, start, _ = properties[number - 1]
            if kind == b"colr" and _read(file, start, 4) == b"nclx":
                return Stored(encoding=Encoding.of_code_points(*struct.unpack(">HH", _read(file, start + 4, 4))))
    return Stored()


def _associations(box: bytes) -> dict[int | None, list[int]]:
    """The numbers of the properties of each item, from the content of an ``ipma`` box."""
    version, wide, count = box[0], box[3] & 1, int.from_bytes(box[4:8])
    found: dict[int | None, list[int]] = {}
    place, width = 8, 4 if version else 2
    for _ in range(count):
        item, place = int.from_bytes(box[place : place + width]), place + width
        many, place, size = box[place], place + 1, 1 + wide
        numbers = (int.from_bytes(box[place + size * each :][:size]) for each in range(many))
        found[item] = [number & (0x7FFF if wide else 0x7F) for number in numbers]
        place += size * many
    return found


_READERS: dict[str, Callable[[Any], Stored]] = {
    "AVIF": _avif,
    "BMP": _bmp,
    "DDS": _dds,
    "JPEG2000": _jpeg_2000,
    "PNG": _png,
    "PPM": _ppm,
    "TGA": _tga,
    "TIFF": _tiff,
}
