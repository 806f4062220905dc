"""Records at known places of a file, each read when it is wanted: what JSONL files and JSON lists have in common."""

import os
from pathlib import Path
from typing import Any

import numpy as np

from lynx.data.media_folder import MediaFolder
from lynx.data.records import Record, check_length, parse_line
from lynx.data.shapes import RecordReader


class FileRecords:
    """JSON objects that follow each other in a file of any size; a ``RecordSource`` once it has ``where``.

    Only the places are in memory. The file must not change while it is used.

    Args:
        path: the file.
        root: the folder that the paths of media are relative to and may not leave; the file's own by default.
        task: the name of the prompts that put its questions; None leaves them as they are.
        check: decode all images, and a frame of every video, when their record is read.
        starts: (records + 1,) int64, where each begins, and as if another one came last.
        between: bytes at the end of each that are not its own.
        fingerprint: tells the file's content from other content, wherever it lies; the images that it names are not in
            it.

    Raises:
        ValueError: there are no records.
    """

    def __init__(
        self,
        path: Path,
        root: str | Path | None,
        *,
        task: str | None,
        check: bool,
        starts: np.ndarray,
        between: int,
        fingerprint: str,
    ):
        if len(starts) < 2:
            raise ValueError(f"{path} is empty")
        self.path, self.task, self.fingerprint = path, task, fingerprint
        self._starts, self._between = starts, between
        self._reader = RecordReader(MediaFolder(path.parent if root is None else root, check=check), task)
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
        size = end - start - self._between
        check_length(size)
        # Not seek and read: forked workers share the file's position.
        return self._reader.read(parse_line(os.pread(self._file, size, start)), lambda: self.where(index))

    def where(self, index: int) -> str:
        """Where a person finds this record."""
        raise NotImplementedError

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None}  # another process opens the file for itself

    def __del__(self) -> None:
        if getattr(self, "_file", None) is not None:
            os.close(self._file)  # type: ignore[arg-type]
