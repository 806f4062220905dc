"""Blocks of tokens inside a PackedLayout that see each other: where they start and end, found on the device."""

from typing import NamedTuple

import torch
from torch import Tensor

from lynx_kernels.layout.base import segment_of_tokens


class Blocks(NamedTuple):
    """Blocks of neighbouring tokens.

    Attributes:
        is_inside: (T,) bool: whether a token is in a block.
        begins: (T,) bool: whether it is the first one of its block.
        starts, ends: (T,) int64: the first row of its block, and the row behind the last; meaningless outside.
        is_whole: 0-dim bool: false if a block goes on where paths fork, or lies in a full segment.
    """

    is_inside: Tensor
    begins: Tensor
    starts: Tensor
    ends: Tensor
    is_whole: Tensor


def find_blocks(numbers: Tensor, tokens: Tensor, key_runs: Tensor, predictors: Tensor) -> Blocks:
    """The blocks of a layout with these tables, given each token's number (T,), below 0 for none.

    Tokens are in one block if they follow each other on a path and have the same number.
    """
    count = numbers.shape[0]
    token = torch.arange(count, device=numbers.device)
    is_inside = numbers >= 0
    goes_on = is_inside & (predictors >= 0) & (numbers[predictors.clamp(min=0)] == numbers)
    part = segment_of_tokens(key_runs, count)  # of a run; its tokens follow each other, and are seen by the same ones
    is_in_part = (predictors == token - 1) & (part == part[(token - 1).clamp(min=0)])
    is_whole = ~(goes_on & ~is_in_part).any() & ~(is_inside & (tokens[1] > token + 1)).any()
    begins = is_inside & ~goes_on
    edges = begins | ~is_inside  # a block ends at the next edge
    starts = torch.where(edges, token, -1).cummax(0).values if count else token
    following = torch.cat([edges[1:], edges.new_ones(min(count, 1))])
    ends = torch.where(following, token + 1, count).flip(0).cummin(0).values.flip(0) if count else token
    return Blocks(is_inside, begins, starts, ends, is_whole)
