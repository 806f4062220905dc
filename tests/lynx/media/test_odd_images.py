"""Images whose samples are not 8 bits of sRGB: 1 to 32 bits, floats, inverted, see-through, with profiles and gammas.

Each is written byte by byte and compared with what follows from its samples: it looks as a person would see it in a
viewer, on white, in the colours of sRGB; 8 bits of sRGB stay as they are. What has no defined look (signed integers,
NaN, floats outside of 0 to 1, a high dynamic range) or what Pillow reads wrongly is refused, by name and reason.
"""

import contextlib
import io
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms, features

from lynx.media.images import ImageError, load_image
from tests.lynx.media import raw_files
from tests.lynx.media.raw_files import jp2, packed, png, tiff

needs_avif = pytest.mark.skipif(not features.check("avif"), reason="Pillow is built without AVIF")
GREY, COLOUR, PALETTE, GREY_ALPHA, COLOUR_ALPHA = 0, 2, 3, 4, 6  # PNG's colour types


def draw(*shape, bits=8, seed=0):
    """Levels of all sizes, black and white among them."""
    levels = np.random.default_rng(seed).integers(0, 2**bits, shape)
    levels.reshape(-1)[:2] = 0, 2**bits - 1
    return levels


def shown(file) -> np.ndarray:
    image = load_image(file)
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def in_8_bits(levels, bits):
    """Levels (height, width) or (height, width, bands), as they stand in the range of their depth, in RGB."""
    found = np.rint(levels * (255 / (2**bits - 1))).astype(int)
    return np.broadcast_to(found.reshape(*found.shape[:2], -1), (*found.shape[:2], 3)).copy()


