"""A slow reference of the planner in plain Python. The planner of lynx_kernels.packing must make the same steps.

lynx_kernels.packing explains how a step is made, and why.
"""

from bisect import bisect_left, bisect_right, insort
from collections import deque
from collections.abc import Iterable, Sequence
from typing import NamedTuple

Step = list[list[int]]

SWAPS = 16  # limit per rank, as in lynx_kernels.packing.balance


class Sample(NamedTuple):
    """The costs of a sample. Sorting gives the order in which swaps are tried."""

    tokens: int
    patches: int
    number: int


NOTHING = Sample(0, 0, -1)


class Pack:
    """The samples of one rank, the remaining tokens of its budget, and the sum of its patches."""

    def __init__(self, room: int):
        self.room = room
        self.patches = 0
        self.samples: list[Sample] = []

    def add(self, sample: Sample) -> None:
        self.samples.append(sample)
        self.room -= sample.tokens
        self.patches += sample.patches

    def remove(self, sample: Sample) -> None:
        self.samples.remove(sample)
        self.room += sample.tokens
        self.patches -= sample.patches


class Planner:
    """The waiting samples and the steps made from them. The caller checks the arguments."""

    def __init__(self, token_budget: int, ranks: int, lookahead: int):
        self._token_budget, self._ranks = token_budget, ranks
        self._enough = (ranks + lookahead) * token_budget
        self.restore(0, [])

    def restore(self, num_seen: int, waiting: Iterable[tuple[int, int, int]]) -> None:
        """Start from waiting samples ``(number, tokens, patches)``, in order of arrival."""
        self.num_seen = num_seen
        self._waiting_tokens = self.num_waiting = 0
        self._arrivals: deque[Sample] = deque()  # still includes samples that were taken by length
        self._by_length: dict[int, deque[Sample]] = {}
        self._lengths: list[int] = []  # the keys of _by_length, sorted
        for index, tokens, patches in waiting:
            self._add(Sample(tokens, patches, index))

    def push(self, all_tokens: Sequence[int], all_patches: Sequence[int]) -> list[Step]:
        """Add the next samples. Those longer than the budget are only counted."""
        steps = []
        for tokens, patches in zip(all_tokens, all_patches, strict=True):
            sample = Sample(tokens, patches, self.num_seen)
            self.num_seen += 1
            if tokens > self._token_budget:
                continue
            self._add(sample)
            while self._waiting_tokens >= self._enough:
                steps.append(_balanced(self.fill_packs()))
        return steps

    def flush(self) -> list[Step]:
        """The steps of all waiting samples."""
        steps = []
        while self.num_waiting:
            steps.append(_balanced(self.fill_packs()))
        return steps

    def _add(self, sample: Sample) -> None:
        if sample.tokens not in self._by_length:
            self._by_length[sample.tokens] = deque()
            insort(self._lengths, sample.tokens)
        self._by_length[sample.tokens].append(sample)
        self._arrivals.append(sample)
        self._waiting_tokens += sample.tokens
        self.num_waiting += 1

    def _waits(self, sample: Sample) -> bool:
        # Of equal lengths the oldest is taken first, so the waiting ones are the newest.
        same = self._by_length.get(sample.tokens)
        return same is not None and same[0].number <= sample.number

    def _take_oldest(self, room: int) -> Sample | None:
        while self._arrivals and not self._waits(self._arrivals[0]):
            self._arrivals.popleft()
        if not self._arrivals or self._arrivals[0].tokens > room:
            return None
        return self._remove(self._arrivals[0].tokens)

    def _take_longest(self, room: int) -> Sample:
        return self._remove(self._lengths[bisect_right(self._lengths, room) - 1])

    def _remove(self, length: int) -> Sample:
        sample = self._by_length[length].popleft()
        if not self._by_length[length]:
            del self._by_length[length]
            del self._lengths[bisect_left(self._lengths, length)]
        self._waiting_tokens -= length
        self.num_waiting -= 1
        return sample

    def fill_packs(self) -> list[Pack]:
        """The packs of the next step, not yet balanced. At least one sample must be waiting."""
        packs = [Pack(self._token_budget) for _ in range(self._ranks)]
        average = self._waiting_tokens // self.num_waiting
        kept = self._ranks * min(
            average * 3 // 2, self._token_budget * 3 // 4
        )  # room left for samples chosen by length
        while sum(pack.room for pack in packs) > kept:
            sample = self._take_oldest(max(pack.room for pack in packs))
            if sample is None:
                break
            fitting = [pack for pack in packs if pack.room >= sample.tokens]
            if sample.patches:
                _fewest_patches(fitting).add(sample)
            else:
                max(fitting, key=lambda pack: pack.room).add(sample)
        while self._lengths and (fitting := [pack for pack in packs if pack.room >= self._lengths[0]]):
            target = _fewest_patches(fitting)
            target.add(self._take_longest(target.room))
        return packs


