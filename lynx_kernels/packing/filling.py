"""The samples that wait, and the packs of one step filled from them.

A step is a pack for each rank. In order of arrival, samples go to the packs that have room for them: one with patches
to the pack with the fewest, one without to the pack with the most room. This ends when the packs have room for no more
than 1.5 samples of average length each, or for 3/4 of their budgets if that is less, or at the first sample that fits
nowhere. Then, of the packs that have room for any, the one with the fewest patches takes the longest that fits it,
until none has. So short samples leave nearly in the order they came, and the last of a pack is chosen among all that
wait, even where a pack holds but two.

Nothing starves. Of the tokens at the front of the queue a step takes at least a quarter of ``token_budget``; or it ends
at a sample that no pack has room for, with which the next step begins: together these two take more than
``token_budget``. Fewer than ``(ranks + lookahead) * token_budget`` tokens stand before a new sample, so it leaves in
``4 * (ranks + lookahead) + 1`` steps at most.

Among equals the lowest rank and the oldest sample come first.
"""

from bisect import bisect_left, bisect_right, insort
from collections import deque
from collections.abc import Iterable
from heapq import heapify, heappop, heapreplace

Sample = tuple[int, int, int]  # tokens, patches, number: sorted, they stand as the swaps of balance.py try them


class Pack:
    """The samples of one rank, the tokens that are left of its budget and the patches of all of them."""

    __slots__ = ("patches", "room", "samples")

    def __init__(self, room: int):
        self.room = room
        self.patches = 0
        self.samples: list[Sample] = []

    def add(self, sample: Sample) -> None:
        """Put the sample in; the caller has seen that it fits."""
        self.samples.append(sample)
        self.room -= sample[0]
        self.patches += sample[1]

    def remove(self, sample: Sample) -> None:
        """Take the sample out."""
        self.samples.remove(sample)
        self.room += sample[0]
        self.patches -= sample[1]

    def numbers(self) -> list[int]:
        """Which samples these are, ascending."""
        return sorted([number for _, _, number in self.samples])


class WaitingSamples:
    """Samples in order of arrival that can also be taken by their length.

    Of one length the oldest leaves first. So those that wait are the newest of their length, which is how the queue
    knows samples that were taken out of turn.

    Attributes:
        tokens: of all that wait.
        count: how many wait.
        lengths: the lengths of those that wait, sorted, each once.
    """

    def __init__(self, samples: Iterable[Sample] = ()):
        self.tokens = self.count = 0
        self.lengths: list[int] = []
        self._arrivals: deque[Sample] = deque()  # those that were taken out of turn are still among them
        self._by_length: dict[int, deque[Sample]] = {}
        for sample in samples:
            self.add(sample)

    def add(self, sample: Sample) -> None:
        """Put a sample at the end of the queue."""
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
        """All that wait, in order of arrival."""
        return [sample for sample in self._arrivals if self._waits(sample)]

    def oldest(self) -> Sample | None:
        """The sample that waits longest; it stays."""
        arrivals = self._arrivals
        while arrivals:
            if self._waits(arrivals[0]):
                return arrivals[0]
            arrivals.popleft()
        return None

    def take(self, length: int) -> Sample:
        """Take out the oldest sample of a length that is among ``lengths``."""
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
    """The packs of the next step, not yet balanced. Some sample must wait."""
    packs = [Pack(token_budget) for _ in range(ranks)]
    average = waiting.tokens // waiting.count
    _fill_in_order(packs, waiting, ranks * min(average * 3 // 2, token_budget * 3 // 4))
    _fill_up(packs, waiting)
    return packs


def _fill_in_order(packs: list[Pack], waiting: WaitingSamples, kept: int) -> None:
    # Until there is room for `kept` tokens in all packs together, or the oldest sample fits nowhere.
    by_patches = [(pack.patches, -pack.room, rank) for rank, pack in enumerate(packs)]  # sorted
    by_room = [(-pack.room, rank) for rank, pack in enumerate(packs)]  # a heap; an entry may tell of room that is gone
    left = sum(pack.room for pack in packs)
    while left > kept and (sample := waiting.oldest()) is not None:
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
    # Until no pack has room for the shortest. Nothing shorter comes, so a pack without room for it is done.
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