def saved(image, kind, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


# Depth


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_grey_png(bits):
    levels = draw(5, 7, 1, bits=bits)
    np.testing.assert_array_equal(shown(png(levels, bits, GREY)), in_8_bits(levels, bits))


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("colour_type", [COLOUR, GREY_ALPHA, COLOUR_ALPHA])
def test_other_png(bits, colour_type):
    bands = {COLOUR: 3, GREY_ALPHA: 2, COLOUR_ALPHA: 4}[colour_type]
    levels = draw(5, 7, bands, bits=bits)
    if colour_type != COLOUR:
        levels[..., -1] = 2**bits - 1
    expected = in_8_bits(levels[..., : 1 if colour_type == GREY_ALPHA else 3], bits)
    # Of two bands of 16 bits, Pillow keeps the high bytes.
    np.testing.assert_allclose(shown(png(levels, bits, colour_type)), expected, atol=colour_type == GREY_ALPHA)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_palettes(bits):
    colours, places = draw(2**bits, 3, seed=1), draw(5, 7, 1, bits=bits)
    files = [png(places, bits, PALETTE, PLTE=colours.astype(np.uint8).tobytes())]
    table = (colours * 257).T.reshape(-1).tolist()  # in TIFF, 16 bits
    files.append(tiff((7, 5), packed(places, bits), t258=[bits], t262=[3], t320=table))
    for file in files:
        np.testing.assert_array_equal(shown(file), colours[places[..., 0]])


@pytest.mark.parametrize("white_is_zero", [True, False])
@pytest.mark.parametrize("bits", [1, 2, 4, 8, 12, 16])
def test_grey_tiff(bits, white_is_zero):
    levels = draw(5, 7, 1, bits=bits)
    file = tiff((7, 5), packed(levels, bits, "<"), t258=[bits], t262=[int(not white_is_zero)])
    if bits == 12 and white_is_zero:
        with pytest.raises(ImageError, match="TIFF file, but damaged or of a kind that cannot be read"):
            load_image(file)
        return
    expected = in_8_bits(2**bits - 1 - levels if white_is_zero else levels, bits)
    np.testing.assert_array_equal(shown(file), expected)


def test_the_photometric_tag_may_be_missing():
    """Then 0 is white, as Pillow and libtiff take it, whatever the depth."""
    for bits in (8, 16):
        levels = draw(5, 7, 1, bits=bits)
        file = tiff((7, 5), packed(levels, bits, "<"), t258=[bits])
        np.testing.assert_array_equal(shown(file), in_8_bits(2**bits - 1 - levels, bits))


@pytest.mark.parametrize("order", ["<", ">"])
def test_byte_orders(order):
    grey, colours = draw(5, 7, 1, bits=16), draw(5, 7, 3, bits=16)
    np.testing.assert_array_equal(
        shown(tiff((7, 5), packed(grey, 16, order), order, t258=[16], t262=[1])), in_8_bits(grey, 16)
    )
    file = tiff((7, 5), packed(colours, 16, order), order, t258=[16] * 3, t262=[2], t277=[3])
    np.testing.assert_allclose(shown(file), in_8_bits(colours, 16), atol=1)


def test_32_bits():
    """Unsigned they have the whole range; signed they are the 16 bits that Pillow writes so, and others are refused."""
    levels = draw(5, 7, 1, bits=32)
    file = tiff((7, 5), packed(levels, 32, "<"), t258=[32], t262=[1])
    np.testing.assert_allclose(shown(file), in_8_bits(levels, 32), atol=1)
    levels = draw(5, 7, bits=16)
    image = Image.fromarray(levels.astype(np.int32))
    for source in (saved(image, "TIFF"), image):
        np.testing.assert_array_equal(shown(source), in_8_bits(levels, 16))
    for wrong in (-1, 65536):
        with pytest.raises(ImageError, match=f"{wrong}.* do not fit 16 bits"):
            load_image(saved(Image.fromarray(np.array([[5, wrong]], np.int32)), "TIFF"))


@pytest.mark.parametrize("bits", [8, 16])
def test_signed_integers_are_refused(bits):
    file = tiff((2, 1), bytes(bits // 4), t258=[bits], t262=[1], t339=[2])
    with pytest.raises(ImageError, match=f"signed integers of {bits} bits, of which nothing says what is black"):
        load_image(file)


def floats(levels, order="<", **tags) -> bytes:
    levels = np.asarray(levels, f"{order}f4")
    return tiff(levels.shape[::-1], levels.tobytes(), order, **{"t258": [32], "t262": [1], "t339": [3], **tags})


def test_floats_from_0_to_1():
    levels = np.random.default_rng(0).random((5, 7)).astype(np.float32)
    levels[0, :4] = 0, 1, -1e-6, 1 + 1e-6  # what a resize leaves
    expected = in_8_bits(levels.clip(0, 1), 1)
    pfm = b"Pf\n7 5\n-1.0\n" + levels[::-1].tobytes()
    for file in (floats(levels), floats(levels, ">"), pfm, saved(Image.fromarray(levels), "TIFF", compression="raw")):
        np.testing.assert_array_equal(shown(file), expected)
    np.testing.assert_array_equal(shown(Image.fromarray(levels)), expected)
    np.testing.assert_array_equal(shown(floats(levels, t262=[0])), 255 - expected)


@pytest.mark.parametrize(
    ("levels", "message"),
    [
        ([[0.5, np.nan]], "some are NaN or infinite"),
        ([[0.5, -np.inf]], "some are NaN or infinite"),
        ([[0.5, 1.2]], r"0.5 ... 1.2 are outside of 0 \(black\) to 1 \(white\)"),
        ([[-0.1, 1]], "-0.1 ... 1 are outside"),
        ([[0, 255]], "0 ... 255 are outside"),
    ],
)
def test_other_floats_are_refused(levels, message):
    for source in (floats(levels), Image.fromarray(np.asarray(levels, np.float32))):
        with pytest.raises(ImageError, match=message):
            load_image(source)


def test_what_pillow_has_no_mode_for_is_named():
    double = tiff((1, 1), struct.pack("<d", 0.5), t258=[64], t262=[1], t339=[3])
    three = tiff((1, 1), struct.pack("<3f", 0, 0.5, 1), t258=[32] * 3, t262=[2], t277=[3], t339=[3] * 3)
    for file in (double, three):
        with pytest.raises(ImageError, match="TIFF file, but damaged or of a kind that cannot be read"):
            load_image(file)
    with pytest.raises(ImageError, match=r"in units of 2.0; scale it"):
        load_image(b"Pf\n1 1\n2.0\n" + struct.pack(">f", 0.5))


@pytest.mark.parametrize("bits", range(1, 9))
def test_jpeg_2000(bits):
    grey, colours = draw(5, 7, bits=bits), draw(5, 7, 3, bits=bits)
    np.testing.assert_array_equal(shown(jp2(grey, bits)), in_8_bits(grey[..., None], bits))
    np.testing.assert_array_equal(shown(jp2(colours, bits)), in_8_bits(colours, bits))


def test_jpeg_2000_of_16_bits():
    levels = draw(5, 7, bits=16)
    file = saved(Image.fromarray(levels.astype(np.uint16)), "JPEG2000", irreversible=False)
    np.testing.assert_array_equal(shown(file), in_8_bits(levels, 16))


@pytest.mark.parametrize("most", [1, 7, 255, 256, 1000, 4095, 65535])
def test_portable_maps(most):
    """Their header names the level that is white."""
    grey, colours = (np.random.default_rng(0).integers(0, most + 1, shape) for shape in ((5, 7), (5, 7, 3)))
    for levels, binary, plain in ((grey, "P5", "P2"), (colours, "P6", "P3")):
        expected = np.rint(levels * 255 / most)
        expected = expected if levels.ndim == 3 else np.repeat(expected[..., None], 3, axis=2)
        body = levels.astype(">u2" if most > 255 else np.uint8).tobytes()
        for file in (
            f"{binary} 7 5 {most}\n".encode() + body,
            f"{plain} 7 5 {most}\n{' '.join(map(str, levels.reshape(-1)))}\n".encode(),
        ):
            np.testing.assert_allclose(shown(file), expected, atol=most > 255)  # by way of 16 bits


def test_sgi_of_16_bits():
    levels = draw(5, 7, 3, bits=16)
    head = struct.pack(">hBBHHHHii", 474, 0, 2, 3, 7, 5, 3, 0, 65535).ljust(512, b"\0")
    file = head + levels[::-1].transpose(2, 0, 1).astype(">u2").tobytes()
    np.testing.assert_allclose(shown(file), in_8_bits(levels, 16), atol=1)


def test_bitmaps_of_16_bits():
    levels = draw(4, 6, 3, bits=5)
    data = (levels[::-1] @ [1 << 10, 1 << 5, 1]).astype("<u2").tobytes()
    head = struct.pack("<2sIIIIiiHHIIiiII", b"BM", 54 + len(data), 0, 54, 40, 6, 4, 1, 16, 0, len(data), 0, 0, 0, 0)
    np.testing.assert_allclose(shown(head + data), in_8_bits(levels, 5), atol=1)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("BMP", {}), ("DDS", {}), ("GIF", {}), ("ICO", {}), ("JPEG2000", {"irreversible": False}), ("PCX", {}),
        ("PNG", {}), ("PPM", {}), ("QOI", {}), ("SGI", {}), ("TGA", {}), ("TGA", {"compression": "tga_rle"}),
        ("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"}), ("WEBP", {"lossless": True}),
        pytest.param("AVIF", {"quality": 100, "subsampling": "4:4:4"}, marks=needs_avif),
        ("JPEG", {"quality": 100, "subsampling": "4:4:4"}),
    ],
)  # fmt: skip
def test_8_bits_stay_as_they_are_in_every_container(kind, options, tmp_path):
    colours = np.array([[c] * 4 for c in ((0, 0, 0), (255, 255, 255), (200, 30, 60), (3, 90, 250))], np.uint8)
    for image in (Image.fromarray(colours), Image.fromarray(colours).convert("L")):
        if kind == "QOI" and image.mode == "L":
            continue
        file = saved(image, kind, **options)
        np.testing.assert_array_equal(shown(file), np.asarray(Image.open(io.BytesIO(file)).convert("RGB")))
        np.testing.assert_allclose(shown(file), np.asarray(image.convert("RGB")), atol=3 * (kind in ("AVIF", "JPEG")))
        (tmp_path / "image").write_bytes(file)
        np.testing.assert_array_equal(shown(tmp_path / "image"), shown(file))


