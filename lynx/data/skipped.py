"""Records that cannot be used: listed in files, up to a limit."""

import json
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
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
    """The list of a run's broken records, a JSON object a line, which outlives the run and its resumption.

    Each rank writes a file of its own and reads those of the others: what one has listed is known to all, and the limit
    is the run's. Two that meet a record at the same moment may both list it; it counts once. Records that are only too
    long are listed too, but do not count.

    Args:
        folder: of the files, the same for all ranks; what they list already is not listed again.
        rank: of this process, which writes ``broken.jsonl`` as rank 0, else ``broken-RANK.jsonl``.
        limit: how many different records may be broken, of all ranks together.

    Attributes:
        count: how many different records are known to be broken.
        too_long: how many are too long.
    """

    def __init__(self, folder: str | Path, rank: int = 0, *, limit: int = 1000):
        self.folder, self.limit = Path(folder), limit
        self.path = self.folder / (f"broken-{rank}.jsonl" if rank else "broken.jsonl")
        self.count = self.too_long = 0
        self._known: set[tuple[str, int]] = set()
        self._read: Counter[Path] = Counter()  # bytes of each file
        self._catch_up()

    def add(self, entries: Iterable[Broken]) -> None:
        """List these.

        Raises:
            TooManyBrokenError: with them, more than ``limit`` records are broken.
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
        broken = [entry for entry in entries if not entry.too_long]
        if broken and self.count > self.limit:
            raise TooManyBrokenError(
                f"{self.count} records are broken, more than the limit of {self.limit}; {self.folder}/broken*.jsonl "
                f"list them, the last: {broken[-1].dataset}, {broken[-1].path}: {broken[-1].reason}"
            )

    def summary(self) -> dict[str, Any]:
        """The counts of all ranks so far, for a log."""
        self._catch_up()
        return {"broken_records": self.count, "too_long_records": self.too_long}

    def _catch_up(self) -> None:
        """Take what was written since the last time."""
        for path in self.folder.glob("broken*.jsonl"):
            with path.open("rb") as file:
                file.seek(self._read[path])
                for line in file:
                    if not line.endswith(b"\n"):  # somebody is writing it, or was killed: the record is met again
                        break
                    self._read[path] += len(line)
                    with suppress(ValueError, TypeError):  # half a line that was ended later
                        self._take(Broken(**json.loads(line)))

    def _take(self, entry: Broken) -> bool:
        key = entry.dataset, entry.record
        if key in self._known:
            return False
        self._known.add(key)
        self.count += not entry.too_long
        self.too_long += entry.too_long
        return True
