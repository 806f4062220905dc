"""Records in the rows of a data set of the ``datasets`` library, or of anything else with rows."""

import logging
from collections.abc import Mapping
from dataclasses import is_dataclass, replace
from pathlib import Path
from typing import Any

from lynx.data.records import MediaFolder, Record, RecordError, parse

logger = logging.getLogger(__name__)

_FIELDS = ("messages", "media", "branches", "image", "video", "question", "answer", "questions", "task")


class ColumnRecords:
    """The rows of a data set as records.

    Pictures stay encoded until a worker decodes them; labels of ``datasets.ClassLabel`` become their names.

    Args:
        dataset: a ``datasets.Dataset``, or anything with a length whose ``dataset[index]`` is a row, a dict.
        columns: for each field of a record (``image``, ``question``, ``answer``, ``messages``, ...) the column that
            holds it; None where the columns bear the fields' names.
        root: the folder that the paths of media are relative to and may not leave; None refuses paths.
        task: the name of the prompts that put its questions; None leaves them as they are.
        name: what to call the data set where a record is named.

    Raises:
        ValueError: a field or a column is unknown, or the data set is empty.
        TypeError: the data set has no length: a stream of ``datasets`` cannot be drawn from in any order.
    """

    def __init__(
        self,
        dataset: Any,
        columns: Mapping[str, str] | None = None,
        root: str | Path | None = None,
        *,
        task: str | None = None,
        name: str = "rows",
    ):
        if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
            raise TypeError(
                f"{name}: a {type(dataset).__name__} cannot be drawn from in any order; load the data set without "
                "streaming"
            )
        if len(dataset) == 0:
            raise ValueError(f"{name}: the data set is empty")
        if isinstance(dataset, Mapping):
            raise TypeError(f"{name}: this holds splits {sorted(dataset)}; pass one of them")
        known = list(getattr(dataset, "column_names", None) or dataset[0])
        self.columns = dict(columns) if columns is not None else {each: each for each in _FIELDS if each in known}
        if unknown := sorted(self.columns.keys() - set(_FIELDS)):
            raise ValueError(f"{name}: records have no field {unknown}; there are {list(_FIELDS)}")
        if missing := sorted(set(self.columns.values()) - set(known)):
            raise ValueError(f"{name}: the data set has no column {missing}; there are {known}")
        self._features = getattr(dataset, "features", None) or {}
        for column in self.columns.values():
            feature = self._features.get(column)
            if is_dataclass(feature) and getattr(feature, "decode", False) is True:  # Image and Video
                dataset = dataset.cast_column(column, replace(feature, decode=False))  # type: ignore[type-var]
        self.dataset, self.task, self.name = dataset, task, name
        self._folder = MediaFolder(root)

    @classmethod
    def from_disk(cls, folder: str | Path, **options: Any) -> "ColumnRecords":
        """Of a folder that ``datasets.Dataset.save_to_disk`` wrote; options as above.

        Raises:
            ModuleNotFoundError: the ``datasets`` library is not installed.
        """
        try:
            import datasets
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(f"{folder}: reading it needs pip install datasets", name="datasets") from error
        return cls(datasets.load_from_disk(str(folder)), **{"name": str(folder), **options})

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Record:
        """One record.

        Raises:
            RecordError: it cannot be used.
        """
        row = self.dataset[index]
        if not isinstance(row, Mapping):
            raise RecordError(f"a row is a {type(row).__name__}, expected a dict")
        fields = {field: self._value(column, row.get(column)) for field, column in self.columns.items()}
        return parse(
            {field: value for field, value in fields.items() if value is not None}, self._folder, task=self.task
        )

    def _value(self, column: str, value: Any) -> Any:
        name_of = getattr(self._features.get(column), "int2str", None)
        return name_of(value) if name_of is not None and isinstance(value, int) and value >= 0 else value

    def where(self, index: int) -> str:
        """The data set and row of a record."""
        return f"{self.name}[{index}]"
