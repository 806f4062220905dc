"""Plan which samples go into which pack: fill token budgets, and balance vision patches across ranks.

``filling`` fills the packs of a step. ``balance`` then balances their patches.
"""

from operator import index as as_int
from typing import Any

from numpy.typing import ArrayLike

from lynx_kernels.packing.balance import balance
from lynx_kernels.packing.costs import check_costs, check_options, check_state, count_too_long
from lynx_kernels.packing.filling import Pack, WaitingSamples, fill_packs

Step = list[list[int]]  # for each rank, the numbers of its samples

_VERSION = 1  # version of the state_dict


class PackPlanner:
    """Cut a stream of samples into steps with one pack per rank, without knowing later samples.

    >>> planner = PackPlanner(token_budget=4096, ranks=8)
    >>> for step in planner.push(tokens, patches):  # any number of times, one sample or a million
    ...     train_on(step)                          # step[rank] holds indices of samples
    >>> for step in planner.flush():                # at the end: the samples that still wait
    ...     train_on(step)

    Samples are numbered 0, 1, 2, ... as they are pushed. Each sample is in exactly one pack; a pack is in ascending
    order. No pack has more tokens than ``token_budget``. Vision patches are balanced across the ranks of a step as far
    as the budgets allow. The steps depend only on the samples and their order, not on how calls of ``push`` divide
    them. A sample leaves within the first ``max_wait`` steps made after its arrival. After ``flush`` the last step may
    be short. If fewer samples than ranks are left, some of its packs are empty.

    Args:
        token_budget: the maximum number of language-model tokens in a pack, vision tokens included.
        ranks: the number of packs in a step.
        lookahead: how many packs of tokens may wait, in addition to those of the next step. A larger value fills packs
            better, and samples wait longer. 16 fills packs to 99 % with image captions and answers.
        too_long: what to do with a sample that has more tokens than the budget: ``"error"``; or ``"skip"`` it, count it
            and log it.

    Attributes:
        skipped: the number of samples skipped so far.
        num_seen: the number of samples pushed, skipped ones included. It is the number of the next sample.

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
        """The maximum number of steps after a sample arrives until it leaves, including its own step."""
        return 4 * (self.ranks + self.lookahead) + 1

    def push(self, tokens: ArrayLike, patches: ArrayLike | None = None) -> list[Step]:
        """Add the next samples and return the steps that are complete, in order.

        Args:
            tokens: an integer, or a sequence or array (n,) of integers: the tokens of each sample, at least 1.
            patches: the same for the vision patches of each sample, at least 0; None means 0 for all.

        Raises:
            ValueError: a cost is out of range, or a sample is too long with ``too_long="error"``. The message names the
                sample. No sample was added.
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
        """The steps of all samples that still wait. More samples may be pushed afterwards."""
        return _steps_of_all(self._waiting, self.token_budget, self.ranks)

    def state_dict(self) -> dict[str, Any]:
        """The state from which ``load_state_dict`` continues exactly: ints and lists of ints."""
        return {
            "version": _VERSION,
            **self._options(),
            "num_seen": self.num_seen,
            "skipped": self.skipped,
            "waiting": [[number, tokens, patches] for tokens, patches, number in self._waiting.in_order()],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state.

        Raises:
            ValueError: the state has another version, comes from a planner with other options, or is one that no
                planner has. This planner is then as it was.
        """
        expected = {"version": _VERSION, **self._options()}
        for name, value in expected.items():
            if state.get(name) != value:
                raise ValueError(
                    f"PackPlanner: the state has {name}={state.get(name)!r}, but this planner has {value}; make the "
                    "planner with the options of the saved one"
                )
        check_state(state, self.token_budget, (self.ranks + self.lookahead) * self.token_budget)
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
    """Cut samples whose costs are all known into steps. Needs fewer packs than ``PackPlanner``, in another order.

    Packs are filled with the longest samples first, and shorter ones fill the room left (first-fit decreasing). Packs
    with similar numbers of patches form a step. The samples of left-over packs are distributed over the ranks of the
    last step; only its packs may be nearly or completely empty. The other steps are in the order of their first
    samples.

    Args:
        tokens, patches, token_budget, ranks, too_long: as in ``PackPlanner``. Samples are numbered in their order.

    Returns:
        Steps of ``ranks`` packs of ascending indices, ``steps[step][rank]``.

    Raises:
        ValueError, TypeError: as in ``PackPlanner`` and its ``push``.
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