def _fewest_patches(packs: list[Pack]) -> Pack:
    return min(packs, key=lambda pack: (pack.patches, -pack.room))


def plan_known(all_tokens: Sequence[int], all_patches: Sequence[int], token_budget: int, ranks: int) -> list[Step]:
    """Steps for samples that are all known.

    Packs are filled with the longest samples first. Packs with similar numbers of patches form a step. The samples of
    the left-over packs are distributed again, so that no rank is without samples.
    """
    known = [
        Sample(tokens, patches, number)
        for number, (tokens, patches) in enumerate(zip(all_tokens, all_patches, strict=True))
        if tokens <= token_budget
    ]
    filling = _waiting_longest_first(known, token_budget, 1)
    packs: list[Pack] = []
    while filling.num_waiting:
        packs += filling.fill_packs()
    packs.sort(key=lambda pack: -pack.patches)
    full = len(packs) // ranks * ranks
    steps = [_balanced(packs[start : start + ranks]) for start in range(0, full, ranks)]
    steps.sort(key=lambda step: min(pack[0] for pack in step))
    left = [sample for pack in packs[full:] for sample in pack.samples]
    return steps + _waiting_longest_first(left, token_budget, ranks).flush()


def _waiting_longest_first(samples: Iterable[Sample], token_budget: int, ranks: int) -> Planner:
    planner = Planner(token_budget, ranks, 0)
    longest_first = sorted(samples, key=lambda sample: (-sample.tokens, sample.number))
    planner.restore(0, [(each.number, each.tokens, each.patches) for each in longest_first])
    return planner


def _balanced(packs: list[Pack]) -> Step:
    _balance(packs)
    return [sorted(each.number for each in pack.samples) for pack in packs]


def _balance(packs: list[Pack]) -> None:
    for _ in range(SWAPS * len(packs)):
        by_patches = sorted(packs, key=lambda pack: pack.patches)
        giver = by_patches[-1]
        for taker in by_patches:
            swap = _best_swap(giver, taker)
            if swap is not None:
                break
        else:
            return
        for sample, source, target in ((swap[0], giver, taker), (swap[1], taker, giver)):
            if sample is not NOTHING:
                source.remove(sample)
                target.add(sample)


def _best_swap(giver: Pack, taker: Pack) -> tuple[Sample, Sample] | None:
    difference = giver.patches - taker.patches
    best, smallest_error = None, difference  # |2 moved - difference| is smaller only if 0 < moved < difference
    returns = [NOTHING, *_distinct(taker.samples)]
    for given in _distinct(giver.samples):
        first = bisect_left(returns, given.tokens - taker.room, key=lambda sample: sample.tokens)
        for returned in returns[first:]:
            if returned.tokens > given.tokens + giver.room:
                break
            error = abs(2 * (given.patches - returned.patches) - difference)
            if error < smallest_error:
                best, smallest_error = (given, returned), error
    return best


def _distinct(samples: list[Sample]) -> list[Sample]:
    # Of samples with equal costs, only the oldest.
    found = {each[:2]: each for each in sorted(samples, reverse=True)}
    return sorted(found.values())
