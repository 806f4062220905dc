"""Video files that are damaged, cut short, too large or none at all: every refusal."""

import io
import os
import warnings

import av
import numpy as np
import pytest

from lynx.media.images import ImageError
from lynx.media.videos import VideoError, load_video
from tests.lynx.clips import frame, numbers, packets, write_clip

COUNT = 41  # a prime: no middle of a segment falls between two frames


@pytest.fixture
def clip(tmp_path):
    return write_clip(tmp_path / "clip.mp4", [frame(i) for i in range(COUNT)])


def textured(count):
    array = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    return [np.roll(array, 3 * i, 1) for i in range(count)]


def damaged(path, place):
    """The file with one bit of a packet flipped such that the decoder makes a frame of it and says that it is wrong."""
    data, (start, size, _) = path.read_bytes(), packets(path)[place]
    for offset in range(size // 2, size):
        flipped = bytearray(data)
        flipped[start + offset] ^= 16
        try:
            with av.open(io.BytesIO(flipped)) as container:
                if any(each.is_corrupt for each in container.decode(video=0)):
                    return bytes(flipped)
        except av.FFmpegError:
            continue
    raise AssertionError("no bit does this")


@pytest.mark.parametrize(("place", "is_needed"), [(9, True), (10, True), (12, False), (17, False), (30, True)])
def test_a_damaged_frame_spoils_those_that_build_on_it(tmp_path, place, is_needed):
    """Frames 10 and 30 are picked, of the groups that start at 8 and 24."""
    path = write_clip(tmp_path / "clip.mp4", textured(COUNT))
    data = damaged(path, place)
    if is_needed:
        with pytest.raises(VideoError, match=rf"damaged, the frame at {place / 25:.3f} s cannot be decoded"):
            load_video(data, 2)
    else:
        assert load_video(data, 2) == load_video(path, 2)


def test_damage_in_a_file_without_times(tmp_path):
    path = write_clip(tmp_path / "clip.avi", textured(COUNT), "libx264")
    assert len(load_video(path, 2)) == 2
    with pytest.raises(VideoError, match="damaged, the frame at"):
        load_video(damaged(path, 3), 2)


def test_formats_that_do_not_tell_give_what_is_there(tmp_path):
    path = write_clip(tmp_path / "half.ts", [frame(i) for i in range(COUNT)], "mpeg2video")
    path.write_bytes(path.read_bytes()[: packets(path)[21][0]])
    assert numbers(load_video(path, 2)) == [5, 15]
    path = write_clip(tmp_path / "half.mkv", [frame(i) for i in range(COUNT)])
    data = bytearray(path.read_bytes()[: packets(path)[21][0]])
    size = data.index(bytes.fromhex("18538067")) + 4  # of the segment: a stream does not know it
    assert data[size] == 1
    data[size + 1 : size + 8] = b"\xff" * 7
    assert numbers(load_video(bytes(data), 2)) == [5, 15]


@pytest.mark.parametrize(
    ("suffix", "keep", "message"),
    [
        ("mp4", 0.6, "cut short"),
        ("mp4", "packet", "cut short, it has 20 of 41 packets"),
        ("mov", 0.6, "cut short"),  # its index is at the end
        ("avi", 0.6, "cut short"),
        ("flv", 0.6, "cut short in packet"),
        ("mkv", "packet", r"cut short, its last \d+ bytes are missing"),
        ("mkv", -1, "cut short, its last 1 bytes are missing"),
        ("webm", 0.6, r"cut short, its last \d+ bytes are missing"),
    ],
)
def test_truncated_files_are_refused_by_name(tmp_path, suffix, keep, message):
    codec = {"flv": "flv", "webm": "libvpx-vp9"}.get(suffix, "mpeg4")
    path = write_clip(tmp_path / f"half.{suffix}", [frame(i) for i in range(COUNT)], codec)
    assert numbers(load_video(path, 2)) == [10, 30]
    data = path.read_bytes()
    path.write_bytes(data[: packets(path)[20][0] if keep == "packet" else keep if keep < 0 else int(len(data) * keep)])
    with pytest.raises(VideoError, match=rf"half\.{suffix}: .*({message})"):
        load_video(path, 5)


def sound(path, cover=None):
    with av.open(path, "w") as container:
        stream = container.add_stream("aac", rate=8000, layout="mono")
        samples = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        samples.sample_rate = 8000
        if cover is not None:
            cover_stream = container.add_stream("png", rate=1)
            cover_stream.height, cover_stream.width, cover_stream.pix_fmt = *cover.shape[:2], "rgb24"
            cover_stream.disposition = av.stream.Disposition.attached_pic
            container.mux(cover_stream.encode(av.VideoFrame.from_ndarray(cover, format="rgb24")))
        container.mux([*stream.encode(samples), *stream.encode()])
    return path.read_bytes()


def without_frames(path):
    with av.open(path, "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        container.start_encoding()
    return path.read_bytes()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: b"", "not a video of a known format, or empty"),
        (lambda path: b"<html>not found</html>" * 500, "not a video of a known format"),
        (lambda path: b"YUV4MPEG2 W16 H16 F25:1\n" + (b"FRAME\n" + bytes(384)) * 3, "not a video of a known format"),
        (lambda path: sound(path.with_suffix(".mkv")), "the file has no video"),
        (lambda path: sound(path.with_suffix(".mp4"), frame(3)), "the file has no video"),
        (lambda path: without_frames(path.with_suffix(".avi")), "no frames"),
    ],
    ids=["empty", "junk", "a format not on the list", "sound", "sound with a cover", "no frames"],
)
def test_what_is_no_video_is_refused_by_name(tmp_path, make, message):
    path = tmp_path / "clip.mp4"
    path.write_bytes(make(tmp_path / "other"))
    with pytest.raises(VideoError, match=rf"clip\.mp4: .*{message}"):
        load_video(path, 2)


