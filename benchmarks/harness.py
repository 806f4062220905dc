"""The frame of every benchmark: check, time in turns, store.

Providers that answer the same question are checked first, and a wrong one is not timed. The others are timed in
rounds, each provider once a round, so that whatever slows the machine for a while slows all of them, and a ratio is
taken within a round. What comes out is one tidy row per provider, mode, shape and metric.
"""

import csv
import platform
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from statistics import quantiles

import torch
import triton

RESULTS = Path(__file__).parent / "results"
_ROUND_SECONDS = 0.01  # a provider's share of a round: enough calls that the clock does not matter


@dataclass(frozen=True)
class Case:
    """One question: a mode ("forward", ...), a shape, and what answers it.

    Attributes:
        providers: by name; each call does the work once. The first is the baseline of ``ratio``.
        check: raises AssertionError for a provider (by name) whose numbers are wrong; its message is stored.
    """

    kernel: str
    mode: str
    shape: str
    providers: Mapping[str, Callable[[], object]]
    check: Callable[[str], None] = lambda name: None


@dataclass(frozen=True)
class Row:
    """One line of results. ``metric`` is "time" (microseconds), "ratio" (the baseline's time over this provider's,
    round by round: above 1 is faster than the baseline) or "wrong" (no numbers, ``note`` says why)."""

    kernel: str
    provider: str
    mode: str
    metric: str
    shape: str
    p20: float
    p50: float
    p80: float
    device: str
    versions: str
    commit: str
    time: str
    note: str = ""


def measure(case: Case, *, rounds: int, clock: Callable[[], float] = time.perf_counter) -> list[Row]:
    """Check and time one case; rows in the order of its providers."""
    about = {"kernel": case.kernel, "mode": case.mode, "shape": case.shape, **_circumstances()}
    wrong: dict[str, str] = {}
    for name in case.providers:
        try:
            case.check(name)
        except AssertionError as error:
            wrong[name] = str(error).splitlines()[0] if str(error) else "wrong"
    right = {name: call for name, call in case.providers.items() if name not in wrong}
    times = _time(right, rounds, clock)
    baseline = next(iter(case.providers))
    rows = []
    for name in case.providers:
        if name in wrong:
            rows.append(Row(provider=name, metric="wrong", p20=0, p50=0, p80=0, note=wrong[name], **about))
            continue
        rows.append(_row(name, "time", [1e6 * each for each in times[name]], about))
        if baseline in times:
            ratios = [base / own for base, own in zip(times[baseline], times[name], strict=True)]
            rows.append(_row(name, "ratio", ratios, about))
    return rows


def _row(provider: str, metric: str, values: list[float], about: dict[str, str]) -> Row:
    tenths = quantiles(values, n=10, method="inclusive")
    return Row(provider=provider, metric=metric, p20=tenths[1], p50=tenths[4], p80=tenths[7], **about)


def _time(
    providers: Mapping[str, Callable[[], object]], rounds: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    def seconds(call: Callable[[], object], repeats: int) -> float:
        start = clock()
        for _ in range(repeats):
            call()
        return (clock() - start) / repeats

    repeats = {}
    for name, call in providers.items():
        seconds(call, 2)  # compiles, allocates
        repeats[name] = max(1, min(1000, int(_ROUND_SECONDS / max(seconds(call, 1), 1e-9))))
    times: dict[str, list[float]] = {name: [] for name in providers}
    for _ in range(rounds):
        for name, call in providers.items():
            times[name].append(seconds(call, repeats[name]))
    return times


def _circumstances() -> dict[str, str]:
    return {
        "device": _device(),
        "versions": f"torch {torch.__version__}, triton {triton.__version__}, python {platform.python_version()}",
        "commit": _commit(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _device() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    said = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in info.splitlines())}
    name = said.get("model name", platform.processor() or platform.machine())
    family = f" family {said['cpu family']} model {said['model']}" if "cpu family" in said else ""
    return f"{name}{family}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"


def _commit() -> str:
    def git(*arguments: str) -> str:
        root = Path(__file__).parent
        return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True).stdout.strip()

    try:
        # Results and reports change with every run; only a change of code makes a commit inexact.
        changed = git("status", "--porcelain", "--", "..", ":!results", ":!RESULTS.md", ":!plots")
        return git("rev-parse", "--short", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def append(rows: list[Row], path: Path) -> None:
    """Add rows to a CSV file, which gets a header when it is new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, [each.name for each in fields(Row)], lineterminator="\n")
        if is_new:
            writer.writeheader()
        for row in rows:
            numbers = {name: f"{getattr(row, name):.5g}" for name in ("p20", "p50", "p80")}
            writer.writerow({**asdict(row), **numbers})


def read(folder: Path = RESULTS) -> list[Row]:
    """All stored rows, of every file, oldest first."""
    rows = []
    for path in sorted(folder.glob("*.csv")):
        with path.open(newline="") as file:
            for line in csv.DictReader(file):
                p20, p50, p80 = (float(line.pop(name)) for name in ("p20", "p50", "p80"))
                rows.append(Row(p20=p20, p50=p50, p80=p80, **line))
    return sorted(rows, key=lambda row: row.time)


def table(rows: list[Row]) -> str:
    """The rows of one case, a line a provider, the ratio first."""
    ratios = {row.provider: row for row in rows if row.metric == "ratio"}
    lines = []
    for row in rows:
        if row.metric == "wrong":
            lines.append(f"  {'WRONG':>18}  {row.provider}: {row.note}")
        elif row.metric == "time":
            ratio = ratios.get(row.provider)
            said = f"{ratio.p50:.2f} ({ratio.p20:.2f}-{ratio.p80:.2f})" if ratio else "-"
            lines.append(f"  {said:>18}  {row.provider:<14} {row.p50:10.0f} us ({row.p20:.0f}-{row.p80:.0f})")
    return "\n".join([f"{rows[0].kernel} {rows[0].mode} {rows[0].shape}", *lines])
