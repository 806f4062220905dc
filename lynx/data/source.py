"""What a source of records must give, and which source opens a path."""

import glob
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from lynx.data.columns import ColumnRecords
from lynx.data.json_list import JsonListRecords, holds_json_list
from lynx.data.jsonl import JsonlRecords
from lynx.data.parquet import ParquetRows
from lynx.data.records import Record
from lynx.data.shards import ShardedRecords
from lynx.data.tar import TarRecords
from lynx.media.images import is_image_file
from lynx.media.regular import refuse_other_than_file

_TRIED = 8  # records read when a source is opened: if none can be used, nobody has to wait for a run to find it out
_SAVED = ("dataset_info.json", "state.json", "dataset_dict.json")  # files of a folder that datasets saved
_SHARDS = (".parquet", ".tar")
_MARKS = {  # first bytes of files that are something else, and what to do with them
    b"\x1f\x8b": "compressed (gzip); unpack it: gunzip",
    b"\x28\xb5\x2f\xfd": "compressed (Zstandard); unpack it: unzstd",
    b"BZh": "compressed (bzip2); unpack it: bunzip2",
    b"\xfd7zXZ": "compressed (xz); unpack it: unxz",
    b"PK\x03\x04": "a ZIP archive; unpack it: unzip",
    b"ARROW1": "an Arrow file; name the folder that datasets.Dataset.save_to_disk wrote, or write a Parquet file",
    b"\xff\xfe": "in UTF-16; convert it: iconv -f UTF-16 -t UTF-8",
    b"\xfe\xff": "in UTF-16; convert it: iconv -f UTF-16 -t UTF-8",
}


