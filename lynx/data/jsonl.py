"""Records in a JSONL file, one a line, in the formats of ``lynx.data.records``, each read when it is wanted.

A record's ``type`` names the group its answers are counted in; any other field is kept and ignored.
"""

import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from lynx.data.records import MediaFolder, Record, check_length, parse, parse_line
from lynx.media.regular import refuse_other_than_file

_CHUNK = 2**24  # bytes searched for line ends at once


class JsonlRecords:
    """The records of a JSONL file of any size, a ``RecordSource``. Only the places of its lines are in memory.

    Args:
        path: the JSONL file, which must not change while it is used.
        root: the folder that the paths of media are relative to and may not leave; the file's own by default.
        task: the name of the prompts that put its questions; None leaves them as they are.

    Attributes:
        fingerprint: tells the file's content from other content, wherever it lies; the images that it names are not in
            it. All bytes are in it: they are read for the lines' places anyway, and a checksum adds little to that.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it has no lines, or is no regular file but a folder, a pipe or a device.
    """

    def __init__(self, path: str | Path, root: str | Path | None = None, *, task: str | None = None):
        self.path = Path(path)
        self.task = task
        self._folder = MediaFolder(root if root is not None else self.path.parent)
        self._starts, self.fingerprint = _scanned(self.path)
        if len(self._starts) < 2:
            raise ValueError(f"{self.path} is empty")
        self._file: int | None = None

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, index: int) -> Record:
        """One record.

        Raises:
            RecordError: it cannot be used.
            IndexError: there is no record of this number.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"{self.path} has {len(self)} records, so the last number is {len(self) - 1}, not {index}")
        if self._file is None:
            self._file = os.open(self.path, os.O_RDONLY)
        start, end = self._starts[index : index + 2].tolist()
        check_length(end - start)
        # Not seek and read: forked workers share the file's position.
        return parse(parse_line(os.pread(self._file, end - start, start)), self._folder, task=self.task)

    def where(self, index: int) -> str:
        """The file and line of a record."""
        return f"{self.path}:{index + 1}"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None}  # another process opens the file for itself

    def __del__(self) -> None:
        if getattr(self, "_file", None) is not None:
            os.close(self._file)  # type: ignore[arg-type]


def _scanned(path: Path) -> tuple[np.ndarray, str]:
    """(lines + 1,) int64: where every line starts, and the end of the file; and the fingerprint."""
    refuse_other_than_file(path)
    found, size, checksum = [np.zeros(1, np.int64)], path.stat().st_size, 0
    with (
        path.open("rb") as file,
        tqdm(total=size, desc=f"lines of {path.name}", unit="B", unit_scale=True, delay=2) as bar,
    ):
        while chunk := file.read(_CHUNK):
            found.append(np.flatnonzero(np.frombuffer(chunk, np.uint8) == ord("\n")) + (file.tell() - len(chunk) + 1))
            checksum = zlib.crc32(chunk, checksum)
            bar.update(len(chunk))
    starts = np.concatenate(found)
    return starts if starts[-1] == size else np.append(starts, size), f"{size:x}-{checksum:08x}"
