"""Records in a tar file, as WebDataset has them: members that follow each other and differ in their suffix are one.

``cat.jpg`` with ``cat.json`` or ``cat.txt``: an image, or a video, with a record about it or a caption. The tar file is
never unpacked. Its records see their own members, and no file outside of it.
"""

import os
import tarfile
import zlib
from array import array
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from lynx.data.media_folder import MediaFolder
from lynx.data.records import Record, RecordError, check_length, parse_line
from lynx.data.shapes import RecordReader, has_media, shape_of
from lynx.media.images import is_image_file
from lynx.media.regular import refuse_other_than_file
from lynx.media.videos import is_video_file

_MOST = 2**29  # bytes of a member
_SAMPLED = 64  # records whose bytes are in a fingerprint
_LINK, _SPARSE = -1, -2  # in place of a size: what has no bytes of its own, or not in one piece
_TEXTS = ("txt", "text", "caption")


class TarRecords:
    """The records of a tar file, a ``RecordSource``. Only the places of its members are in memory.

    A record's own images go before the members: it may name them by path in its JSON, which is looked up among the
    members of the record. A JSON file that is no record, such as what ``img2dataset`` keeps of a download, is passed
    over where there is a text.

    Args:
        path: the tar file, without compression, which must not change while it is used.
        task: the name of the prompts that put its questions; None leaves them as they are.
        check: decode all images, and a frame of every video, when their record is read.

    Attributes:
        fingerprint: tells its content from other content, by names and sizes, and the bytes of some records.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no tar file, is cut short or has no members; or is no regular file.
    """

    def __init__(self, path: str | Path, *, task: str | None = None, check: bool = False):
        self.path, self.task, self._check = Path(path), task, check
        refuse_other_than_file(self.path)
        self._reader = RecordReader(MediaFolder(None, check=check), task)
        self._file: int | None = None
        self._suffixes: list[str] = []
        self._index()
        if len(self) == 0:
            raise ValueError(f"{path} is empty")
        self.fingerprint = self._fingerprint()

    def _index(self) -> None:
        known: dict[str, int] = {}
        starts, sizes, suffixes, firsts, keys = array("q"), array("q"), array("H"), array("q"), []
        end, last, checksum = self.path.stat().st_size, None, 0
        try:
            with (
                tarfile.open(self.path, "r:") as tar,
                tqdm(total=end, desc=f"members of {self.path.name}", unit="B", unit_scale=True, delay=2) as bar,
            ):
                for member in tar:
                    tar.members = []  # type: ignore[attr-defined]  # or it keeps them all
                    bar.update(member.offset_data + member.size - bar.n)
                    folder, _, base = member.name.rpartition("/")
                    if member.isdir() or base.startswith("."):
                        continue
                    if member.offset_data + member.size > end:
                        raise ValueError(f"{self.path}: cut short in {member.name}")
                    stem, _, suffix = base.partition(".")
                    key = f"{folder}/{stem}" if folder else stem
                    if key != last:
                        last = key
                        firsts.append(len(starts))
                        keys.append(key)
                    starts.append(member.offset_data)
                    sizes.append(_LINK if not member.isreg() else _SPARSE if member.issparse() else member.size)
                    suffixes.append(known.setdefault(suffix, len(known)))
                    checksum = zlib.crc32(f"{member.name} {member.size}\n".encode(errors="replace"), checksum)
        except tarfile.TarError as error:
            raise ValueError(f"{self.path}: not a tar file, or cut short: {error}") from error
        firsts.append(len(starts))
        self._starts, self._sizes, self._firsts = (np.array(each, np.int64) for each in (starts, sizes, firsts))
        self._of_suffix, self._suffixes, self._checksum = np.array(suffixes), list(known), checksum
        self._keys, self._key_ends = "".join(keys), np.cumsum([0, *map(len, keys)])

    def _fingerprint(self) -> str:
        checksum = self._checksum
        for number in range(min(len(self), _SAMPLED)):
            for member in range(*self._members(number * len(self) // min(len(self), _SAMPLED))):
                if self._sizes[member] >= 0:
                    checksum = zlib.crc32(self._bytes(member), checksum)
        return f"{len(self):x}-{checksum:08x}"

    def __len__(self) -> int:
        return len(self._firsts) - 1

    def __getitem__(self, index: int) -> Record:
        """One record.

        Raises:
            RecordError: it cannot be used.
            IndexError: there is no record of this number.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"{self.path} has {len(self)} records, so the last number is {len(self) - 1}, not {index}")
        key, found = self._key(index), {}
        for member in range(*self._members(index)):
            suffix = self._suffixes[self._of_suffix[member]]
            name = f"{key}.{suffix}" if suffix else key
            if name in found:
                raise RecordError(f"it has two members of the name {name}")
            found[name] = self._bytes(member)
        return self._reader.read(_record(key, found), lambda: self.where(index), _Members(found, check=self._check))

    def where(self, index: int) -> str:
        """The tar file, and the name of the members without their suffix."""
        return f"{self.path}[{self._key(index)}]"

    def _key(self, index: int) -> str:
        return self._keys[self._key_ends[index] : self._key_ends[index + 1]]

    def _members(self, index: int) -> tuple[int, int]:
        return int(self._firsts[index]), int(self._firsts[index + 1])

    def _bytes(self, member: int) -> bytes:
        size = int(self._sizes[member])
        if size < 0:
            raise RecordError(f"a member is {'sparse' if size == _SPARSE else 'a link'}, which is not followed")
        check_length(size, _MOST)
        if self._file is None:
            self._file = os.open(self.path, os.O_RDONLY)
        return os.pread(self._file, size, int(self._starts[member]))  # forked workers share the file's position

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None}  # another process opens the file for itself

    def __del__(self) -> None:
        if getattr(self, "_file", None) is not None:
            os.close(self._file)  # type: ignore[arg-type]


def _record(key: str, members: dict[str, bytes]) -> dict[str, Any]:
    """The record that members make: what its JSON says, or a text as a caption; with its images and videos."""
    by_suffix = {name.removeprefix(key).removeprefix("."): data for name, data in members.items()}
    record = parse_line(by_suffix["json"]) if "json" in by_suffix else {}
    media: dict[str, Any] = {}
    if not has_media(record):  # a suffix of two parts, such as in a.mask.png, says that it is another kind of image
        plain = {f"a.{suffix}": data for suffix, data in by_suffix.items() if "." not in suffix}
        media["images"] = [data for name, data in plain.items() if is_image_file(name)] or None
        media["videos"] = [data for name, data in plain.items() if is_video_file(name)] or None
    text = next((by_suffix[suffix] for suffix in _TEXTS if suffix in by_suffix), None)
    if text is not None and not _says_more({**record, **media}):
        try:
            record = {"caption": text.decode("utf-8-sig").strip()}
        except UnicodeDecodeError as error:
            raise RecordError(f"the text of {key} is not UTF-8: {error}") from error
    return {**record, **media}


def _says_more(record: dict[str, Any]) -> bool:
    """Whether it is a record, and of more than a caption."""
    try:
        return shape_of(record).tasks is None
    except RecordError:
        return False


class _Members(MediaFolder):
    """The members of a record in place of a folder."""

    def __init__(self, members: dict[str, bytes], *, check: bool):
        super().__init__(None, check=check)
        self._members = members

    def resolve(self, path: Any, *, is_video: bool = False) -> bytes:
        """The bytes of a member by its name, with or without the folders before it; RecordError where there is none."""
        if not isinstance(path, str) or not path:
            raise RecordError(f"the path of an image or a video is {path!r}, expected text")
        for name, data in self._members.items():
            if name == path or name.rpartition("/")[2] == path.rpartition("/")[2]:
                return data
        raise RecordError(f"{path!r} is not among the members of the record: {', '.join(self._members)}")
