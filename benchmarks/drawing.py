"""Three plots for each device, kernel and dtype: ratio to each peer, share of the floor, cost as work grows."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.rows import RATIO, SHARE, Row
from benchmarks.tables import by_case, chosen

# Okabe and Ito's colours, which colour-blind eyes tell apart; markers say it once more.
_COLOURS = ("#000000", "#0072B2", "#E69F00", "#D55E00", "#009E73", "#CC79A7", "#56B4E9")
_MARKERS = "osD^vP*"
_TICKS = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5, 7, 10, 20, 50)  # of ratios
_SPEED, _SHARE, _COST = "times as fast", "floor's time / own time", "microseconds"

Point = tuple[int, Row]  # the value of what grows, the measurement
Panels = dict[tuple[str, str], dict[str, list[Point]]]  # (group, mode) to lines by label


@dataclass(frozen=True)
class Figure:
    """One plot: a column of panels for each group, a row for each mode."""

    title: str
    name: str
    label: str
    panels: Panels
    providers: list[str]  # all of the kernel's, so that one has the same colour in every figure


def figures(rows: list[Row]) -> list[Figure]:
    """The plots of one device and kernel."""
    found = []
    ours = {case: chosen(mine) for case, mine in by_case(rows).items()}
    providers = list(dict.fromkeys(row.provider for row in rows))
    floor = next((row.metric for row in rows if row.metric.startswith(SHARE)), "")

    def peer(row: Row) -> str | None:
        is_ours = row.provider == ours[row.case] and row.metric.startswith(RATIO)
        return row.metric.removeprefix(RATIO) if is_ours else None

    def sharing(row: Row) -> str | None:
        return row.provider if row.metric == floor else None

    def timed(row: Row) -> str | None:
        return row.provider if row.metric == "time" else None

    for dtype in dict.fromkeys(row.shape.split()[0] for row in rows):
        mine = [row for row in rows if row.shape.split()[0] == dtype]
        about = f"{mine[0].kernel} {dtype}"
        start = re.sub(r"\W+", "-", f"{about} {mine[0].device}".lower())
        for what, title, label, line_of in (
            ("ratio", f"{about}: speed of {ours[mine[0].case]} against each peer", _SPEED, peer),
            ("share", f"{about}: {floor}", _SHARE, sharing),
            ("cost", f"{about}: cost as work grows", _COST, timed),
        ):
            if panels := _panels(mine, line_of):
                found.append(Figure(title, f"{start}-{what}.png", label, panels, providers))
    return found


def _panels(rows: list[Row], line_of: Callable[[Row], str | None]) -> Panels:
    panels: Panels = {}
    for row in rows:
        if line := line_of(row):
            panels.setdefault((row.group, row.mode), {}).setdefault(line, []).append((row.grows[1], row))
    return panels


def draw(figure: Figure, folder: Path) -> None:
    """Write the figure as a PNG file into the folder."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    groups = list(dict.fromkeys(group for group, _ in figure.panels))
    modes = list(dict.fromkeys(mode for _, mode in figure.panels))
    drawn = {line for panel in figure.panels.values() for line in panel}
    lines = [provider for provider in figure.providers if provider in drawn]
    size = (1.2 + 3.4 * len(groups), 0.9 + 2.4 * len(modes))
    canvas, axes = pyplot.subplots(
        len(modes), len(groups), figsize=size, sharey=True, sharex="col", squeeze=False, layout="constrained"
    )
    for j, group in enumerate(groups):
        values = {
            value for mode in modes for points in figure.panels.get((group, mode), {}).values() for value, _ in points
        }
        for i, mode in enumerate(modes):
            panel = figure.panels.get((group, mode), {})
            for line, points in panel.items():
                again, number = divmod(figure.providers.index(line), len(_COLOURS))
                marker = _MARKERS[(number + again) % len(_MARKERS)]  # a colour comes again with another marker
                _line(axes[i][j], points, line, _COLOURS[number], marker)
            _axes(axes[i][j], figure.label, sorted(values))
            axes[i][j].set_title(f"{mode}, {group}", fontsize=9)
    for axis in axes[:, 0]:
        axis.set_ylabel(figure.label)
    for axis in axes[-1]:
        axis.set_xlabel(next(row.grows[0] for panel in figure.panels.values() for [(_, row), *_] in panel.values()))
    if figure.label == _SPEED:  # one scale for all panels, at least wide enough for three ticks
        ratios = [row.p50 for panel in figure.panels.values() for points in panel.values() for _, row in points]
        axes[0][0].set_ylim(min(*ratios, 0.7) / 1.1, max(*ratios, 1.5) * 1.1)
    handles = {line.get_label(): line for each in canvas.axes for line in each.get_lines()}
    canvas.legend(
        [handles[line] for line in lines], lines, loc="outside lower center", ncols=min(len(lines), 1 + 2 * len(groups))
    )
    canvas.suptitle(figure.title, fontsize=11)
    folder.mkdir(parents=True, exist_ok=True)
    canvas.savefig(folder / figure.name, dpi=100)
    pyplot.close(canvas)


def _line(axis: Any, points: list[Point], label: str, colour: str, marker: str) -> None:
    values, rows = zip(*sorted(points, key=lambda point: point[0]), strict=True)
    axis.plot(values, [row.p50 for row in rows], color=colour, marker=marker, markersize=4, linewidth=1.3, label=label)
    axis.fill_between(
        values, [row.p20 for row in rows], [row.p80 for row in rows], color=colour, alpha=0.15, linewidth=0
    )


def _axes(axis: Any, label: str, values: list[int]) -> None:
    axis.set_xscale("log", base=2)
    axis.set_xticks(values, [f"{value // 1024}k" if value >= 1024 else str(value) for value in values])
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    if label == _COST:
        axis.set_yscale("log")
        return
    axis.axhline(1, color="#777777", linewidth=1)
    if label == _SHARE:
        axis.set_ylim(bottom=0)
    else:
        axis.set_yscale("log")
        axis.set_yticks(_TICKS, [f"{tick:g}" for tick in _TICKS])
        axis.minorticks_off()
