"""Convert other descriptions of a packed batch to and from PackedLayout.

``cu_seqlens``, the position ids of transformers and xformers' block-diagonal masks describe causal or full sequences
only. A PackedLayout can express all of them. A layout that they cannot express is an error that states the reason.
FlexAttention's BlockMask can express every layout. Apart from ``to_block_mask``, and from ``from_cu_seqlens`` on a
device, every function reads its input on the host.
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from lynx_kernels.layout import PackedLayout
from lynx_kernels.layout.packed import path_positions


def from_cu_seqlens(
    cu_seqlens: Sequence[int] | Tensor,
    *,
    is_causal: bool = True,
    num_tokens: int | None = None,
    device: torch.device | str | None = None,
) -> PackedLayout:
    """The layout of packed sequences. Sequence i is the tokens ``cu_seqlens[i] <= t < cu_seqlens[i + 1]``.

    Args:
        cu_seqlens: the N + 1 offsets of N sequences, from 0 to T: a list, or a 1-D integer tensor.
        is_causal: causal sequences if true, full ones if false.
        num_tokens: T. Needed if cu_seqlens is not on the CPU: then the layout is built there, and nothing is read on
            the host.
        device: the device of the layout; by default that of cu_seqlens.

    Raises:
        ValueError: the offsets are not 1-D, do not start at 0, decrease or do not end at num_tokens; or they are not on
            the CPU and num_tokens is missing. On a device, wrong values are device-side assertions.
        TypeError: the offsets are not integers.
    """
    offsets = torch.as_tensor(cu_seqlens)
    _require_integers("cu_seqlens", offsets)
    if offsets.dim() != 1 or offsets.shape[0] == 0:
        raise ValueError(f"cu_seqlens has shape {tuple(offsets.shape)}, expected (sequences + 1,)")
    if not offsets.is_cpu:
        if num_tokens is None:
            raise ValueError(
                f"cu_seqlens is on {offsets.device}, where its last value is not read on the host: pass num_tokens"
            )
        return PackedLayout.from_offsets(offsets.to(device or offsets.device), num_tokens, is_causal=is_causal)
    starts = offsets.tolist()
    if starts[0] != 0:
        raise ValueError(f"cu_seqlens starts at {starts[0]}, it must start at 0")
    for index, (start, end) in enumerate(pairwise(starts)):
        if end < start:
            raise ValueError(f"cu_seqlens decreases after index {index}: {start}, {end}; offsets must not decrease")
    if num_tokens is not None and starts[-1] != num_tokens:
        raise ValueError(f"cu_seqlens ends at {starts[-1]}, but num_tokens is {num_tokens}")
    lengths = [end - start for start, end in pairwise(starts)]
    make = PackedLayout.causal if is_causal else PackedLayout.full
    return make(lengths, device=device)


def to_cu_seqlens(layout: PackedLayout) -> tuple[Tensor, int, bool]:
    """``(cu_seqlens, max_seqlen, is_causal)`` of a layout that holds only causal or only full sequences.

    A sequence is a path that shares no token with another one. A sequence of one token is both causal and full; if all
    have one token, ``is_causal`` is true.

    Returns:
        cu_seqlens: (N + 1,) int32 on the CPU, the offsets of the N sequences that are not empty.
        max_seqlen: the longest of them, 0 if there are none.
        is_causal: whether the sequences are causal; otherwise they are full.

    Raises:
        ValueError: the layout is not on the CPU, has a window or a chunk, paths share tokens, or causal and full
            segments are mixed.
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
    if not position_ids.is_cpu:
        raise ValueError(
            f"position_ids is on {position_ids.device}, but is read on the host; convert it before .to(device), or use "
            "from_cu_seqlens"
        )
    _require_integers("position_ids", position_ids)
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
    _, is_causal = _sequences(layout, "position_ids")
    if not is_causal:
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


