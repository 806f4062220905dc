"""A watch over losses, gradients and weights: a run with numbers that are not finite stops before it saves them."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lynx.train import checkpoints

_PATIENCE = 100  # steps between checks where nothing is logged or saved
_SHOWN = 5  # records that a message names


class NotFiniteError(ValueError):
    """A run came to a loss, a gradient or a weight that is NaN or infinite; the message says where."""


class _Seen(NamedTuple):
    step: int
    what: str
    value: torch.Tensor  # on the device
    records: tuple[str, ...]


class _Found(NamedTuple):
    step: int
    what: str
    records: tuple[str, ...]


class FiniteWatch:
    """Remembers numbers of each step on the device, and looks at them together: the device is not waited for between.

    Args:
        stage: the name of the stage, for the message.
        folder: where its checkpoints lie.
        device: of the model.
    """

    def __init__(self, stage: str, folder: Path, device: torch.device):
        self.stage, self.folder, self.device = stage, folder, device
        self._seen: list[_Seen] = []
        self._checked = 0

    def see(self, step: int, what: str, value: torch.Tensor | float | None, records: Sequence[str] = ()) -> None:
        """Remember a number: of which step, in words what it is, and the records it was computed from."""
        if value is not None:
            value = _local(torch.as_tensor(value).detach())
            self._seen.append(_Seen(step, what, value.to(self.device, non_blocking=True), tuple(records)))

    def is_due(self, step: int) -> bool:
        """Whether it is long since the last check; the same on every rank."""
        return step - self._checked >= _PATIENCE

    def check(self, step: int, weights: Mapping[str, torch.Tensor] | None = None, others: Iterable[Any] = ()) -> None:
        """Look at all numbers since the last check; every rank comes to the same verdict.

        Args:
            step: how many steps have been made.
            weights: what is to be saved, looked at too.
            others: more that is to be saved, the optimizer's; what is no floating tensor is passed over.

        Raises:
            NotFiniteError: one of them is NaN or infinite, on any rank.
        """
        self._checked = step
        found = self._first() or self._in_weights(step, weights or {}, others)
        every = [found]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            every = every * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(every, found)
        bad = [each for each in every if each is not None]
        if not bad:
            return
        first = min(each.step for each in bad)
        # A loss goes before the gradients that it made, and one that names its records before one that cannot.
        worst = min((each for each in bad if each.step == first), key=lambda each: not each.records)
        raise NotFiniteError(
            f"stage {self.stage}: {worst.what} of step {worst.step}{_named(worst.records)}. Nothing of it was saved; "
            f"{checkpoints.describe_latest(self.folder)}. Look at these records, or train with a lower learning_rate, "
            "a longer warmup or precision=fp32"
        )

    def _first(self) -> _Found | None:
        seen, self._seen = self._seen, []
        if not seen:
            return None
        values = torch.stack([each.value.float().reshape(()) for each in seen]).tolist()
        for each, value in zip(seen, values, strict=True):
            if value != value or abs(value) == float("inf"):
                return _Found(each.step, f"{each.what} is {value}, that", each.records)
        return None

    def _in_weights(self, step: int, weights: Mapping[str, torch.Tensor], others: Iterable[Any]) -> _Found | None:
        named = [(f"the weights {name} are", value) for name, value in weights.items()]
        named += [("the optimizer's state is", value) for value in others]
        named = [(what, value) for what, value in named if torch.is_tensor(value) and value.is_floating_point()]
        if not named:
            return None
        checks = [_local(value).isfinite().all().to(self.device) for _, value in named]
        for (what, _), is_finite in zip(named, torch.stack(checks).tolist(), strict=True):
            if not is_finite:
                return _Found(step, f"{what} not finite, those", ())
        return None


def _local(value: torch.Tensor) -> torch.Tensor:
    """This rank's part of a tensor that is spread over the ranks."""
    return value.to_local() if hasattr(value, "to_local") else value


def _named(records: Sequence[str]) -> str:
    if not records:
        return ""
    more = f" and {len(records) - _SHOWN} more" if len(records) > _SHOWN else ""
    return f", from the records {', '.join(records[:_SHOWN])}{more}"
