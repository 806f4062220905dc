"""Checks of the planner's arguments."""

import logging
from operator import index as as_int

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
