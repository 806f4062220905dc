"""The compiled CPU pack_frames: every instruction set, any strides and sizes, threads, forked processes."""

import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lynx_kernels.backends import cpu as cpu_backend
from lynx_kernels.backends.dispatch import explain
from lynx_kernels.ops.pack_frames import pack_frames
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
from tests.lynx_kernels.helpers import assert_child_ends_well

if cpu_backend.MISSING is not None:
    pytest.skip(cpu_backend.MISSING, allow_module_level=True)

# One pixel; one row or column; ten to one; up; down; an unchanged side; remainders of row blocks and column groups.
SHAPES = [
    (1, 1), (1, 9), (9, 1), (3, 2), (400, 40), (40, 400), (7, 70), (28, 28), (28, 31), (33, 28), (16, 16), (17, 15),
    (64, 48), (47, 65), (100, 101), (257, 31), (30, 333),
]  # fmt: skip
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


pytestmark = pytest.mark.usefixtures("poison")


@pytest.fixture(autouse=True)
def one_thread(restore_threads):
    torch.set_num_threads(1)


def assert_same(frames, **options):
    """The result equals the reference bit for bit."""
    expected = pack_frames(frames, **options, impl="reference")
    actual = pack_frames(frames, **options, impl="cpu")
    assert torch.equal(actual, expected), f"{[frame.shape for frame in frames]} {options}"


@pytest.mark.parametrize("resize", ["exact", "short_side"])
def test_every_instruction_set(instruction_set, resize):
    generator = np.random.default_rng(0)
    frames = [random_frame(generator, *shape, harsh=index % 2 == 0) for index, shape in enumerate(SHAPES)]
    for crop_rounding in ("round", "floor"):
        options = OPTIONS | {"resize": resize, "crop_rounding": crop_rounding}
        assert_same(frames, **options)
        assert_same(frames, **options, flip=[index % 3 != 0 for index in range(len(frames))])
        assert_same(frames, **options, output="pixels", dtype=torch.bfloat16)


@pytest.mark.parametrize("resize", ["exact", "short_side"])
def test_bytes_equal_pillow(instruction_set, resize):
    generator = np.random.default_rng(1)
    for index, (height, width) in enumerate([*SHAPES, *random_shapes(generator, 300)]):
        size = int(generator.integers(1, 130))
        frame = random_frame(generator, height, width, harsh=index % 3 == 0)
        expected = pillow_resize(frame, size, size) if resize == "exact" else pillow_short_side(frame, size)
        actual = pack_bytes([frame], size=size, resize=resize, impl="cpu")[0]
        np.testing.assert_array_equal(actual, expected, err_msg=f"{height} x {width} -> {size}")


@st.composite
def calls(draw):
    """A frame, a crop box, and options."""
    height, width = draw(st.integers(1, 90)), draw(st.integers(1, 90))
    top, left = draw(st.integers(0, height - 1)), draw(st.integers(0, width - 1))
    box = top, left, draw(st.integers(1, height - top)), draw(st.integers(1, width - left))
    resize = draw(st.sampled_from(["exact", "short_side"]))
    patch_size, grid = draw(st.sampled_from([1, 2, 5, 14, 16, 40])), draw(st.integers(1, 3))
    options = {
        "size": (patch_size * grid, patch_size * (grid if resize == "short_side" else draw(st.integers(1, 3)))),
        "patch_size": patch_size,
        "crop_boxes": [box],
        "flip": [draw(st.booleans())],
        "resize": resize,
        "resample": draw(st.sampled_from(["bicubic", "bilinear", "lanczos"])) if resize == "exact" else "bicubic",
        "crop_rounding": draw(st.sampled_from(["round", "floor"])),
        "output": draw(st.sampled_from(["patches", "pixels"])),
        "dtype": draw(st.sampled_from(DTYPES)),
    }
    return random_frame(
        np.random.default_rng(draw(st.integers(0, 99))), height, width, harsh=draw(st.booleans())
    ), options


@settings(max_examples=150, deadline=None)
@given(calls(), st.sampled_from(cpu_backend.instruction_sets()))
def test_any_call(call, instruction_set):
    frame, options = call
    cpu_backend.force_instruction_set(instruction_set)
    try:
        assert_same([frame], mean=MEAN, std=STD, **options)
    finally:
        cpu_backend.force_instruction_set(None)


