"""Which data set each sample comes from, and which of its records: a mixture of two levels.

Groups are drawn by weight, the data sets of a group by their sizes. Every data set is walked in a random order of its
own, a new one each epoch: no record comes twice before all have come once. Both follow from the seed and the counts of
what was drawn. So those counts are the whole state, however large the data sets are. What else is in a state tells
whether the data are still the same.
"""

from bisect import bisect_right
from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass
from importlib import resources
from itertools import accumulate
from math import isfinite
from operator import index as as_int
from typing import Any, Generic, NamedTuple, TypeVar

import yaml

_VERSION = 2  # of the state
_ROUNDS = 6  # of the permutation's network
_64_BITS = 2**64 - 1

_Data = TypeVar("_Data", bound=Sized)  # a RecordSource; where only shares are asked for, anything with a length


@dataclass(frozen=True)
class Group(Generic[_Data]):
    """Data sets that share a part of the mixture.

    Attributes:
        name: to call it by.
        weight: its part of the mixture, beside the other groups' weights, whatever they sum to.
        datasets: by name. A mixture draws them in proportion to their lengths.
    """

    name: str
    weight: float
    datasets: Mapping[str, _Data]


class Reference(NamedTuple):
    """A drawn sample: few numbers that say all of it."""

    dataset: int  # its number in the mixture
    record: int  # in the data set
    draw: int  # in the mixture, from 0; with the seed, it decides prompt, answer, crop and frames


class Mixture(Generic[_Data]):
    """An endless stream of samples from data sets in groups.

    Args:
        groups: the data sets, their names different.
        seed: of the order in which samples come.

    Attributes:
        names: of the data sets, in their order.
        datasets: the data sets themselves.
        counts: how often each was drawn so far, by name.

    Raises:
        ValueError: there is no group, a weight is not positive, a data set is empty, or a name comes twice.
    """

    def __init__(self, groups: Sequence[Group[_Data]], *, seed: int):
        self.groups, self.seed = list(groups), as_int(seed)
        self._shares = shares(groups)
        self.names = list(self._shares)
        self.datasets = [dataset for group in groups for dataset in group.datasets.values()]
        self._sizes = [len(dataset) for dataset in self.datasets]
        self._fingerprints = [getattr(dataset, "fingerprint", None) for dataset in self.datasets]
        self._ends = list(accumulate(self._shares.values()))
        self._drawn = [0] * len(self.names)

    @property
    def shares(self) -> dict[str, float]:
        """The part of all samples that each data set gives, by name."""
        return dict(self._shares)

    @property
    def counts(self) -> dict[str, int]:
        return dict(zip(self.names, self._drawn, strict=True))

    def draw(self) -> Reference:
        """The next sample."""
        draw = sum(self._drawn)
        place = _mixed(self.seed, draw) / 2**64 * self._ends[-1]
        # A place that rounding has put on the last end belongs to the last data set.
        number = min(bisect_right(self._ends, place), len(self._ends) - 1)
        epoch, position = divmod(self._drawn[number], self._sizes[number])
        self._drawn[number] += 1
        key = _mixed(self.seed, number, epoch)
        return Reference(number, permuted(position, self._sizes[number], key), draw)

    def state_dict(self) -> dict[str, Any]:
        """What ``load_state_dict`` needs to go on from here exactly: numbers and names."""
        return {
            "version": _VERSION,
            "seed": self.seed,
            "sizes": self._known_sizes(),
            "fingerprints": list(self._fingerprints),
            "counts": self.counts,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state.

        Raises:
            ValueError: it has another version or seed, or is of other data sets, or these have other content by now.
        """
        for name, value in (("version", _VERSION), ("seed", self.seed), ("sizes", self._known_sizes())):
            if state.get(name) != value:
                raise ValueError(
                    f"Mixture: the state has {name}={state.get(name)!r}, this mixture has {value}; make the mixture as "
                    "it was when the state was saved, of the same data, or start anew"
                )
        known = zip(self.names, state["fingerprints"], self._fingerprints, strict=True)
        if changed := [name for name, then, now in known if then != now]:
            raise ValueError(
                f"Mixture: {', '.join(changed)}: as many records as when the state was saved, but not the same ones. "
                "Give the data as they were, wherever they lie, or start anew"
            )
        self._drawn = [state["counts"][name] for name in self.names]

    def _known_sizes(self) -> dict[str, int]:
        return dict(zip(self.names, self._sizes, strict=True))


def shares(groups: Sequence[Group[_Data]]) -> dict[str, float]:
    """The part of all samples that each data set gives, by name: its group's weight times its part of the group.

    Raises:
        ValueError: as ``Mixture`` does.
    """
    if not groups:
        raise ValueError("a mixture needs at least one group of data sets")
    found: dict[str, float] = {}
    total = sum(group.weight for group in groups)
    for group in groups:
        if not (isfinite(group.weight) and group.weight > 0):
            raise ValueError(f"group {group.name!r} has weight {group.weight}, expected a positive number")
        if not group.datasets:
            raise ValueError(f"group {group.name!r} has no data sets")
        size = sum(len(dataset) for dataset in group.datasets.values())
        for name, dataset in group.datasets.items():
            if len(dataset) == 0:
                raise ValueError(f"data set {name!r} is empty")
            if name in found:
                raise ValueError(f"two data sets have the name {name!r}; counts and states need different names")
            found[name] = group.weight / total * len(dataset) / size
    return found


def paper_groups(phase: str) -> list[Group[range]]:
    """The paper's mixture, its Table 9: groups of data sets that have nothing but a length.

    Args:
        phase: ``"pretraining"`` or ``"finetuning"``.

    Raises:
        ValueError: it is neither.
    """
    text = resources.files("lynx.data").joinpath("paper_mixture.yaml").read_text(encoding="utf-8")
    phases = yaml.safe_load(text)
    if phase not in phases:
        raise ValueError(f"the paper has no phase {phase!r}; there are {list(phases)}")
    return [
        # A data set without a size is alone in its group: any length gives the group's share.
        Group(each["name"], each["weight"], {name: range(size or 1) for name, size in each["datasets"].items()})
        for each in phases[phase]
    ]


def permuted(position: int, size: int, key: int) -> int:
    """Where ``position`` lands in a permutation of ``range(size)`` that ``key`` chooses, in constant time and memory.

    A Feistel network permutes the numbers of an even count of bits. What leaves the range is sent through it again.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    keys = [_mixed(key, each) for each in range(_ROUNDS)]
    while True:
        left, right = position >> half, position & mask
        for each in keys:
            left, right = right, left ^ (_mixed(each, right) & mask)
        position = left << half | right
        if position < size:
            return position


def _mixed(*values: int) -> int:
    """64 bits that look random, the same for the same numbers: each goes through SplitMix64's finalizer."""
    mixed = 0
    for value in values:
        mixed = (mixed ^ value) + 0x9E3779B97F4A7C15 & _64_BITS
        mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9 & _64_BITS
        mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB & _64_BITS
        mixed ^= mixed >> 31
    return mixed
