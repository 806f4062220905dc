"""Decoding of images, and the training crop."""

import base64
import io
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

from lynx.media.image_processor import LynxImageProcessor
from lynx.media.images import DEFAULT_MAX_PIXELS, ImageError, decode_base64, load_image, random_resized_crop_box

ORIENTATION = 0x0112


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encode(image: Image.Image, image_format: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, image_format, **options)
    return file.getvalue()


def test_every_kind_of_source(tmp_path):
    array = noise(12, 17)
    path = tmp_path / "image.png"
    path.write_bytes(encode(Image.fromarray(array)))
    for source in (path, str(path), path.read_bytes(), Image.fromarray(array), Image.open(path), array):
        image = load_image(source)
        assert image.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(image), array)


@pytest.mark.parametrize(
    ("orientation", "upright"),
    [
        (1, lambda a: a),
        (2, lambda a: a[:, ::-1]),
        (3, lambda a: a[::-1, ::-1]),
        (4, lambda a: a[::-1]),
        (5, lambda a: a.swapaxes(0, 1)),
        (6, lambda a: np.rot90(a, -1)),
        (7, lambda a: a[::-1, ::-1].swapaxes(0, 1)),
        (8, np.rot90),
        (9, lambda a: a),
    ],
)
def test_exif_orientation(orientation, upright):
    array = noise(12, 17)
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    file = encode(Image.fromarray(array), exif=exif)
    image = load_image(file)
    np.testing.assert_array_equal(np.asarray(image), upright(array))
    np.testing.assert_array_equal(np.asarray(load_image(image)), upright(array))  # once turned is turned enough
    processor = LynxImageProcessor(size=28)
    assert torch.equal(processor([image]).pixel_values, processor([np.ascontiguousarray(upright(array))]).pixel_values)
    assert torch.equal(processor([file]).pixel_values, processor([image]).pixel_values)


def test_transparency_lies_on_white():
    array = noise(6, 9)
    alpha = np.zeros((6, 9), np.uint8)
    alpha[:, :4], alpha[:, 4] = 255, 51
    image = load_image(encode(Image.fromarray(np.dstack([array, alpha]))))
    actual = np.asarray(image).astype(int)
    np.testing.assert_array_equal(actual[:, :4], array[:, :4])
    np.testing.assert_allclose(actual[:, 4], array[:, 4] * 0.2 + 255 * 0.8, atol=1)
    assert (actual[:, 5:] == 255).all()


def test_grey_with_alpha_and_transparent_palettes_lie_on_white():
    grey = np.full((4, 4), 10, np.uint8)
    alpha = np.zeros((4, 4), np.uint8)
    alpha[0] = 255
    expected = np.repeat(np.where(alpha == 255, grey, 255)[..., None], 3, axis=2)
    image = Image.merge("LA", [Image.fromarray(grey), Image.fromarray(alpha)])
    np.testing.assert_array_equal(np.asarray(load_image(encode(image))), expected)

    palette = Image.fromarray((alpha == 0).astype(np.uint8))  # colour 0 is grey 10, colour 1 see-through red
    palette.putpalette([10, 10, 10, 255, 0, 0])
    np.testing.assert_array_equal(np.asarray(load_image(encode(palette, transparency=1))), expected)


def test_palette_cmyk_and_bilevel():
    image = Image.fromarray(noise(8, 8))
    palette = image.quantize(16)
    np.testing.assert_array_equal(np.asarray(load_image(encode(palette))), np.asarray(palette.convert("RGB")))
    black = Image.new("CMYK", (3, 3), (0, 0, 0, 255))
    assert np.asarray(load_image(encode(black, "TIFF"))).max() == 0
    assert load_image(encode(Image.new("1", (3, 3), 1))).getpixel((0, 0)) == (255, 255, 255)


def test_16_bit_grey_is_scaled():
    levels = np.array([[0, 128, 129, 257, 32768, 65535]], np.uint16)
    expected = np.repeat(np.array([[0, 0, 1, 1, 128, 255]], np.uint8)[..., None], 3, axis=2)
    for image in (Image.fromarray(levels), Image.fromarray(levels.astype(np.int32))):
        np.testing.assert_array_equal(np.asarray(load_image(image)), expected)
    np.testing.assert_array_equal(np.asarray(load_image(encode(Image.fromarray(levels)))), expected)