@settings(max_examples=150, deadline=None)
@given(calls())
def test_any_call_equals_pillow(call):
    frame, options = call
    top, left, height, width = options["crop_boxes"][0]
    cut, size = frame[top : top + height, left : left + width], options["size"]
    if options["resize"] == "exact":
        expected = pillow_resize(cut, *size, options["resample"])
    else:
        expected = pillow_short_side(cut, size[0], options["crop_rounding"])
    asked = {name: options[name] for name in ("crop_boxes", "flip", "resize", "resample", "crop_rounding")}
    actual = pack_bytes([frame], size=size, **asked, impl="cpu")[0]
    np.testing.assert_array_equal(actual, expected[:, ::-1] if options["flip"][0] else expected)


@pytest.mark.parametrize("patch_size", [1, 3, 7, 14, 16, 31, 32, 33, 50, 100])
def test_patch_sizes(instruction_set, patch_size):
    """Patches shorter than a vector, and longer than a strip."""
    generator = np.random.default_rng(2)
    size = patch_size * (1 if patch_size > 31 else 3)
    frames = [random_frame(generator, *shape) for shape in ((size, size), (size, size + 5), (60, 50))]
    for output in ("patches", "pixels"):
        for flip in (None, [True] * 3):
            assert_same(frames, size=size, patch_size=patch_size, mean=MEAN, std=STD, output=output, flip=flip)


@pytest.mark.parametrize("dtype", DTYPES)
# The reciprocals of the last divisors are subnormal, so multiplying by them is not dividing: a table is needed.
@pytest.mark.parametrize(
    ("mean", "std"), [(MEAN, STD), ((0, 0.5, 1), (1, 0.5, 1e-30)), ((0.1, 0.2, 0.3), (1e38, 2e38, 3e38))]
)
def test_levels(instruction_set, dtype, mean, std):
    levels = torch.arange(256, dtype=torch.uint8)
    frame = torch.stack([levels, levels.flip(0), levels.roll(7)], -1).view(16, 16, 3)
    assert_same([frame], size=16, patch_size=16, mean=mean, std=std, dtype=dtype)


def layouts(frame):
    """Name -> the frame with other strides."""
    height, width, _ = frame.shape
    wide = torch.full((2 * height, 3 * width, 5), 9, dtype=torch.uint8)
    wide[::2, ::3, 1:4] = frame
    four = torch.full((height, width, 4), 9, dtype=torch.uint8)
    four[..., :3] = frame
    return {
        "spread": wide[::2, ::3, 1:4],
        "four channels": four[..., :3],
        "planes": frame.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        "columns first": frame.transpose(0, 1).contiguous().transpose(0, 1),
        "padded rows": wide.new_zeros(height, width + 7, 3)[:, 2 : 2 + width].copy_(frame),
        "reversed": np.ascontiguousarray(frame.numpy()[::-1, ::-1, ::-1])[::-1, ::-1, ::-1],
    }


@pytest.mark.parametrize("shape", [(28, 28), (45, 37), (28, 40)])
@pytest.mark.parametrize("flip", [False, True])
def test_strides(instruction_set, shape, flip):
    frame = torch.from_numpy(random_frame(np.random.default_rng(3), *shape))
    expected = pack_frames([frame], **OPTIONS, flip=[flip], impl="reference")
    for name, same in layouts(frame).items():
        assert torch.equal(pack_frames([same], **OPTIONS, flip=[flip], impl="cpu"), expected), name


def test_expanded_frames():
    pixel = torch.tensor([1, 2, 3], dtype=torch.uint8)
    grey = torch.arange(40, dtype=torch.uint8)[:, None, None]
    assert_same([pixel.expand(40, 30, 3), grey.expand(40, 28, 3), grey.expand(40, 40, 3)], **OPTIONS)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(28, 28), (45, 37)])
def test_no_writes_outside_the_output(instruction_set, dtype, shape):
    frames = [random_frame(np.random.default_rng(4), *shape)] * 2
    storage = torch.full((10, 588), 77.0, dtype=dtype)
    out = pack_frames(frames, **OPTIONS, dtype=dtype, out=storage[1:9], impl="cpu")
    assert torch.equal(out, pack_frames(frames, **OPTIONS, dtype=dtype, impl="reference"))
    assert (storage[[0, 9]] == 77).all()


def test_frames_of_many_sizes_at_once():
    generator = np.random.default_rng(5)
    frames = [random_frame(generator, *shape) for shape in random_shapes(generator, 40)]
    boxes = [
        (index % height, 0, height - index % height, width)
        for index, (height, width, _) in enumerate(frame.shape for frame in frames)
    ]
    flips = [index % 2 == 0 for index in range(40)]
    assert_same(frames, **OPTIONS, crop_boxes=boxes, flip=flips, resize="exact")


