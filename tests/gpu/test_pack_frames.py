import numpy as np
import pytest
import torch

from lynx_kernels.backends import dispatch
from lynx_kernels.ops.pack_frames import pack_frames
from tests.gpu import bench
from tests.lynx_kernels.frame_helpers import OPTIONS, random_frame, random_shapes

DTYPES = (torch.float64, *bench.DTYPES)

pytestmark = pytest.mark.usefixtures("cuda")


def on_device(*shapes):
    generator = np.random.default_rng(0)
    return [
        torch.from_numpy(random_frame(generator, *shape, harsh=index % 2 == 0)).to(bench.DEVICE)
        for index, shape in enumerate(shapes)
    ]


def check(frames, **options):
    """The result equals the reference on the CPU bit for bit."""
    options = {**OPTIONS, **options}
    expected = pack_frames([frame.cpu() for frame in frames], **options, impl="reference")
    for impl in ("cuda", "reference"):
        assert torch.equal(pack_frames(frames, **options, impl=impl).cpu(), expected), impl


def test_default_implementation():
    choice = dispatch.explain(pack_frames, on_device((30, 40)), **OPTIONS)
    assert choice.name == "cuda", choice


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(420, 420), (720, 1280), (100, 333), (420, 500)])
def test_real_sizes(shape, dtype):
    check(on_device(*[shape] * 3), size=420, dtype=dtype)


@pytest.mark.parametrize("resize", ["short_side", "exact"])
def test_many_shapes(resize):
    check(on_device(*random_shapes(np.random.default_rng(1), 70)), size=20, patch_size=5, resize=resize)


def test_boxes_flips_and_strides():
    frames = [frame[:, 1:-2] for frame in on_device((60, 80), (50, 40), (30, 41), (31, 34))]
    frames[0] = frames[0].permute(2, 0, 1).contiguous().permute(1, 2, 0)
    boxes = [(3, 5, 40, 60), (7, 9, 28, 28), (1, 2, 28, 31), (0, 0, 31, 28)]
    for rounding in ("round", "floor"):
        check(frames, crop_boxes=boxes, flip=[True, True, False, True], crop_rounding=rounding)


@pytest.mark.parametrize("shape", [(28, 28), (40, 60)])
def test_never_synchronises_and_replays(shape):
    frames = on_device(*[shape] * 40)
    out = pack_frames(frames, **OPTIONS)  # copies the table of levels
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        pack_frames(frames, **OPTIONS, out=out)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        pack_frames(frames, **OPTIONS, out=out)
    for frame in frames:
        frame.copy_(255 - frame)
    out.fill_(torch.nan)
    graph.replay()
    assert torch.equal(out, pack_frames(frames, **OPTIONS, impl="reference"))
