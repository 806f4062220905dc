"""Image files and ICC profiles written byte by byte, of kinds that Pillow does not write."""

import io
import struct
import zlib

import numpy as np
from PIL import Image

D50 = (0.9642, 1.0, 0.8249)
SRGB = ((0.3127, 0.3290), (0.64, 0.33), (0.30, 0.60), (0.15, 0.06))  # x and y of white, red, green, blue
DISPLAY_P3 = (SRGB[0], (0.68, 0.32), (0.265, 0.69), (0.15, 0.06))
ADOBE_RGB = (SRGB[0], (0.64, 0.33), (0.21, 0.71), (0.15, 0.06))


def packed(levels: np.ndarray, bits: int, order: str = ">") -> bytes:
    """Rows of levels (height, width, bands) of so many bits, each row filled up to a byte."""
    rows = levels.reshape(len(levels), -1)
    if bits in (8, 16, 32):
        return rows.astype(f"{order}u{bits // 8}").tobytes()
    each = (rows[..., None] >> np.arange(bits - 1, -1, -1)) & 1
    return np.packbits(each.reshape(len(rows), -1).astype(np.uint8), axis=1).tobytes()


def png(levels: np.ndarray, bits: int, colour_type: int, **chunks: bytes) -> bytes:
    """A PNG of levels (height, width, bands); chunks by name, put before the pixels."""
    height, width = levels.shape[:2]
    data = packed(levels, bits)
    stride = len(data) // height
    rows = b"".join(b"\0" + data[n * stride : (n + 1) * stride] for n in range(height))
    head = struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0)
    found = [("IHDR", head), *chunks.items(), ("IDAT", zlib.compress(rows)), ("IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name.encode() + body + struct.pack(">I", zlib.crc32(name.encode() + body))
        for name, body in found
    )


def chromaticities(primaries) -> bytes:
    """The content of PNG's cHRM."""
    return struct.pack(">8I", *(round(100000 * each) for point in primaries for each in point))


def tiff(size: tuple[int, int], data: bytes, order: str = "<", **tags: list[int]) -> bytes:
    """A TIFF without compression, in one strip; tags of 16 bits as ``t262=[1]``."""
    width, height = size
    entries = {256: [width], 257: [height], 278: [height], 273: [8], 279: [len(data)]}
    entries |= {int(name[1:]): values for name, values in tags.items()}
    data += b"\0" * (len(data) % 2)
    directory, extra = b"", b""
    after = 8 + len(data) + 2 + 12 * len(entries) + 4
    for tag in sorted(entries):
        body = struct.pack(f"{order}{len(entries[tag])}I", *entries[tag])
        if len(body) <= 4:
            directory += struct.pack(f"{order}HHI", tag, 4, len(entries[tag])) + body
        else:
            directory += struct.pack(f"{order}HHII", tag, 4, len(entries[tag]), after + len(extra))
            extra += body
    mark = b"II" if order == "<" else b"MM"
    head = mark + struct.pack(f"{order}HI", 42, 8 + len(data))
    return head + data + struct.pack(f"{order}H", len(entries)) + directory + struct.pack(f"{order}I", 0) + extra


def jp2(levels: np.ndarray, bits: int, colr: bytes | None = None) -> bytes:
    """A lossless JPEG 2000 file of levels of at most 8 bits, (height, width) or (height, width, bands).

    Pillow writes 8 bits. Levels are stored relative to the middle of their range, so these are written, moved to the
    middle of 8 bits, and the depth is set to ``bits``. ``colr`` replaces the content of that box.
    """
    file = io.BytesIO()
    moved = Image.fromarray((levels.astype(int) + 128 - 2 ** (bits - 1)).astype(np.uint8))
    moved.save(file, "JPEG2000", irreversible=False, mct=0)
    found = bytearray(file.getvalue())
    start = found.index(b"\xff\x4f\xff\x51")
    for band in range(struct.unpack_from(">H", found, start + 40)[0]):
        found[start + 42 + 3 * band] = bits - 1
    found[found.index(b"ihdr") + 14] = bits - 1
    if colr is not None:
        place = found.index(b"colr") - 4
        size = struct.unpack_from(">I", found, place)[0]
        found[place : place + size] = struct.pack(">I4s", 8 + len(colr), b"colr") + colr
        header = found.index(b"jp2h") - 4
        struct.pack_into(">I", found, header, struct.unpack_from(">I", found, header)[0] + 8 + len(colr) - size)
    return bytes(found)


def icc_profile(space: str, tags: dict[str, bytes], pcs: str = "XYZ ") -> bytes:
    """An ICC profile of version 2 for a display or, with ``space`` "CMYK", a printer."""
    kind = b"prtr" if space == "CMYK" else b"mntr"
    tags = {"desc": b"desc\0\0\0\0" + struct.pack(">I", 2) + b"t\0" + bytes(78), "wtpt": _xyz(D50), **tags}
    table, body, start = b"", b"", 128 + 4 + 12 * len(tags)
    for name, content in tags.items():
        table += struct.pack(">4sII", name.encode(), start + len(body), len(content))
        body += content + b"\0" * (-len(content) % 4)
    head = struct.pack(">I4sI4s4s4s", start + len(body), b"none", 0x02100000, kind, space.encode(), pcs.encode())
    head += bytes(12) + b"acsp" + bytes(28) + struct.pack(">3i", *(round(65536 * each) for each in D50))
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


def _xyz(values) -> bytes:
    return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(65536 * each) for each in values))


