"""Convert other descriptions of a packed batch to and from PackedLayout.

``cu_seqlens``, the position ids of transformers and xformers' block-diagonal masks describe causal or full sequences
only. A PackedLayout can express all of them. A layout that they cannot express is an error that states the reason.
A layout does not keep empty sequences, because they have no tokens. Every function reads its input on the host.
"""

from collections.abc import Sequence
from itertools import accumulate, groupby, pairwise
from typing import Any

import torch
from torch import Tensor

from lynx_kernels.layout import PackedLayout


def from_cu_seqlens(
    cu_seqlens: Sequence[int] | Tensor, *, is_causal: bool = True, device: torch.device | str | None = None
) -> PackedLayout:
    """The layout of packed sequences. Sequence i is the tokens ``cu_seqlens[i] <= t < cu_seqlens[i + 1]``.

    Args:
        cu_seqlens: the N + 1 offsets of N sequences, from 0 to T: a list, or a 1-D integer tensor on the CPU.
        is_causal: causal sequences if true, full ones if false.
        device: the device of the layout.

    Raises:
        ValueError: the offsets are not 1-D, not on the CPU, do not start at 0, or decrease.
        TypeError: the offsets are not integers.
    """
    offsets = torch.as_tensor(cu_seqlens)
    _require_integers_on_host("cu_seqlens", offsets)
    if offsets.dim() != 1 or offsets.shape[0] == 0:
        raise ValueError(f"cu_seqlens has shape {tuple(offsets.shape)}, expected (sequences + 1,)")
    starts = offsets.tolist()
    if starts[0] != 0:
        raise ValueError(f"cu_seqlens starts at {starts[0]}, it must start at 0")
    for index, (start, end) in enumerate(pairwise(starts)):
        if end < start:
            raise ValueError(f"cu_seqlens decreases after index {index}: {start}, {end}; offsets must not decrease")
    lengths = [end - start for start, end in pairwise(starts)]
    make = PackedLayout.causal if is_causal else PackedLayout.full
    return make(lengths, device=device)


def to_cu_seqlens(layout: PackedLayout) -> tuple[Tensor, int, bool]:
    """``(cu_seqlens, max_seqlen, is_causal)`` of a layout that holds only causal or only full sequences.

    A causal sequence is a branch without a root, or a causal root with at most one branch. A full sequence is a full
    root without branches. A sequence of one token is both. If all have one token, ``is_causal`` is the layout's
    ``root_is_causal``.

    Returns:
        cu_seqlens: (N + 1,) int32 on the CPU, the offsets of the N sequences that are not empty.
        max_seqlen: the longest of them, 0 if there are none.
        is_causal: whether the sequences are causal; otherwise they are full.

    Raises:
        ValueError: the layout is not on the CPU, several branches share a root, a branch follows a full root, or
            causal and full sequences are mixed.
    """
    lengths, is_causal = _sequences(layout, "cu_seqlens")
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32), max(lengths, default=0), is_causal


def from_position_ids(position_ids: Tensor) -> PackedLayout:
    """The layout of causal sequences packed as in transformers: position 0 starts a sequence.

    Args:
        position_ids: (T,) or (1, T) integers on the CPU. Positions increase by one.

    Raises:
        ValueError: another shape, not on the CPU, or a position that is neither 0 nor one more than the previous one.
        TypeError: the positions are not integers.
    """
    _require_integers_on_host("position_ids", position_ids)
    if position_ids.dim() != 1 and not (position_ids.dim() == 2 and position_ids.shape[0] == 1):
        raise ValueError(f"position_ids has shape {tuple(position_ids.shape)}, expected (T,) or (1, T)")
    positions = position_ids.flatten()
    follows = positions[1:] == positions[:-1] + 1
    allowed = torch.cat([positions[:1] == 0, follows | (positions[1:] == 0)])
    if not allowed.all():
        token = int((~allowed).nonzero()[0])
        before = f"follows {int(positions[token - 1])}" if token else "is the first"
        raise ValueError(
            f"position_ids[{token}] is {int(positions[token])} and {before}: a position must be 0, which starts a "
            "sequence, or one more than the previous position"
        )
    starts = (positions == 0).nonzero().flatten().tolist()
    return from_cu_seqlens([*starts, positions.shape[0]] if starts else [0])