@runtime_checkable
class RecordSource(Protocol):
    """Records under the numbers from 0 to ``len(source) - 1``: a file, a folder, rows of a table.

    Training draws them in a random order, each many times, in several processes at once. So a source

    - gives the same record under the same number each time, and all records in any order;
    - knows its length without reading the records' media, and is not empty;
    - can be pickled, and survives a fork: a copy in another process opens its files for itself;
    - says of a bad record, when it is asked for, what is wrong with it. The record is then skipped and the run goes on.
      What makes all records unusable is an error when the source is made.

    ``lynx.data.shapes.RecordReader`` makes a ``Record`` of a mapping in any of the known shapes.
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
    path: Path,
    *,
    root: Path | None = None,
    task: str | None = None,
    columns: Mapping[str, str] | None = None,
    check: bool = False,
) -> RecordSource:
    """The source that reads a path, by what is there; docs/data.md has a table of it.

    A file may hold a record a line, a list of records in JSON, the rows of a table in Parquet, or members in tar. A
    folder holds Parquet or tar files, the shards of one data set, or is what ``datasets.Dataset.save_to_disk`` wrote. A
    pattern, such as ``shards/train-*.tar``, names several files.

    Args:
        path: the file, folder or pattern.
        root: the folder that the paths of media are relative to and may not leave. By default that of the file; of a
            folder that ``datasets`` saved None, which refuses paths. Records in tar see their own members alone.
        task: the name of the prompts that put its questions.
        columns: of the rows of a table, for each field of a record the column that holds it.
        check: decode all images, and a frame of every video, when their record is read.

    Raises:
        ValueError: it is none of these, or empty; or of some records that were tried none can be used; or an argument
            does not go with it.
        OSError: there is no such file or folder.
        ModuleNotFoundError: pyarrow or the ``datasets`` library is needed, and is not installed.
    """

    def opened(file: Path) -> RecordSource:
        return _file(file, root=root, task=task, columns=columns, check=check)

    source: RecordSource
    if path.is_dir() and any((path / name).is_file() for name in _SAVED):
        source = ColumnRecords.from_disk(path, columns=columns, root=root, task=task, check=check)
    elif path.is_dir():
        source = _sharded(_shards_in(path), opened)
    elif glob.has_magic(path.name) and not path.exists():
        found = sorted(path.parent.glob(path.name))
        if not found:
            raise FileNotFoundError(f"{path}: no file matches this pattern")
        source = _sharded(found, opened)
    else:
        source = opened(path)
    _try_some(source, path)
    return source


def _sharded(files: Sequence[Path], opened: Callable[[Path], RecordSource]) -> RecordSource:
    return opened(files[0]) if len(files) == 1 else ShardedRecords([opened(file) for file in files])


def _file(path: Path, *, columns: Mapping[str, str] | None, **options: Any) -> RecordSource:
    """The source that reads a file, by its first bytes."""
    refuse_other_than_file(path)
    with path.open("rb") as file:
        start = file.read(512)
    if start.startswith(b"PAR1"):
        root = path.parent if options["root"] is None else options["root"]
        return ColumnRecords(ParquetRows(path), columns, name=str(path), **{**options, "root": root})
    if columns is not None:
        raise ValueError(
            f"columns are for the rows of a table, in Parquet or a folder that the datasets library saved, and {path} "
            "has none"
        )
    if start[257:262] == b"ustar" or path.suffix == ".tar":
        if options["root"] is not None:
            raise ValueError(f"{path}: records in a tar file see its members alone; leave out root")
        return TarRecords(path, task=options["task"], check=options["check"])
    for mark, what in _MARKS.items():
        if start.startswith(mark):
            raise ValueError(f"{path} is {what}")
    return (JsonListRecords if holds_json_list(path) else JsonlRecords)(path, **options)


def _shards_in(folder: Path) -> list[Path]:
    """The files of a folder that are the shards of one data set.

    Raises:
        ValueError: there are none, or of several; the message says what to name instead.
    """
    names = sorted(each.name for each in folder.iterdir() if not each.name.startswith("."))
    groups: dict[str, list[Path]] = {}
    for name in names:
        if name.endswith(_SHARDS) and (folder / name).is_file():
            # As the Hub names shards, after "of" stands what may be a hash; else what differs is numbers.
            pattern = re.sub(r"\d+-of-\d+.*(\.\w+)$", r"*\1", name)
            groups.setdefault(re.sub(r"\d+", "*", pattern), []).append(folder / name)
    if len(groups) == 1:
        return next(iter(groups.values()))
    if groups:
        patterns = ", ".join(str(folder / pattern) for pattern in groups)
        raise ValueError(f"{folder} holds files of {len(groups)} kinds; name one kind of them: {patterns}")
    files = [name for name in names if name.endswith((".jsonl", ".json", ".jsonl.gz", ".json.gz"))]
    if files:
        raise ValueError(f"{folder} is a folder; name the file in it that holds the records: {', '.join(files[:5])}")
    if images := sum(map(is_image_file, names)):
        raise ValueError(
            f"{folder} holds {images} images, and nothing that says what to learn of them; write a file with a line "
            'for each, such as {"image": "' + next(filter(is_image_file, names)) + '", "question": "What is this?", '
            '"answer": "A cat."}, and name that file'
        )
    raise ValueError(
        f"{folder} is a folder without data: no Parquet or tar files, and not one that datasets.Dataset.save_to_disk "
        f"wrote; name a file of records{_inner(folder)}"
    )


def _inner(folder: Path) -> str:
    folders = sorted(each.name for each in folder.iterdir() if each.is_dir() and not each.name.startswith("."))
    return f", or one of the folders in it: {', '.join(folders[:5])}" if folders else ""


def _try_some(source: RecordSource, path: Path) -> None:
    """Raise ValueError if of some records, from all over the source, none can be used."""
    first, size = None, len(source)
    tried = [number * size // min(size, _TRIED) for number in range(min(size, _TRIED))]
    for index in tried:
        try:
            source[index]
        except (ValueError, OSError) as error:
            first = first or f"{source.where(index)}: {error}"
        else:
            return
    some = f"its {size} records" if len(tried) == size else f"{len(tried)} records from all over it"
    raise ValueError(f"{path}: none of {some} can be used; the first one: {first}")
