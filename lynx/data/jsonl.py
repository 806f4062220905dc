"""Records in a JSONL file, one a line, in the shapes of ``lynx.data.shapes``, each read when it is wanted."""

import zlib
from pathlib import Path

import numpy as np
from tqdm import tqdm

from lynx.data.places import FileRecords
from lynx.media.regular import refuse_other_than_file

_CHUNK = 2**22  # bytes searched for line ends at once
_SPACE = ord(" ")  # the largest byte that JSON takes for space


class JsonlRecords(FileRecords):
    """The records of a JSONL file of any size, a ``RecordSource``. Blank lines are none, and have no number.

    Args:
        path: the JSONL file, which must not change while it is used.
        root: the folder that the paths of media are relative to and may not leave; the file's own by default.
        task: the name of the prompts that put its questions; None leaves them as they are.
        check: decode all images, and a frame of every video, when their record is read.

    Attributes:
        fingerprint: as of ``FileRecords``. All bytes are in it: they are read for the lines' places anyway, and a
            checksum adds little to that.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it has no lines, or is no regular file but a folder, a pipe or a device.
    """

    def __init__(
        self, path: str | Path, root: str | Path | None = None, *, task: str | None = None, check: bool = False
    ):
        path = Path(path)
        starts, self._blank, fingerprint = _scanned(path)
        super().__init__(path, root, task=task, check=check, starts=starts, between=0, fingerprint=fingerprint)

    def where(self, index: int) -> str:
        """The file and line of a record."""
        return f"{self.path}:{index + 1 + np.searchsorted(self._blank, index, side='right')}"


def _scanned(path: Path) -> tuple[np.ndarray, np.ndarray, str]:
    """Where every line starts that is not blank, and the end; before which of them a blank line is; the fingerprint.

    A record is read up to the start of the next one, with the blank lines between them: to JSON they are space.
    """
    refuse_other_than_file(path)
    found, blank, size, checksum = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], path.stat().st_size, 0
    start, has_text, count = 0, False, 0  # of the line that has begun, and how many records there are before it
    with (
        path.open("rb") as file,
        tqdm(total=size, desc=f"lines of {path.name}", unit="B", unit_scale=True, delay=2) as bar,
    ):
        while chunk := file.read(_CHUNK):
            checksum = zlib.crc32(chunk, checksum)
            data = np.frombuffer(chunk, np.uint8)
            begin = file.tell() - len(chunk)
            inner = np.flatnonzero(data == ord("\n")) + 1  # starts of lines
            pieces = np.concatenate([[0], inner[inner < len(data)]])
            texts = np.maximum.reduceat(data, pieces) > _SPACE
            texts[0] |= has_text
            starts = np.concatenate([[start], begin + pieces[1:]])
            if len(pieces) > len(inner):  # the last line has not ended
                start, has_text, starts, texts = int(starts[-1]), bool(texts[-1]), starts[:-1], texts[:-1]
            else:
                start, has_text = begin + len(data), False
            found.append(starts[texts])
            blank.append(count + np.cumsum(texts)[~texts])
            count += int(texts.sum())
            bar.update(len(chunk))
    if has_text:
        found.append(np.array([start]))
    starts = np.concatenate(found)
    return (
        np.append(starts, size)[: len(starts) + 1 if len(starts) else 0],
        np.concatenate(blank),
        f"{size:x}-{checksum:08x}",
    )
