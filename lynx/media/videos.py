"""Frames of a video file, picked by time; only what they need is decoded."""

import io
import os
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from lynx.media.images import DEFAULT_MAX_PIXELS, ImageError, check_size, to_rgb
from lynx.media.regular import not_a_file

# Demuxers of one self-contained file: playlists, for one, would open others.
_FORMATS = ("asf", "avi", "flv", "gif", "matroska", "mov", "mpeg", "mpegts", "ogg")
_SUFFIXES = {
    ".3gp", ".asf", ".avi", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".ogv", ".ts",
    ".webm", ".wmv",
}  # fmt: skip
_UPRIGHT = {  # by whether x and y change places, and whether the new x and the new y are mirrored
    (False, True, False): Image.Transpose.FLIP_LEFT_RIGHT,
    (False, False, True): Image.Transpose.FLIP_TOP_BOTTOM,
    (False, True, True): Image.Transpose.ROTATE_180,
    (True, False, False): Image.Transpose.TRANSPOSE,
    (True, True, False): Image.Transpose.ROTATE_270,
    (True, False, True): Image.Transpose.ROTATE_90,
    (True, True, True): Image.Transpose.TRANSVERSE,
}

_PQ = 16  # the transfer characteristics of SMPTE ST 2084, as ITU-T H.273 numbers them
# The first bytes of two elements of Matroska, RFC 9559.
_EBML, _SEGMENT = bytes.fromhex("1a45dfa3"), bytes.fromhex("18538067")

VideoSource = str | os.PathLike | bytes


class VideoError(ImageError):
    """A video cannot be used; the message names the video and says why."""


def is_video_file(source: Any) -> bool:
    """Whether this is a path with the suffix of a video file (GIF counts as an image)."""
    return isinstance(source, str | os.PathLike) and os.path.splitext(os.fspath(source))[1].lower() in _SUFFIXES


def load_video(
    source: VideoSource,
    num_frames: int,
    *,
    generator: np.random.Generator | None = None,
    max_pixels: int = DEFAULT_MAX_PIXELS,
) -> list[Image.Image]:
    """Decode some frames of a video to RGB, upright as its rotation says and with square pixels.

    The time from the first frame to the end of the last one is cut into ``num_frames`` equal segments. Of each segment
    the frame in the middle is taken or, with a generator, the frame at a random time. If a video has fewer frames, some
    are taken more than once. Times are those of the frames, whatever the header says of rate, duration and number. If
    the times in a file cannot be right, its frames are taken to be evenly spaced. The last frame is taken to last as
    long as the others on average.

    All packets are read, since the index of a file holds the times of decoding, not those of showing. Reading took an
    eighth of the time for 5 frames of 300 (H.264, 640 x 368, on one core). Only packets from the nearest keyframe
    before each picked frame are decoded. Only the picked frames are kept. A URL is never fetched.

    Pixels that are not square are stretched along one side, so that no pixel is lost. 10 and 12 bits become 8. Videos
    with a high dynamic range in HLG are taken as they are, as HLG also suits usual screens. Those in PQ are refused, as
    their levels mean another brightness.

    Args:
        source: a path, or the bytes of a file.
        num_frames: how many frames, at least 1.
        generator: draws the times, as for training.
        max_pixels: as for ``load_image``: larger frames are refused.

    Raises:
        VideoError: the file is missing, of an unknown format, damaged before a picked frame, in PQ, without a video or
            without frames. A file that was cut short counts as damaged if its format shows it (MP4, MOV, Matroska,
            WebM, AVI, FLV). In other formats, which include endless streams, the video is what is there.
        ImageError: a frame is too large, or has no defined RGB value.
        ModuleNotFoundError: PyAV is not installed.
        ValueError, TypeError: ``num_frames`` is below 1, or ``source`` is of another type.
    """
    if num_frames < 1:
        raise ValueError(f"num_frames must be at least 1, got {num_frames}")
    name = _name(source)
    if not isinstance(source, bytes) and (kind := not_a_file(source)):
        raise VideoError(f"{name}: cannot be decoded: it is {kind}, not a video file")
    try:
        with io.BytesIO(source) if isinstance(source, bytes) else Path(source).open("rb") as file:
            return _Video(file, name, max_pixels).sample(num_frames, generator)
    except OSError as error:
        raise VideoError(f"{name}: {'no such file' if isinstance(error, FileNotFoundError) else error}") from error


def _name(source: VideoSource) -> str:
    if isinstance(source, bytes):
        return f"video of {len(source)} bytes"
    if not isinstance(source, str | os.PathLike):
        raise TypeError(f"a video must be a path or bytes, got {type(source).__name__}")
    name = os.fspath(source)
    if "://" in name:
        raise VideoError(f"{name}: a URL is never fetched; download the video and pass its path or bytes")
    return name


