"""Drawings of who sees whom, for people: SVG, and characters for a terminal."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lynx_kernels.layout.base import segment_of_tokens

if TYPE_CHECKING:
    from lynx_kernels.layout.packed import PackedLayout

_CELLS = 64  # cells a side, at most: a longer row shares cells
_TOKENS = 2048  # tokens that are looked at, at most, evenly spread
_SHADES = " ░▒▓█"
_COLORS = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#a463f2", "#9c6b4e", "#97bbf5")
_CELL, _MARGIN, _FONT = 10, 8, 12  # pixels


@dataclass(frozen=True, eq=False)
class Drawing:
    """Queries from top to bottom, keys from left to right.

    Attributes:
        seen: (n, n) in [0, 1], how much of a cell is seen.
        segments: of each segment that is not empty its name, and its first and last cell.
    """

    seen: Tensor
    segments: list[tuple[str, int, int]]

    def __str__(self) -> str:
        """One line of characters a cell of queries, with the segment's name where it starts."""
        width = max((len(name) for name, _, _ in self.segments), default=0)
        starts = {first: name for name, first, _ in reversed(self.segments)}
        shades = (self.seen * (len(_SHADES) - 1)).ceil().int().tolist()
        return "\n".join(
            f"{starts.get(row, ''):>{width}} |{''.join(_SHADES[shade] * 2 for shade in line)}|"
            for row, line in enumerate(shades)
        )

    def svg(self) -> str:
        """The image as the text of an SVG file."""
        cells = self.seen.shape[0]
        label = max((len(name) for name, _, _ in self.segments), default=0) * 0.62 * _FONT + 2 * _MARGIN
        side, top = cells * _CELL, label
        parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{label + side + _MARGIN:.0f}" '
            f'height="{top + side + _MARGIN:.0f}" font-family="sans-serif" font-size="{_FONT}">',
            f'<rect width="100%" height="100%" fill="white"/><g transform="translate({label:.0f} {top:.0f})">',
        ]
        for index, (name, first, last) in enumerate(self.segments):
            color, middle = _COLORS[index % len(_COLORS)], (first + last + 1) / 2 * _CELL
            text = f'fill="{color}" text-anchor="{{}}" dominant-baseline="middle"'
            parts.append(f'<text x="{-_MARGIN}" y="{middle}" {text.format("end")}>{escape(name)}</text>')
            parts.append(
                f'<text transform="translate({middle} {-_MARGIN}) rotate(-90)" {text.format("start")}>'
                f"{escape(name)}</text>"
            )
            for column in range(first, last + 1):
                for row, seen in enumerate(self.seen[:, column].tolist()):
                    if seen > 0:
                        parts.append(
                            f'<rect x="{column * _CELL}" y="{row * _CELL}" width="{_CELL}" height="{_CELL}" '
                            f'fill="{color}" fill-opacity="{0.25 + 0.75 * seen:.2f}"/>'
                        )
        for _, first, _ in self.segments:
            at = first * _CELL
            parts.append(f'<path d="M0 {at}H{side}M{at} 0V{side}" stroke="#ccc"/>')
        parts.append(f'<rect width="{side}" height="{side}" fill="none" stroke="#666"/></g></svg>')
        return "\n".join(parts)

    _repr_svg_ = svg  # Jupyter shows it

    def save(self, path: str | Path) -> None:
        """Write the SVG file."""
        Path(path).write_text(self.svg())


def draw(layout: "PackedLayout", names: Sequence[str] | None) -> Drawing:
    """``PackedLayout.draw``."""
    layout = layout.to("cpu")
    count, tokens = layout.segments.shape[0] - 1, layout.num_tokens
    names = [str(index) for index in range(count)] if names is None else list(names)
    if len(names) != count:
        raise ValueError(f"{len(names)} names but {count} segments, empty ones included")
    cells = min(tokens, _CELLS)
    if cells == 0:
        return Drawing(torch.zeros(0, 0), [])
    token = torch.arange(tokens) if tokens <= _TOKENS else torch.linspace(0, tokens - 1, _TOKENS).long()
    cell = torch.div(token * cells, tokens, rounding_mode="floor")
    in_cell = torch.nn.functional.one_hot(cell, cells).double()
    in_cell /= in_cell.sum(0)
    seen = in_cell.T @ layout.visible(token).double() @ in_cell
    cell_of = torch.div(torch.arange(tokens) * cells, tokens, rounding_mode="floor").tolist()
    segment = segment_of_tokens(layout.segments, tokens)
    found = []
    for index in segment.unique().tolist():
        first, end = layout.segments[index : index + 2].tolist()
        found.append((names[index], cell_of[first], cell_of[end - 1]))
    return Drawing(seen.clamp(max=1), found)
