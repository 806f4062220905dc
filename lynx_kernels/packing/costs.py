"""Checks of the planner's arguments."""

import logging
from operator import index as as_int
from typing import Any, NoReturn

import numpy as np
from numpy.typing import ArrayLike, NDArray

logger = logging.getLogger("lynx_kernels.packing")

_LIMIT = 2**31  # limit of every number, so that sums and products fit in 64 bits


def check_options(too_long: str, **options: tuple[int, int]) -> None:
    """Raise ValueError unless ``too_long`` is valid and each option, a (value, minimum), is in range."""
    for name, (value, minimum) in options.items():
        if not minimum <= as_int(value) < _LIMIT:
            raise ValueError(f"planner: {name}={value}, expected {minimum} to 2^31 - 1")
    if too_long not in ("error", "skip"):
        raise ValueError(f"planner: too_long={too_long!r}, expected 'error' or 'skip'")


def check_costs(tokens: ArrayLike, patches: ArrayLike | None, num_seen: int) -> tuple[list[int], list[int]]:
    """The tokens and the patches of the samples, as ints.

    Args:
        num_seen: the number (index in the stream) of the first sample.

    Raises:
        ValueError: a cost is out of range; the message names the sample.
        TypeError: costs are not integers.
    """
    if type(tokens) is int and type(patches) is int and 1 <= tokens < _LIMIT and 0 <= patches < _LIMIT:
        return [tokens], [patches]  # one sample, as in a stream: numpy takes ten times as long
    lengths = _integers("tokens", tokens, 1, num_seen)
    if patches is None:
        return lengths.tolist(), [0] * lengths.size
    found = _integers("patches", patches, 0, num_seen)
    if found.size != lengths.size:
        raise ValueError(f"planner: {found.size} patches for {lengths.size} tokens, expected one for each sample")
    return lengths.tolist(), found.tolist()


def _integers(name: str, values: ArrayLike, minimum: int, num_seen: int) -> NDArray[np.integer]:
    found = np.atleast_1d(np.asarray(values))
    if found.size == 0:
        return np.zeros(0, np.int64)
    if found.dtype.kind not in "iu":
        raise TypeError(f"planner: {name} are {found.dtype}, expected integers")
    if found.ndim != 1:
        raise ValueError(f"planner: {name} have shape {found.shape}, expected one number for each sample")
    wrong = (found < minimum) | (found >= _LIMIT)
    if wrong.any():
        first = int(wrong.argmax())
        raise ValueError(
            f"planner: sample {num_seen + first} has {found[first]} {name}, expected {minimum} to 2^31 - 1"
        )
    return found


def count_too_long(tokens: list[int], token_budget: int, too_long: str, num_seen: int, skipped: int) -> int:
    """The number of samples longer than the budget, which are to be skipped.

    Args:
        too_long: ``"error"`` raises; ``"skip"`` logs a warning.
        num_seen, skipped: the number of the first sample, and how many were skipped before.

    Raises:
        ValueError: a sample is too long, and ``too_long`` is ``"error"``.
    """
    if not tokens or max(tokens) <= token_budget:
        return 0
    wrong = [place for place, length in enumerate(tokens) if length > token_budget]
    problem = f"sample {num_seen + wrong[0]} has {tokens[wrong[0]]} tokens, more than token_budget={token_budget}"
    if too_long == "error":
        raise ValueError(f"planner: {problem}; truncate it, raise the budget, or skip such samples (too_long='skip')")
    logger.warning("%s; skipped (%d in this call, %d so far)", problem, len(wrong), skipped + len(wrong))
    return len(wrong)


def check_state(state: dict[str, Any], token_budget: int, enough: int) -> None:
    """Raise ValueError for a state that no planner has: from some of these it would make empty steps for ever.

    Args:
        state: what ``PackPlanner.load_state_dict`` was given.
        token_budget: of the planner.
        enough: so many waiting tokens make a step.
    """

    def refuse(problem: str) -> NoReturn:
        raise ValueError(f"PackPlanner: the state is not one of a planner: {problem}; is it truncated or edited?")

    def integer(name: str, value: Any, least: int, most: int) -> int:
        if type(value) is not int or not least <= value <= most:
            refuse(f"{name} is {value!r}, expected an integer from {least} to {most}")
        return value

    waiting = state.get("waiting")
    if not isinstance(waiting, list | tuple):
        refuse(f"waiting is {waiting!r}, expected a list")
    num_seen = integer("num_seen", state.get("num_seen"), len(waiting), 2**63 - 1)
    integer("skipped", state.get("skipped"), 0, num_seen - len(waiting))
    before, total = -1, 0
    for place, sample in enumerate(waiting):
        if not isinstance(sample, list | tuple) or len(sample) != 3:
            refuse(f"waiting[{place}] is {sample!r}, expected [number, tokens, patches]")
        before = integer(f"waiting[{place}]: number", sample[0], before + 1, num_seen - 1)
        total += integer(f"waiting[{place}]: tokens", sample[1], 1, token_budget)
        integer(f"waiting[{place}]: patches", sample[2], 0, _LIMIT - 1)
    if total >= enough:
        refuse(f"{total} tokens wait, but {enough} make a step")