def to_position_ids(layout: PackedLayout) -> Tensor:
    """(1, T) int64 on the CPU: the position ids of a packed batch of causal sequences, as in transformers.

    Raises:
        ValueError: the layout is not on the CPU, or does not hold only causal sequences.
    """
    lengths, is_causal = _sequences(layout, "position_ids")
    if not is_causal and any(length > 1 for length in lengths):
        raise ValueError("position_ids cannot express this layout: they describe causal sequences, and these are full")
    return layout.position_ids[None]


def from_xformers(mask: Any) -> PackedLayout:
    """The layout of an xformers BlockDiagonalMask, BlockDiagonalCausalMask or BlockDiagonalCausalFromBottomRightMask.

    Raises:
        TypeError: another mask. This includes subclasses, which may have another meaning.
        ValueError: the blocks of the queries and of the keys differ, or leave gaps.
    """
    is_causal = _xformers_masks().get(type(mask))
    if is_causal is None:
        known = ", ".join(each.__name__ for each in _xformers_masks())
        raise TypeError(f"cannot convert a {type(mask).__name__} to a PackedLayout; convertible masks: {known}")
    starts = mask.q_seqinfo.seqstart_py
    if not list(mask.q_seqinfo.intervals()) == list(mask.k_seqinfo.intervals()) == list(pairwise(starts)):
        raise ValueError(
            "the mask's blocks of queries and of keys differ or leave gaps, but a PackedLayout describes one row of "
            "tokens that attends to itself; use a SpanLayout for cross-attention"
        )
    return from_cu_seqlens(starts, is_causal=is_causal)


def to_xformers(layout: PackedLayout) -> Any:
    """The layout as a mask of xformers on the CPU: BlockDiagonalCausalMask, or BlockDiagonalMask for full sequences.

    Raises:
        ValueError: as in ``to_cu_seqlens``.
    """
    lengths, is_causal = _sequences(layout, "an xformers mask")
    mask_type = next(each for each, causal in _xformers_masks().items() if causal == is_causal)
    return mask_type.from_seqlens(lengths, device=torch.device("cpu"))


def _xformers_masks() -> dict[Any, bool]:
    """The masks of xformers that a layout can express -> whether they are causal."""
    from xformers.ops.fmha import attn_bias  # slow to import, and not a dependency

    return {
        attn_bias.BlockDiagonalMask: False,
        attn_bias.BlockDiagonalCausalMask: True,
        # Differs from the one above only if a block has different numbers of queries and keys.
        attn_bias.BlockDiagonalCausalFromBottomRightMask: True,
    }


def _require_integers_on_host(name: str, tensor: Tensor) -> None:
    if tensor.device.type != "cpu":
        raise ValueError(f"{name} is on {tensor.device}, but is read on the host; convert it before .to(device)")
    if tensor.numel() > 0 and (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool):
        raise TypeError(f"{name} is {tensor.dtype}, expected integers")


def _sequences(layout: PackedLayout, target: str) -> tuple[list[int], bool]:
    """The lengths of the non-empty sequences in ``layout``, and whether they are causal.

    Raises:
        ValueError: the layout is not on the CPU, or does not hold only causal or only full sequences.
    """
    if layout.segments.device.type != "cpu":
        raise ValueError(
            f"the layout is on {layout.segments.device}, but is read on the host; convert it before .to(device)"
        )
    rows = layout.segments.tolist()
    segments = [(*row, end) for row, (end, *_) in pairwise(rows) if end > row[0]]
    lengths: list[int] = []
    causal_group, full_group = "", ""  # the first groups of sequences that are only causal, and only full
    for (root_start, group_end), members in groupby(segments, key=lambda segment: (segment[1], segment[3])):
        group = list(members)
        root_end = group[0][2]
        root_length = root_end - root_start
        branch_lengths = [end - start for start, *_, end in group if start >= root_end]
        where = f"the group of tokens {root_start} to {group_end - 1}"
        if root_length > 0 and len(branch_lengths) > 1:
            raise ValueError(
                f"{target} cannot express this layout: in {where}, {len(branch_lengths)} branches share a root"
            )
        root_is_full = root_length > 1 and not layout.root_is_causal
        if root_is_full and branch_lengths:
            raise ValueError(f"{target} cannot express this layout: in {where}, a causal branch follows a full root")
        sequences = [group_end - root_start] if root_length > 0 else branch_lengths
        if root_is_full:
            full_group = full_group or where
        elif max(sequences) > 1:
            causal_group = causal_group or where
        lengths += sequences
    if causal_group and full_group:
        raise ValueError(f"{target} cannot express this layout: {causal_group} is causal, {full_group} is full")
    return lengths, bool(causal_group) or (not full_group and layout.root_is_causal)