def test_patches_times_the_weight_equal_a_convolution():
    generator = np.random.default_rng(6)
    frames = [random_frame(generator, *shape) for shape in ((60, 80), (42, 42), (90, 50))]
    weight = torch.from_numpy(generator.standard_normal((5, 3, 14, 14)))
    options = {"size": 42, "patch_size": 14, "mean": MEAN, "std": STD, "dtype": torch.float64}
    patches = pack_frames(frames, **options, impl="cpu")
    levels = np.stack([pillow_short_side(frame, 42) for frame in frames]) / 255
    pixels = torch.from_numpy((levels - MEAN) / STD).permute(0, 3, 1, 2)
    expected = F.conv2d(pixels, weight, stride=14).flatten(2).transpose(1, 2).flatten(0, 1)
    torch.testing.assert_close(patches @ weight.flatten(1).t(), expected)


@pytest.mark.parametrize("count", [1, 3, 7])
def test_result_does_not_depend_on_threads(instruction_set, count):
    generator = np.random.default_rng(7)
    frames = [random_frame(generator, 150 + index, 130) for index in range(count)]
    options = {"size": 126, "patch_size": 14, "mean": MEAN, "std": STD}
    expected = pack_frames(frames, **options, impl="reference")
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        assert torch.equal(pack_frames(frames, **options, impl="cpu"), expected)
        assert torch.equal(
            pack_frames(frames, **options, output="pixels", impl="cpu"),
            pack_frames(frames, **options, output="pixels", impl="reference"),
        )


def test_forked_child_does_not_hang():
    torch.set_num_threads(2)
    frames = [random_frame(np.random.default_rng(8), 90, 80)] * 4
    expected = pack_frames(frames, **OPTIONS, impl="cpu")
    assert_child_ends_well(lambda: torch.equal(pack_frames(frames, **OPTIONS, impl="cpu"), expected))


class Packed(torch.utils.data.Dataset):
    """Packs frames in the workers that load them."""

    def __init__(self):
        generator = np.random.default_rng(9)
        self.frames = [random_frame(generator, 40 + index, 50) for index in range(6)]

    def __len__(self):
        return len(self.frames)

    def __getitem__(self, index):
        return pack_frames([self.frames[index]], **OPTIONS, impl="cpu")


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_of_a_data_loader(start):
    torch.set_num_threads(2)
    dataset = Packed()
    expected = [dataset[index] for index in range(len(dataset))]
    loader = DataLoader(dataset, batch_size=2, num_workers=2, multiprocessing_context=start, timeout=120)
    assert torch.equal(torch.cat(list(loader)), torch.stack(expected))


def test_the_call_releases_the_gil():
    frames = [random_frame(np.random.default_rng(10), 400, 400)] * 100
    out = torch.empty(100, 3, 224, 224)
    seconds = []

    def work():
        start = time.perf_counter()
        pack_frames(frames, size=224, patch_size=None, mean=MEAN, std=STD, output="pixels", out=out, impl="cpu")
        seconds.append((start, time.perf_counter()))

    thread = threading.Thread(target=work)
    thread.start()
    moments = []
    while thread.is_alive():
        moments.append(time.perf_counter())
        time.sleep(0.0005)
    [(start, end)] = seconds
    tenths = {int(10 * (moment - start) / (end - start)) for moment in moments if start < moment < end}
    assert len(tenths) >= 3, "the call did not release the GIL"  # then only the first and the last are seen


def test_explain_and_unsupported_reasons(monkeypatch):
    frame = np.zeros((9, 9, 3), np.uint8)
    assert explain(pack_frames, [frame], **OPTIONS).name == "cpu"
    elsewhere = torch.zeros(9, 9, 3, dtype=torch.uint8, device="meta")
    assert (
        explain(pack_frames, [elsewhere], **OPTIONS).reasons["cpu"]
        == "it is written for cpu, and the tensors are on meta"
    )
    monkeypatch.setattr(cpu_backend, "MISSING", "the compiled module is missing")
    choice = explain(pack_frames, [frame], **OPTIONS)
    assert (choice.name, choice.reasons["cpu"]) == ("reference", "the compiled module is missing")
    with pytest.raises(RuntimeError, match="the compiled module is missing"):
        pack_frames([frame], **OPTIONS, impl="cpu")
