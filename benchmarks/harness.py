"""The frame of every benchmark: check, time in turns, measure memory.

Providers that answer the same question are checked first, and a wrong one is not timed. The others are timed in
rounds, each provider once a round, so that whatever slows the machine for a while slows all of them, and a ratio is
taken within a round. A floor is a provider too: what no implementation can be faster than, timed in the same rounds.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import quantiles
from typing import Any

from torch import Tensor

from benchmarks import memory
from benchmarks.rows import OURS, RATIO, SHARE, Row, circumstances
from benchmarks.timing import Batch, Timer, batches, copying, running_on, timer_of

CALL_SECONDS = 2.0  # a case whose calls are expected to take longer is left out
_ROUND_SECONDS = 0.01  # a provider's share of a round: enough calls that the clock does not matter
_CASE_SECONDS = 10.0  # rounds are fewer where they would take longer together, but at least:
_FEWEST_ROUNDS = 5


@dataclass(frozen=True)
class Setup:
    """A case ready to run.

    Attributes:
        providers: by name; a call with one of ``copies`` does the work once. The first is the baseline; the names of
            our own begin with "lynx ", what ``impl=None`` takes before the others.
        copies: inputs, several where they have to be cold (``timing.cold_copies``).
        check: raises AssertionError for a provider (by name) whose numbers are wrong; its message is stored.
        floors: which providers are floors. Where ``traffic`` is given, a copy of as many bytes is one more.
        flops, traffic: the operation's own work, in FLOP or in bytes from and to memory, whichever bounds it.
        items: how many things of its own (samples, say) a call works through, where that measures its work.
        qualities: numbers that a call's result is judged by, by name: how full, how balanced.
        device: "cpu", "cuda", or "host" for what makes no tensors, whose memory is then not measured.
        captured: on a GPU, time CUDA graphs: where calls are so short that launching them would be most of the time.
        parameters: tensors of ``copies[0]`` that stay alive anyway. Where they are given, the memory of all other
            tensors that are saved for backward is measured.
        left_out: why other providers, by name, do not answer; stored and shown.
        threads: of PyTorch, where the case asks for its own number; it is then part of its shape.
        frames: how many a call handles; where given, rates are in frames too.
        tokens: how many a call generates or learns from, likewise.
    """

    providers: Mapping[str, Callable[[Any], object]]
    copies: Sequence[Any] = (None,)
    check: Callable[[str], None] = lambda name: None
    floors: tuple[str, ...] = ()
    flops: float = 0
    traffic: float = 0
    items: float = 0
    qualities: Mapping[str, Callable[[Any], float]] = field(default_factory=dict)
    device: str = "cpu"
    captured: bool = False
    parameters: Sequence[Tensor] = ()
    left_out: Mapping[str, str] = field(default_factory=dict)
    threads: int | None = None
    frames: int = 0
    tokens: int = 0


@dataclass(frozen=True)
class Case:
    """One question, not yet built: building takes memory and a reference in fp64.

    Attributes:
        mode: "forward", "train" (forward and backward), ...
        shape: as in ``Row``.
        providers: names that may answer; one that cannot run is missing from what ``build`` returns.
        seconds: what a call is expected to take.
    """

    kernel: str
    mode: str
    shape: str
    build: Callable[[], Setup]
    providers: tuple[str, ...] = ()
    seconds: float = 0.0

    def __str__(self) -> str:
        return f"{self.kernel} {self.mode} {self.shape}"

    @property
    def left_out(self) -> str | None:
        """Why the case does not fit this machine, or None."""
        if self.seconds <= CALL_SECONDS:
            return None
        return f"a call would take about {self.seconds:.1f} s, more than {CALL_SECONDS:g}"


def measure(case: Case, *, rounds: int, timer: Timer | None = None) -> list[Row]:
    """Check one case, time it and measure its memory; rows in the order of its providers."""
    setup = case.build()
    about = {"kernel": case.kernel, "mode": case.mode, "shape": case.shape, **circumstances()}
    with running_on(setup.threads):
        return _measure(setup, about, rounds, timer or timer_of(setup.device))


def _measure(setup: Setup, about: dict[str, str], rounds: int, timer: Timer) -> list[Row]:
    refused = {name: why for name in setup.providers if (why := _not_timed_reason(setup, name))}
    entrants = {name: (call, setup.copies) for name, call in setup.providers.items() if name not in refused}
    floors = setup.floors
    if setup.traffic:
        floors = (*floors, "copy")
        entrants["copy"] = copying(setup.traffic, setup.device)
    made = batches(entrants, setup.captured and setup.device == "cuda")
    times = _time(made, rounds, timer)
    rows = []
    absent = refused | {name: ("left out", why) for name, why in setup.left_out.items()}
    for name in dict.fromkeys([*setup.providers, *entrants, *absent]):
        if name in absent:
            metric, note = absent[name]
            rows.append(Row(provider=name, metric=metric, p20=0, p50=0, p80=0, note=note, **about))
            continue
        values = {"time": [1e6 * each for each in times[name]], **_comparisons(name, times, setup, floors)}
        if setup.flops:
            values["TFLOP/s"] = [1e-12 * setup.flops / each for each in times[name]]
        if setup.traffic:
            values["GB/s"] = [1e-9 * setup.traffic / each for each in times[name]]
        if setup.items:
            values["M items/s"] = [1e-6 * setup.items / each for each in times[name]]
        if setup.frames and name not in floors:
            values["frames/s"] = [setup.frames / each for each in times[name]]
        if setup.tokens and name not in floors:
            values["tokens/s"] = [setup.tokens / each for each in times[name]]
        call = partial(setup.providers[name], setup.copies[0]) if name in setup.providers else None
        if call is not None and setup.qualities:
            result = call()
            values |= {quality: [ask(result)] * 2 for quality, ask in setup.qualities.items()}
        if call is not None and name not in floors and setup.device != "host":
            values["peak memory"] = [memory.peak(call, setup.device) / 2**20] * 2
            if setup.parameters:
                values["saved memory"] = [memory.saved(call, setup.parameters) / 2**20] * 2
        rows += [_row(name, metric, each, made[name].note, about) for metric, each in values.items()]
    return rows


def _not_timed_reason(setup: Setup, name: str) -> tuple[str, str] | None:
    """Why a provider is not timed, as metric and note, or None."""
    try:
        setup.check(name)
    except AssertionError as error:
        return "wrong", _first_line(error)
    except Exception as error:  # a peer that does not compile or does not fit is a result, not the end of the run
        return "failed", f"{type(error).__name__}: {_first_line(error)}"
    return None


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "no message")


def _comparisons(name: str, times: dict[str, list[float]], setup: Setup, floors: tuple[str, ...]) -> dict:
    """Ratios to the baseline, of ours to every peer too, and shares of the floors: metric to a value each round."""
    baseline = next(iter(setup.providers))
    peers = [each for each in times if each not in floors and not each.startswith(OURS)]
    asked = {RATIO + peer: peer for peer in peers if peer == baseline or name.startswith(OURS)}
    if name not in floors:
        asked |= {SHARE + floor: floor for floor in floors if floor in times}
    return {
        metric: [theirs / own for theirs, own in zip(times[other], times[name], strict=True)]
        for metric, other in asked.items()
    }


def _row(provider: str, metric: str, values: list[float], note: str, about: dict[str, str]) -> Row:
    tenths = quantiles(values, n=10, method="inclusive")
    return Row(provider=provider, metric=metric, p20=tenths[1], p50=tenths[4], p80=tenths[7], note=note, **about)


def _time(made: Mapping[str, Batch], rounds: int, timer: Timer) -> dict[str, list[float]]:
    """Seconds a call, for each provider and round."""
    repeats, expected = {}, 0.0
    for name, batch in made.items():
        timer(batch.run, 2)  # compiles, allocates
        seconds = max(timer(batch.run, 1), 1e-9)
        repeats[name] = max(1, min(1000, int(_ROUND_SECONDS / seconds)))
        expected += repeats[name] * seconds
    if expected * rounds > _CASE_SECONDS:
        rounds = min(rounds, max(_FEWEST_ROUNDS, int(_CASE_SECONDS / expected)))
    times: dict[str, list[float]] = {name: [] for name in made}
    for _ in range(rounds):
        for name, batch in made.items():
            times[name].append(timer(batch.run, repeats[name]) / batch.calls)
    return times
