"""Frames of video files: which are picked, what is decoded for them, how they are shown."""

import gc
import io
import os
import struct
import sys
from bisect import bisect_right
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from lynx.media import videos
from lynx.media.images import ImageError
from lynx.media.videos import VideoError, is_video_file, load_video
from tests.lynx.clips import frame, numbers, packets, write_clip

COUNT = 41  # a prime: no middle of a segment falls between two frames
KINDS = [
    ("mp4", "mpeg4", {}),
    ("mp4", "libx264", {}),  # with B-frames, which are decoded in another order than shown
    ("mp4", "libx264", {"options": {"x264-params": "open-gop=1:bframes=3:b-adapt=0"}}),
    ("mp4", "libx264", {"options": {"bf": "0"}}),
    ("mkv", "libx264", {}),
    ("avi", "libx264", {}),  # times that cannot be right
    ("avi", "mpeg4", {"options": {"bf": "2"}}),
    ("ts", "libx264", {}),
    ("mpg", "mpeg2video", {}),
    ("webm", "libvpx-vp9", {"options": {"deadline": "realtime", "cpu-used": "8"}}),
    ("mov", "qtrle", {"pixels": "rgb24"}),
    ("avi", "mjpeg", {"pixels": "yuvj420p"}),
]
IDS = [f"{codec}-{suffix}-{number}" for number, (suffix, codec, _) in enumerate(KINDS)]


@pytest.fixture
def clip(tmp_path):
    return write_clip(tmp_path / "clip.mp4", [frame(i) for i in range(COUNT)])


def every_frame(path):
    with av.open(path) as container:
        return [each.to_ndarray(format="rgb24") for each in container.decode(video=0)]


