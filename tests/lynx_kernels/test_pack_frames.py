"""pack_frames against Pillow, transformers' image processors and a convolution."""

import numpy as np
import PIL
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from lynx_kernels.backends import cpu as cpu_backend
from lynx_kernels.backends.dispatch import explain
from lynx_kernels.ops.pack_frames import fit, pack_frames
from lynx_kernels.ops.pack_frames.fit import filters_vertically_first, version_of
from tests.lynx_kernels.frame_helpers import (
    MEAN,
    OPTIONS,
    STD,
    pack_bytes,
    pillow_resize,
    pillow_short_side,
    random_frame,
    random_shapes,
)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The products here are tiny; on a busy machine, threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(
    params=["reference", pytest.param("cpu", marks=pytest.mark.skipif(bool(cpu_backend.MISSING), reason="not built"))]
)
def impl(request):
    return request.param


@pytest.mark.parametrize("resize", ["exact", "short_side"])
def test_bytes_equal_pillow(resize, impl):
    generator = np.random.default_rng(0)
    for index, (height, width) in enumerate(random_shapes(generator, 200)):
        size = int(generator.integers(1, 100))
        frame = random_frame(generator, height, width, harsh=index % 3 == 0)
        expected = pillow_resize(frame, size, size) if resize == "exact" else pillow_short_side(frame, size)
        actual = pack_bytes([frame], size=size, resize=resize, impl=impl)[0]
        np.testing.assert_array_equal(actual, expected, err_msg=f"{height} x {width} -> {size}")


@pytest.mark.parametrize("resample", ["bicubic", "bilinear", "lanczos"])
def test_rectangles_equal_pillow(resample, impl):
    """Enlarged and reduced, by sides apart. With the passes in the other order, a tenth of these frames differ."""
    generator = np.random.default_rng(1)
    for index, (height, width) in enumerate(random_shapes(generator, 60)):
        size = tuple(int(side) for side in generator.integers(1, 100, 2))
        frame = random_frame(generator, height, width, harsh=index % 3 == 0)
        actual = pack_bytes([frame], size=size, resize="exact", resample=resample, impl=impl)[0]
        expected = pillow_resize(frame, *size, resample)
        np.testing.assert_array_equal(actual, expected, err_msg=f"{height} x {width} -> {size}")


@pytest.mark.parametrize(
    ("pillow", "height", "width", "new_height", "new_width", "expected"),
    [
        ((11, 0), 900, 3, 10, 10, False),
        ((12, 1), 900, 3, 10, 10, False),
        ((12, 2), 900, 9, 10, 10, False),  # 100 times as high
        ((12, 2), 901, 9, 10, 10, True),
        ((12, 3), 901, 9, 901, 10, False),  # the rows do not become fewer
        ((13, 0), 640, 480, 384, 384, True),  # 256 rows fewer, 96 columns
        ((13, 0), 480, 640, 384, 384, False),
        ((13, 0), 30, 20, 10, 10, False),  # twice as many
        ((13, 0), 31, 20, 10, 10, True),
        ((13, 0), 31, 20, 30, 40, True),  # the columns become more
        ((13, 0), 31, 20, 31, 40, False),
        ((14, 2), 640, 480, 384, 384, True),
    ],
)
def test_order_of_the_passes_by_version(pillow, height, width, new_height, new_width, expected):
    assert filters_vertically_first(pillow, height, width, new_height, new_width) == expected


def test_versions():
    assert version_of("12.3.0") == (12, 3)
    assert version_of("13.0.0.dev0") == (13, 0)
    assert version_of(PIL.__version__) == fit.PILLOW


@pytest.mark.parametrize("resize", ["exact", "short_side"])
def test_passes_in_the_order_of_other_versions(resize, monkeypatch, impl):
    """Horizontally first, as before Pillow 12.2, made of two calls that have one pass each."""
    generator = np.random.default_rng(20)
    frame, size = random_frame(generator, 420, 100, harsh=True), 50
    bicubic, (height, width) = Image.Resampling.BICUBIC, (50, 50) if resize == "exact" else (210, 50)
    rows, columns = (width, 420), (100, height)
    start = (height - size) // 2
    image = Image.fromarray(frame)
    for version, between in (((12, 1), rows), ((13, 0), columns)):
        monkeypatch.setattr(fit, "PILLOW", version)
        expected = np.asarray(image.resize(between, bicubic).resize((width, height), bicubic))[start : start + size]
        np.testing.assert_array_equal(pack_bytes([frame], size=size, resize=resize, impl=impl)[0], expected)


