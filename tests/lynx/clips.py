"""Small video files whose frames tell which they are."""

from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

_EXACT = {"qmin": "1", "qmax": "1"}  # as exact as it can be
LEVELS = 5  # grey levels from one frame to the next: enough to survive any codec


def frame(number: int, height: int = 48, width: int = 64) -> np.ndarray:
    return np.full((height, width, 3), number * LEVELS, np.uint8)


def write_clip(
    path: Path,
    frames: list[np.ndarray],
    codec: str = "mpeg4",
    *,
    times: list[int] | None = None,
    rate: int = 25,
    pixels: str = "yuv420p",
    source: str = "rgb24",
    options: dict[str, str] | None = None,
    context: dict[str, Any] | None = None,
) -> Path:
    """Encode frames, a keyframe every 8; ``times`` are theirs in units of 1/rate s, by default 0, 1, 2, ...;
    ``options`` are the codec's own, ``context`` what it has in common with others."""
    with av.open(path, "w", container_options={"movflags": "faststart"} if path.suffix == ".mp4" else {}) as container:
        exact = _EXACT if codec == "mpeg4" else {}
        stream = container.add_stream(codec, rate=rate, options={**exact, **(options or {})})
        stream.height, stream.width, stream.pix_fmt = *frames[0].shape[:2], pixels
        stream.codec_context.gop_size = 8
        stream.codec_context.time_base = Fraction(1, rate)
        for name, value in (context or {}).items():
            setattr(stream.codec_context, name, value)
        for number, pixels_of in enumerate(frames):
            video_frame = av.VideoFrame.from_ndarray(pixels_of, format=source)
            video_frame.pts = number if times is None else times[number]
            video_frame.time_base = Fraction(1, rate)
            container.mux(stream.encode(video_frame))
        container.mux(stream.encode())
    return path


def numbers(images) -> list[int]:
    """Which frames these are."""
    return [round(np.asarray(image).mean() / LEVELS) for image in images]


def packets(path: Path) -> list[tuple[int, int, bool]]:
    """(place in the file, size, whether it is a keyframe) of the video's packets."""
    with av.open(path) as container:
        return [(each.pos, each.size, each.is_keyframe) for each in container.demux(video=0) if each.size]
