"""benchmarks/RESULTS.md and its plots, from the stored rows alone.

Ratios are those stored: they were taken within a round of one run on one machine, so rows of different machines never
meet. Of several runs of a case on one machine the newest counts.
"""

from collections import defaultdict
from pathlib import Path

from benchmarks.harness import RESULTS, Row, read

_PEERS = ("eager", "compile", "max-autotune", "matmuls")  # the others are ours
_HEAD = """# Results

Written by `python -m benchmarks report` from `benchmarks/results/*.csv`; do not edit. Every number is a ratio to the
first provider, median (20th-80th percentile) of rounds in which the providers took turns: above 1 is faster, **bold**
is one of ours that is slower. `matmuls` is the floor, the bare products alone.
"""


def newest(rows: list[Row]) -> list[Row]:
    """The rows of the newest run of every case (device, kernel, mode, shape); ``rows`` are oldest first."""
    latest = {_case(row): row.time for row in rows}
    return [row for row in rows if row.time == latest[_case(row)]]


def write(results: Path = RESULTS, target: Path | None = None) -> Path:
    """Write the report and its plots beside the folder of results; return its path."""
    target = target or results.parent / "RESULTS.md"
    by_device: dict[str, list[Row]] = defaultdict(list)
    for row in newest(read(results)):
        by_device[row.device].append(row)
    parts = [_HEAD]
    for number, (device, rows) in enumerate(sorted(by_device.items())):
        parts.append(f"## {device}\n\n{_origin(rows)}\n")
        for kernel, mode in sorted({(row.kernel, row.mode) for row in rows}):
            chosen = [row for row in rows if (row.kernel, row.mode) == (kernel, mode)]
            plot = target.parent / "plots" / f"{kernel}-{mode}-{number}.png"
            parts.append(f"### {kernel}, {mode}\n\n{_table(chosen)}\n")
            if _plot(chosen, plot):
                parts.append(f"![{kernel}, {mode}: ratios](plots/{plot.name})\n")
        parts.append(_losses(rows))
    target.write_text("\n".join(parts))
    return target


def _case(row: Row) -> tuple[str, ...]:
    return row.device, row.kernel, row.mode, row.shape


def _origin(rows: list[Row]) -> str:
    commits, versions = sorted({row.commit for row in rows}), sorted({row.versions for row in rows})
    return f"Commit {', '.join(commits)}; {'; '.join(versions)}; {rows[0].time[:10]} to {rows[-1].time[:10]}."


def _table(rows: list[Row]) -> str:
    providers = list(dict.fromkeys(row.provider for row in rows))
    cells = {(row.shape, row.provider): _cell(row) for row in rows if row.metric in ("ratio", "wrong")}
    times = {row.shape: f"{row.p50:.0f}" for row in rows if row.metric == "time" and row.provider == providers[0]}
    lines = [f"| shape | {providers[0]}, us | {' | '.join(providers[1:])} |", "|" + "---|" * (len(providers) + 1)]
    for shape in dict.fromkeys(row.shape for row in rows):
        said = [cells.get((shape, provider), "-") for provider in providers[1:]]
        lines.append(f"| {shape} | {times.get(shape, '-')} | {' | '.join(said)} |")
    return "\n".join(lines)


def _cell(row: Row) -> str:
    if row.metric == "wrong":
        return "**wrong**"
    said = f"{row.p50:.2f} ({row.p20:.2f}-{row.p80:.2f})"
    return f"**{said}**" if row.p50 < 1 and row.provider not in _PEERS else said


def _losses(rows: list[Row]) -> str:
    """What we must not hide: for each case the best of ours, where a peer is faster or ours is wrong."""
    lines = []
    for case in dict.fromkeys(_case(row) for row in rows):
        mine = [row for row in rows if _case(row) == case]
        where = f"{case[1]} {case[2]}, {case[3]}"
        lines += [f"- {where}: {row.provider} is WRONG: {row.note}" for row in mine if row.metric == "wrong"]
        times = {row.provider: row.p50 for row in mine if row.metric == "time"}
        ours = {name: each for name, each in times.items() if name not in _PEERS}
        peers = {name: each for name, each in times.items() if name in _PEERS and name != "matmuls"}
        if ours and peers and min(ours.values()) > min(peers.values()):
            best, peer = min(ours, key=ours.__getitem__), min(peers, key=peers.__getitem__)
            lines.append(f"- {where}: {best} takes {ours[best] / peers[peer]:.2f} times the time of {peer}")
    return "### Losses\n\n" + ("\n".join(lines) or "None: in every case one of ours is the fastest.") + "\n"


def _plot(rows: list[Row], path: Path) -> bool:
    """Ratio over tokens, a panel for each shape without its T; nothing where no shape has a T."""
    panels: dict[str, dict[str, list[tuple[int, float]]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        rest, separator, tokens = row.shape.rpartition(" T=")
        if row.metric == "ratio" and separator:
            panels[rest][row.provider].append((int(tokens), row.p50))
    if not panels:
        return False
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(panels), figsize=(4 * len(panels), 3.2), sharey=True, squeeze=False)
    for axis, (title, lines) in zip(axes[0], panels.items(), strict=True):
        for provider, points in lines.items():
            axis.plot(
                *zip(*sorted(points), strict=True), "--" if provider in _PEERS else "-", marker=".", label=provider
            )
        axis.set(title=title, xscale="log", xlabel="tokens")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("times as fast as the first")
    axes[0][-1].legend()
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)
    pyplot.close(figure)
    return True