def _pyav() -> Any:
    try:
        import av
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "decoding a video needs PyAV; install it with pip install 'lynx-kernels[video]'", name="av"
        ) from error
    return av


class _Video:
    """An open file, and of its packets, in the order of decoding, ``times`` (valid if ``timed``) and ``keys``."""

    def __init__(self, file: BinaryIO, name: str, max_pixels: int):
        self.av = _pyav()
        self.file, self.name, self.max_pixels = file, name, max_pixels
        self.times: list[int] = []
        self.seeks: list[int] = []  # when each is decoded; formats without an index seek by it
        self.keys: list[int] = []  # places in ``times``
        hidden = set()  # packets that are decoded but not shown, before the start of an edited video
        cut = False
        with self._open() as (container, stream):
            for packet in container.demux(stream):
                if not packet.size:  # the last one of demux
                    continue
                cut = packet.is_corrupt
                if packet.is_keyframe:
                    self.keys.append(len(self.times))
                if packet.is_discard:
                    hidden.add(len(self.times))
                self.times.append(packet.pts)
                self.seeks.append(packet.pts if packet.dts is None else packet.dts)
            if cut:  # an earlier corrupt packet is an error only if it is needed
                raise VideoError(f"{name}: cut short in packet {len(self.times)} of the video")
            reorders = container.format.name == "avi" and stream.codec_context.has_b_frames
            if container.format.name.startswith("mov") and len(self.times) < len(stream.index_entries):
                raise VideoError(
                    f"{name}: cut short, it has {len(self.times)} of {len(stream.index_entries)} packets of the video"
                )
            self.pixel_ratio = stream.sample_aspect_ratio or 1  # of a pixel's width to its height
        if (missing := _missing_bytes(file)) > 0:
            raise VideoError(f"{name}: cut short, its last {missing} bytes are missing")
        self.shown = [time for place, time in enumerate(self.times) if place not in hidden]
        known = [time for time in self.times if time is not None]
        self.timed = len(set(known)) == len(self.times)
        # AVI numbers packets in their order. If the decoder reorders them, these are not the times of showing.
        if reorders and known == sorted(known):
            self.timed = False

    def sample(self, num_frames: int, generator: np.random.Generator | None) -> list[Image.Image]:
        if not self.shown:
            raise VideoError(f"{self.name}: the video has no frames")
        if self.timed:
            picked = _pick(sorted(self.shown), num_frames, generator)
            for seek in (True, False):  # in some files a seek lands behind the frame that was asked for
                found = self._decode(picked, seek)
                if len(found) == len(set(picked)):
                    return [found[time] for time in picked]
        return self._sample_in_order(num_frames, generator)

    def _decode(self, picked: list[int], seek: bool) -> dict[int, Image.Image]:
        """The images shown at these ascending times; times at which no frame is found are left out."""
        found: dict[int, Image.Image] = {}
        with self._open() as (container, stream):
            place, frames, shown, coming = 0, None, None, None
            for time in picked:
                if time in found:
                    continue
                start = self._start(time) if seek else 0
                if frames is None or start > place:
                    place, shown, coming = start, None, None
                    frames = self._frames(container, stream, start)
                while shown is None or shown.pts < time:
                    if coming is None:
                        place, coming = next(frames, (place, None))
                    if coming is None or coming.pts > time:
                        break
                    shown, coming = coming, None
                if shown is None:
                    break
                found[time] = self._image(shown)
        return found

    def _start(self, time: int) -> int:
        """Where decoding must start for the frame of this time: at the last keyframe that is not shown after it.

        A frame that is decoded after a keyframe but shown before it may need the keyframe before.
        """
        return max((place for place in self.keys if self.times[place] <= time), default=0)

    def _frames(self, container: Any, stream: Any, start: int) -> Iterator[tuple[int, Any]]:
        """Each frame from packet ``start`` on, with the number of packets decoded so far.

        Raises VideoError for a damaged frame, since later frames build on it.
        """
        place = start
        if start:
            container.seek(self.seeks[start], stream=stream)
        for packet in container.demux(stream):
            if place == start and start and packet.pts != self.times[start]:
                continue  # a seek may land before what it was asked for
            place += bool(packet.size)
            for frame in packet.decode():
                if frame.is_corrupt:
                    raise VideoError(
                        f"{self.name}: damaged, the frame at {float(frame.time or 0):.3f} s cannot be decoded"
                    )
                yield place, frame

    def _sample_in_order(self, num_frames: int, generator: np.random.Generator | None) -> list[Image.Image]:
        with self._open() as (container, stream):
            times = [frame.pts for frame in container.decode(stream)]
        if not times:
            raise VideoError(f"{self.name}: no frame of the video can be decoded")
        if None in times or any(after <= before for before, after in pairwise(times)):
            times = list(range(len(times)))
        picked = _pick(times, num_frames, generator)
        found = {}
        with self._open() as (container, stream):
            for time, (_, frame) in zip(times, self._frames(container, stream, 0), strict=False):
                if time in picked:
                    found[time] = self._image(frame)
                if time == picked[-1]:
                    break
        return [found[time] for time in picked]

    @contextmanager
    def _open(self) -> Iterator[tuple[Any, Any]]:
        self.file.seek(0)
        options = {"format_whitelist": ",".join(_FORMATS), "protocol_whitelist": "none"}
        try:
            container = self.av.open(self.file, options=options)
        except (self.av.FFmpegError, OSError) as error:  # an empty file is an OSError
            reason = error.strerror or error
            raise VideoError(f"{self.name}: not a video of a known format, or empty, or cut short: {reason}") from error
        try:
            with container:
                stream = container.streams.best("video")
                if not container.streams:
                    raise VideoError(f"{self.name}: cut short, or empty")
                if stream is None or stream.disposition & self.av.stream.Disposition.attached_pic:
                    raise VideoError(f"{self.name}: the file has no video; it may have been cut short")
                if stream.codec_context is None:
                    raise VideoError(f"{self.name}: PyAV does not know its codec; convert the video to another one")
                if stream.codec_context.width:  # otherwise the first frame tells
                    check_size(stream.codec_context.width, stream.codec_context.height, self.name, self.max_pixels)
                if stream.codec_context.color_trc == _PQ:
                    raise VideoError(
                        f"{self.name}: the video has a high dynamic range (PQ), which needs tone mapping; convert it "
                        "to a standard range"
                    )
                stream.codec_context.thread_count = 1  # a loader has a core; threads would run ahead of a seek
                # So no memory is taken for a frame much larger than those before. Codecs need some around each frame.
                most = min(2 * self.max_pixels + 2**16, 2**31 - 1)
                stream.codec_context.options = {"max_pixels": str(most)}
                yield container, stream
        except self.av.FFmpegError as error:
            reason = f"cannot be decoded: {error.strerror or error}"
            if isinstance(error, self.av.ArgumentError):  # one of its causes is max_pixels
                reason += f"; a frame may have more pixels than the limit of {self.max_pixels}"
            raise VideoError(f"{self.name}: {reason}") from error

    def _image(self, frame: Any) -> Image.Image:
        check_size(frame.width, frame.height, self.name, self.max_pixels)
        has_alpha = any(component.is_alpha for component in frame.format.components) or frame.format.has_palette
        # A converter with threads may be freed in a forked loader, which then waits for them for ever.
        image = Image.fromarray(frame.to_ndarray(format="rgba" if has_alpha else "rgb24", threads=1))
        if self.pixel_ratio != 1:
            width = round(image.width * max(1, self.pixel_ratio))
            height = round(image.height / min(1, self.pixel_ratio))
            check_size(width, height, self.name, self.max_pixels)
            image = image.resize((width, height), Image.Resampling.BICUBIC)
        turn = _turn(frame)
        return to_rgb(image if turn is None else image.transpose(turn), self.name, self.max_pixels)


