"""What a source of records must give, and which source opens a path."""

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol, runtime_checkable

from lynx.data.columns import ColumnRecords
from lynx.data.jsonl import JsonlRecords
from lynx.data.records import Record


@runtime_checkable
class RecordSource(Protocol):
    """Records under the numbers from 0 to ``len(source) - 1``: a file, a folder, rows of a table.

    Training draws them in a random order, each many times, in several processes at once. So a source

    - gives the same record under the same number each time, and all records in any order;
    - knows its length without reading the records' media, and is not empty;
    - can be pickled, and survives a fork: a copy in another process opens its files for itself;
    - says of a bad record, when it is asked for, what is wrong with it. The record is then skipped and the run goes on.
      What makes all records unusable is an error when the source is made.

    ``lynx.data.records.parse`` makes a ``Record`` of a mapping in any of the known formats.
    """

    @property
    def task(self) -> str | None:
        """The name of the prompts that put the questions of its records; None leaves them as they are."""

    @property
    def fingerprint(self) -> str | None:
        """Tells the content of this source from other content, wherever it lies. None where nothing can.

        A checkpoint remembers it, and a run does not go on with other data.
        """

    def __len__(self) -> int:
        """How many records there are, the bad ones included."""

    def __getitem__(self, index: int) -> Record:
        """One record.

        Raises:
            RecordError: it cannot be used; the message says why. (``ValueError`` and ``OSError`` do, too.)
            IndexError: there is no record of this number.
        """

    def where(self, index: int) -> str:
        """Where a person finds this record, such as the file and the line."""


def open_source(
    path: Path, *, root: Path | None = None, task: str | None = None, columns: Mapping[str, str] | None = None
) -> RecordSource:
    """The source that reads a path: a JSONL file, or a folder that ``datasets.Dataset.save_to_disk`` wrote.

    Args:
        path: the file or folder.
        root: the folder that the paths of media are relative to and may not leave. By default that of a JSONL file; of
            a saved data set None, which refuses paths.
        task: the name of the prompts that put its questions.
        columns: of a saved data set, for each field of a record the column that holds it.

    Raises:
        ValueError: ``columns`` are given for a file, or the source is empty.
        OSError: there is no such file or folder.
        ModuleNotFoundError: the ``datasets`` library is needed, and is not installed.
    """
    if path.is_dir():
        return ColumnRecords.from_disk(path, columns=columns, root=root, task=task)
    if columns is not None:
        raise ValueError(f"columns are for a folder that the datasets library saved, and {path} is not a folder")
    return JsonlRecords(path, root, task=task)