def test_patches_of_rectangles(impl):
    frames = [random_frame(np.random.default_rng(21), 50, 70)] * 2
    options = OPTIONS | {"size": (28, 42), "resize": "exact", "impl": impl, "flip": [False, True]}
    pixels = pack_frames(frames, **options, output="pixels")  # (2, 3, 28, 42)
    expected = F.unfold(pixels, 14, stride=14).transpose(1, 2).flatten(0, 1)  # (2 * 2 * 3 patches, 588)
    assert torch.equal(pack_frames(frames, **options), expected)


@pytest.mark.parametrize(("size", "merge_size", "temporal_patch_size"), [((56, 84), 2, 2), ((28, 14), 1, 3)])
def test_patches_in_blocks_with_copies(size, merge_size, temporal_patch_size, impl):
    """As Qwen2-VL has them: blocks of merge_size x merge_size patches, and each channel of a patch so many times."""
    frames = [random_frame(np.random.default_rng(seed), 50, 70) for seed in (22, 23)]
    options = {"size": size, "patch_size": 14, "mean": MEAN, "std": STD, "resize": "exact", "impl": impl}
    actual = pack_frames(frames, **options, merge_size=merge_size, temporal_patch_size=temporal_patch_size)
    pixels = pack_frames(frames, **options, output="pixels")
    expected = []
    for frame in pixels:
        for block_row in frame.split(14 * merge_size, 1):
            for block in block_row.split(14 * merge_size, 2):
                patches = [patch for row in block.split(14, 1) for patch in row.split(14, 2)]
                expected += [each[:, None].expand(-1, temporal_patch_size, -1, -1).flatten() for each in patches]
    assert torch.equal(actual, torch.stack(expected))


@pytest.mark.parametrize("resample", ["bicubic", "lanczos"])
def test_windows_are_cut_from_resized_frames(resample, impl):
    frame = random_frame(np.random.default_rng(24), 60, 33, harsh=True)
    resized = pillow_resize(frame, 40, 50, resample)
    windows = [(0, 0, 20, 25), (20, 25, 20, 25), (7, 11, 20, 25)]
    flip = [False, False, True]
    actual = pack_bytes(
        [frame] * 3, size=(40, 50), resize="exact", resample=resample, windows=windows, flip=flip, impl=impl
    )
    expected = [resized[top : top + height, left : left + width] for top, left, height, width in windows]
    np.testing.assert_array_equal(actual, np.stack([*expected[:2], expected[2][:, ::-1]]))


def test_windows_of_frames_of_different_sizes(impl):
    frames = [random_frame(np.random.default_rng(30 + seed), 60, 33) for seed in range(3)]
    sizes, windows = [(40, 50), (25, 21), (60, 33)], [(3, 5, 20, 20), (5, 1, 20, 20), (40, 13, 20, 20)]
    actual = pack_bytes(frames, size=sizes, resize="exact", windows=windows, impl=impl)
    expected = [
        pillow_resize(frame, *size)[top : top + 20, left : left + 20]
        for frame, size, (top, left, _, _) in zip(frames, sizes, windows, strict=True)
    ]
    np.testing.assert_array_equal(actual, np.stack(expected))


@pytest.mark.parametrize("output", ["patches", "pixels"])
def test_bytes_are_not_normalised(output, impl):
    frames = [random_frame(np.random.default_rng(seed), 50, 70) for seed in (25, 26)]
    options = {"size": (28, 42), "patch_size": 14, "resize": "exact", "output": output, "impl": impl}
    actual = pack_frames(frames, **options, mean=None, std=None, dtype=torch.uint8)
    expected = pack_frames(frames, **options, mean=(0, 0, 0), std=(1, 1, 1), dtype=torch.float64)
    assert actual.dtype == torch.uint8
    assert torch.equal(actual, (expected * 255).round().to(torch.uint8))


def test_unchanged_size_is_a_copy(impl):
    frame = random_frame(np.random.default_rng(2), 28, 28, harsh=True)
    np.testing.assert_array_equal(pack_bytes([frame], size=28, impl=impl)[0], frame)