def _missing_bytes(file: BinaryIO) -> int:
    """How many bytes of its segment a Matroska or WebM file lacks; at most 0 if none, or for other files."""
    start = 0
    for identifier in (_EBML, _SEGMENT):
        file.seek(start)
        element = file.read(12)  # its identifier, then its size in 1 to 8 bytes; the first of them says how many
        if len(element) < 12 or not element.startswith(identifier):
            return 0
        length = 9 - element[4].bit_length()
        mask = (1 << 7 * length) - 1
        size = int.from_bytes(element[4 : 4 + length]) & mask
        start += 4 + length + size
    return 0 if size == mask else start - file.seek(0, io.SEEK_END)  # all ones: a stream of unknown size


def _pick(times: list[int], num_frames: int, generator: np.random.Generator | None) -> list[int]:
    """The start times of the frames to take, ascending, of the ascending start times of all frames."""
    span = times[-1] - times[0]
    length = span + Fraction(span, max(1, len(times) - 1))
    places = [
        number + (Fraction(1, 2) if generator is None else Fraction(generator.random())) for number in range(num_frames)
    ]
    return [times[bisect_right(times, times[0] + place * length / num_frames) - 1] for place in places]


def _turn(frame: Any) -> Image.Transpose | None:
    """What turns a frame upright as its display matrix says, to the nearest right angle."""
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return None
    # The matrix shows a pixel (x, y) at (a x + c y, b x + d y).
    a, b, _, c, d = np.frombuffer(bytes(matrix), np.int32)[:5].tolist()
    swap = abs(b) + abs(c) > abs(a) + abs(d)
    return _UPRIGHT.get((swap, (c if swap else a) < 0, (b if swap else d) < 0))
