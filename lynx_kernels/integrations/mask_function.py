"""The mask function of ``attn_implementation="lynx"``: from transformers' description of a mask to a layout."""

import logging
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from transformers.masking_utils import causal_mask_function, sdpa_mask

from lynx_kernels.integrations import patterns
from lynx_kernels.integrations.attention_mask import AttentionMask
from lynx_kernels.integrations.logs import model_name, say
from lynx_kernels.integrations.patterns import Pattern
from lynx_kernels.layout import PackedLayout
from lynx_kernels.layout.blocks import find_blocks


def mask(
    *,
    batch_size: int,
    kv_length: int,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | AttentionMask | None = None,
    local_size: int | None = None,
    config: Any = None,
    **kwargs: Any,
) -> AttentionMask:
    """A mask function of transformers' AttentionMaskInterface.

    It reads tensors on the host, as ``sdpa_mask`` does: one synchronisation per mask, two for one with blocks.
    Compiled code cannot. There, padding between the tokens of a row is an error, and blocks and packed samples have
    dense masks.

    Args:
        batch_size, kv_length: B, and K, the number of keys.
        mask_function: the pattern, without the padding.
        attention_mask: (B, K) bool, false at padding; or the result of ``packed_mask`` or ``padded_mask``.
        local_size: the size of the window or chunk, if the pattern has one.
        config: of the model.
        kwargs: the number of queries, and other arguments of ``sdpa_mask`` in this release of transformers.

    Returns:
        A mask with a layout, if queries and keys are the same tokens and ``patterns.read`` knows the pattern. A layout
        of ``packed_mask`` or ``padded_mask`` gets the window, the chunk and the blocks of the pattern. Otherwise a mask
        with the result of ``sdpa_mask``.

        If a layout of ``packed_mask`` or ``padded_mask`` cannot get the pattern, layers that use the mask are refused.
    """
    name, pattern = model_name(config), patterns.read(mask_function)
    if pattern is None and torch.compiler.is_compiling():
        pattern = patterns.read_compiled(local_size, config, kwargs.get("allow_is_causal_skip", True))
    if isinstance(attention_mask, AttentionMask):
        if attention_mask.has_pattern:  # ``generate`` makes masks before it calls the model, which makes them again
            return replace(attention_mask, model=name)
        return _refine(attention_mask, name, pattern)
    position = kwargs.get("cache_position")  # older releases pass the positions of the queries, not their number
    q_length, device = (kwargs["q_length"], kwargs["device"]) if position is None else (len(position), position.device)
    made = AttentionMask(name, torch.Size((batch_size, 1, q_length, kv_length)), torch.device(device), has_pattern=True)
    if (
        pattern is not None
        and q_length == kv_length
        and _may_be_layout(pattern, config, **kwargs)
        and (attention_mask is None or tuple(attention_mask.shape) == (batch_size, kv_length))
    ):
        if attention_mask is None:
            attention_mask = torch.ones(batch_size, kv_length, dtype=torch.bool, device=made.device)
            has_padding = has_gaps = False
        else:
            has_padding, has_gaps = _read_padding(attention_mask)
        layout, reason = (
            (None, "a row has padding between its tokens") if has_gaps else _layout(pattern, attention_mask != 0)
        )
        if layout is not None:
            is_plain = pattern.is_plain and not has_padding
            has_samples = pattern.samples is not None
            return replace(
                made, layout=layout, is_plain=is_plain, is_causal=bool(pattern.is_causal), has_samples=has_samples
            )
        say(
            logging.WARNING,
            name,
            f"attention runs PyTorch's scaled_dot_product_attention with a dense mask, since {reason}, which a layout "
            f"cannot describe",
        )
    seen = sdpa_mask(
        batch_size=batch_size,
        kv_length=kv_length,
        mask_function=mask_function,
        attention_mask=attention_mask,
        local_size=local_size,
        config=config,
        **kwargs,
    )
    may_be_causal = kwargs.get("allow_is_causal_skip", True) if pattern is None else bool(pattern.is_causal)
    return replace(made, seen=seen, is_causal=seen is None and may_be_causal)


def _may_be_layout(
    pattern: Pattern,
    config: Any,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    **_kwargs: Any,
) -> bool:
    """Whether a pattern is one of a layout's, and the model does not insist on a dense mask."""
    if pattern.is_causal:
        # Beside blocks and samples transformers always insists, since they cannot be skipped.
        return allow_is_causal_skip or pattern.blocks is not None or pattern.samples is not None
    is_full_decoder = getattr(config, "is_causal", True) is False and not getattr(config, "is_encoder_decoder", False)
    return pattern.is_causal is False and pattern.is_plain and is_full_decoder and allow_is_bidirectional_skip


def _read_padding(attention_mask: Tensor) -> tuple[bool, bool]:
    """Whether a (B, L) mask has padding, and whether a row has padding between its tokens.

    A mask that cannot be read counts as one with padding at the ends.
    """
    if _has_no_values(attention_mask):
        return True, False
    is_token = attention_mask != 0
    has_padding, has_gaps = torch.stack([~is_token.all(), (_begins(is_token).sum(1) > 1).any()]).tolist()
    return has_padding, has_gaps


