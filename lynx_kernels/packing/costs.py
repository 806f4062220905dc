"""The checks of what a caller hands to the planner."""

import logging
from operator import index as as_int

import numpy as np
from numpy.typing import ArrayLike, NDArray

logger = logging.getLogger("lynx_kernels.packing")

_LIMIT = 2**31  # of every number: sums and products then fit in 64 bits


def check_options(too_long: str, **options: tuple[int, int]) -> None:
    """Raise ValueError unless each option, given with its least value, is in range and ``too_long`` is known."""
    for name, (value, least) in options.items():
        if not least <= as_int(value) < _LIMIT:
            raise ValueError(f"planner: {name}={value}, expected {least} to 2^31 - 1")
    if too_long not in ("error", "skip"):
        raise ValueError(f"planner: too_long={too_long!r}, expected 'error' or 'skip'")


def check_costs(tokens: ArrayLike, patches: ArrayLike | None, num_seen: int) -> tuple[list[int], list[int]]:
    """The samples' tokens and patches as ints.

    Args:
        num_seen: the number of the first sample.

    Raises:
        ValueError: a cost is out of range; the message names the sample.
        TypeError: costs are not integers.
    """
    if type(tokens) is int and type(patches) is int and 1 <= tokens < _LIMIT and 0 <= patches < _LIMIT:
        return [tokens], [patches]  # one sample at a time, as streams come: numpy takes ten times as long
    lengths = _integers("tokens", tokens, 1, num_seen)
    if patches is None:
        return lengths.tolist(), [0] * lengths.size
    found = _integers("patches", patches, 0, num_seen)
    if found.size != lengths.size:
        raise ValueError(f"planner: {found.size} patches for {lengths.size} tokens, expected one for each sample")
    return lengths.tolist(), found.tolist()


def _integers(name: str, values: ArrayLike, least: int, num_seen: int) -> NDArray[np.integer]:
    found = np.atleast_1d(np.asarray(values))
    if found.size == 0:
        return np.zeros(0, np.int64)
    if found.dtype.kind not in "iu":
        raise TypeError(f"planner: {name} are {found.dtype}, expected integers")
    if found.ndim != 1:
        raise ValueError(f"planner: {name} have shape {found.shape}, expected one number for each sample")
    wrong = (found < least) | (found >= _LIMIT)
    if wrong.any():
        first = int(wrong.argmax())
        raise ValueError(f"planner: sample {num_seen + first} has {found[first]} {name}, expected {least} to 2^31 - 1")
    return found


def count_too_long(tokens: list[int], token_budget: int, too_long: str, num_seen: int, skipped: int) -> int:
    """How many samples are longer than the budget and are to be left out.

    Args:
        too_long: ``"error"``, or ``"skip"``: they are logged.
        num_seen, skipped: the number of the first sample, and how many were left out before.

    Raises:
        ValueError: there are some, and ``too_long`` is ``"error"``.
    """
    if not tokens or max(tokens) <= token_budget:
        return 0
    wrong = [place for place, length in enumerate(tokens) if length > token_budget]
    said = f"sample {num_seen + wrong[0]} has {tokens[wrong[0]]} tokens, more than token_budget={token_budget}"
    if too_long == "error":
        raise ValueError(f"planner: {said}; cut it, raise the budget, or leave such samples out with too_long='skip'")
    logger.warning("%s; skipped (%d in this call, %d so far)", said, len(wrong), skipped + len(wrong))
    return len(wrong)
