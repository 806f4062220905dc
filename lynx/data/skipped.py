"""Records that cannot be used: skipped, listed in files, up to a limit."""

import json
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

# What the files in an output folder are called; the second is the name that earlier code gave them.
FILES = ("skipped*.jsonl", "broken*.jsonl")


class Skipped(NamedTuple):
    """A record that was left out."""

    dataset: str
    record: int
    path: str  # where the record stands
    reason: str
    too_long: bool = False  # it could be used, but is longer than a pack


class TooManySkippedError(ValueError):
    """More records cannot be used than the limit of a run allows."""


class SkippedRecords:
    """The list of a run's skipped records, a JSON object a line. It outlives the run and its resumption.

    Each rank writes a file of its own and reads those of the others. What one rank has listed is known to all, and the
    limit is the run's. Two ranks that meet a record at the same moment may both list it; it counts once. Records that
    are only too long are listed too, but do not count.

    Args:
        folder: where the files are, the same for all ranks. What they list already is not listed again.
        rank: of this process. Rank 0 writes ``skipped.jsonl``, the others ``skipped-RANK.jsonl``.
        limit: how many different records may be unusable, in all ranks together.

    Attributes:
        count: how many different records are known to be unusable.
        too_long: how many are too long.
    """

    def __init__(self, folder: str | Path, rank: int = 0, *, limit: int = 1000):
        self.folder, self.limit = Path(folder), limit
        self.path = self.folder / (f"skipped-{rank}.jsonl" if rank else "skipped.jsonl")
        self.count = self.too_long = 0
        self._known: set[tuple[str, int]] = set()
        self._read: Counter[Path] = Counter()  # bytes of each file
        self._catch_up()

    def add(self, entries: Iterable[Skipped]) -> None:
        """List these.

        Raises:
            TooManySkippedError: with them, more than ``limit`` records cannot be used.
        """
        entries = list(entries)
        if not entries:
            return
        self._catch_up()
        if new := [entry for entry in entries if self._take(entry)]:
            self.folder.mkdir(parents=True, exist_ok=True)
            lines = "".join(json.dumps(entry._asdict()) + "\n" for entry in new)
            with self.path.open("ab") as file:
                is_cut = file.tell() > self._read[self.path]  # a killed run left half a line
                file.write((("\n" if is_cut else "") + lines).encode())
        unusable = [entry for entry in entries if not entry.too_long]
        if unusable and self.count > self.limit:
            last = unusable[-1]
            raise TooManySkippedError(
                f"{self.count} records cannot be used, more than max_skipped={self.limit}; they are listed in "
                f"{self.folder}/skipped*.jsonl. The last one: {last.dataset}, {last.path}: {last.reason}"
            )

    def summary(self) -> dict[str, Any]:
        """The counts of all ranks so far, for a log."""
        self._catch_up()
        return {"skipped_records": self.count, "too_long_records": self.too_long}

    def _catch_up(self) -> None:
        """Take what was written since the last time."""
        for path in (path for pattern in FILES for path in self.folder.glob(pattern)):
            with path.open("rb") as file:
                file.seek(self._read[path])
                for line in file:
                    if not line.endswith(b"\n"):  # it is being written, or its writer was killed: it will come again
                        break
                    self._read[path] += len(line)
                    with suppress(ValueError, TypeError):  # half a line that was ended later
                        self._take(Skipped(**json.loads(line)))

    def _take(self, entry: Skipped) -> bool:
        key = entry.dataset, entry.record
        if key in self._known:
            return False
        self._known.add(key)
        self.count += not entry.too_long
        self.too_long += entry.too_long
        return True