# Kinds of colours


def test_colours_for_print():
    inks = draw(5, 7, 4)
    expected = 255 - inks[..., :3] - inks[..., 3:] + inks[..., :3] * inks[..., 3:] / 255  # as light through each ink
    file = tiff((7, 5), packed(inks, 8), t258=[8] * 4, t262=[5], t277=[4])
    np.testing.assert_allclose(shown(file), expected, atol=2)
    file = tiff((7, 5), packed(inks * 257, 16, "<"), t258=[16] * 4, t262=[5], t277=[4])
    np.testing.assert_allclose(shown(file), expected, atol=2)


@pytest.mark.parametrize("transform", [0, 2])
def test_jpeg_for_print(transform):
    """Adobe's are inverted; where they say 2, they are YCCK, and inks follow from luminance and chroma."""
    stored = np.full((16, 16, 4), (60, 128, 128, 200), np.uint8)  # as the file has them: without ink is 255
    file = bytearray(saved(Image.fromarray(255 - stored, "CMYK"), "JPEG", quality=100))
    file[file.index(b"Adobe") + 11] = transform
    inks = 255 - (stored[0, 0] if transform == 0 else np.array([255 - 60, 255 - 60, 255 - 60, 200])).astype(int)
    expected = (255 - inks[:3]) * (255 - inks[3]) / 255
    np.testing.assert_allclose(shown(bytes(file))[8, 8], expected, atol=3)


def test_luminance_and_chroma():
    stored = draw(4, 6, 3)
    stored[..., 1:] = 128 + stored[..., 1:] // 8
    y, blue, red = (stored[..., n] - 128 * (n > 0) for n in range(3))
    expected = np.stack([y + 1.402 * red, y - 0.344136 * blue - 0.714136 * red, y + 1.772 * blue], axis=-1).clip(0, 255)
    tags = {"t258": [8] * 3, "t262": [6], "t277": [3]}
    for more in ({"t530": [1, 1]}, {}):  # the tag may be missing
        np.testing.assert_allclose(shown(tiff((6, 4), packed(stored, 8), **tags, **more)), expected, atol=2)
    for subsampling in ([2, 2], [2, 1]):
        with pytest.raises(ImageError, match="subsampled YCbCr without compression is not read; compress it"):
            load_image(tiff((6, 4), bytes(36), **tags, t530=subsampling))
    with pytest.raises(ImageError, match="subsampled YCbCr"):
        load_image(tiff((6, 4), bytes(36), **tags))


def test_lab():
    """CIE L*a*b*, whose neutral colours are grey."""
    light = np.array([[0, 64, 128, 200, 255]])
    stored = np.stack([light, 0 * light, 0 * light], axis=-1)
    y = np.where(light / 2.55 > 8, ((light / 2.55 + 16) / 116) ** 3, light / 2.55 / 903.3)
    expected = np.repeat(255 * raw_files.to_levels(y)[..., None], 3, axis=2)
    file = tiff((5, 1), packed(stored, 8), t258=[8] * 3, t262=[8], t277=[3])
    np.testing.assert_allclose(shown(file), expected, atol=2)


