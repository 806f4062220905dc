"""What is a file: a FIFO or a terminal waits for a writer for ever, and a device may have no end."""

import os
import stat
from pathlib import Path

_KINDS = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


def not_a_file(path: str | os.PathLike) -> str | None:
    """What a path is whose reading may never end, in words; None for a file, a folder, and where nothing is there."""
    try:
        return _KINDS.get(stat.S_IFMT(os.stat(path).st_mode))
    except (OSError, ValueError):  # opening it says what is wrong
        return None


def refuse_other_than_file(path: str | os.PathLike) -> None:
    """Raise ValueError, before anything is opened, for a path to something else than a regular file."""
    if kind := "a folder" if os.path.isdir(path) else not_a_file(path):
        raise ValueError(f"{Path(path)} is {kind}, not a file; copy what it gives into a file and name that")
