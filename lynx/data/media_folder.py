"""Where the images and videos of records are, and that no record names a file outside of that."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from PIL import Image

from lynx.data.records import RecordError, check_length
from lynx.media.images import ImageError, decode_base64, load_image
from lynx.media.videos import is_video_file, load_video

_MAX_STORED = 2**29  # bytes of a JSON file of frames that a record names
_ADDRESS = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*://")
_FILE = "file://"


class MediaFolder:
    """The folder that the paths of images and videos are relative to, and that they may not leave.

    Args:
        root: the folder. None where records hold their images themselves: every path is refused.
        check: decode every image, and a frame of every video, when it is first named.
    """

    def __init__(self, root: str | Path | None, *, check: bool = False):
        self._named = None if root is None else Path(root)
        self.root = None if root is None else Path(root).resolve()
        self._check, self._checked = check, set[tuple[str, bool]]()

    def source(
        self, value: Any, *, is_video: bool = False, is_path: bool = False
    ) -> str | bytes | Image.Image | list[Any]:
        """What ``load_image`` reads, or ``load_video``; of a list, the frames of a video.

        Args:
            value: a path, an address ``file://``, base64 or a data URL; bytes, a PIL image, or what tables hold: a dict
                with ``bytes`` or ``path``, or with ``url``.
            is_video: whether it is a video's.
            is_path: whether a text is a path or an address, and not bare base64.

        Raises:
            RecordError: it is none of these, or a file outside of the root, or an address on a network.
        """
        if is_video and isinstance(value, list):
            return [self.source(frame, is_path=is_path) for frame in value]
        found = self._found(value, is_video, is_path)
        if self._check and (isinstance(found, bytes | Image.Image) or (found, is_video) not in self._checked):
            _check(found, is_video)
            if isinstance(found, str):
                self._checked.add((found, is_video))
        return found

    def _found(self, value: Any, is_video: bool, is_path: bool) -> str | bytes | Image.Image:
        if isinstance(value, Mapping):
            value = value.get("bytes") or value.get("path") or value.get("url")
        if isinstance(value, bytes | Image.Image):
            return value
        if isinstance(value, str) and value.startswith(_FILE):
            value = unquote(value.removeprefix(_FILE))
        elif isinstance(value, str) and _ADDRESS.match(value):
            raise RecordError(
                f"the address {value[:100]} is never fetched: download what the records name, and give paths of files"
            )
        is_data_url = isinstance(value, str) and value.startswith("data:")
        may_be_data = isinstance(value, str) and not is_path and not is_video_file(value)
        data = decode_base64(value) if is_data_url or may_be_data else None
        if is_data_url:
            if data is None:
                raise RecordError(f"{value[:40]}... is not valid base64")
            return data
        try:
            return self.resolve(value, is_video=is_video)
        except RecordError:
            if data is None:  # else it is no name, such as "cat1", that might be base64, too
                raise
            return data

    def stored(self, path: str) -> Any:
        """What a JSON file holds: base64 of an image, or of the frames of a video."""
        try:
            found = self.resolve(path)
            if isinstance(found, str):
                check_length(Path(found).stat().st_size, _MAX_STORED)
            return json.loads(Path(found).read_bytes() if isinstance(found, str) else found)
        except (OSError, ValueError, RecursionError) as error:
            raise error if isinstance(error, RecordError) else RecordError(f"{path}: not JSON: {error}") from error

    def resolve(self, path: Any, *, is_video: bool = False) -> str | bytes:
        """The path of a file inside the root, links followed; absolute only if the root was named so.

        Raises:
            RecordError: it leaves the root, or is not a file.
        """
        kind = "video" if is_video else "image"
        if not isinstance(path, str) or not path:
            raise RecordError(f"the path of an image or a video is {path!r}, expected text")
        if self.root is None or self._named is None:
            raise RecordError(f"the path {path!r} needs a root folder that it is in; name one with root=FOLDER")
        try:
            resolved = (self.root / path).resolve()
            is_file = resolved.is_file()
        except (OSError, ValueError, RuntimeError) as error:  # too long a name, a NUL in it, links in a circle
            raise RecordError(f"the path {path!r} cannot be followed: {error}") from error
        if not resolved.is_relative_to(self.root):
            raise RecordError(f"the path {path!r} leaves the root folder {self._named}")
        inside = self._named / resolved.relative_to(self.root)  # as the root was named: reports then move with a run
        if not is_file:
            raise RecordError(f"no such {kind}: {inside}")
        return str(inside)


def _check(source: str | bytes | Image.Image, is_video: bool) -> None:
    try:
        if is_video and not isinstance(source, Image.Image):
            load_video(source, 1)
        else:
            load_image(source)
    except ImageError as error:
        raise RecordError(str(error)) from error
