"""Swaps samples between the packs of a step until their patches are balanced, the budgets kept.

A swap moves a sample, or exchanges two, between the pack with the most patches and the one with the fewest (the next,
where there is no swap). It is the one that brings the two nearest to each other. Among equals the sample that is
shorter, then the one with fewer patches, then the older one comes first.
"""

from bisect import bisect_left, insort

from lynx_kernels.packing.filling import Pack, Sample

_SWAPS = 16  # at most, for each rank: far above what mixes of images need, a bound for patches that are all different
_NOTHING: Sample = (0, 0, -1)
_END: Sample = (2**63, 0, -1)  # longer than any


class _Candidates:
    """A pack's samples as a swap looks at them. Of those that cost the same the oldest does: it would be chosen.

    Attributes:
        given: those with patches, for giving away others makes no pack lighter.
        returned: nothing, all, and an end, sorted.
        lengths, patches: of ``returned``.
    """

    __slots__ = ("given", "lengths", "patches", "returned")

    def __init__(self, pack: Pack):
        self.returned = [_NOTHING]
        for sample in sorted(pack.samples):
            if sample[:2] != self.returned[-1][:2]:
                self.returned.append(sample)
        self.returned.append(_END)
        self.given = [sample for sample in self.returned if sample[1]]
        self.lengths = [sample[0] for sample in self.returned]
        self.patches = [sample[1] for sample in self.returned]


def balance(packs: list[Pack]) -> None:
    """Balance the packs in place."""
    order = sorted((pack.patches, rank) for rank, pack in enumerate(packs))
    if order[-1][0] - order[0][0] < 2:
        return
    candidates = [_Candidates(pack) for pack in packs]
    for _ in range(_SWAPS * len(packs)):
        giver = order[-1][1]
        found = _first_swap(packs, candidates, order)
        if found is None:
            return
        taker, given, returned = found
        for rank in (giver, taker):
            del order[bisect_left(order, (packs[rank].patches, rank))]
        _exchange(packs[giver], packs[taker], given, returned)
        for rank in (giver, taker):
            insort(order, (packs[rank].patches, rank))
            candidates[rank] = _Candidates(packs[rank])


def _first_swap(
    packs: list[Pack], candidates: list[_Candidates], order: list[tuple[int, int]]
) -> tuple[int, Sample, Sample] | None:
    # Of the pack with the most patches with the first that has one: the other's rank, what is given, what comes back.
    most, giver = order[-1]
    for fewest, taker in order:
        if most - fewest < 2:
            break
        swap = _best_swap(packs[giver], candidates[giver], packs[taker], candidates[taker])
        if swap is not None:
            return taker, *swap
    return None


def _best_swap(giver: Pack, gives: _Candidates, taker: Pack, takes: _Candidates) -> tuple[Sample, Sample] | None:
    difference = giver.patches - taker.patches
    low, high = 0, difference  # what is moved must lie between them: then it is nearer to half the difference
    best = None
    lengths, returned_patches = takes.lengths, takes.patches
    giver_room, taker_room = giver.room, taker.room
    for given in gives.given:
        tokens, patches, _ = given
        place = bisect_left(lengths, tokens - taker_room)
        longest = tokens + giver_room
        while lengths[place] <= longest:
            moved = patches - returned_patches[place]
            if low < moved < high:
                best = given, place
                low, high = sorted((moved, difference - moved))
            place += 1
    return None if best is None else (best[0], takes.returned[best[1]])


def _exchange(giver: Pack, taker: Pack, given: Sample, returned: Sample) -> None:
    giver.remove(given)
    taker.add(given)
    if returned is not _NOTHING:
        taker.remove(returned)
        giver.add(returned)