@pytest.mark.parametrize(("suffix", "codec", "options"), KINDS, ids=IDS)
def test_middles_of_equal_segments(tmp_path, suffix, codec, options):
    path = write_clip(tmp_path / f"clip.{suffix}", [frame(i) for i in range(COUNT)], codec, **options)
    every = every_frame(path)
    assert numbers(every) == list(range(COUNT))
    for count in (1, 2, 5, 12, COUNT, 60):
        expected = [(2 * i + 1) * COUNT // (2 * count) for i in range(count)]
        images = load_video(path, count)
        assert numbers(images) == expected
        for image, number in zip(images, expected, strict=True):
            assert image.mode == "RGB"
            np.testing.assert_array_equal(np.asarray(image), every[number])


@pytest.mark.parametrize(("suffix", "codec", "options"), KINDS, ids=IDS)
def test_any_frames_found_by_seeking(tmp_path, suffix, codec, options):
    path = write_clip(tmp_path / f"clip.{suffix}", [frame(i) for i in range(COUNT)], codec, **options)
    generator = np.random.default_rng(0)
    with path.open("rb") as file:
        video = videos._Video(file, "clip", 10**6)
        assert video.timed == ((suffix, codec) != ("avi", "libx264"))
        times = sorted(video.shown)
        for _ in range(10 if video.timed else 0):
            picked = sorted(generator.choice(COUNT, 3).tolist())
            found = video._decode([times[number] for number in picked], True)
            assert numbers(found[times[number]] for number in picked) == picked


def test_what_is_not_needed_is_not_decoded(tmp_path):
    path = write_clip(
        tmp_path / "clip.mp4", [frame(i) for i in range(48)], "libx264", options={"bf": "0", "sc_threshold": "0"}
    )
    whole = load_video(path, 2)  # frames 12 and 36, of groups that start at 8 and 32
    assert numbers(whole) == [12, 36]
    stored = packets(path)
    assert [place for place, (_, _, key) in enumerate(stored) if key] == [0, 8, 16, 24, 32, 40]
    data = bytearray(path.read_bytes())
    for place, (start, size, _) in enumerate(stored):
        if not 8 <= place <= 12 and not 32 <= place <= 36:
            data[start : start + size] = b"\xff" * size
    assert load_video(bytes(data), 2) == whole
    start, size, _ = stored[10]
    data[start : start + size] = b"\xff" * size
    with pytest.raises(VideoError, match=rf"video of {len(data)} bytes: "):
        load_video(bytes(data), 2)


def test_seeking_spares_reading(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (80, 64, 64, 3), dtype=np.uint8)
    path = write_clip(tmp_path / "clip.mov", list(noise), "qtrle", pixels="rgb24")

    class Counting(io.FileIO):
        total = 0

        def read(self, size=-1):
            data = super().read(size)
            self.total += len(data)
            return data

    with Counting(path) as file:
        video = videos._Video(file, "clip", 10**6)
        scanned = file.total
        [image] = video._decode([video.times[70]], True).values()
        assert np.array_equal(image, noise[70])
        assert scanned > path.stat().st_size * 0.95
        assert file.total - scanned < path.stat().st_size / 3


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_a_variable_rate_is_picked_by_time(tmp_path, suffix):
    times = [0, 1, 2, 3, 4, 40, 41, 42, 70, 99]
    path = write_clip(tmp_path / f"clip.{suffix}", [frame(4 * i) for i in range(10)], times=times)
    end = 99 + 11  # the last frame lasts as long as the others on average
    for count in (1, 3, 7):
        expected = [4 * (bisect_right(times, (i + 0.5) * end / count) - 1) for i in range(count)]
        assert numbers(load_video(path, count)) == expected
    assert numbers(load_video(path, 7)) == [16, 16, 16, 28, 32, 32, 36]


def test_times_need_not_start_at_zero(tmp_path):
    path = write_clip(tmp_path / "clip.mkv", [frame(i) for i in range(COUNT)], times=list(range(1000, 1000 + COUNT)))
    assert numbers(load_video(path, 2)) == [10, 30]


def test_a_random_frame_of_each_segment(clip):
    generator = np.random.default_rng(0)
    drawn = [videos._pick(list(range(40)), 4, generator) for _ in range(300)]
    for segment in range(4):
        assert {each[segment] for each in drawn} == set(range(10 * segment, 10 * segment + 10))
    first, again, other = (numbers(load_video(clip, 5, generator=np.random.default_rng(seed))) for seed in (3, 3, 4))
    assert first == again != other
    assert first == videos._pick(list(range(COUNT)), 5, np.random.default_rng(3))


def test_fewer_frames_than_asked_for(tmp_path):
    two = write_clip(tmp_path / "two.mp4", [frame(3), frame(9)])
    assert numbers(load_video(two, 5)) == [3, 3, 9, 9, 9]
    one = write_clip(tmp_path / "one.mp4", [frame(7)])
    assert numbers(load_video(one, 3)) == [7, 7, 7]
    with pytest.raises(ValueError, match="num_frames must be at least 1, got 0"):
        load_video(one, 0)


def test_bytes_and_paths(clip):
    assert load_video(str(clip), 3) == load_video(clip, 3) == load_video(clip.read_bytes(), 3)
    with pytest.raises(TypeError, match="a video must be a path or bytes, got list"):
        load_video([clip], 3)
    for name, answer in {"a.MP4": True, clip: True, "a.png": False, "mp4": False, b"a.mp4": False}.items():
        assert is_video_file(name) == answer


@pytest.mark.parametrize(
    ("matrix", "upright"),
    [  # QuickTime's: (x, y) is shown at (a x + c y, b x + d y), written a b c d
        ((1, 0, 0, 1), lambda a: a),
        ((-1, 0, 0, 1), lambda a: a[:, ::-1]),
        ((1, 0, 0, -1), lambda a: a[::-1]),
        ((-1, 0, 0, -1), lambda a: a[::-1, ::-1]),
        ((0, 1, -1, 0), lambda a: np.rot90(a, -1)),  # a telephone held upright
        ((0, -1, 1, 0), np.rot90),
        ((0, 1, 1, 0), lambda a: a.swapaxes(0, 1)),
        ((0, -1, -1, 0), lambda a: a[::-1, ::-1].swapaxes(0, 1)),
        ((0.1, 0.99, -0.99, 0.1), lambda a: np.rot90(a, -1)),
    ],
)
def test_rotation_is_carried_out(tmp_path, matrix, upright):
    array = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    path = write_clip(tmp_path / "clip.mov", [array] * 3, "qtrle", pixels="rgb24")
    data = bytearray(path.read_bytes())
    start = data.index(b"tkhd") + 44
    a, b, c, d = (round(value * 65536) for value in matrix)
    data[start : start + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    [image] = load_video(bytes(data), 1)
    np.testing.assert_array_equal(np.asarray(image), upright(array))


@pytest.mark.parametrize(("ratio", "size"), [((16, 11), (93, 48)), ((8, 9), (64, 54))])
@pytest.mark.parametrize(("suffix", "codec"), [("mp4", "libx264"), ("mkv", "mpeg4")])
def test_pixels_become_square(tmp_path, suffix, codec, ratio, size):
    array = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    context = {"sample_aspect_ratio": Fraction(*ratio)}
    path = write_clip(tmp_path / f"clip.{suffix}", [array] * 3, codec, context=context)
    [image] = load_video(path, 1)
    assert image.size == size
    stored = Image.fromarray(every_frame(path)[1])
    np.testing.assert_array_equal(np.asarray(image), np.asarray(stored.resize(size, Image.Resampling.BICUBIC)))
    with pytest.raises(ImageError, match=f"{size[0]} x {size[1]} pixels are more than the limit of {64 * 48}"):
        load_video(path, 1, max_pixels=64 * 48)


def test_ten_bits_become_eight(tmp_path):
    frames = [frame(i) for i in range(COUNT)]
    path = write_clip(tmp_path / "clip.mkv", frames, "ffv1", pixels="yuv420p10le")
    assert numbers(load_video(path, COUNT)) == list(range(COUNT))


@pytest.mark.parametrize(("space", "red", "blue"), [(1, 0.2126, 0.0722), (5, 0.299, 0.114), (9, 0.2627, 0.0593)])
def test_colours_by_the_matrix_that_the_file_names(tmp_path, space, red, blue):
    """Pixels are written by BT.601, so that another matrix shows in what is read. Numbers of spaces: ITU-T H.273."""
    r, g, b = 60, 170, 60
    luma = 0.299 * r + 0.587 * g + 0.114 * b
    r, b = luma + (1 - red) / 0.701 * (r - luma), luma + (1 - blue) / 0.886 * (b - luma)
    expected = r, (luma - red * r - blue * b) / (1 - red - blue), b
    array = np.full((48, 64, 3), (60, 170, 60), np.uint8)
    context = {"colorspace": space}
    path = write_clip(tmp_path / "clip.mkv", [array] * 3, "ffv1", pixels="yuv444p", context=context)
    actual = np.asarray(load_video(path, 1)[0])[24, 32].astype(int)
    np.testing.assert_allclose(actual, expected, atol=2.5)
    assert space == 5 or abs(np.asarray(expected) - (60, 170, 60)).max() > 6


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_high_dynamic_range(tmp_path, suffix):
    """HLG is made for usual screens too; PQ is not."""
    frames = [frame(i) for i in range(COUNT)]
    wide = {"color_primaries": 9, "colorspace": 9}  # BT.2020
    hlg = write_clip(tmp_path / f"hlg.{suffix}", frames, "libx264", context={**wide, "color_trc": 18})
    with av.open(str(hlg)) as container:
        assert container.streams.video[0].codec_context.color_trc == 18
    assert numbers(load_video(hlg, 2)) == [10, 30]
    pq = write_clip(tmp_path / f"pq.{suffix}", frames, "libx264", context={**wide, "color_trc": 16})
    with pytest.raises(VideoError, match=rf"pq\.{suffix}: .*high dynamic range \(PQ\), .* convert it"):
        load_video(pq, 2)


def test_transparency_lies_on_white(tmp_path):
    array = np.zeros((32, 48, 4), np.uint8)
    array[:16] = 255, 10, 20, 30  # alpha first
    path = write_clip(tmp_path / "clip.mov", [array] * 2, "qtrle", pixels="argb", source="argb")
    actual = np.asarray(load_video(path, 1)[0])
    assert (actual[:16] == (10, 20, 30)).all()
    assert (actual[16:] == 255).all()


def patched(data, box, offset, value):
    """Every box of this name in an MP4 file with another 32-bit number in it."""
    data, start = bytearray(data), 0
    while (start := data.find(box, start)) >= 0:
        start += len(box)
        data[start + offset : start + offset + 4] = struct.pack(">I", value)
    return bytes(data)


def test_a_header_that_lies_about_its_duration(clip):
    data = clip.read_bytes()
    for length in (1, 10**9):
        lying = data
        for box, offset in ((b"mvhd", 16), (b"mdhd", 16), (b"tkhd", 20)):
            lying = patched(lying, box, offset, length)
        with av.open(io.BytesIO(lying)) as container:
            assert length > 1 or container.streams.video[0].duration == length  # FFmpeg sees through the other
        assert numbers(load_video(lying, 2)) == [10, 30]


def test_a_header_that_lies_about_its_frames(tmp_path):
    path = write_clip(tmp_path / "clip.avi", [frame(i) for i in range(COUNT)])
    data = bytearray(path.read_bytes())
    for start in (data.index(b"avih") + 24, data.index(b"strh") + 40):
        assert struct.unpack_from("<I", data, start) == (COUNT,)
        struct.pack_into("<I", data, start, 5000)
    assert numbers(load_video(bytes(data), 2)) == [10, 30]


def test_what_an_edit_cuts_away_is_not_shown(tmp_path):
    path = write_clip(tmp_path / "clip.mp4", [frame(i) for i in range(COUNT)], "libx264")
    data = path.read_bytes()
    start = data.index(b"elst") + 16
    [begin] = struct.unpack_from(">I", data, start)
    cut = patched(data, b"elst", 12, begin + 11 * 512)  # 11 frames
    assert numbers(load_video(cut, 1)) == [11 + (COUNT - 11) // 2]
    assert numbers(load_video(cut, 30)) == list(range(11, COUNT))


def test_without_pyav_the_error_says_what_to_install(clip, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'lynx-kernels\[video\]'"):
        load_video(clip, 2)


def test_no_threads_are_left_behind(tmp_path):
    """Garbage that owns threads, freed in a forked loader where there are none, hangs it."""
    clip = write_clip(tmp_path / "clip.mp4", [frame(number) for number in range(9)])
    load_video(clip, 2)
    gc.disable()
    try:
        before = len(os.listdir("/proc/self/task"))
        load_video(clip, 4)
        assert len(os.listdir("/proc/self/task")) == before
    finally:
        gc.enable()
