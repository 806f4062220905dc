"""Which samples go into which pack: token budgets filled, vision patches balanced across ranks, before any tensor."""

import logging
from operator import index as as_int
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lynx_kernels.backends import cpu as cpu_backend
from lynx_kernels.backends import dispatch
from lynx_kernels.packing import reference
from lynx_kernels.packing.reference import Step

logger = logging.getLogger(__name__)

_VERSION = 1  # of the state
_LIMIT = 2**31  # of every number: sums and products then fit in 64 bits
_NOTHING = np.zeros(0, np.int64)


class _Compiled:
    """``lynx_kernels._host``'s planner, which takes addresses."""

    def __init__(self, token_budget: int, ranks: int, lookahead: int):
        self._planner = cpu_backend.module.Planner(token_budget, ranks, lookahead)
        self.flush, self.waiting, self.restore = self._planner.flush, self._planner.waiting, self._planner.restore

    @property
    def num_seen(self) -> int:
        return self._planner.num_seen

    def push(self, tokens: NDArray, patches: NDArray) -> list[Step]:
        return self._planner.push(tokens.ctypes.data, patches.ctypes.data, tokens.size)

    @staticmethod
    def plan_known(tokens: NDArray, patches: NDArray, token_budget: int, ranks: int) -> list[Step]:
        return cpu_backend.module.plan_known(tokens.ctypes.data, patches.ctypes.data, tokens.size, token_budget, ranks)


class _Plain(reference.Planner):
    def push(self, tokens: Any, patches: Any) -> list[Step]:
        return super().push(tokens.tolist(), patches.tolist())

    @staticmethod
    def plan_known(tokens: NDArray, patches: NDArray, token_budget: int, ranks: int) -> list[Step]:
        return reference.plan_known(tokens.tolist(), patches.tolist(), token_budget, ranks)


_FORMS: dict[str, type[_Compiled] | type[_Plain]] = {"cpu": _Compiled, "reference": _Plain}
OPERATION = dispatch.Operation(
    "planner",
    dispatch.Implementation("cpu", _Compiled, unsupported_reason=lambda: cpu_backend.MISSING),
    dispatch.Implementation("reference", _Plain),
)


