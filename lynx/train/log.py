"""The log of a run: a file of JSON objects, one a line, that outlives crashes and resumptions."""

import json
from pathlib import Path
from typing import Any

from lynx.train.renamed import renamed_entry


def read_log(path: Path) -> list[dict[str, Any]]:
    """The entries of a log, under the keys of today; a last line that a crash cut off is left out.

    Raises:
        FileNotFoundError: there is no log.
    """
    return [renamed_entry(entry) for entry in _entries(path)]


def append_entry(path: Path, entry: dict[str, Any]) -> None:
    """Write one more entry."""
    with path.open("a") as file:
        file.write(f"{json.dumps(entry)}\n")


def drop_entries_after(path: Path, stage: str, step: int) -> None:
    """Remove a stage's entries of steps behind this one, and a line that was cut off; the others stay as they are."""
    kept = [entry for entry in _entries(path) if entry.get("stage") != stage or entry.get("step", 0) <= step]
    unfinished = path.with_name(f".{path.name}")
    unfinished.write_text("".join(f"{json.dumps(entry)}\n" for entry in kept))
    unfinished.replace(path)


def _entries(path: Path) -> list[dict[str, Any]]:
    entries = []
    for line in path.read_text().splitlines():
        try:
            entries.append(json.loads(line))
        except ValueError:
            continue
    return entries
