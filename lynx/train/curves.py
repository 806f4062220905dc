"""The curves of a run, drawn from its log."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import LogFormatterSciNotation

from lynx.train.log import read_log

_CURVES = {  # what the log calls it: title, and whether it is drawn on a logarithmic axis
    "loss": ("loss per supervised token (nats)", True),
    "learning_rate": ("learning rate", False),
    "grad_norm": ("norm of the gradient", True),
    "supervised_tokens_per_second": ("supervised tokens a second", False),
    "mfu": ("model FLOPs utilisation", False),
    "pack_utilization": ("part of the packs that is used", False),
    "data_wait": ("part of the time spent waiting for data", False),
}


class _Decimal(LogFormatterSciNotation):
    """Labels the ticks that matplotlib would label, as 0.6 and not as 6 x 10^-1."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        return f"{x:g}" if super().__call__(x, pos) else ""


def draw(log: Path, path: Path) -> None:
    """Draw loss, learning rate, speed and the rest over the steps; stages follow each other, each in its colour.

    Args:
        log: the ``log.jsonl`` of a run, an earlier release's too.
        path: the PNG to write.

    Raises:
        FileNotFoundError: there is no log.
        ValueError: it has no entry of training yet.
    """
    stages: dict[str, list[dict]] = {}
    for entry in read_log(log):
        if "loss" in entry:
            stages.setdefault(entry["stage"], []).append(entry)
    if not stages:
        raise ValueError(f"{log} has no entry with a loss yet; let the run make some steps first")
    rows = -(-len(_CURVES) // 2)
    figure, axes = plt.subplots(rows, 2, figsize=(11, 2.7 * rows), sharex=True)
    for axis, (key, (title, is_log)) in zip(axes.flat, _CURVES.items(), strict=False):
        begin = 0
        for name, entries in stages.items():
            found = [(begin + entry["step"], float(entry[key])) for entry in entries if entry.get(key) is not None]
            axis.plot(*zip(*found, strict=True), label=name) if found else None
            begin += entries[-1]["step"]
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.3, which="both")
        if is_log:
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter(_Decimal())
            axis.yaxis.set_minor_formatter(_Decimal(labelOnlyBase=False))
        else:
            axis.set_ylim(0, 1.05 * axis.get_ylim()[1])
    for axis in axes.flat[len(_CURVES) :]:
        axis.axis("off")
    axes.flat[0].legend(fontsize=8)
    for axis in axes.flat[len(_CURVES) - 2 : len(_CURVES)]:  # the lowest of each column
        axis.set_xlabel("step")
        axis.tick_params(labelbottom=True)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