@pytest.mark.parametrize("resize", ["exact", "short_side"])
def test_crop_boxes_and_flips_equal_pillow_on_the_cropped_frame(resize, impl):
    generator = np.random.default_rng(3)
    frames, boxes, flips, expected = [], [], [], []
    for index, (height, width) in enumerate(random_shapes(generator, 60)):
        frame = random_frame(generator, height, width, harsh=index % 2 == 0)
        top, left = int(generator.integers(height)), int(generator.integers(width))
        box = top, left, int(generator.integers(1, height - top + 1)), int(generator.integers(1, width - left + 1))
        cut = frame[top : top + box[2], left : left + box[3]]
        result = pillow_resize(cut, 20, 20) if resize == "exact" else pillow_short_side(cut, 20)
        frames.append(frame)
        boxes.append(box)
        flips.append(index % 3 == 0)
        expected.append(result[:, ::-1] if flips[-1] else result)
    actual = pack_bytes(frames, size=20, resize=resize, crop_boxes=boxes, flip=flips, impl=impl)
    np.testing.assert_array_equal(actual, np.stack(expected))


@pytest.mark.parametrize(("height", "width"), [(40, 53), (41, 57), (60, 31), (29, 28), (20, 39)])
@pytest.mark.parametrize("crop_rounding", ["round", "floor"])
def test_crop_rounding(height, width, crop_rounding, impl):
    frame = random_frame(np.random.default_rng(4), height, width)
    expected = pillow_short_side(frame, 28, crop_rounding)
    np.testing.assert_array_equal(pack_bytes([frame], size=28, crop_rounding=crop_rounding, impl=impl)[0], expected)


def test_crop_roundings_differ(impl):
    frame = random_frame(np.random.default_rng(5), 28, 31)  # 3 columns too many: 1.5 rounds to 2 and floors to 1
    for crop_rounding, left in (("round", 2), ("floor", 1)):
        actual = pack_bytes([frame], size=28, crop_rounding=crop_rounding, impl=impl)[0]
        np.testing.assert_array_equal(actual, frame[:, left : left + 28])