def to_block_mask(layout: PackedLayout, *, block_size: int = 128) -> Any:
    """The layout as a BlockMask of FlexAttention, on the layout's device. It expresses every layout.

    It is built from the keys' intervals, without a mask of T x T. FlexAttention compiles once a length.

    Args:
        block_size: of queries and of keys.
    """
    from torch.nn.attention.flex_attention import BlockMask

    tokens, device = layout.num_tokens, layout.runs.device
    first, see_end, last = layout.tokens
    place = path_positions(layout.runs, tokens)
    window, chunk = layout.window, layout.chunk

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        in_tree = (first[key] <= query) & (query < last[key])
        if window is not None:
            return in_tree & ((place[query] - place[key] < window) | (query < see_end[key]))
        if chunk is not None:
            return in_tree & ((place[query] // chunk == place[key] // chunk) | (query < see_end[key]))
        return in_tree

    def floor(place: Tensor) -> Tensor:  # the first place that a query there sees, but for full segments
        if window is not None:
            return place - window + 1
        return place if chunk is None else place // chunk * chunk

    blocks = -(-tokens // block_size)
    begin = torch.arange(blocks, device=device) * block_size  # of a block of queries
    end = (begin + block_size).clamp(max=tokens)
    # Keys behind the row's end are seen by nothing. They change neither what a block sees nor what it sees whole.
    key = torch.arange(blocks * block_size, device=device).clamp(max=max(tokens - 1, 0))
    key_first, key_last = first[key], last[key]  # (keys,)
    some = (key_first < end[:, None]) & (key_last > begin[:, None])  # (blocks, keys)
    whole = (key_first <= begin[:, None]) & (key_last >= end[:, None])
    if window is not None or chunk is not None:
        # Places rise along a run, so those of the block's ends bound what its queries see. A block across runs is not
        # skipped.
        in_one_run = place[end - 1] - place[begin] == end - 1 - begin
        low, high = (floor(place[each]) for each in (begin, end - 1))
        is_near = (place[key] >= low[:, None]) | ~in_one_run[:, None] | (see_end[key] > begin[:, None])
        some, whole = some & is_near, whole & (place[key] >= high[:, None]) & in_one_run[:, None]
    some, whole = (each.unflatten(1, (blocks, block_size)) for each in (some, whole))
    is_full = whole.all(2)  # (blocks, blocks)
    is_partial = some.any(2) & ~is_full

    def listed(chosen: Tensor) -> tuple[Tensor, Tensor]:  # the chosen blocks' number and, first of all, their indices
        indices = (~chosen).to(torch.uint8).argsort(dim=1, stable=True)
        return chosen.sum(1).int()[None, None], indices.int()[None, None]

    lengths = (tokens, tokens)
    return BlockMask.from_kv_blocks(
        *listed(is_partial), *listed(is_full), BLOCK_SIZE=block_size, mask_mod=sees, seq_lengths=lengths
    )


def _require_integers(name: str, tensor: Tensor) -> None:
    if tensor.numel() > 0 and (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool):
        raise TypeError(f"{name} is {tensor.dtype}, expected integers")


def _sequences(layout: PackedLayout, target: str) -> tuple[list[int], bool]:
    """The lengths of the sequences in ``layout``, which are its runs, and whether they are causal.

    Raises:
        ValueError: the layout is not on the CPU, has a window or a chunk, or does not hold only causal or only full
            sequences.
    """
    if layout.runs.device.type != "cpu":
        raise ValueError(
            f"the layout is on {layout.runs.device}, but is read on the host; convert it before .to(device)"
        )
    if layout.chunk is not None or layout.window is not None:
        local = f"window={layout.window}" if layout.chunk is None else f"chunk={layout.chunk}"
        raise ValueError(
            f"{target} cannot express this layout: it has {local}; convert layout.with_local() and give the window to "
            "the other library"
        )
    rows = layout.runs.tolist()
    first, see_end, _ = layout.tokens
    lengths: list[int] = []
    causal_run, full_run = "", ""  # the first runs that are only causal, and only full
    for (start, _, _, *ranges), (end, *_) in pairwise(rows):
        if start == end:
            continue
        where = f"the path through tokens {start} to {end - 1}"
        if any(ranges[1::3]):
            raise ValueError(f"{target} cannot express this layout: {where} shares its first tokens with another path")
        is_causal = bool((see_end[start:end] == torch.arange(start + 1, end + 1)).all())
        if not is_causal and not bool((first[start:end] == start).all()):
            raise ValueError(f"{target} cannot express this layout: {where} has full and causal segments")
        if end - start > 1 and is_causal:
            causal_run = causal_run or where
        elif end - start > 1:
            full_run = full_run or where
        lengths.append(end - start)
    if causal_run and full_run:
        raise ValueError(f"{target} cannot express this layout: {causal_run} is causal, {full_run} is full")
    return lengths, not full_run
