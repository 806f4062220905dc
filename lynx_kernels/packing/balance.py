"""Balance the patches of the packs of a step by swapping samples, within the token budgets.

A swap moves one sample, or exchanges two, between the pack with the most patches (the giver) and the pack with the
fewest (the taker). If these two have no swap, the pack with the next fewest is tried. The chosen swap makes the two
packs most equal. Ties prefer the shorter sample, then the one with fewer patches, then the older one.
"""

from bisect import bisect_left, insort

from lynx_kernels.packing.filling import Pack, Sample

_SWAPS = 16  # limit per rank; far more than mixes of images need, it matters only if all patch counts differ
_NOTHING: Sample = (0, 0, -1)
_END: Sample = (2**63, 0, -1)  # longer than any sample


class _Candidates:
    """The samples of a pack that a swap may choose. Of samples with equal costs only the oldest is listed.

    Attributes:
        given: the samples with patches; giving away others does not reduce patches.
        returned: ``_NOTHING``, all samples, and ``_END``, sorted.
        lengths, patches: the tokens and the patches of ``returned``.
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
    # The first pack with which the pack with the most patches has a swap: its rank, the sample given, the one returned.
    giver_patches, giver = order[-1]
    for taker_patches, taker in order:
        if giver_patches - taker_patches < 2:
            break
        swap = _best_swap(packs[giver], candidates[giver], packs[taker], candidates[taker])
        if swap is not None:
            return taker, *swap
    return None


def _best_swap(giver: Pack, gives: _Candidates, taker: Pack, takes: _Candidates) -> tuple[Sample, Sample] | None:
    difference = giver.patches - taker.patches
    low, high = 0, difference  # patches moved between these bounds are closer to half the difference than the best
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
