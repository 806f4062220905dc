"""Records in a JSON file that holds a list of them, or a mapping with such a list, each read when it is wanted."""

import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from lynx.data.places import FileRecords
from lynx.data.records import MAX_RECORD, RecordError
from lynx.data.shapes import shape_of
from lynx.media.regular import refuse_other_than_file

_CHUNK = 2**22  # bytes looked at at once
_BOM = b"\xef\xbb\xbf"
_SPACE = b" \t\r\n"
_OPEN, _CLOSE, _COMMA = b"[{", b"]}", ord(",")
_KINDS = np.zeros(256, np.int8)  # of each byte outside of texts: 1 opens, -1 closes, 2 is a comma
_KINDS[list(_OPEN)], _KINDS[list(_CLOSE)], _KINDS[_COMMA] = 1, -1, 2


class JsonListRecords(FileRecords):
    """The records of a JSON file, a ``RecordSource``: the elements of the list that it holds.

    The file is a list; or a mapping, and the list is the one of mappings that it holds, or of several the one under
    ``data``. It is read once, to find where each element is, and is never in memory as a whole.

    Args:
        path: the file, which must not change while it is used.
        root: the folder that the paths of media are relative to and may not leave; the file's own by default.
        task: the name of the prompts that put its questions; None leaves them as they are.
        check: decode all images, and a frame of every video, when their record is read.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds no such list, or an empty one; is cut short; or is no regular file.
    """

    def __init__(
        self, path: str | Path, root: str | Path | None = None, *, task: str | None = None, check: bool = False
    ):
        path = Path(path)
        refuse_other_than_file(path)
        starts, self._name, fingerprint = _scanned(path)
        super().__init__(path, root, task=task, check=check, starts=starts, between=1, fingerprint=fingerprint)

    def where(self, index: int) -> str:
        """The file, the name of the list if it has one, and the number of the element, from 0."""
        return f"{self.path}{self._name}[{index}]"


def holds_json_list(path: Path) -> bool:
    """Whether a file is one JSON value, and not one on each line.

    It is where its first line is no value by itself, but may begin one: it ends in a bracket or a comma, or is too long
    for a record. And where its only line is a list, or a mapping that is no record and has a list of mappings.
    """
    with path.open("rb") as file:
        first = file.readline(MAX_RECORD + 1).removeprefix(_BOM)
        while first and not first.strip(_SPACE):
            first = file.readline(MAX_RECORD + 1)
        first = first.strip(_SPACE)
        if not first.startswith((b"[", b"{")):
            return False
        if len(first) > MAX_RECORD:
            return True
        has_more = any(line.strip(_SPACE) for line in iter(lambda: file.readline(2**16), b""))
    if first.startswith(b"[") and not has_more:
        return True
    try:
        value = json.loads(first)
    except (ValueError, RecursionError):
        return first.endswith((b"[", b"{", b","))
    return not has_more and not _is_record(value) and any(map(_holds_mappings, value.values()))


def _is_record(value: dict[str, Any]) -> bool:
    try:
        shape_of(value)
    except RecordError:
        return False
    return True