@pytest.mark.parametrize(("bits", "photometric", "bands"), [(16, 2, 3), (16, 2, 4), (8, 8, 3), (8, 6, 3), (16, 5, 4)])
def test_planes_that_pillow_mixes_up_are_refused(bits, photometric, bands):
    size = 2 * bits // 8
    places = {"t273": [8 + size * n for n in range(bands)], "t279": [size] * bands}
    tags = {"t258": [bits] * bands, "t262": [photometric], "t277": [bands], "t284": [2], "t530": [1, 1]}
    tags |= {"t338": [2]} if photometric == 2 and bands == 4 else {}
    with pytest.raises(ImageError, match="in planes without compression are not read"):
        load_image(tiff((2, 1), bytes(size * bands), **tags, **places))


def test_planes_of_8_bits():
    levels = draw(1, 2, 3)
    places = {"t273": [8, 10, 12], "t279": [2] * 3}
    file = tiff((2, 1), packed(levels.transpose(2, 0, 1), 8), t258=[8] * 3, t262=[2], t277=[3], t284=[2], **places)
    np.testing.assert_array_equal(shown(file), levels)


def test_a_high_dynamic_range_is_refused():
    head = struct.pack("<4sIIIIIII", b"DDS ", 124, 0x1007, 4, 4, 16, 0, 0).ljust(76, b"\0")
    head += struct.pack("<II4s", 32, 4, b"DX10").ljust(52, b"\0") + struct.pack("<5I", 95, 3, 0, 1, 0)
    with pytest.raises(ImageError, match=r"high dynamic range \(BC6H\)"):
        load_image(head + bytes(16))
    with pytest.raises(ImageError, match=r"high dynamic range \(PQ\)"):
        load_image(png(draw(2, 2, 3), 8, COLOUR, cICP=bytes([9, 16, 0, 1])))


# See-through pixels, on white


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_a_see_through_grey(bits):
    levels = np.array([[0, 1, 2 ** (bits - 1), 2**bits - 1]])[..., None]
    for key in {*levels.reshape(-1).tolist()}:
        expected = in_8_bits(levels, bits)
        expected[levels[..., 0] == key] = 255
        np.testing.assert_array_equal(shown(png(levels, bits, GREY, tRNS=struct.pack(">H", key))), expected)


@pytest.mark.parametrize("bits", [8, 16])
def test_a_see_through_colour(bits):
    """Of colours of 16 bits that are the same in 8 bits, one alone."""
    colour = np.array([3, 2**bits - 2, 2 ** (bits - 1) + 1])
    levels = (colour + np.array([(0, 0, 0), (0, 0, 1), (-1, 0, 0), (0, 1, 0)]))[None]
    expected = in_8_bits(levels, bits)
    expected[0, 0] = 255
    file = png(levels, bits, COLOUR, tRNS=struct.pack(">3H", *colour))
    np.testing.assert_array_equal(shown(file), expected)


def test_only_the_low_bits_of_a_see_through_colour_count():
    """As PNG has it, of what stands in the file for one of 8 bits."""
    grey, colours = np.array([[[7], [8]]]), np.array([[(7, 8, 9), (7, 8, 8)]])
    for levels, colour_type, key in ((grey, GREY, [0x107]), (colours, COLOUR, [0x107, 8, 0xFF09])):
        expected = in_8_bits(levels, 8)
        expected[0, 0] = 255
        file = png(levels, 8, colour_type, tRNS=struct.pack(f">{len(key)}H", *key))
        np.testing.assert_array_equal(shown(file), expected)


def test_a_see_through_colour_of_an_image_loaded_before():
    """Of 16 bits, Pillow has the high bytes by then."""
    levels = np.array([[(700, 800, 90), (700, 800, 1000)]])
    loaded = Image.open(io.BytesIO(png(levels, 16, COLOUR, tRNS=struct.pack(">3H", 700, 800, 90))))
    loaded.load()
    np.testing.assert_array_equal(shown(loaded), [[(255, 255, 255), (2, 3, 3)]])


def test_a_palette_with_opacities():
    colours, opacity, places = draw(4, 3, seed=1), np.array([0, 51, 255, 128]), draw(5, 7, 1, bits=2)
    chunks = {"PLTE": colours.astype(np.uint8).tobytes(), "tRNS": opacity.astype(np.uint8).tobytes()}
    share = (opacity / 255)[places]
    expected = colours[places[..., 0]] * share + 255 * (1 - share)
    np.testing.assert_allclose(shown(png(places, 2, PALETTE, **chunks)), expected, atol=1)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("colour_type", [GREY_ALPHA, COLOUR_ALPHA])
def test_opacities(bits, colour_type):
    levels = draw(5, 7, 2 if colour_type == GREY_ALPHA else 4, bits=bits) / (2**bits - 1)
    stored = np.rint(levels * (2**bits - 1)).astype(int)
    expected = np.broadcast_to(255 * (levels[..., :-1] * levels[..., -1:] + 1 - levels[..., -1:]), (5, 7, 3))
    np.testing.assert_allclose(shown(png(stored, bits, colour_type)), expected, atol=2)