def test_a_small_file_of_16_bit_grey_takes_no_more_memory_than_its_image_needs():
    side = 1000
    file = encode(Image.fromarray(np.zeros((side, side), np.uint16)))
    tracemalloc.start()
    load_image(file)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10 * side**2, "2 bytes of the file's levels, 4 to compute with, 1 of the result"


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (Image.fromarray(np.full((2, 2), 70000, np.int32)), "70000 do not fit 16 bits"),
        (Image.new("RGB", (0, 4)), "empty"),
        (np.zeros((0, 4, 3), np.uint8), "empty"),
        (np.zeros((4, 4), np.uint8), "expected .height, width, 3."),
        (np.zeros((4, 4, 3)), "uint8"),
        (b"", "image of 0 bytes"),
        (b"<html>not found</html>", "not an image"),
        ("https://example.org/image.png", "never fetched"),
        ("no/such/image.png", "no/such/image.png: no such file"),
    ],
)
def test_useless_images_are_refused(image, message):
    with pytest.raises(ImageError, match=message):
        load_image(image)


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_truncated_files_are_refused_by_name(image_format, tmp_path):
    whole = encode(Image.fromarray(noise(40, 60)), image_format)
    load_image(whole)
    path = tmp_path / "half.img"
    for keep in (len(whole) // 2, len(whole) - 30):
        path.write_bytes(whole[:keep])
        with pytest.raises(ImageError, match=r"half\.img: .*"):
            load_image(path)


def test_formats_that_run_other_programs_are_refused():
    with pytest.raises(ImageError, match="not an image of a known format"):
        load_image(encode(Image.new("RGB", (5, 5)), "EPS"))


def test_too_many_pixels_are_refused_before_decoding():
    image = encode(Image.new("RGB", (40, 50)))
    assert load_image(image, max_pixels=2000).size == (40, 50)
    with pytest.raises(ImageError, match="40 x 50 pixels are more than the limit of 1999"):
        load_image(image, max_pixels=1999)
    header = image[: image.index(b"IDAT") - 4]  # nothing to decode at all: only the header can have been read
    with pytest.raises(ImageError, match="more than the limit"):
        load_image(header + image[-12:], max_pixels=1999)
    for decoded in (Image.new("RGB", (40, 50)), np.zeros((50, 40, 3), np.uint8)):
        with pytest.raises(ImageError, match="more than the limit"):
            load_image(decoded, max_pixels=1999)


def test_pillow_settings_are_left_alone():
    before = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES
    load_image(encode(Image.new("RGB", (4, 4))), max_pixels=10**12)
    assert before == (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES)
    assert before == (DEFAULT_MAX_PIXELS, False)


def test_base64():
    image = Image.fromarray(noise(12, 17))
    text = base64.b64encode(encode(image)).decode()
    lines = "\n".join(text[start : start + 76] for start in range(0, len(text), 76))
    quoted = text.replace("+", "%2B").replace("/", "%2F").replace("=", "%3D")
    for source in (text, lines, f"data:image/png;base64,{text}", f"data:;base64,{quoted}"):
        np.testing.assert_array_equal(np.asarray(load_image(source)), np.asarray(image))


def test_a_file_comes_before_base64_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = "picture1"
    assert decode_base64(name)
    (tmp_path / name).write_bytes(encode(Image.new("RGB", (3, 5))))
    assert load_image(name).size == (3, 5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("picture2", r"picture2 \(no such file, so read as base64\): not an image"),
        ("", "cannot be decoded"),
        ("data:image/svg+xml,<svg/>", "a data URL of an image must hold valid base64"),
        ("data:image/png;base64,????", "must hold valid base64"),
        ("data:image/png;base64", "must hold valid base64"),
        ("iVBORw0KGgo" * 40 + "?", r"^iVBORw0KGgoiVBORw0KGgoiVBORw0KGgoiVBORw0\.\.\. \(441 characters\): "),
    ],
)
def test_what_is_no_base64_of_an_image_is_refused(text, message):
    with pytest.raises(ImageError, match=message):
        load_image(text)


def test_a_photograph_for_print():
    image = Image.new("RGB", (16, 16), (200, 30, 60))
    actual = np.asarray(load_image(encode(image.convert("CMYK"), "JPEG", quality=100))).astype(int)
    assert abs(actual - np.asarray(image)).max() <= 3  # not inverted, as JPEG files keep these colours


@pytest.mark.parametrize("image_format", ["GIF", "PNG", "WEBP"])
def test_an_animation_gives_its_first_frame(image_format):
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "lime", "blue")]
    file = encode(frames[0], image_format, save_all=True, append_images=frames[1:], lossless=True)
    assert Image.open(io.BytesIO(file)).n_frames == 3
    assert (np.asarray(load_image(file)) == np.asarray(frames[0])).all()


def test_16_bit_colour_is_scaled():
    file = bytearray(encode(Image.new("RGB", (2, 1))))
    rows = zlib.compress(b"\0" + struct.pack(">6H", 0, 257, 32768, 65535, 40000, 1000))
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0)), (b"IDAT", rows), (b"IEND", b"")]
    file = file[:8] + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    actual = np.asarray(load_image(bytes(file))).reshape(-1).astype(int)
    np.testing.assert_allclose(actual, np.array([0, 257, 32768, 65535, 40000, 1000]) / 257, atol=1)


def test_corrupt_files_are_refused():
    file = bytearray(encode(Image.fromarray(noise(40, 60))))
    file[len(file) // 2] ^= 255
    with pytest.raises(ImageError, match="cannot be decoded"):
        load_image(bytes(file))


def test_other_types_are_refused():
    with pytest.raises(TypeError, match="got int"):
        load_image(7)


@pytest.mark.parametrize(("height", "width"), [(100, 100), (90, 120), (120, 90), (1000, 800)])
def test_random_crops_follow_scale_and_ratio(height, width):
    generator = np.random.default_rng(0)
    boxes = [random_resized_crop_box(height, width, generator) for _ in range(300)]
    for top, left, box_height, box_width in boxes:
        assert top >= 0
        assert left >= 0
        assert top + box_height <= height
        assert left + box_width <= width
        assert 0.88 <= box_height * box_width / (height * width) <= 1.02
        assert 0.73 <= box_width / box_height <= 1.37
    assert len(set(boxes)) > 50
    shares = [box_height * box_width / (height * width) for _, _, box_height, box_width in boxes]
    assert 0.92 < np.mean(shares) < 0.98
    assert all(type(value) is int for value in boxes[0])


def test_random_crops_of_elongated_images_are_centred():
    generator = np.random.default_rng(0)
    assert random_resized_crop_box(30, 300, generator) == (0, 130, 30, 40)
    assert random_resized_crop_box(300, 30, generator) == (130, 0, 40, 30)
    assert random_resized_crop_box(1, 1, generator) == (0, 0, 1, 1)


def test_random_crops_are_the_generators():
    first, again, other = (random_resized_crop_box(90, 100, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert first == again != other


def test_an_endless_strip_is_refused():
    with pytest.raises(ImageError, match="32769 x 1 pixels have a side longer than the limit of 32768"):
        load_image(encode(Image.new("RGB", (32769, 1))))
