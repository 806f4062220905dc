"""The waiting samples, and how the packs of one step are filled from them.

A step has one pack per rank. It is filled in two phases:

1. Samples are placed in order of arrival. A sample with patches goes to the pack with the fewest patches that has room
   for it; one without goes to the pack with the most room. This phase ends when the room left is at most 1.5 samples of
   average length per pack, or 3/4 of the budgets if that is less, or at the first sample that fits nowhere.
2. Of the packs that have room for some sample, the one with the fewest patches takes the longest sample that fits. This
   repeats until no sample fits.

So short samples leave nearly in order of arrival. The last sample of a pack is chosen among all that wait, even if the
pack holds only two.

No sample waits forever. From the front of the queue, a step takes at least a quarter of ``token_budget``. Otherwise it
ended at a sample that fits nowhere, and the next step starts with that sample; together these two steps take more than
``token_budget``. Fewer than ``(ranks + lookahead) * token_budget`` tokens are in front of a new sample. So it leaves
within ``4 * (ranks + lookahead) + 1`` steps.

Ties prefer the lowest rank and the oldest sample.
"""

from bisect import bisect_left, bisect_right, insort
from collections import deque
from collections.abc import Iterable
from heapq import heapify, heappop, heapreplace

Sample = tuple[int, int, int]  # tokens, patches, number; in this order sorting gives the order of swaps in balance.py


class Pack:
    """The samples of one rank, the remaining tokens of its budget (``room``), and the sum of its patches."""

    __slots__ = ("patches", "room", "samples")

    def __init__(self, room: int):
        self.room = room
        self.patches = 0
        self.samples: list[Sample] = []

    def add(self, sample: Sample) -> None:
        """Add the sample. The caller has checked that it fits."""
        self.samples.append(sample)
        self.room -= sample[0]
        self.patches += sample[1]

    def remove(self, sample: Sample) -> None:
        """Remove the sample."""
        self.samples.remove(sample)
        self.room += sample[0]
        self.patches -= sample[1]

    def numbers(self) -> list[int]:
        """The numbers of the samples, ascending."""
        return sorted([number for _, _, number in self.samples])


class WaitingSamples:
    """A queue of samples in order of arrival from which samples can also be taken by length.

    Of equal lengths the oldest is taken first. So the samples of a length that still wait are its newest. This tells
    the queue which of its entries were already taken by length.

    Attributes:
        tokens: the sum over the waiting samples.
        count: the number of waiting samples.
        lengths: the distinct lengths of the waiting samples, sorted.
    """

    def __init__(self, samples: Iterable[Sample] = ()):
        self.tokens = self.count = 0
        self.lengths: list[int] = []
        self._arrivals: deque[Sample] = deque()  # still includes samples that were taken by length
        self._by_length: dict[int, deque[Sample]] = {}
        for sample in samples:
            self.add(sample)

    def add(self, sample: Sample) -> None:
        """Append a sample to the queue."""
        length = sample[0]
        same = self._by_length.get(length)
        if same is None:
            self._by_length[length] = deque((sample,))
            insort(self.lengths, length)
        else:
            same.append(sample)
        self._arrivals.append(sample)
        self.tokens += length
        self.count += 1

    def in_order(self) -> list[Sample]:
        """All waiting samples, in order of arrival."""
        return [sample for sample in self._arrivals if self._waits(sample)]

    def oldest(self) -> Sample | None:
        """The oldest waiting sample. It stays in the queue."""
        arrivals = self._arrivals
        while arrivals:
            if self._waits(arrivals[0]):
                return arrivals[0]
            arrivals.popleft()
        return None

    def take(self, length: int) -> Sample:
        """Remove and return the oldest sample of ``length``, which must be in ``lengths``."""
        same = self._by_length[length]
        sample = same.popleft()
        if not same:
            del self._by_length[length]
            del self.lengths[bisect_left(self.lengths, length)]
        self.tokens -= length
        self.count -= 1
        return sample

    def _waits(self, sample: Sample) -> bool:
        same = self._by_length.get(sample[0])
        return same is not None and same[0][2] <= sample[2]


def fill_packs(waiting: WaitingSamples, token_budget: int, ranks: int) -> list[Pack]:
    """The packs of the next step, not yet balanced. At least one sample must be waiting."""
    packs = [Pack(token_budget) for _ in range(ranks)]
    average = waiting.tokens // waiting.count
    _fill_in_order(packs, waiting, ranks * min(average * 3 // 2, token_budget * 3 // 4))
    _fill_up(packs, waiting)
    return packs


def _fill_in_order(packs: list[Pack], waiting: WaitingSamples, reserved: int) -> None:
    # Phase 1: until all packs together have room for at most `reserved` tokens, or the oldest sample fits nowhere.
    by_patches = [(pack.patches, -pack.room, rank) for rank, pack in enumerate(packs)]  # sorted
    by_room = [(-pack.room, rank) for rank, pack in enumerate(packs)]  # a heap; entries may be out of date
    left = sum(pack.room for pack in packs)
    while left > reserved and (sample := waiting.oldest()) is not None:
        tokens, patches, _ = sample
        if patches:
            for place, (_, room, rank) in enumerate(by_patches):  # noqa: B007
                if room + tokens <= 0:
                    break
            else:
                return
        else:
            rank = by_room[0][1]
            while by_room[0][0] != -packs[rank].room:
                heapreplace(by_room, (-packs[rank].room, rank))
                rank = by_room[0][1]
            if packs[rank].room < tokens:
                return
            place = bisect_left(by_patches, (packs[rank].patches, -packs[rank].room, rank))
        pack = packs[rank]
        pack.add(waiting.take(tokens))
        del by_patches[place]
        insort(by_patches, (pack.patches, -pack.room, rank))
        left -= tokens


def _fill_up(packs: list[Pack], waiting: WaitingSamples) -> None:
    # Phase 2: until no pack has room for the shortest sample. No shorter one will come, so such a pack is complete.
    heap = [(pack.patches, -pack.room, rank) for rank, pack in enumerate(packs)]
    heapify(heap)
    lengths = waiting.lengths
    while heap and lengths:
        _, room, rank = heap[0]
        fitting = bisect_right(lengths, -room)
        if fitting == 0:
            heappop(heap)
            continue
        pack = packs[rank]
        pack.add(waiting.take(lengths[fitting - 1]))
        heapreplace(heap, (pack.patches, -pack.room, rank))
