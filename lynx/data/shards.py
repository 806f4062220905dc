"""Several sources as one: the files that a data set is cut into."""

import zlib
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

from lynx.data.records import Record

if TYPE_CHECKING:
    from lynx.data.source import RecordSource


class ShardedRecords:
    """The records of sources one after another, a ``RecordSource``.

    Args:
        shards: the sources, with the same task.

    Attributes:
        fingerprint: of all of them in their order; None where one has none.
    """

    def __init__(self, shards: Sequence["RecordSource"]):
        self.shards, self.task = list(shards), shards[0].task
        self._ends = list(accumulate(len(each) for each in shards))
        prints = [each.fingerprint for each in shards]
        self.fingerprint = None if None in prints else f"{zlib.crc32(repr((prints, self._ends)).encode()):08x}"

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Record:
        """One record; RecordError and IndexError as of the sources."""
        shard, inner = self._place(index)
        return shard[inner]

    def where(self, index: int) -> str:
        """Where a person finds this record."""
        shard, inner = self._place(index)
        return shard.where(inner)

    def _place(self, index: int) -> tuple["RecordSource", int]:
        if not 0 <= index < len(self):
            raise IndexError(f"there are {len(self)} records, so the last number is {len(self) - 1}, not {index}")
        number = bisect_right(self._ends, index)
        return self.shards[number], index - (self._ends[number - 1] if number else 0)
