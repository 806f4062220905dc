"""Which pattern a mask function of transformers describes: causal, a window, blocks of image tokens, packed samples.

transformers composes masks from a few functions of ``masking_utils``. What a composition says can be read from it, so
that a layout can say the same. A function of a model's own says nothing that could be read.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import masking_utils


@dataclass(frozen=True, eq=False)
class Pattern:
    """Which keys a query sees, padding aside: those of all conditions that are given, and those of its own block.

    Attributes:
        is_causal: keys up to the query; false: all keys; None: not said.
        window: keys at positions above that of the query minus window.
        chunk: keys of the query's chunk of so many positions.
        samples: (B, K) integers: keys with the number of the query.
        positions: (B, K), in the samples.
        blocks: (B, K) integers: a query sees the keys with its number, whatever else is said; -1: no block.
        has_local_blocks: whether the window holds inside blocks, too.
    """

    is_causal: bool | None = None
    window: int | None = None
    chunk: int | None = None
    samples: Tensor | None = None
    positions: Tensor | None = None
    blocks: Tensor | None = None
    has_local_blocks: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether it is just causal, or full."""
        return self._says() <= {"is_causal"}

    def _says(self) -> set[str]:
        return {name for name, value in vars(self).items() if value is not None and value is not False}

    def both(self, other: "Pattern") -> "Pattern | None":
        """The keys that both let a query see; None if a Pattern cannot say it."""
        if "blocks" in other._says():
            return other.both(self) if "blocks" not in self._says() else None
        if "blocks" in self._says() and other._says():
            is_new_window = other._says() == {"window"} and self.window is None
            return replace(self, window=other.window, has_local_blocks=True) if is_new_window else None
        if (self._says() & other._says()) - {"is_causal"}:
            return None
        # What the other says is added. A full pattern adds nothing.
        return replace(self, **{name: getattr(other, name) for name in other._says()}) if other._says() else self

    def either(self, other: "Pattern") -> "Pattern | None":
        """The keys that this one or a pattern of blocks lets a query see; None for other patterns."""
        if other._says() != {"blocks"} or not self.is_causal or self.blocks is not None:
            return None
        return replace(self, blocks=other.blocks)


def read(mask_function: Any) -> Pattern | None:
    """The pattern of a mask function, or None if it has another one than ``Pattern`` can say."""
    if mask_function is masking_utils.causal_mask_function:
        return Pattern(is_causal=True)
    if mask_function is masking_utils.bidirectional_mask_function:
        return Pattern(is_causal=False)
    if torch.compiler.is_compiling():  # it cannot look into functions
        return None
    if getattr(mask_function, "__module__", None) != masking_utils.__name__ or not mask_function.__closure__:
        return None
    names, cells = mask_function.__code__.co_freevars, mask_function.__closure__
    values = {name: cell.cell_contents for name, cell in zip(names, cells, strict=True)}
    made_by = mask_function.__qualname__.split(".")[0]
    return _READERS[made_by](**values) if made_by in _READERS else None


def read_compiled(local_size: int | None, config: Any, allow_is_causal_skip: bool) -> Pattern | None:
    """The pattern of a window or chunk that transformers would skip where it is as long as the row.

    Compiled code cannot look into functions. transformers skips none that has more than causality and this size.
    """
    window, chunk = (getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))
    if local_size is None or local_size < 1 or not allow_is_causal_skip or window == chunk:
        return None
    if local_size == chunk:
        return Pattern(is_causal=True, chunk=local_size)
    return Pattern(is_causal=True, window=local_size) if local_size == window else None


def _both(mask_functions: tuple[Any, ...]) -> Pattern | None:
    found: Pattern | None = Pattern()
    for each in mask_functions:
        other = read(each)
        found = None if found is None or other is None else found.both(other)
    return found


def _either(mask_functions: tuple[Any, ...]) -> Pattern | None:
    if len(mask_functions) != 2:
        return None
    first, second = map(read, mask_functions)
    return None if first is None or second is None else first.either(second)


def _in_samples(mask_function: Any, position_ids: Tensor) -> Pattern | None:
    found = read(mask_function)
    return None if found is None or found.blocks is not None else replace(found, positions=position_ids)


_READERS: dict[str, Callable[..., Pattern | None]] = {  # by the function of masking_utils that makes the mask function
    "and_masks": _both,
    "or_masks": _either,
    # Some configurations switch windows off by 0, and their models make a mask that no layer uses.
    "sliding_window_overlay": lambda sliding_window: Pattern(window=sliding_window) if sliding_window > 0 else None,
    # Chunks are counted from a row's first token, and in a layout from the start of a path, which is the same.
    "chunked_overlay": lambda chunk_size, left_padding: Pattern(chunk=chunk_size),
    "blockwise_overlay": lambda block_sequence_ids: Pattern(blocks=block_sequence_ids),
    "packed_sequence_mask_function": lambda packed_sequence_mask: Pattern(samples=packed_sequence_mask),
    "remap_positions_for_packed_sequence": _in_samples,
}
