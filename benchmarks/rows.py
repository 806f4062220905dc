"""What a benchmark leaves behind: one tidy row per provider, mode, shape and metric, appended to CSV files."""

import csv
import platform
import subprocess
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path

import torch
import triton

RESULTS = Path(__file__).parent / "results"
OURS = "lynx "  # what the names of our own providers begin with
RATIO = "ratio to "
SHARE = "share of "
RATES = ("TFLOP/s", "GB/s", "frames/s", "tokens/s", "M items/s")
MEMORY = ("peak memory", "saved memory")
NO_NUMBERS = ("wrong", "failed", "left out")
# What stored rows of earlier code call otherwise; the words in their shapes and their providers stay.
_KERNELS_NOW = {"loss": "linear_cross_entropy"}
_METRICS_NOW = {"fill": "pack_utilization"}


@dataclass(frozen=True)
class Row:
    """One line of results.

    Attributes:
        provider: who was measured; our own begin with "lynx ", the best one first.
        metric: "time" (microseconds a call); "ratio to P" (P's time over this one's, round by round: above 1 is faster
            than P); "share of F" (the same for a floor F, so at most about 1); "TFLOP/s", "GB/s", "frames/s",
            "tokens/s" or "M items/s" of the operation's own work; "peak memory" (the most MiB that a call has allocated
            at one time, its results included); "saved memory" (MiB that stay alive between forward and backward,
            parameters not counted); "wrong", "failed" or "left out" (no numbers, ``note`` says why). Any other is a
            quality of the result (``Setup.qualities``).
        shape: dtype and sizes; the last ``name=value`` is what grows, the rest is a group that belongs together.
        p20, p50, p80: percentiles over rounds.
    """

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

    @property
    def case(self) -> tuple[str, ...]:
        """What rows must share to be compared; the device is part of it, so rows of different machines never meet."""
        return self.device, self.kernel, self.mode, self.shape

    @property
    def group(self) -> str:
        """The shape without what grows."""
        return self.shape.rpartition(" ")[0]

    @property
    def dtype_and_workload(self) -> tuple[str, str]:
        """The first word of the shape, and the rest."""
        dtype, _, workload = self.shape.partition(" ")
        return dtype, workload

    @property
    def grows(self) -> tuple[str, int]:
        """Name and value of what grows, the last word of the shape."""
        name, _, value = self.shape.rpartition(" ")[2].partition("=")
        return name, int(value)


def circumstances() -> dict[str, str]:
    """Where, with what and when: the columns that are the same for every row of a case."""
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
        # Results and what is written from them change with every run; only a change of code makes a commit inexact.
        generated = (":!results", ":!../docs/benchmarks.md", ":!../README.md")
        changed = git("status", "--porcelain", "--", "..", *generated)
        return git("rev-parse", "--short", "HEAD") + ("-dirty" if changed else "")
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
                line["kernel"] = _KERNELS_NOW.get(line["kernel"], line["kernel"])
                line["metric"] = _METRICS_NOW.get(line["metric"], line["metric"])
                rows.append(Row(p20=p20, p50=p50, p80=p80, **line))
    return sorted(rows, key=lambda row: row.time)


def newest(rows: list[Row]) -> list[Row]:
    """The rows of the newest run of every case; ``rows`` are oldest first."""

    def case(row: Row) -> tuple[str, ...]:
        return *row.case[:-1], row.shape.replace("pictures=", "images=")  # as stored by earlier code

    latest = {case(row): row.time for row in rows}
    return [row for row in rows if row.time == latest[case(row)]]