def _has_no_values(tensor: Tensor) -> bool:
    """Whether the host cannot read a tensor: while compiling or capturing."""
    is_captured = tensor.is_cuda and torch.cuda.is_current_stream_capturing()
    return torch.compiler.is_compiling() or isinstance(tensor, FakeTensor) or tensor.is_meta or is_captured


def _begins(values: Tensor) -> Tensor:
    """(B, L) bool: where stretches of one value begin; for bool values, those of true ones."""
    begins = values != values.roll(1, 1)
    begins[:, :1] = True
    return begins & values if values.dtype == torch.bool else begins


def _layout(pattern: Pattern, is_token: Tensor) -> tuple[PackedLayout | None, str | None]:
    """The layout of padded rows (B, L) with a pattern; or None, and what it cannot describe."""
    rows, length = is_token.shape
    if pattern.samples is None:
        layout = PackedLayout.from_padding_mask(is_token, is_causal=bool(pattern.is_causal))
    else:
        if _has_no_values(pattern.samples):
            return None, "code is compiled, which cannot count the samples of a row"
        begins = _begins(pattern.samples).expand(rows, length)
        assert pattern.positions is not None
        if pattern.chunk is not None and (begins & (pattern.positions % pattern.chunk != 0)).any():
            return None, "a sample starts inside a chunk"
        offsets = torch.cat([begins.flatten().nonzero()[:, 0], begins.new_tensor([rows * length], dtype=torch.int64)])
        layout = PackedLayout.from_offsets(offsets, rows * length)
    layout = layout.with_local(window=pattern.window, chunk=pattern.chunk)
    if pattern.blocks is None:
        return layout, None
    row = torch.arange(rows, device=is_token.device)[:, None].expand(rows, length)
    blocks = torch.where(is_token, pattern.blocks, -1)
    return _with_blocks(layout, blocks.flatten(), row.flatten(), pattern)


def _with_blocks(
    layout: PackedLayout, blocks: Tensor, group: Tensor, pattern: Pattern
) -> tuple[PackedLayout | None, str | None]:
    """The layout with full blocks, by number (T,); tokens of one number and group (T,), ascending, see each other."""
    if not _has_no_values(blocks):
        found = find_blocks(blocks, layout.tokens, layout.key_runs, layout.predictors)
        # The first token of each block, numbered by group and block: a number seen before is a second part of a block.
        number = torch.where(found.begins, group * (blocks.max() + 1) + blocks, -1)
        highest = number.cummax(0).values
        is_split = (found.begins[1:] & (number[1:] <= highest[:-1])).any()
        longest = torch.where(found.is_inside, found.ends - found.starts, 0).max()
        is_local = longest > (pattern.window or 0) if pattern.has_local_blocks else torch.zeros_like(is_split)
        forks, split, local = torch.stack([~found.is_whole, is_split, is_local]).tolist()
        if forks or split:
            return None, "tokens of one block do not follow each other in one segment"
        if local:
            return None, "a block of tokens that see each other is longer than the window"
    return layout.with_full(blocks), None


def _refine(given: AttentionMask, name: str, pattern: Pattern | None) -> AttentionMask:
    """The mask of ``packed_mask`` or ``padded_mask`` with the window, the chunk and the blocks of a model's pattern."""
    assert given.layout is not None
    layout, reason = _add(given.layout, pattern)
    if layout is None or pattern is None:
        unsupported = (
            f"{name} adds to the attention mask what the layout of packed_mask or padded_mask cannot get: {reason}; "
            f"pass a 2-D attention_mask, or leave out the inputs for the pattern"
        )
        return replace(given, model=name, has_pattern=True, unsupported_reason=unsupported)
    return replace(given, model=name, layout=layout, is_plain=given.is_plain and pattern.is_plain, has_pattern=True)


def _add(layout: PackedLayout, pattern: Pattern | None) -> tuple[PackedLayout | None, str | None]:
    """The layout with a pattern; or None, and why it cannot have it."""
    if pattern is None or pattern.is_causal is None or pattern.samples is not None:
        return None, "a pattern of its own"
    if not pattern.is_causal and not layout.has_full and layout.max_length > 1:
        return None, "attention in both directions, and the layout is causal"
    if pattern.window is not None or pattern.chunk is not None:
        if layout.window is not None or layout.chunk is not None:
            return None, "a window or chunk, and the layout has one already"
        layout = layout.with_local(window=pattern.window, chunk=pattern.chunk)
    if pattern.blocks is None:
        return layout, None
    blocks = pattern.blocks.flatten()
    if len(blocks) != layout.num_tokens:
        return None, f"blocks of {len(blocks)} tokens, and the layout has {layout.num_tokens}"
    return _with_blocks(layout, blocks, _trees(layout), pattern)


def _trees(layout: PackedLayout) -> Tensor:
    """(T,) int64: the tree of each token."""
    last = layout.tokens[2].long()
    if not len(last):
        return last
    before = torch.cat([last.new_zeros(1), last.cummax(0).values[:-1]])
    return (torch.arange(len(last), device=last.device) >= before).cumsum(0)
