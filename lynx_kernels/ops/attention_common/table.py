"""Who sees whom, as kernels read it: the table of a PackedLayout or of a SpanLayout."""

from typing import NamedTuple

from torch import Tensor


class Table(NamedTuple):
    """The segments of a PackedLayout, or those of a SpanLayout with its inverse."""

    segments: Tensor
    root_is_causal: bool = False
    inverse: tuple[Tensor, Tensor] | None = None  # tile_offsets and tile_segments, which only gradients read

    @property
    def num_segments(self) -> int:
        """How many segments of queries there are."""
        return self.segments.shape[0] - 1

    @property
    def has_spans(self) -> bool:
        """Whether it is of a SpanLayout."""
        return self.inverse is not None