@pytest.mark.parametrize(("height", "width"), [(48, 64), (64, 48), (90, 50), (33, 77), (12, 23), (28, 28), (31, 28)])
def test_equals_clip_of_transformers(height, width, impl):
    frame = random_frame(np.random.default_rng(6), height, width)
    clip = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    raw = clip(frame, do_rescale=False, do_normalize=False, return_tensors="np").pixel_values
    np.testing.assert_array_equal(
        pack_bytes([frame], size=28, crop_rounding="floor", impl=impl), raw.transpose(0, 2, 3, 1)
    )
    expected = clip(frame, return_tensors="pt").pixel_values
    actual = pack_frames([frame], **OPTIONS, impl=impl, crop_rounding="floor", output="pixels")
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize(("height", "width"), [(48, 64), (64, 48), (33, 77), (12, 23), (28, 28), (31, 28)])
def test_equals_siglip_of_transformers(height, width, impl):
    frame = random_frame(np.random.default_rng(7), height, width)
    half = (0.5, 0.5, 0.5)
    siglip = SiglipImageProcessorPil(size={"height": 28, "width": 28})
    raw = siglip(frame, do_rescale=False, do_normalize=False, return_tensors="np").pixel_values
    np.testing.assert_array_equal(pack_bytes([frame], size=28, resize="exact", impl=impl), raw.transpose(0, 2, 3, 1))
    expected = siglip(frame, return_tensors="pt").pixel_values
    actual = pack_frames(
        [frame], size=28, patch_size=14, mean=half, std=half, resize="exact", output="pixels", impl=impl
    )
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_patches_times_the_weight_equal_a_convolution(impl):
    generator = np.random.default_rng(8)
    frames = [random_frame(generator, height, width) for height, width in ((50, 70), (28, 28), (90, 40))]
    weight = torch.from_numpy(generator.standard_normal((5, 3, 14, 14)))
    patches = pack_frames(frames, **OPTIONS, impl=impl, dtype=torch.float64)
    pixels = pack_frames(frames, **OPTIONS, impl=impl, dtype=torch.float64, output="pixels")
    assert patches.shape == (3 * 4, 3 * 14 * 14)
    expected = F.conv2d(pixels, weight, stride=14).flatten(2).transpose(1, 2).flatten(0, 1)  # (patches, 5)
    torch.testing.assert_close(patches @ weight.flatten(1).t(), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_dtypes(dtype, impl):
    frame = random_frame(np.random.default_rng(9), 40, 50)
    actual = pack_frames([frame], **OPTIONS, impl=impl, dtype=dtype, output="pixels")
    wide = torch.promote_types(dtype, torch.float32)
    levels = torch.from_numpy(pack_bytes([frame], size=28, impl=impl)).permute(0, 3, 1, 2).to(wide)
    mean, std = (torch.tensor(each, dtype=wide)[:, None, None] for each in (MEAN, STD))
    torch.testing.assert_close(actual, ((levels / 255 - mean) / std).to(dtype), rtol=0, atol=0)


def test_input_strides_do_not_change_the_result(impl):
    generator = np.random.default_rng(10)
    frame = random_frame(generator, 40, 50)
    expected = pack_frames([frame], **OPTIONS, impl=impl)
    wide = random_frame(generator, 80, 100)
    wide[::2, ::2] = frame
    planes = torch.from_numpy(frame).permute(2, 0, 1).contiguous()
    read_only = frame.copy()
    read_only.flags.writeable = False
    for same in (
        torch.from_numpy(frame), wide[::2, ::2], torch.from_numpy(wide)[::2, ::2], planes.permute(1, 2, 0),
        frame[::-1].copy()[::-1], np.asfortranarray(frame), read_only, np.asarray(Image.fromarray(frame)),
    ):  # fmt: skip
        assert torch.equal(pack_frames([same], **OPTIONS, impl=impl), expected)


def test_stacked_frames_equal_a_list(impl):
    frames = np.random.default_rng(11).integers(0, 256, (3, 30, 40, 3), dtype=np.uint8)
    expected = pack_frames(list(frames), **OPTIONS, impl=impl)
    assert torch.equal(pack_frames(frames, **OPTIONS, impl=impl), expected)
    assert torch.equal(pack_frames(torch.from_numpy(frames), **OPTIONS, impl=impl), expected)


@pytest.mark.parametrize("output", ["patches", "pixels"])
def test_out_is_filled_and_returned(output, impl):
    frames = [random_frame(np.random.default_rng(12), 30, 40)] * 2
    expected = pack_frames(frames, **OPTIONS, impl=impl, output=output)
    out = torch.full_like(expected, float("nan"))
    assert pack_frames(frames, **OPTIONS, impl=impl, output=output, out=out) is out
    assert torch.equal(out, expected)


def test_out_may_be_a_part_of_a_canvas(impl):
    frames = [random_frame(np.random.default_rng(seed), 30, 40) for seed in (27, 28)]
    options = OPTIONS | {"size": (24, 36), "resize": "exact", "output": "pixels", "impl": impl}
    expected = pack_frames(frames, **options)
    canvas = torch.full((4, 3, 30, 41), 7.0)
    part = canvas[1:3, :, 2:26, 5:41]
    assert pack_frames(frames, **options, out=part) is part
    assert torch.equal(part, expected)
    part.fill_(7.0)
    assert torch.equal(canvas, torch.full_like(canvas, 7.0))
    rows, same = torch.empty(2, 24, 3, 36).transpose(1, 2), torch.empty(1, 3, 24, 36).expand(2, -1, -1, -1)
    for wrong in (rows, same, torch.empty(2, 3, 36, 24).transpose(2, 3)):
        with pytest.raises(ValueError, match="a part of a contiguous tensor"):
            pack_frames(frames, **options, out=wrong)


def test_pixels_of_four_bytes(impl):
    """As Pillow has them."""
    wide = np.random.default_rng(29).integers(0, 256, (33, 70, 4), dtype=np.uint8)
    for frame in (wide[..., :3], wide[..., :3][:, 3:67], wide[..., :3][::2]):
        assert torch.equal(
            pack_frames([frame], **OPTIONS, impl=impl), pack_frames([frame.copy()], **OPTIONS, impl=impl)
        )


def test_no_frames(impl):
    assert pack_frames([], **OPTIONS, impl=impl).shape == (0, 588)
    assert pack_frames(np.zeros((0, 9, 9, 3), np.uint8), **OPTIONS, impl=impl, output="pixels").shape == (0, 3, 28, 28)
    assert pack_frames([], **OPTIONS, impl=impl, crop_boxes=[], flip=[]).shape == (0, 588)


def test_explain():
    frame = np.zeros((9, 9, 3), np.uint8)
    choice = explain(pack_frames, [frame], **OPTIONS)
    assert choice.name == ("reference" if cpu_backend.MISSING else "cpu")
    assert choice.reasons == {
        "cuda": "it is written for sm_80, sm_90, sm_100, and the tensors are on cpu",
        **({"cpu": cpu_backend.MISSING} if cpu_backend.MISSING else {}),
    }
    with pytest.raises(ValueError, match="not an implementation"):
        pack_frames([frame], **OPTIONS, impl="nothing")


GOOD = np.zeros((30, 40, 3), np.uint8)


@pytest.mark.parametrize(
    ("frame", "error", "message"),
    [
        (GOOD.astype(np.float32), TypeError, r"frames\[1\] has dtype float32"),
        (torch.zeros(30, 40, 3), TypeError, r"frames\[1\] has dtype torch.float32"),
        (Image.fromarray(GOOD), TypeError, r"frames\[1\] is a Image"),
        (GOOD[0], ValueError, r"frames\[1\] has shape \(40, 3\)"),
        (GOOD[..., :1], ValueError, r"frames\[1\] has shape \(30, 40, 1\)"),
        (GOOD.transpose(2, 0, 1), ValueError, r"frames\[1\] has shape \(3, 30, 40\)"),
        (GOOD[:0], ValueError, r"frames\[1\].*no pixels"),
        (GOOD[:, :0], ValueError, r"frames\[1\].*no pixels"),
        (torch.empty(30, 40, 3, dtype=torch.uint8, device="meta"), ValueError, r"frames\[1\] is on meta"),
    ],
)
def test_invalid_frames(frame, error, message):
    with pytest.raises(error, match=message):
        pack_frames([GOOD, frame], **OPTIONS)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"resize": "long_side"}, ValueError, "resize='long_side'"),
        ({"output": "tokens"}, ValueError, "output='tokens'"),
        ({"crop_rounding": "ceil"}, ValueError, "crop_rounding='ceil'"),
        ({"resample": "box"}, ValueError, "resample='box'"),
        ({"size": (28, 42)}, ValueError, r"size=\(28, 42\) is no square, and resize='short_side'"),
        ({"size": (28, 30), "resize": "exact"}, ValueError, r"size=\(28, 30\) is not a multiple of patch_size=14"),
        ({"size": (28,)}, ValueError, r"size=\(28,\), expected an int or \(height, width\)"),
        ({"size": (28, 28.0)}, TypeError, "size must be an int, got 28.0"),
        ({"size": 30}, ValueError, "size=30 is not a multiple of patch_size=14"),
        ({"size": 0}, ValueError, "size=0"),
        ({"size": 28.0}, TypeError, r"size must be an int or \(height, width\), got 28.0"),
        ({"patch_size": None}, TypeError, "patch_size must be an int"),
        ({"patch_size": -14}, ValueError, "patch_size=-14"),
        ({"mean": (0.5,)}, ValueError, "mean must have one value"),
        ({"std": (0.5, 0.5)}, ValueError, "std must have one value"),
        ({"std": (0.5, 0.0, 0.5)}, ValueError, "expected positive values"),
        ({"dtype": torch.int32}, TypeError, "dtype is torch.int32"),
        ({"flip": [True, False]}, ValueError, "flip has 2 entries for 1 frames"),
        ({"crop_boxes": []}, ValueError, "crop_boxes has 0 entries for 1 frames"),
        ({"crop_boxes": [(0, 0, 5)]}, ValueError, r"crop_boxes\[0\] is \(0, 0, 5\)"),
        ({"crop_boxes": [(0, 0, 5.0, 5)]}, TypeError, r"crop_boxes\[0\] is \(0, 0, 5.0, 5\), expected ints"),
        ({"crop_boxes": torch.zeros(1, 4)}, TypeError, "crop_boxes is a tensor"),
        ({"mean": None}, ValueError, "mean is None"),
        ({"dtype": torch.uint8}, ValueError, "are not normalised"),
        ({"merge_size": 0}, ValueError, "merge_size=0, expected at least 1"),
        ({"merge_size": 3}, ValueError, "patch_size=14 times merge_size=3"),
        ({"temporal_patch_size": 2.0}, TypeError, "temporal_patch_size must be an int"),
        ({"merge_size": 2, "output": "pixels"}, ValueError, "use output='patches'"),
        ({"windows": [(0, 0, 14, 14)]}, ValueError, "use 'exact'"),
        ({"windows": [], "resize": "exact"}, ValueError, "windows has 0 entries for 1 frames"),
        (
            {"windows": [(0, 0, 14, 14)], "size": [(20, 20)] * 2, "resize": "exact"},
            ValueError,
            "size has 2 entries for 1",
        ),
        ({"size": [(20, 20)]}, ValueError, r"size=\[\(20, 20\)\], expected an int"),
        ({"windows": [(0, 0, 14)], "resize": "exact"}, ValueError, r"windows\[0\].*expected \(top"),
        ({"windows": [(0, 0, 14, 1.0)], "resize": "exact"}, TypeError, r"windows\[0\].*expected ints"),
        ({"windows": [(0, 15, 14, 14)], "resize": "exact"}, ValueError, r"windows\[0\].*not inside"),
        ({"windows": [(0, 0, 0, 14)], "resize": "exact"}, ValueError, r"windows\[0\].*empty"),
        ({"windows": [(0, 0, 15, 14)], "resize": "exact"}, ValueError, "not a multiple of patch_size=14"),
        ({"crop_boxes": [(0, 0, 31, 40)]}, ValueError, r"crop_boxes\[0\].*not inside"),
        ({"crop_boxes": [(0, 1, 30, 40)]}, ValueError, r"crop_boxes\[0\].*not inside"),
        ({"crop_boxes": [(-1, 0, 30, 40)]}, ValueError, r"crop_boxes\[0\].*not inside"),
        ({"crop_boxes": [(0, -1, 30, 40)]}, ValueError, r"crop_boxes\[0\].*not inside"),
        ({"crop_boxes": [(5, 5, 0, 5)]}, ValueError, r"crop_boxes\[0\].*empty"),
        ({"crop_boxes": [(5, 5, 5, 0)]}, ValueError, r"crop_boxes\[0\].*empty"),
        ({"out": torch.empty(4, 587)}, ValueError, r"out has shape \(4, 587\), expected \(4, 588\)"),
        ({"out": torch.empty(4, 588, dtype=torch.float16)}, TypeError, "out is torch.float16"),
        ({"out": torch.empty(588, 4).t()}, ValueError, "out must be contiguous"),
        ({"out": torch.empty(4, 588, device="meta")}, ValueError, "out is on meta"),
        ({"out": torch.empty(4, 588, requires_grad=True)}, ValueError, "out requires a gradient"),
    ],
)
def test_invalid_options(options, error, message):
    with pytest.raises(error, match=message):
        pack_frames([GOOD], **(OPTIONS | options))


