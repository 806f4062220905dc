"""Records in the rows of a data set of the ``datasets`` library, or of anything else with rows."""

import zlib
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from lynx.data.media_folder import MediaFolder
from lynx.data.parquet import ParquetRows
from lynx.data.records import Record, RecordError
from lynx.data.shapes import FIELDS, RecordReader

_SAMPLED = 64  # rows that a fingerprint reads


class ColumnRecords:
    """The rows of a data set as records, a ``RecordSource``.

    Rows of the library are read as they are stored: images, in lists too, stay encoded until a worker decodes them. A
    transform that was set on the data set is applied all the same. Labels of ``datasets.ClassLabel`` become their
    names.

    Args:
        dataset: a ``datasets.Dataset``, or anything with a length whose ``dataset[index]`` is a row, a dict.
        columns: for each field of a record (``image``, ``question``, ``answer``, ``messages``, ...) the column that
            holds it; None where the columns have the names of the fields.
        root: the folder that the paths of media are relative to and may not leave; None refuses paths.
        task: the name of the prompts that put its questions; None leaves them as they are.
        check: decode all images, and a frame of every video, when their record is read.
        name: what to call the data set where a record is named.

    Raises:
        ValueError: a field or a column is unknown, no column is a field, or the data set is empty.
        TypeError: the data set has no length, as a stream of ``datasets``, or it holds several splits.
    """

    def __init__(
        self,
        dataset: Any,
        columns: Mapping[str, str] | None = None,
        root: str | Path | None = None,
        *,
        task: str | None = None,
        check: bool = False,
        name: str = "rows",
    ):
        if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
            raise TypeError(
                f"{name}: records are drawn in any order, which a {type(dataset).__name__} does not allow; load the "
                "data set without streaming"
            )
        if len(dataset) == 0:
            raise ValueError(f"{name}: the data set is empty")
        if isinstance(dataset, Mapping):
            raise TypeError(
                f"{name}: this holds the splits {sorted(dataset)}; name one of them, the folder inside if it is saved"
            )
        known = list(getattr(dataset, "column_names", None) or dataset[0])
        self.columns = dict(columns) if columns is not None else {each: each for each in FIELDS if each in known}
        if unknown := sorted(self.columns.keys() - set(FIELDS)):
            raise ValueError(f"{name}: columns: records have no field {unknown}; the fields are {list(FIELDS)}")
        if missing := sorted(set(self.columns.values()) - set(known)):
            raise ValueError(f"{name}: columns: the data set has no column {missing}; it has {known}")
        if not self.columns:
            raise ValueError(
                f"{name}: none of the columns {known} has the name of a field, {list(FIELDS)}; say with columns which "
                "column holds which field"
            )
        self._features = getattr(dataset, "features", None) or {}
        self._is_stored = hasattr(dataset, "with_format") and dataset.format["type"] != "custom"  # which is a transform
        if self._is_stored or isinstance(dataset, ParquetRows):
            dataset = dataset.select_columns(list(dict.fromkeys(self.columns.values())))
        if self._is_stored:
            dataset = dataset.with_format("arrow")
        self.dataset, self.task, self.name = dataset, task, name
        self._reader = RecordReader(MediaFolder(root, check=check), task)

    @classmethod
    def from_disk(cls, folder: str | Path, **options: Any) -> "ColumnRecords":
        """The rows of a folder that ``datasets.Dataset.save_to_disk`` wrote; options as above.

        Raises:
            ModuleNotFoundError: the ``datasets`` library is not installed.
        """
        try:
            import datasets
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"{folder}: reading it needs the datasets library: pip install datasets", name="datasets"
            ) from error
        return cls(datasets.load_from_disk(str(folder)), **{"name": str(folder), **options})

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Record:
        """One record.

        Raises:
            RecordError: it cannot be used.
            IndexError: there is no row of this number.
        """
        row = self._row(index)
        if not isinstance(row, Mapping):
            raise RecordError(f"the row must be a dict, got {type(row).__name__}")
        fields = {field: self._value(column, row.get(column)) for field, column in self.columns.items()}
        return self._reader.read(
            {field: value for field, value in fields.items() if value is not None}, lambda: self.where(index)
        )

    @cached_property
    def fingerprint(self) -> str | None:
        """Tells rows of the library from others, by the columns, the bytes that all rows take, and some of the rows.

        To read all images would take as long as an epoch. So one row of many that changes and keeps its length is
        likely to be missed. None where the rows are not read as the library stores them.
        """
        if isinstance(self.dataset, ParquetRows):
            return f"{self.dataset.fingerprint}-{zlib.crc32(repr(sorted(self.columns.items())).encode()):08x}"
        if not self._is_stored:
            return None
        size = len(self)
        rows = [self._row(number * size // min(size, _SAMPLED)) for number in range(min(size, _SAMPLED))]
        return f"{zlib.crc32(repr((self._features, self.dataset.data.nbytes, rows)).encode(errors='replace')):08x}"

    def _row(self, index: int) -> Any:
        row = self.dataset[index]
        return row.to_pylist()[0] if self._is_stored else row  # an Arrow table of one row

    def _value(self, column: str, value: Any) -> Any:
        name_of = getattr(self._features.get(column), "int2str", None)
        return name_of(value) if name_of is not None and isinstance(value, int) and value >= 0 else value

    def where(self, index: int) -> str:
        """The data set and row of a record."""
        return f"{self.name}[{index}]"
