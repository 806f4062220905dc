"""Which samples go into which pack: token budgets filled, vision patches balanced across ranks, before any tensor.

``filling`` says how the packs of a step are filled, ``balance`` how their patches are balanced then.
"""

from operator import index as as_int
from typing import Any

from numpy.typing import ArrayLike

from lynx_kernels.packing.balance import balance
from lynx_kernels.packing.costs import check_costs, check_options, count_too_long
from lynx_kernels.packing.filling import Pack, WaitingSamples, fill_packs

Step = list[list[int]]  # for each rank the numbers of its samples

_VERSION = 1  # of the state


class PackPlanner:
    """Cuts a stream of samples into steps, a pack for each rank, without knowing what is still to come.

    >>> planner = PackPlanner(token_budget=4096, ranks=8)
    >>> for step in planner.push(tokens, patches):  # as often as you like, one sample or a million
    ...     train_on(step)                          # step[rank] holds indices of samples
    >>> for step in planner.flush():                # the end: what still waits
    ...     train_on(step)

    Samples are numbered 0, 1, 2, ... as they are pushed. Every one is in exactly one pack, ascending there. No pack has
    more tokens than ``token_budget``; vision patches are balanced across the ranks of a step, as far as that leaves the
    budgets alone. The steps depend on nothing but the samples and their order, not on how they were cut into calls of
    ``push``. A sample leaves with one of the first ``max_wait`` steps made after it came. After ``flush`` the last step
    may be short, and where fewer samples than ranks are left some of its packs are empty.

    Args:
        token_budget: the most language-model tokens of a pack, vision tokens included.
        ranks: how many packs a step has.
        lookahead: how many packs full of tokens may wait, beside those of the next step. More fills packs better and
            lets samples wait longer. 16 fills them to 99 % with image captions and answers.
        too_long: what becomes of a sample with more tokens than the budget: ``"error"``, or ``"skip"``: it is left out,
            counted and logged.

    Attributes:
        skipped: how many samples were left out so far.
        num_seen: how many samples were pushed, skipped ones included: the number of the next one.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        token_budget: int,
        *,
        ranks: int = 1,
        lookahead: int = 16,
        too_long: str = "error",
    ):
        check_options(too_long, token_budget=(token_budget, 1), ranks=(ranks, 1), lookahead=(lookahead, 0))
        self.token_budget, self.ranks, self.lookahead = as_int(token_budget), as_int(ranks), as_int(lookahead)
        self.too_long = too_long
        self.skipped = self.num_seen = 0
        self._waiting = WaitingSamples()

    @property
    def max_wait(self) -> int:
        """The most steps that are made after a sample came until it leaves, its own included."""
        return 4 * (self.ranks + self.lookahead) + 1

    def push(self, tokens: ArrayLike, patches: ArrayLike | None = None) -> list[Step]:
        """Take in the next samples and return the steps that are complete, in their order.

        Args:
            tokens: integers, a number or a sequence or array (n,): each sample's tokens, at least 1.
            patches: likewise, each sample's vision patches, at least 0; None is 0 for all.

        Raises:
            ValueError: a cost is out of range, or a sample is too long for ``too_long="error"``; the message names the
                sample. Nothing was taken in.
            TypeError: costs are not integers.
        """
        all_tokens, all_patches = check_costs(tokens, patches, self.num_seen)
        self.skipped += count_too_long(all_tokens, self.token_budget, self.too_long, self.num_seen, self.skipped)
        waiting, enough = self._waiting, (self.ranks + self.lookahead) * self.token_budget
        steps = []
        for number, sample in enumerate(zip(all_tokens, all_patches, strict=True), self.num_seen):
            if sample[0] > self.token_budget:
                continue
            waiting.add((*sample, number))
            while waiting.tokens >= enough:
                steps.append(_balanced(fill_packs(waiting, self.token_budget, self.ranks)))
        self.num_seen += len(all_tokens)
        return steps

    def flush(self) -> list[Step]:
        """The steps of all samples that still wait. More may be pushed afterwards."""
        return _steps_of_all(self._waiting, self.token_budget, self.ranks)

    def state_dict(self) -> dict[str, Any]:
        """What ``load_state_dict`` needs to go on from here exactly: ints and lists of ints."""
        return {
            "version": _VERSION,
            **self._options(),
            "num_seen": self.num_seen,
            "skipped": self.skipped,
            "waiting": [[number, tokens, patches] for tokens, patches, number in self._waiting.in_order()],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state.

        Raises:
            ValueError: the state is of another version, or of a planner with other options.
        """
        expected = {"version": _VERSION, **self._options()}
        for name, value in expected.items():
            if state.get(name) != value:
                raise ValueError(
                    f"PackPlanner: the state has {name}={state.get(name)!r}, this planner {value}; make the planner as "
                    "it was when the state was saved"
                )
        self.num_seen, self.skipped = state["num_seen"], state["skipped"]
        self._waiting = WaitingSamples((tokens, patches, number) for number, tokens, patches in state["waiting"])

    def _options(self) -> dict[str, int]:
        return {"token_budget": self.token_budget, "ranks": self.ranks, "lookahead": self.lookahead}


def plan_packs(
    tokens: ArrayLike,
    patches: ArrayLike | None = None,
    *,
    token_budget: int,
    ranks: int = 1,
    too_long: str = "error",
) -> list[Step]:
    """Cut samples whose costs are all known into steps: fewer packs than ``PackPlanner`` needs, in no order of arrival.

    Packs are filled as if the samples waited in order of their length, the longest first; shorter ones fill the rest:
    first-fit decreasing. Packs with like numbers of patches make a step; what does not fill one is shared among the
    ranks of the last, where alone packs may be nearly or quite empty. The other steps stand in the order of their first
    samples.

    Args:
        tokens, patches, token_budget, ranks, too_long: as of ``PackPlanner``; samples are numbered as they stand.

    Returns:
        Steps of ``ranks`` packs of ascending indices, ``steps[step][rank]``.

    Raises:
        ValueError, TypeError: as ``PackPlanner`` and its ``push`` do.
    """
    check_options(too_long, token_budget=(token_budget, 1), ranks=(ranks, 1))
    token_budget, ranks = as_int(token_budget), as_int(ranks)
    all_tokens, all_patches = check_costs(tokens, patches, 0)
    count_too_long(all_tokens, token_budget, too_long, 0, 0)
    known = zip(all_tokens, all_patches, range(len(all_tokens)), strict=True)
    waiting = _longest_first([sample for sample in known if sample[0] <= token_budget])
    packs: list[Pack] = []
    while waiting.count:
        packs += fill_packs(waiting, token_budget, 1)
    packs.sort(key=lambda pack: -pack.patches)
    full = len(packs) // ranks * ranks
    steps = [_balanced(packs[start : start + ranks]) for start in range(0, full, ranks)]
    steps.sort(key=lambda step: min(pack[0] for pack in step))
    left = [sample for pack in packs[full:] for sample in pack.samples]
    return steps + _steps_of_all(_longest_first(left), token_budget, ranks)


def _longest_first(samples: list[tuple[int, int, int]]) -> WaitingSamples:
    return WaitingSamples(sorted(samples, key=lambda sample: (-sample[0], sample[2])))


def _steps_of_all(waiting: WaitingSamples, token_budget: int, ranks: int) -> list[Step]:
    steps = []
    while waiting.count:
        steps.append(_balanced(fill_packs(waiting, token_budget, ranks)))
    return steps


def _balanced(packs: list[Pack]) -> Step:
    balance(packs)
    return [pack.numbers() for pack in packs]
