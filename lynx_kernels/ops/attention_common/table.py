"""The table of a PackedLayout or of a SpanLayout, as the kernels read it."""

from typing import NamedTuple

from torch import Tensor


class Table(NamedTuple):
    """The segments of a PackedLayout, or the segments and the inverse table of a SpanLayout."""

    segments: Tensor
    root_is_causal: bool = False
    inverse: tuple[Tensor, Tensor] | None = None  # tile_offsets and tile_segments, used only for gradients

    @property
    def num_segments(self) -> int:
        """The number of query segments."""
        return self.segments.shape[0] - 1

    @property
    def has_spans(self) -> bool:
        """Whether it belongs to a SpanLayout."""
        return self.inverse is not None