def _curve(levels: np.ndarray | float) -> bytes:
    """A power, or the light at evenly spaced levels."""
    if isinstance(levels, float):
        return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(256 * levels))
    return b"curv\0\0\0\0" + struct.pack(f">I{len(levels)}H", len(levels), *np.rint(65535 * levels).astype(int))


def rgb_profile(primaries, gamma: float | None = None) -> bytes:
    """A matrix profile; its curve is sRGB's, or a power."""
    curve = _curve(to_light(np.linspace(0, 1, 1024)) if gamma is None else gamma)
    columns = zip("rgb", adapted(primaries, D50).T, strict=True)
    return icc_profile("RGB ", {f"{each}XYZ": _xyz(value) for each, value in columns} | dict.fromkeys(
        ("rTRC", "gTRC", "bTRC"), curve
    ))  # fmt: skip


def grey_profile(gamma: float) -> bytes:
    return icc_profile("GRAY", {"kTRC": _curve(gamma)})


def cmyk_profile() -> bytes:
    """A profile for print in which black ink alone, 0 to 100 %, is seen, from L* = 100 to L* = 0."""
    identity = bytes(range(256))
    grid = b"".join(
        bytes([255 - 255 * (n & 1), 128, 128]) for n in range(16)
    )  # the last of four channels moves fastest
    table = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0])
    table += struct.pack(">9i", *(65536 * (n % 4 == 0) for n in range(9))) + identity * 4 + grid + identity * 3
    return icc_profile("CMYK", {"A2B0": table}, pcs="Lab ")


def adapted(primaries, white) -> np.ndarray:
    """(3, 3): from light in these primaries to XYZ, their white moved to another by Bradford's method."""
    columns = np.array([[x / y, 1, (1 - x - y) / y] for x, y in primaries]).T
    own, rgb = columns[:, 0], columns[:, 1:]
    to_xyz = rgb * np.linalg.solve(rgb, own)
    cone = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
    return np.linalg.inv(cone) @ np.diag((cone @ white) / (cone @ own)) @ cone @ to_xyz


def to_light(levels: np.ndarray) -> np.ndarray:
    """The curve of sRGB, from levels to light, both from 0 to 1."""
    return np.where(levels <= 0.04045, levels / 12.92, ((levels + 0.055) / 1.055) ** 2.4)


def to_levels(light: np.ndarray) -> np.ndarray:
    """The curve of sRGB, from light to levels."""
    light = np.clip(light, 0, 1)
    return np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)


def in_srgb(levels: np.ndarray, primaries=SRGB, gamma: float | None = None) -> np.ndarray:
    """Levels (..., 3) from 0 to 1, in these primaries and with this power, as sRGB's from 0 to 255."""
    light = to_light(levels) if gamma is None else levels**gamma
    return 255 * to_levels(light @ (np.linalg.inv(adapted(SRGB, D50)) @ adapted(primaries, D50)).T)
