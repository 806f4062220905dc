"""The CUDA kernels of pack_frames, run on a CPU: bit for bit what the reference gives.

Of every frame the driver gets exactly what its box cuts out, so that the sanitizer sees every access beside it.
"""

import numpy as np
import pytest
import torch

from lynx_kernels.ops.pack_frames import pack_frames
from tests.lynx_kernels.frame_helpers import MEAN, STD, pack_bytes, pillow_resize, random_frame, random_shapes

pytestmark = pytest.mark.usefixtures("on_host")
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def check(frames, **options):
    options = {"size": 24, "patch_size": 8, "mean": MEAN, "std": STD, **options}
    actual = pack_frames(frames, **options, impl="cuda")
    expected = pack_frames(frames, **options, impl="reference")
    assert torch.equal(actual, expected), f"{int((actual != expected).sum())} of {actual.numel()} differ"


def some_frames(seed=0, shapes=((60, 80), (24, 24), (24, 70), (100, 30), (5, 9))):
    generator = np.random.default_rng(seed)
    return [random_frame(generator, *shape, harsh=index % 2 == 0) for index, shape in enumerate(shapes)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("output", ["patches", "pixels"])
def test_dtypes_and_outputs(output, dtype):
    check(some_frames(), dtype=dtype, output=output)


@pytest.mark.parametrize("resize", ["short_side", "exact"])
def test_many_shapes(resize):
    """Enlarged and reduced, single pixels, ten times as long as wide; more frames and filters than a launch takes."""
    generator = np.random.default_rng(1)
    frames = [random_frame(generator, *shape, harsh=True) for shape in random_shapes(generator, 70)]
    check(frames, size=10, patch_size=5, resize=resize)


@pytest.mark.parametrize("resample", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [(40, 40), (70, 17), (12, 70)])
def test_equals_pillow(size, resample):
    """Squares and rectangles, the vertical pass first among them."""
    options = {"size": size, "resize": "exact", "resample": resample, "impl": "cuda"}
    for frame in some_frames(2):
        np.testing.assert_array_equal(pack_bytes([frame], **options)[0], pillow_resize(frame, *size, resample))


def test_both_orders_flipped_in_patches():
    """Frames of one call that are copied, resized horizontally first and vertically first."""
    frames = some_frames(9, ((60, 80), (24, 48), (90, 30), (91, 70), (20, 200)))
    check(frames, size=(24, 48), resize="exact", flip=[True, False, True, False, True])


def test_lanczos_is_refused():
    frames = some_frames()
    with pytest.raises(RuntimeError, match="a GPU's sine may differ"):
        pack_frames(frames, size=24, patch_size=8, mean=MEAN, std=STD, resample="lanczos", impl="cuda")


@pytest.mark.parametrize(("size", "patch_size"), [(1, 1), (7, 7), (16, 16), (17, 1), (33, 11), (70, 14)])
def test_sizes(size, patch_size):
    """Full and partial tiles of 16 rows and 32 columns; copies of 16 bytes at once and of one element."""
    check(some_frames(3, ((60, 80), (size, size), (size, size + 9))), size=size, patch_size=patch_size)


@pytest.mark.parametrize("rounding", ["round", "floor"])
def test_boxes_and_flips(rounding):
    """Some boxes have the square's own size, some do not; some crops have their middle between two pixels."""
    frames = some_frames(4, ((60, 80), (50, 40), (30, 41), (31, 24), (27, 45)))
    boxes = [(3, 5, 40, 60), (7, 9, 24, 24), (1, 2, 24, 39), (0, 0, 31, 24), (1, 1, 25, 39)]
    for flip in ([True] * 5, [False] * 5, [True, False, True, False, True]):
        check(frames, crop_boxes=boxes, flip=flip, crop_rounding=rounding)


def test_strides():
    """Planes, every second pixel, and rows further apart than they are wide."""
    frames = [torch.from_numpy(frame) for frame in some_frames(5)]
    planes = [frame.permute(2, 0, 1).contiguous().permute(1, 2, 0) for frame in frames]
    check(planes)
    check([frame[::2, ::2] for frame in frames], size=12, patch_size=4)
    check([frame[:, 1:-2] for frame in frames])


def test_more_frames_than_a_launch():
    generator = np.random.default_rng(6)
    check([random_frame(generator, 9 + 7 * (index // 40 % 2), 9) for index in range(100)], size=9, patch_size=3)
    check([], size=9, patch_size=3)


@pytest.mark.parametrize("offset", [1, 4])
def test_outputs_that_do_not_start_at_16_bytes(offset, on_host):
    on_host.offset = offset
    check(some_frames(7), dtype=torch.bfloat16)


def test_the_order_of_threads_changes_nothing(on_host):
    for seed in range(3):
        on_host.seed = seed
        check(some_frames(8))


def test_sizes_that_do_not_fit():
    with pytest.raises(RuntimeError, match="the CUDA kernels make frames of up to 22369621 pixels"):
        pack_frames(some_frames(), size=4730, patch_size=None, mean=MEAN, std=STD, output="pixels", impl="cuda")