def test_windows_of_two_sizes():
    windows = [(0, 0, 14, 14), (0, 0, 14, 28)]
    with pytest.raises(ValueError, match=r"windows\[1\].*one size"):
        pack_frames([GOOD] * 2, **OPTIONS, resize="exact", windows=windows)


def test_one_frame_must_be_in_a_list():
    with pytest.raises(ValueError, match="put a single frame into a list"):
        pack_frames(GOOD, **OPTIONS)


@pytest.mark.parametrize("patch_size", [14, None])
def test_opcheck(patch_size, impl):
    frames = [
        torch.randint(0, 256, (20, 30, 3), dtype=torch.uint8),
        torch.randint(0, 256, (9, 8, 3), dtype=torch.uint8),
    ]
    out = torch.empty((8, 588) if patch_size else (2, 3, 28, 28))
    boxes = [2, 3, 10, 20, 0, 0, 9, 8]
    torch.library.opcheck(
        torch.ops.lynx_kernels.pack_frames.default,
        (
            frames,
            out,
            boxes,
            [True, False],
            [28, 28] * 2,
            [],
            patch_size,
            1,
            1,
            list(MEAN),
            list(STD),
            "exact",
            "bicubic",
            "round",
            impl,
        ),
    )


def test_compiles_as_one_graph():
    """With changing sizes and boxes there are at most two recompilations; fullgraph makes more an error."""

    def function(frames, box, out):
        packed = pack_frames(frames, **OPTIONS, crop_boxes=[box, (0, 0, 9, 8)], flip=[True, False])
        return packed, pack_frames(frames, **OPTIONS, out=out)

    compiled = torch.compile(function, fullgraph=True)
    with torch._dynamo.config.patch(recompile_limit=3):
        for step in range(6):
            shapes = ((20 + 3 * step, 31 + step, 3), (9, 8, 3))
            frames = [torch.randint(0, 256, shape, dtype=torch.uint8) for shape in shapes]
            box = (2 + step, 3 + step % 2, 10 + step, 20 + step)
            out, eager_out = torch.empty(2, 8, 588).unbind(0)
            actual, returned = compiled(frames, box, out)
            expected, _ = function(frames, box, eager_out)
            assert torch.equal(actual, expected)
            assert torch.equal(out, eager_out)
            assert torch.equal(returned, eager_out)