def test_missing_files_folders_and_urls(tmp_path):
    with pytest.raises(VideoError, match=r"none\.mp4: no such file"):
        load_video(tmp_path / "none.mp4", 2)
    with pytest.raises(VideoError, match="Is a directory"):
        load_video(tmp_path, 2)
    with pytest.raises(VideoError, match="never fetched"):
        load_video("https://example.org/clip.mp4", 2)


def test_playlists_do_not_open_other_files(clip, tmp_path):
    segment = write_clip(tmp_path / "clip.ts", [frame(1)] * 9, "mpeg2video")
    lists = {
        "concat": f"ffconcat version 1.0\nfile '{clip.name}'\n",
        "hls": f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{segment.name}\n#EXT-X-ENDLIST\n",
    }
    for kind, text in lists.items():
        path = tmp_path / f"{kind}.mp4"
        path.write_text(text)
        with pytest.raises(VideoError, match=kind):
            load_video(path, 2)


def test_frames_too_large_are_refused(clip, tmp_path):
    assert len(load_video(clip, 2, max_pixels=48 * 64)) == 2
    with pytest.raises(ImageError, match=r"clip\.mp4: 64 x 48 pixels are more than the limit of 3071"):
        load_video(clip, 2, max_pixels=48 * 64 - 1)


@pytest.mark.parametrize(
    ("side", "message"),
    [
        (64, "64 x 64 pixels are more than the limit of 1024"),
        (512, r"cannot be decoded: .*; a frame may have more pixels than the limit of 1024"),  # by the decoder
    ],
)
def test_frames_that_grow_too_large_are_refused(tmp_path, side, message):
    small, large = (
        write_clip(tmp_path / f"{each}.ts", [frame(2, each, each)] * 12, "mpeg2video").read_bytes()
        for each in (32, side)
    )
    assert {image.size for image in load_video(small + large, 12)} >= {(side, side)}
    with pytest.raises(ImageError, match=message):
        load_video(small + large, 12, max_pixels=32 * 32)


def test_files_are_closed_whatever_happens(clip, tmp_path):
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(clip.read_bytes()[: clip.stat().st_size // 2])
    other = tmp_path / "sound.mkv"
    sound(other)
    before = len(os.listdir("/proc/self/fd"))
    held = []  # exceptions keep the frames of the stack, and what is open there, alive
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for path, options in ((clip, {}), (cut, {}), (other, {}), (clip, {"max_pixels": 5})):
            try:
                load_video(path, 3, **options)
            except ImageError as error:
                held.append(error)
            assert len(os.listdir("/proc/self/fd")) == before
    assert len(held) == 3
    assert not [each for each in caught if issubclass(each.category, ResourceWarning)]
