"""Records that cannot be used: listed in a file, each once, up to a limit."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple


class Broken(NamedTuple):
    """A record that was left out."""

    dataset: str
    record: int
    path: str  # where the record stands
    reason: str
    too_long: bool = False  # it is whole, but longer than a pack


class TooManyBrokenError(ValueError):
    """More records are broken than a run puts up with."""


class BrokenRecords:
    """The list of broken records, a JSON object a line, which outlives a run and its resumption.

    Records that are only too long are listed too, but do not count.

    Args:
        path: the file; what it lists already is not listed again.
        limit: how many different records may be broken.

    Attributes:
        count: how many different records are broken so far.
        too_long: how many are too long.
    """

    def __init__(self, path: str | Path, *, limit: int = 1000):
        self.path, self.limit = Path(path), limit
        self.count = self.too_long = 0
        self._known: set[tuple[str, int]] = set()
        self._cut = False  # whether a killed run left half a line
        if self.path.exists():
            text = self.path.read_text(encoding="utf-8", errors="replace")
            self._cut = bool(text) and not text.endswith("\n")
            for line in text.splitlines():
                try:
                    entry = json.loads(line)
                    self._take(Broken(**entry))
                except (ValueError, TypeError):  # half a line; its record will be met again
                    continue

    def add(self, entries: Iterable[Broken]) -> None:
        """List these.

        Raises:
            TooManyBrokenError: with them, more than ``limit`` records are broken.
        """
        new = [entry for entry in entries if self._take(entry)]
        if not new:
            return
        lines = "".join(json.dumps(entry._asdict()) + "\n" for entry in new)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(("\n" if self._cut else "") + lines)
        self._cut = False
        if self.count > self.limit:
            raise TooManyBrokenError(
                f"{self.count} records are broken, more than the limit of {self.limit}; {self.path} lists them, the "
                f"last: {new[-1].dataset}, {new[-1].path}: {new[-1].reason}"
            )

    def summary(self) -> dict[str, Any]:
        """The counts, for a log."""
        return {"broken_records": self.count, "too_long_records": self.too_long}

    def _take(self, entry: Broken) -> bool:
        key = entry.dataset, entry.record
        if key in self._known:
            return False
        self._known.add(key)
        self.count += not entry.too_long
        self.too_long += entry.too_long
        return True