class PackPlanner:
    """Cuts a stream of samples into steps, a pack for each rank, without knowing what is still to come.

    >>> planner = PackPlanner(token_budget=4096, ranks=8)
    >>> for step in planner.push(tokens, patches):  # as often as you like, one sample or a million
    ...     train_on(step)                          # step[rank] holds indices of samples
    >>> for step in planner.flush():                # the end: what still waits
    ...     train_on(step)

    Samples are numbered 0, 1, 2, ... as they are pushed. Every one is in exactly one pack, ascending there. No pack has
    more tokens than ``token_budget``; vision patches are balanced across the ranks of a step, as far as that leaves the
    budgets alone. The steps depend on nothing but the samples and their order: not on how they were cut into calls of
    ``push``, not on ``impl``. ``reference`` says how a step is made. A sample leaves with one of the first
    ``max_wait`` steps made after it came. After ``flush`` the last step may be short, and where fewer samples than
    ranks are left some of its packs are empty.

    Args:
        token_budget: the most language-model tokens of a pack, vision tokens included.
        ranks: how many packs a step has.
        lookahead: how many packs full of tokens may wait, beside those of the next step. More fills packs better and
            lets samples wait longer. 16 fills them to 99 % with picture captions and answers.
        too_long: what becomes of a sample with more tokens than the budget: ``"error"``, or ``"skip"``: it is left out,
            counted and logged.
        impl: ``"cpu"``, compiled; ``"reference"``, plain Python, the same steps; None takes the first that can run.

    Attributes:
        skipped: how many samples were left out so far.

    Raises:
        ValueError: an argument is out of range.
        RuntimeError: ``impl`` cannot run.
    """

    def __init__(
        self,
        token_budget: int,
        *,
        ranks: int = 1,
        lookahead: int = 16,
        too_long: str = "error",
        impl: str | None = None,
    ):
        _check_options(token_budget=(token_budget, 1), ranks=(ranks, 1), lookahead=(lookahead, 0))
        _check_too_long(too_long)
        self.token_budget, self.ranks, self.lookahead = as_int(token_budget), as_int(ranks), as_int(lookahead)
        self.too_long = too_long
        self.skipped = 0
        form = _FORMS[OPERATION.choose(impl)]
        self._planner = form(self.token_budget, self.ranks, self.lookahead)

    @property
    def max_wait(self) -> int:
        """The most steps that are made after a sample came until it leaves, its own included."""
        return 4 * (self.ranks + self.lookahead) + 1

    @property
    def num_seen(self) -> int:
        """How many samples were pushed, skipped ones included: the number of the next one."""
        return self._planner.num_seen

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
        costs = _costs(tokens, patches, self.num_seen)
        self.skipped += _leave_out(costs[0], self.token_budget, self.too_long, self.num_seen, self.skipped)
        return self._planner.push(*costs)

    def flush(self) -> list[Step]:
        """The steps of all samples that still wait. More may be pushed afterwards."""
        return self._planner.flush()

    def state_dict(self) -> dict[str, Any]:
        """What ``load_state_dict`` needs to go on from here exactly: ints and lists of ints."""
        return {
            "version": _VERSION,
            **self._options(),
            "num_seen": self.num_seen,
            "skipped": self.skipped,
            "waiting": [list(sample) for sample in self._planner.waiting()],  # index, tokens, patches
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state, whichever implementation it comes from.

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
        self.skipped = state["skipped"]
        self._planner.restore(state["num_seen"], [tuple(sample) for sample in state["waiting"]])

    def _options(self) -> dict[str, int]:
        return {"token_budget": self.token_budget, "ranks": self.ranks, "lookahead": self.lookahead}


def plan_packs(
    tokens: ArrayLike,
    patches: ArrayLike | None = None,
    *,
    token_budget: int,
    ranks: int = 1,
    too_long: str = "error",
    impl: str | None = None,
) -> list[Step]:
    """Cut samples whose costs are all known into steps: fewer packs than ``PackPlanner`` needs, in no order of arrival.

    The longest go first and shorter ones fill the rest: first-fit decreasing. Packs with like numbers of patches make a
    step; what does not fill one is shared among the ranks of the last, where alone packs may be nearly or quite empty.
    The other steps stand in the order of their first samples.

    Args:
        tokens, patches, token_budget, ranks, too_long, impl: as of ``PackPlanner``; samples are numbered as they stand.

    Returns:
        Steps of ``ranks`` packs of ascending indices, ``steps[step][rank]``.

    Raises:
        ValueError, TypeError, RuntimeError: as ``PackPlanner`` and its ``push`` do.
    """
    _check_options(token_budget=(token_budget, 1), ranks=(ranks, 1))
    _check_too_long(too_long)
    form = _FORMS[OPERATION.choose(impl)]
    costs = _costs(tokens, patches, 0)
    _leave_out(costs[0], as_int(token_budget), too_long, 0, 0)
    return form.plan_known(*costs, as_int(token_budget), as_int(ranks))


def _check_options(**options: tuple[int, int]) -> None:
    for name, (value, least) in options.items():
        if not least <= as_int(value) < _LIMIT:
            raise ValueError(f"planner: {name}={value}, expected {least} to 2^31 - 1")


def _check_too_long(too_long: str) -> None:
    if too_long not in ("error", "skip"):
        raise ValueError(f"planner: too_long={too_long!r}, expected 'error' or 'skip'")


def _costs(tokens: ArrayLike, patches: ArrayLike | None, num_seen: int) -> tuple[NDArray, NDArray]:
    lengths = _integers("tokens", tokens, 1, num_seen)
    if patches is None:
        return lengths, np.zeros_like(lengths)
    found = _integers("patches", patches, 0, num_seen)
    if found.shape != lengths.shape:
        raise ValueError(f"planner: {found.size} patches for {lengths.size} tokens, expected one for each sample")
    return lengths, found


def _integers(name: str, values: ArrayLike, least: int, num_seen: int) -> NDArray:
    found = np.atleast_1d(np.asarray(values))
    if found.size == 0:
        return _NOTHING
    if found.dtype.kind not in "iu":
        raise TypeError(f"planner: {name} are {found.dtype}, expected integers")
    if found.ndim != 1:
        raise ValueError(f"planner: {name} have shape {found.shape}, expected one number for each sample")
    wrong = (found < least) | (found >= _LIMIT)
    if wrong.any():
        first = int(wrong.argmax())
        raise ValueError(f"planner: sample {num_seen + first} has {found[first]} {name}, expected {least} to 2^31 - 1")
    return np.ascontiguousarray(found, np.int64)


def _leave_out(tokens: NDArray, token_budget: int, too_long: str, num_seen: int, skipped: int) -> int:
    # How many samples are longer than the budget; the implementations leave them out.
    wrong = tokens > token_budget
    count = int(np.count_nonzero(wrong))
    if count == 0:
        return 0
    first = int(wrong.argmax())
    said = f"sample {num_seen + first} has {tokens[first]} tokens, more than token_budget={token_budget}"
    if too_long == "error":
        raise ValueError(f"planner: {said}; cut it, raise the budget, or leave such samples out with too_long='skip'")
    logger.warning("%s; skipped (%d in this call, %d so far)", said, count, skipped + count)
    return count
