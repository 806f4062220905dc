"""Rows of Parquet files by number, for ``ColumnRecords``: such as data sets on the Hugging Face Hub are stored in."""

import json
import logging
import os
import zlib
from bisect import bisect_right
from itertools import accumulate
from pathlib import Path
from typing import Any

from lynx.media.regular import refuse_other_than_file

logger = logging.getLogger(__name__)

_SLOW, _MOST = 2**27, 2**31  # bytes of a row group: to read one row reads its row group
_SAMPLED, _SAMPLE = 64, 2**12  # pieces of the file that are in its fingerprint, and their bytes
_ADVICE = "write the file anew with smaller ones: pyarrow.parquet.write_table(table, path, row_group_size=100)"


class ParquetRows:
    """The rows of a Parquet file. The row group that was read last is kept; nothing else of the file is in memory.

    Args:
        path: the file, which must not change while it is used.
        columns: the columns to read; None reads all.

    Attributes:
        column_names: what the file has.
        features: of columns whose numbers stand for names (``datasets.ClassLabel``), what tells the names.
        fingerprint: tells the file from others, by its description of itself and by some of its bytes.

    Raises:
        ModuleNotFoundError: pyarrow is not installed.
        ValueError: it is no Parquet file, is damaged, or its row groups are too large to be read for a row.
    """

    def __init__(self, path: str | Path, columns: list[str] | None = None):
        self.path, self.columns = Path(path), columns
        refuse_other_than_file(self.path)
        self._open: tuple[int, Any] | None = None  # the process that has opened it, and the file
        self._group: tuple[int, Any] | None = None
        try:
            metadata = self._file().metadata
        except (OSError, ValueError) as error:  # pyarrow's ArrowInvalid is one
            raise ValueError(f"{path}: not a Parquet file, or damaged: {error}") from error
        schema = self._file().schema_arrow
        self.column_names: list[str] = schema.names
        self.features = _labels(schema.metadata or {})
        groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
        self._ends = list(accumulate(group.num_rows for group in groups))
        largest = max((group.total_byte_size for group in groups), default=0)
        if largest > _MOST:
            raise ValueError(f"{path}: to read a row would read its row group of {largest >> 20} MiB; {_ADVICE}")
        if largest > _SLOW:
            logger.warning(
                "%s: to read a row reads its row group of %d MiB, which is slow; %s", path, largest >> 20, _ADVICE
            )
        self.fingerprint = _fingerprint(self.path)

    def select_columns(self, columns: list[str]) -> "ParquetRows":
        """These rows with some of the columns."""
        return ParquetRows(self.path, columns)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"{self.path} has {len(self)} rows, so the last number is {len(self) - 1}, not {index}")
        number = bisect_right(self._ends, index)
        if self._group is None or self._group[0] != number:
            self._group = None  # its memory is free before the next one is read
            self._group = number, self._file().read_row_group(number, columns=self.columns, use_threads=False)
        start = self._ends[number - 1] if number else 0
        return self._group[1].slice(index - start, 1).to_pylist()[0]

    def _file(self) -> Any:
        if self._open is None or self._open[0] != os.getpid():  # a forked worker opens the file for itself
            self._open = os.getpid(), _pyarrow().ParquetFile(self.path, pre_buffer=False)
        return self._open[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": None, "_group": None}


class _Label:
    """The names that the numbers of a column stand for."""

    def __init__(self, names: list[str]):
        self.names = names

    def int2str(self, number: int) -> str:
        return self.names[number]

    def __repr__(self) -> str:
        return f"labels {self.names}"


def _pyarrow() -> Any:
    try:
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "reading Parquet files needs pyarrow; install it with pip install 'lynx-kernels[parquet]'", name="pyarrow"
        ) from error
    return pyarrow.parquet


def _labels(metadata: dict[bytes, bytes]) -> dict[str, _Label]:
    """What the ``datasets`` library has written beside its tables."""
    try:
        features = json.loads(metadata.get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    except ValueError:
        return {}
    return {
        name: _Label(each["names"])
        for name, each in features.items()
        if isinstance(each, dict) and each.get("_type") == "ClassLabel" and isinstance(each.get("names"), list)
    }


def _fingerprint(path: Path) -> str:
    """All bytes would take as long as an epoch. The last of the pieces holds the file's description of itself."""
    size = path.stat().st_size
    checksum = 0
    with path.open("rb") as file:
        file.seek(max(0, size - 8))
        end = 8 + int.from_bytes(file.read(4), "little")
        for number in range(_SAMPLED):
            file.seek(number * size // _SAMPLED)
            checksum = zlib.crc32(file.read(_SAMPLE), checksum)
        file.seek(max(0, size - end))
        checksum = zlib.crc32(file.read(), checksum)
    return f"{size:x}-{checksum:08x}"