def _holds_mappings(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


class _Structure(NamedTuple):
    """The brackets and commas of a JSON file outside of texts, those at most two brackets deep.

    Attributes:
        places: (n,) int64, where each is.
        kinds: (n,) 1 for a bracket that opens, -1 for one that closes, 2 for a comma.
        depths: (n,) how many brackets are open at a comma; a bracket counts itself.
        fingerprint: of the file.
    """

    places: np.ndarray
    kinds: np.ndarray
    depths: np.ndarray
    fingerprint: str


def _scanned(path: Path) -> tuple[np.ndarray, str, str]:
    """Where each element starts, and where another one would; the name of the list; and the fingerprint."""
    found = _structure(path)
    with path.open("rb") as file:

        def between(start: int, end: int) -> bytes:
            file.seek(start)
            return file.read(end - start)

        depth, name = 1, ""
        start, end = found.places[(found.depths == 1) & (found.kinds != 2)].tolist()
        if between(start, start + 1) == b"{":
            depth, (name, start, end) = 2, _list_of(path, found, between)
        commas = found.places[(found.kinds == 2) & (found.depths == depth)]
        starts = np.concatenate([[start], commas[(commas > start) & (commas < end)], [end]]) + 1
        is_empty = len(starts) == 2 and not between(start + 1, end).strip(_SPACE)
        if between(int(found.places[-1]) + 1, path.stat().st_size).strip(_SPACE):
            raise ValueError(f"{path}: not JSON: there is more than JSON at its end")
    return starts[:0] if is_empty else starts, name and f"[{json.dumps(name)}]", found.fingerprint


def _list_of(path: Path, found: _Structure, between: Callable[[int, int], bytes]) -> tuple[str, int, int]:
    """The name, start and end of the list of mappings that a mapping holds."""
    ends = found.places[(found.depths == 2) & (found.kinds != 2)].reshape(-1, 2).tolist()
    keys = found.places[(found.depths == 1) & (found.kinds != -1)]  # what stands before a key
    lists = []
    for start, end in ends:
        if between(start, start + 1) == b"[" and between(start + 1, min(end, start + 2**16)).lstrip(_SPACE)[:1] == b"{":
            key = between(int(keys[np.searchsorted(keys, start) - 1]) + 1, start).strip(_SPACE + b":")
            lists.append((json.loads(key), start, end))
    chosen = lists if len(lists) == 1 else [each for each in lists if each[0] == "data"]
    if len(chosen) != 1:
        names = ", ".join(name for name, *_ in lists) or "none"
        raise ValueError(
            f"{path}: it must hold one list of records, or one under 'data'; its lists of mappings: {names}"
        )
    return chosen[0]


def _structure(path: Path) -> _Structure:
    """Read the file once, in pieces."""
    parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    size, checksum, depth = path.stat().st_size, 0, 0
    in_text, escapes = False, 0  # and how many backslashes were the last bytes
    with (
        path.open("rb") as file,
        tqdm(total=size, desc=f"list in {path.name}", unit="B", unit_scale=True, delay=2) as bar,
    ):
        while chunk := file.read(_CHUNK):
            checksum = zlib.crc32(chunk, checksum)
            data, begin = np.frombuffer(chunk, np.uint8), file.tell() - len(chunk)
            quotes = np.flatnonzero(data == ord('"'))
            quotes = quotes[~_escaped(data, quotes, escapes)]
            marks = np.flatnonzero(_KINDS[data])
            outside = (np.searchsorted(quotes, marks) + in_text) % 2 == 0
            marks = marks[outside]
            kinds = _KINDS[data[marks]]
            steps = np.where(kinds == 2, 0, kinds)
            after = depth + np.cumsum(steps)
            depths = after + (kinds == -1)  # as it was before it closed
            if len(after):
                depth = int(after[-1])
            if len(after) and after.min() < 0:
                raise ValueError(f"{path}: not JSON: a bracket closes that was not opened")
            near = depths <= 2
            parts.append((begin + marks[near], kinds[near], depths[near]))
            in_text ^= bool(len(quotes) % 2)
            run = len(chunk) - len(chunk.rstrip(b"\\"))
            escapes = run + escapes if run == len(chunk) else run
            bar.update(len(chunk))
    if in_text or depth:
        raise ValueError(f"{path}: not JSON, or cut short: {'a text' if in_text else f'{depth} brackets'} did not end")
    places, kinds, depths = (np.concatenate([part[n] for part in parts]) for n in range(3))
    if ((depths == 1) & (kinds == 1)).sum() != 1:
        raise ValueError(f"{path}: it holds several JSON values, some over several lines; write one record a line")
    return _Structure(places, kinds, depths, f"{size:x}-{checksum:08x}")


def _escaped(data: np.ndarray, quotes: np.ndarray, before: int) -> np.ndarray:
    """For each quotation mark, whether the number of backslashes right before it is odd; ``before`` came first."""
    slashes = np.flatnonzero(data == ord("\\"))
    if not len(slashes):
        return (quotes == 0) & bool(before % 2)
    # Slashes next to each other keep their place less their rank; the first of each run is the first of that value.
    runs = slashes - np.arange(len(slashes))
    firsts = slashes[np.searchsorted(runs, runs)]
    at = np.searchsorted(slashes, quotes) - 1  # the last slash before the quotation mark
    at_safe = np.maximum(at, 0)
    adjoins = (at >= 0) & (slashes[at_safe] == quotes - 1)
    lengths = np.where(adjoins, quotes - firsts[at_safe], 0)
    lengths += np.where(lengths == quotes, before, 0)  # the run, or an empty one, reaches back to the start
    return lengths % 2 == 1