@pytest.mark.parametrize("bits", [8, 16])
def test_tiff_says_whether_colours_are_multiplied_by_their_opacity(bits):
    most = 2**bits - 1
    opacity = np.array([[0, most // 5, most // 2, most]])
    colour = np.array([most // 3, most, 0])
    for associated in (1, 2):
        light = (
            np.rint(colour * opacity[..., None] / most).astype(int)
            if associated == 1
            else colour + 0 * opacity[..., None]
        )
        levels = np.concatenate([light, opacity[..., None]], axis=-1)
        file = tiff((4, 1), packed(levels, bits, "<"), t258=[bits] * 4, t262=[2], t277=[4], t338=[associated])
        share = opacity[..., None] / most
        np.testing.assert_allclose(shown(file), 255 * (colour / most * share + 1 - share), atol=3)
    levels = np.concatenate([colour + 0 * opacity[..., None], opacity[..., None]], axis=-1)
    file = tiff((4, 1), packed(levels, bits, "<"), t258=[bits] * 4, t262=[2], t277=[4], t338=[0])
    np.testing.assert_allclose(shown(file), 255 * colour / most + 0 * levels[..., :3], atol=1)  # of no stated meaning


@pytest.mark.parametrize("mode", ["LA", "La", "RGBA", "RGBa", "PA"])
def test_modes_in_memory(mode):
    """Black at a fifth of the opacity."""
    opacity = Image.new("L", (2, 2), 51)
    if mode == "PA":
        image = Image.new("PA", (2, 2), (0, 51))
        image.putpalette([0] * 768)
    else:
        image = Image.merge(mode.upper(), [Image.new("L", (2, 2), 0)] * (len(mode) - 1) + [opacity]).convert(mode)
    np.testing.assert_allclose(shown(image), 204, atol=1)


def test_opacity_that_nobody_wrote():
    """Bitmaps and Targa files have a fourth band that may be unused."""
    colours = np.full((4, 4, 4), (200, 30, 60, 0), np.uint8)
    masks = struct.pack("<4I", 0xFF0000, 0xFF00, 0xFF, 0xFF000000)
    head = struct.pack("<2sIIIIiiHHIIiiII", b"BM", 186, 0, 122, 108, 4, 4, 1, 32, 3, 64, 0, 0, 0, 0) + masks
    bitmap = head.ljust(122, b"\0") + colours[..., [2, 1, 0, 3]].tobytes()
    targa = bytearray(saved(Image.fromarray(colours), "TGA"))
    for file in (bitmap, targa):
        np.testing.assert_array_equal(shown(bytes(file)), colours[..., :3])
    colours[..., 3] = 99
    targa = bytearray(saved(Image.fromarray(colours), "TGA"))
    np.testing.assert_allclose(shown(bytes(targa)), 255 - (255 - colours[..., :3].astype(int)) * 99 / 255, atol=1)
    targa[17] &= ~15  # it says that no bits of a pixel are opacity
    np.testing.assert_array_equal(shown(bytes(targa)), colours[..., :3])


# Colours of other screens

COLOURS = np.array([[(0, 0, 0), (255, 255, 255), (128, 128, 128), (20, 20, 20)],
                    [(200, 60, 60), (90, 160, 90), (60, 60, 190), (230, 200, 120)]])  # fmt: skip
PROFILES = {
    "Display P3": (raw_files.DISPLAY_P3, None), "Adobe RGB": (raw_files.ADOBE_RGB, 563 / 256),
    "linear": (raw_files.SRGB, 1.0),
}  # fmt: skip
LOSSLESS = {
    "PNG": {}, "TIFF": {}, "WEBP": {"lossless": True}, "MPO": {"quality": 100, "subsampling": "4:4:4"},
    "JPEG": {"quality": 100, "subsampling": "4:4:4"},
}  # fmt: skip


def blocks(colours=COLOURS):
    """Each colour a block, so that JPEG keeps it."""
    return np.repeat(np.repeat(colours, 16, axis=0), 16, axis=1).astype(np.uint8)


def block_colours(file):
    return shown(file)[8::16, 8::16]


@pytest.mark.parametrize("kind", [*LOSSLESS, pytest.param("AVIF", marks=needs_avif)])
@pytest.mark.parametrize("name", PROFILES)
def test_a_profile_is_followed(name, kind):
    primaries, gamma = PROFILES[name]
    options = LOSSLESS.get(kind, {"quality": 100, "subsampling": "4:4:4"})
    file = saved(Image.fromarray(blocks()), kind, icc_profile=raw_files.rgb_profile(primaries, gamma), **options)
    expected = raw_files.in_srgb(COLOURS / 255, primaries, gamma)
    assert np.abs(expected - COLOURS).max() > 9
    slack = 2 if kind in ("PNG", "TIFF", "WEBP") else 4
    if gamma == 1.0 and slack == 4:
        slack = 12  # one level of a dark colour is many
    np.testing.assert_allclose(block_colours(file), expected, atol=slack)


def test_profiles_where_pillow_does_not_tell_of_them():
    primaries, gamma = PROFILES["Adobe RGB"]
    profile = raw_files.rgb_profile(primaries, gamma)
    expected = raw_files.in_srgb(COLOURS / 255, primaries, gamma)
    np.testing.assert_allclose(shown(jp2(COLOURS, 8, b"\2\0\0" + profile)), expected, atol=2)
    data = COLOURS[::-1, :, ::-1].astype(np.uint8).tobytes()
    head = struct.pack("<2sIIIIiiHHIIiiII", b"BM", 138 + len(data), 0, 138, 124, 4, 2, 1, 24, 0, len(data), 0, 0, 0, 0)
    head = head.ljust(70, b"\0") + b"DEBM".ljust(56, b"\0") + struct.pack("<III", 124 + len(data), len(profile), 0)
    np.testing.assert_allclose(shown(head + data + profile), expected, atol=2)


def test_a_profile_that_says_srgb_changes_nothing():
    """Nor does one that says it with other rounding."""
    levels = draw(40, 50, 3)
    image = Image.fromarray(levels.astype(np.uint8))
    rounded = raw_files.rgb_profile([raw_files.SRGB[0], (0.6395, 0.3295), *raw_files.SRGB[2:]])
    srgb = ImageCms.createProfile("sRGB")
    moved = ImageCms.profileToProfile(image, io.BytesIO(rounded), srgb)
    assert 0 < np.abs(np.asarray(moved).astype(int) - levels).max() <= 2
    for profile in (raw_files.rgb_profile(raw_files.SRGB), rounded):
        np.testing.assert_array_equal(shown(saved(image, "PNG", icc_profile=profile)), levels)


def test_a_profile_of_grey():
    levels = draw(5, 7)
    expected = np.repeat(255 * raw_files.to_levels((levels / 255) ** 1.0)[..., None], 3, axis=2)
    for image in (Image.fromarray(levels.astype(np.uint8)), Image.fromarray((levels * 257).astype(np.uint16))):
        file = saved(image, "PNG", icc_profile=raw_files.grey_profile(1.0))
        np.testing.assert_allclose(shown(file), expected, atol=2)
    opaque = Image.merge("LA", [Image.fromarray(levels.astype(np.uint8)), Image.new("L", (7, 5), 255)])
    np.testing.assert_allclose(shown(saved(opaque, "PNG", icc_profile=raw_files.grey_profile(1.0))), expected, atol=2)


def test_a_profile_for_print():
    """Its inks do not look as the plain formula says: here, none but the black one is seen."""
    inks = np.zeros((1, 3, 4), np.uint8)
    inks[..., 0], inks[0, :, 3] = 200, (0, 128, 255)
    lightness = 100 - inks[0, :, 3] / 2.55
    y = np.where(lightness > 8, ((lightness + 16) / 116) ** 3, lightness / 903.3)
    expected = np.repeat(255 * raw_files.to_levels(y)[None, :, None], 3, axis=2)
    image = Image.fromarray(inks, "CMYK")
    for kind in ("TIFF",):
        file = saved(image, kind, icc_profile=raw_files.cmyk_profile())
        np.testing.assert_allclose(shown(file), expected, atol=3)
    large = Image.fromarray(np.repeat(np.repeat(inks, 16, axis=0), 16, axis=1), "CMYK")
    file = saved(large, "JPEG", quality=100, icc_profile=raw_files.cmyk_profile())
    np.testing.assert_allclose(shown(file)[8:9, 8::16], expected, atol=4)


def test_a_profile_of_no_use_is_ignored():
    """Broken, cut short, or of other colours than the image has."""
    whole = raw_files.rgb_profile(raw_files.DISPLAY_P3)
    levels = draw(5, 7, 3)
    image = Image.fromarray(levels.astype(np.uint8))
    for profile in (b"nonsense", b"\0" * 500, whole[:200], raw_files.cmyk_profile(), raw_files.grey_profile(1.0)):
        np.testing.assert_array_equal(shown(saved(image, "PNG", icc_profile=profile)), levels)
    inks = image.convert("CMYK")
    np.testing.assert_array_equal(shown(saved(inks, "TIFF", icc_profile=whole)), np.asarray(inks.convert("RGB")))


def test_profiles_and_opacity():
    primaries, gamma = PROFILES["Adobe RGB"]
    opacity = np.array([[255, 0, 128, 51], [255, 255, 0, 128]])
    image = Image.fromarray(np.dstack([COLOURS, opacity]).astype(np.uint8))
    file = saved(image, "PNG", icc_profile=raw_files.rgb_profile(primaries, gamma))
    share = opacity[..., None] / 255
    expected = raw_files.in_srgb(COLOURS / 255, primaries, gamma) * share + 255 * (1 - share)
    np.testing.assert_allclose(shown(file), expected, atol=3)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("gamma", [100000, 55556, 30000])
def test_gamma(bits, gamma):
    """What gAMA says is followed, in the depth of the file: dark levels of 16 bits stay apart."""
    most = 2**bits - 1
    grey, colours = draw(5, 7, 1, bits=bits), draw(5, 7, 3, bits=bits)
    grey[0, :5, 0] = 1, 40, most // 100, most // 30, most // 9
    for levels, colour_type in ((grey, GREY), (colours, COLOUR)):
        expected = np.broadcast_to(255 * raw_files.to_levels((levels / most) ** (100000 / gamma)), (5, 7, 3))
        file = png(levels, bits, colour_type, gAMA=struct.pack(">I", gamma))
        np.testing.assert_allclose(shown(file), expected, atol=1)


def test_gamma_of_see_through_images_and_palettes():
    gamma = struct.pack(">I", 100000)
    levels = draw(5, 7, 4)
    levels[..., 3] = 255
    expected = 255 * raw_files.to_levels(levels[..., :3] / 255)
    np.testing.assert_allclose(shown(png(levels, 8, COLOUR_ALPHA, gAMA=gamma)), expected, atol=1)
    colours, places = draw(4, 3), draw(5, 7, 1, bits=2)
    file = png(places, 2, PALETTE, gAMA=gamma, PLTE=colours.astype(np.uint8).tobytes())
    np.testing.assert_allclose(shown(file), 255 * raw_files.to_levels(colours / 255)[places[..., 0]], atol=1)
    deep, key = draw(5, 7, 3, bits=16), [7, 8, 9]
    deep[2, 3] = key
    expected = 255 * raw_files.to_levels(deep / 65535)
    expected[2, 3] = 255
    file = png(deep, 16, COLOUR, gAMA=gamma, tRNS=struct.pack(">3H", *key))
    np.testing.assert_allclose(shown(file), expected, atol=1)


def test_primaries():
    chunks = {"gAMA": struct.pack(">I", 45455), "cHRM": raw_files.chromaticities(raw_files.ADOBE_RGB)}
    expected = raw_files.in_srgb(COLOURS / 255, raw_files.ADOBE_RGB, 2.2)
    np.testing.assert_allclose(shown(png(COLOURS, 8, COLOUR, **chunks)), expected, atol=1)
    expected = raw_files.in_srgb(COLOURS / 255, raw_files.ADOBE_RGB)
    np.testing.assert_allclose(shown(png(COLOURS, 8, COLOUR, cHRM=chunks["cHRM"])), expected, atol=1)


def test_another_white():
    """The white of the file is the white of the screen."""
    primaries = ((0.3457, 0.3585), *raw_files.ADOBE_RGB[1:])
    expected = raw_files.in_srgb(COLOURS / 255, primaries)
    np.testing.assert_allclose(expected[0, 1:3], COLOURS[0, 1:3], atol=0.1)
    file = png(COLOURS, 8, COLOUR, cHRM=raw_files.chromaticities(primaries))
    np.testing.assert_allclose(shown(file), expected, atol=1)


def test_what_goes_first_of_what_png_says():
    """cICP before the profile, the profile before sRGB, sRGB before gAMA and cHRM."""
    gamma, srgb = {"gAMA": struct.pack(">I", 100000)}, {"sRGB": b"\0"}
    profile = {"iCCP": b"p\0\0" + zlib.compress(raw_files.rgb_profile(raw_files.DISPLAY_P3))}
    p3 = raw_files.in_srgb(COLOURS / 255, raw_files.DISPLAY_P3)
    for chunks, expected in (
        (gamma | srgb, COLOURS), (gamma | profile, p3), (gamma | srgb | profile, p3),
        (gamma | profile | {"cICP": bytes([1, 13, 0, 1])}, COLOURS), (gamma | {"cICP": bytes([12, 13, 0, 1])}, p3),
    ):  # fmt: skip
        np.testing.assert_allclose(shown(png(COLOURS, 8, COLOUR, **chunks)), expected, atol=2)


def test_what_png_usually_says_changes_nothing():
    levels = draw(40, 50, 3)
    usual = {"gAMA": struct.pack(">I", 45455), "cHRM": raw_files.chromaticities(raw_files.SRGB)}
    for chunks in (
        usual, {"gAMA": usual["gAMA"]}, {"cHRM": usual["cHRM"]}, usual | {"sRGB": b"\0"}, {"cICP": bytes([1, 1, 0, 1])},
        {"gAMA": bytes(4)}, {"gAMA": b"\xff" * 4}, {"cHRM": bytes(32)}, {"cHRM": struct.pack(">8I", *[30000] * 8)},
    ):  # fmt: skip
        np.testing.assert_array_equal(shown(png(levels, 8, COLOUR, **chunks)), levels)


@pytest.mark.parametrize(
    ("code_points", "message"),
    [((12, 16, 0, 1), "PQ"), ((12, 13, 1, 1), "not RGB"), ((12, 13, 0, 0), "full range"),
     ((3, 13, 0, 1), "primaries 3"), ((1, 9, 0, 1), "characteristics 9")],
)  # fmt: skip
def test_code_points_that_cannot_be_followed(code_points, message):
    with pytest.raises(ImageError, match=message):
        load_image(png(COLOURS, 8, COLOUR, cICP=bytes(code_points)))


@needs_avif
def test_code_points_of_avif():
    image = Image.fromarray(blocks())
    file = saved(image, "AVIF", quality=100, subsampling="4:4:4")
    place = file.index(b"nclx") + 4

    def with_code_points(*numbers):
        return file[:place] + struct.pack(">HH", *numbers) + file[place + 4 :]

    plain = np.asarray(Image.open(io.BytesIO(file)).convert("RGB"))
    for numbers in ((1, 13), (2, 2), (1, 1)):
        np.testing.assert_array_equal(shown(with_code_points(*numbers)), plain)
    expected = raw_files.in_srgb(COLOURS / 255, raw_files.DISPLAY_P3)
    np.testing.assert_allclose(block_colours(with_code_points(12, 13)), expected, atol=4)
    other = bytearray(with_code_points(12, 13))  # they stand in the file, but for no item: number 0 is none
    numbers = other.index(b"ipma") + 4 + 4 + 4 + 2 + 1
    other[numbers : numbers + other[numbers - 1]] = bytes(
        0 if each & 127 == 4 else each for each in other[numbers : numbers + other[numbers - 1]]
    )
    np.testing.assert_array_equal(shown(bytes(other)), plain)
    with pytest.raises(ImageError, match="PQ"):
        load_image(with_code_points(9, 16))


def test_colours_of_jpeg_2000_that_are_not_known():
    with pytest.raises(ImageError, match="number 14 of JPEG 2000, are not known"):
        load_image(jp2(COLOURS, 8, b"\1\0\0\0\0\0\x0e"))


# Images that Pillow has opened already


def test_an_opened_image_gives_what_its_file_gives(tmp_path):
    grey = np.array([[[3], [5], [15], [0]]])
    deep = draw(5, 7, 3, bits=16)
    files = [
        png(grey, 4, GREY, tRNS=struct.pack(">H", 5)),
        png(deep, 16, COLOUR, tRNS=struct.pack(">3H", *deep[1, 2]), gAMA=struct.pack(">I", 100000)),
        png(COLOURS, 8, COLOUR, cICP=bytes([12, 13, 0, 1])),
        saved(Image.fromarray(COLOURS.astype(np.uint8)), "ICO"),
        tiff((7, 5), packed(deep[..., :1], 16, "<"), t258=[16], t262=[0]),
        saved(
            Image.fromarray(COLOURS.astype(np.uint8)), "TIFF", icc_profile=raw_files.rgb_profile(raw_files.ADOBE_RGB)
        ),
    ]
    for number, file in enumerate(files):
        path = tmp_path / str(number)
        path.write_bytes(file)
        expected = shown(file)
        np.testing.assert_array_equal(shown(path), expected)
        np.testing.assert_array_equal(shown(Image.open(path)), expected)
        opened = Image.open(path)
        before = dict(opened.info)
        first = load_image(opened)
        assert dict(opened.info).keys() == before.keys(), "the caller's image stays as it is"
        np.testing.assert_array_equal(shown(first), expected)  # and what is done is not done again


# Safety


def test_an_icon_may_hold_a_larger_image():
    large = png(np.zeros((400, 300, 1), int), 8, GREY)
    icon = struct.pack("<3H", 0, 1, 1) + struct.pack("<4BHHII", 16, 16, 0, 0, 1, 32, len(large), 22) + large
    assert load_image(icon).size == (300, 400)
    with pytest.raises(ImageError, match="300 x 400 pixels are more than the limit of 1000"):
        load_image(icon, max_pixels=1000)
    bitmap = icon[:22] + struct.pack("<IiiHHI", 40, 300, 800, 1, 32, 0).ljust(40, b"\0")  # and nothing to decode
    with pytest.raises(ImageError, match="300 x 400 pixels are more than the limit of 1000"):
        load_image(bitmap, max_pixels=1000)


@pytest.mark.parametrize("kind", ["float", "colours of 16 bits", "32 bits", "gamma"])
def test_memory_stays_a_few_times_that_of_the_image(kind):
    side = 1200
    if kind == "float":
        file = saved(Image.fromarray(np.zeros((side, side), np.float32)), "TIFF", compression="tiff_lzw")
    elif kind == "32 bits":
        file = saved(Image.fromarray(np.zeros((side, side), np.int32)), "TIFF", compression="tiff_lzw")
    elif kind == "gamma":
        file = png(np.zeros((side, side, 3), int), 8, COLOUR, gAMA=struct.pack(">I", 100000))
    else:
        file = png(np.zeros((side, side, 3), int), 16, COLOUR)
    tracemalloc.start()
    load_image(file)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**25 + 8 * side**2, "strips, and the result"


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_damaged_headers_are_refused_by_name():
    """Nothing but ImageError, whatever byte of a header is wrong."""
    files = [
        png(draw(3, 4, 3, bits=16), 16, COLOUR, cICP=bytes([12, 13, 0, 1]), gAMA=struct.pack(">I", 1)),
        jp2(draw(3, 4), 4), tiff((4, 3), bytes(24), t258=[16], t262=[0]), floats([[0, 1]]),
    ]  # fmt: skip
    image = Image.fromarray(COLOURS.astype(np.uint8))
    files += [saved(image, kind) for kind in ("BMP", "DDS", "ICO", "PCX", "QOI", "SGI", "TGA")]
    for number, file in enumerate(files):
        draws = np.random.default_rng(number)
        for _ in range(60):
            wrong = bytearray(file)
            wrong[draws.integers(min(len(file), 160))] = draws.integers(256)
            with contextlib.suppress(ImageError):
                load_image(bytes(wrong), max_pixels=10**6)
