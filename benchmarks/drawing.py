"""Three plots for each device, kernel and dtype: ratio to each peer, share of the floor, cost.

Lines over what grows, or, where nothing does, dots for workloads one below the other.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

from benchmarks.rows import RATIO, SHARE, Row
from benchmarks.tables import by_case, chosen, is_curve

# Okabe and Ito's colours, which colour-blind eyes tell apart; markers say it once more.
_COLOURS = ("#000000", "#0072B2", "#E69F00", "#D55E00", "#009E73", "#CC79A7", "#56B4E9")
_MARKERS = "osD^vP*"
_TICKS = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5, 7, 10, 20, 50)  # of ratios
_SPEED, _SHARE, _COST = "times as fast", "floor's time / own time", "microseconds"

Point = tuple[int, Row]  # the value of what grows, the measurement
Panels = dict[tuple[str, str], dict[str, list[Point]]]  # (group, mode) to lines by label


@dataclass(frozen=True)
class Figure:
    """One plot: a column of panels for each group and a row for each mode; or a panel of dots for each mode."""

    title: str
    name: str
    label: str
    panels: Panels
    providers: list[str]  # all of the kernel's, so that one has the same colour in every figure
    is_curve: bool

    @property
    def groups(self) -> list[str]:
        return list(dict.fromkeys(group for group, _ in self.panels))

    @property
    def modes(self) -> list[str]:
        return list(dict.fromkeys(mode for _, mode in self.panels))

    @property
    def lines(self) -> list[str]:
        """The providers that are drawn, in their order."""
        drawn = {line for panel in self.panels.values() for line in panel}
        return [provider for provider in self.providers if provider in drawn]

    def look(self, line: str) -> dict[str, Any]:
        """Colour, marker and name of a line; a colour comes again with another marker."""
        again, number = divmod(self.providers.index(line), len(_COLOURS))
        return {"color": _COLOURS[number], "marker": _MARKERS[(number + again) % len(_MARKERS)], "label": line}


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

    for dtype in dict.fromkeys(row.dtype_and_workload[0] for row in rows):
        mine = [row for row in rows if row.dtype_and_workload[0] == dtype]
        about = f"{mine[0].kernel} {dtype}"
        start = re.sub(r"\W+", "-", f"{about} {mine[0].device}".lower())
        for what, title, label, line_of in (
            ("ratio", f"{about}: speed of {ours[mine[0].case]} against each peer", _SPEED, peer),
            ("share", f"{about}: {floor}", _SHARE, sharing),
            ("cost", f"{about}: cost", _COST, timed),
        ):
            if panels := _panels(mine, line_of):
                found.append(Figure(title, f"{start}-{what}.png", label, panels, providers, is_curve(rows)))
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

    canvas = _curves(figure, pyplot) if figure.is_curve else _dots(figure, pyplot)
    handles = {line.get_label(): line for axis in canvas.axes for line in axis.get_lines()}
    widest = 0.6 + 0.09 * max(map(len, figure.lines))  # inches of an entry
    columns = max(1, min(len(figure.lines), int(canvas.get_figwidth() / widest)))
    canvas.legend([handles[line] for line in figure.lines], figure.lines, loc="outside lower center", ncols=columns)
    canvas.suptitle(figure.title, fontsize=11)
    folder.mkdir(parents=True, exist_ok=True)
    canvas.savefig(folder / figure.name, dpi=100)
    pyplot.close(canvas)


def _curves(figure: Figure, pyplot: Any) -> Any:
    groups, modes = figure.groups, figure.modes
    size = (1.2 + 3.4 * len(groups), 0.9 + 2.4 * len(modes))
    canvas, axes = pyplot.subplots(
        len(modes), len(groups), figsize=size, sharey=True, sharex="col", squeeze=False, layout="constrained"
    )
    for j, group in enumerate(groups):
        grown: set[int] = set()
        for axis, mode in zip(axes[:, j], modes, strict=True):
            for line, points in figure.panels.get((group, mode), {}).items():
                values, rows = zip(*sorted(points, key=lambda point: point[0]), strict=True)
                look = figure.look(line)
                axis.plot(values, [row.p50 for row in rows], markersize=4, linewidth=1.3, **look)
                low, high = [row.p20 for row in rows], [row.p80 for row in rows]
                axis.fill_between(values, low, high, color=look["color"], alpha=0.15, linewidth=0)
                grown.update(values)
            axis.set_title(f"{mode}, {group}", fontsize=9)
        axes[0, j].set_xscale("log", base=2)
        axes[0, j].set_xticks(sorted(grown), [f"{v // 1024}k" if v >= 1024 else str(v) for v in sorted(grown)])
        axes[-1, j].set_xlabel(
            next(row.grows[0] for (g, _), p in figure.panels.items() if g == group for row in _rows(p))
        )
    for axis in axes.flat:
        axis.xaxis.minorticks_off()
        axis.grid(alpha=0.3)
        _scale(axis.yaxis, figure)
    for axis in axes[:, 0]:
        axis.set_ylabel(figure.label)
    return canvas


def _dots(figure: Figure, pyplot: Any) -> Any:
    """The first workload on top, the providers of one workload close together, each with its spread."""
    modes, drawn = figure.modes, dict[str, list[str]]()  # the lines of each workload, in whichever mode
    for panel in figure.panels.values():
        for line in figure.lines:
            for _, row in panel.get(line, ()):
                mine = drawn.setdefault(row.dtype_and_workload[1], [])
                mine.extend({line} - set(mine))
    # A step down for each line and one between workloads.
    starts = list(accumulate((len(mine) + 1 for mine in drawn.values()), initial=0))
    start_of = dict(zip(drawn, starts, strict=False))
    size = (3 + 3.6 * len(modes), 1.6 + 0.14 * starts[-1])
    canvas, axes = pyplot.subplots(
        1, len(modes), figsize=size, sharex=True, sharey=True, squeeze=False, layout="constrained"
    )
    for axis, mode in zip(axes[0], modes, strict=True):
        for (_, of), panel in figure.panels.items():
            for line, points in panel.items() if of == mode else ():
                look = figure.look(line)
                for _, row in points:
                    workload = row.dtype_and_workload[1]
                    y = start_of[workload] + drawn[workload].index(line) + 1
                    axis.plot([row.p20, row.p80], [y, y], color=look["color"], linewidth=1.3)
                    axis.plot([row.p50], [y], markersize=5, linestyle="", **look)
        for between in starts[1:-1]:
            axis.axhline(between, color="#DDDDDD", linewidth=0.8)
        axis.set_title(mode, fontsize=9)
        axis.set_xlabel(figure.label)
        axis.grid(axis="x", alpha=0.3)
        _scale(axis.xaxis, figure)
    axes[0, 0].set_yticks([(a + b) / 2 for a, b in pairwise(starts)], list(drawn))
    axes[0, 0].set_ylim(starts[-1], 0)
    return canvas


def _rows(panel: dict[str, list[Point]]) -> list[Row]:
    return [row for points in panel.values() for _, row in points]


def _scale(side: Any, figure: Figure) -> None:
    """Scale the axis of the values alike in every figure of a kind."""
    axis, is_x = side.axes, side.axis_name == "x"
    set_scale, set_limits = (axis.set_xscale, axis.set_xlim) if is_x else (axis.set_yscale, axis.set_ylim)
    if figure.label == _COST:
        set_scale("log")
        return
    (axis.axvline if is_x else axis.axhline)(1, color="#777777", linewidth=1)
    if figure.label == _SHARE:
        set_limits(0, None)
        return
    # One scale for all panels, at least wide enough for three ticks.
    rows = [row for panel in figure.panels.values() for row in _rows(panel)]
    set_scale("log")
    side.set_ticks(_TICKS, [f"{tick:g}" for tick in _TICKS])
    side.minorticks_off()
    set_limits(min(0.7, *(row.p20 for row in rows)) / 1.1, max(1.5, *(row.p80 for row in rows)) * 1.1)
