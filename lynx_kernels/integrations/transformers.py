"""``attn_implementation="lynx"`` for the models of transformers: who sees whom comes from a layout, not from a mask.

Four ways lead through a layer, and each says exactly what the model's own eager attention says:

- packed: one batch row with its ``PackedLayout`` in the model's keyword arguments, ``layout=``, and
  ``attention_mask=packed_mask(layout)``. Runs ``prefix_attention``.
- padded: plain causal rows, or plain full ones of a decoder with ``is_causal=False`` in its configuration, padded on
  either side or not at all. The mask function makes the layout of them from the 2-D mask, once for all layers. Runs
  ``prefix_attention``; what it writes at pads means nothing.
- decoding over a cache in which rows share roots, said by ``shared_roots=`` in the model's keyword arguments. Runs
  ``prefix_attention_decode``.
- everything else runs PyTorch's scaled_dot_product_attention with transformers' own dense mask: decoding over another
  cache, masks with a pattern added (PaliGemma's full prefix), 4-D masks of the caller, padded encoders (theirs could
  be the mask of a cross-attention, whose queries are other tokens than its keys), layers that get no mask at all.

What neither knows, sliding windows, chunked masks, soft caps, sinks and biases, is refused by name.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import (
    AttentionMaskInterface,
    bidirectional_mask_function,
    causal_mask_function,
    sdpa_mask,
)

from lynx_kernels.layout import PackedLayout
from lynx_kernels.ops.prefix_attention import prefix_attention
from lynx_kernels.ops.prefix_attention_decode import prefix_attention_decode

NAME = "lynx"
_UNSUPPORTED = {  # what layers pass to the attention function for features we lack
    "sliding_window": "sliding windows",
    "softcap": "soft caps",
    "s_aux": "attention sinks",
    "position_bias": "position biases",
}


@dataclass(frozen=True)
class SharedRoots:
    """What all layers of a decoder need beside its cache's branches, which are the keys and values of a layer's rows.

    Attributes:
        keys, values: (layers, R, Lr, Hkv, D), the roots'; a layer's are at its ``layer_idx``.
        branch_to_root, root_lengths, branch_lengths: as ``prefix_attention_decode`` wants them, the new tokens counted.
    """

    keys: Tensor
    values: Tensor
    branch_to_root: Tensor
    root_lengths: Tensor
    branch_lengths: Tensor


def register() -> None:
    """Make ``attn_implementation="lynx"`` known to transformers. Calling it again changes nothing."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask)


def packed_mask(layout: PackedLayout) -> Tensor:
    """What to pass a decoder as ``attention_mask`` beside a ``layout``, (1, 1, 0, 0).

    A 4-D mask is transformers' sign that the mask is ready: it builds none, and does not search ``position_ids`` for
    packed sequences, which would read the device on the host. The layout says all there is to say.
    """
    return torch.empty(1, 1, 0, 0, dtype=torch.bool, device=layout.segments.device)


def padded_mask(layout: PackedLayout) -> Tensor:
    """What stands for ``layout`` as the ``attention_mask`` of a padded batch that ``PackedLayout.from_padding_mask``
    described: its segments, (1, 1, S + 1, 4) int32.

    Four dimensions, since an outer model may hand it to an inner one, which takes that as a mask that is ready.
    """
    return layout.segments[None, None]


def mask(
    *,
    batch_size: int,
    kv_length: int,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    config: Any = None,
    **kwargs: Any,
) -> Tensor | None:
    """A mask function of transformers' AttentionMaskInterface.

    Args:
        batch_size, kv_length: B, and K, the keys a query may see at most.
        mask_function: the pattern, without the padding.
        attention_mask: (B, K) bool, false at pads.
        local_size: the window or chunk of a local pattern.
        config: the model's.
        kwargs: the query's length and what else ``sdpa_mask`` of this release of transformers takes.

    Returns:
        Where the rows are plain and queries and keys the same tokens, a table for ``attention``: the segments of
        their layout, as ``padded_mask`` gives them. Elsewhere what ``sdpa_mask`` returns, (B, 1, Q, K) bool or None.

    Raises:
        ValueError: the pattern is local, or a row has a pad between its tokens.
    """
    if local_size is not None:
        is_chunked = getattr(config, "attention_chunk_size", None) == local_size
        feature = f"chunked masks (of {local_size})" if is_chunked else f"sliding windows (of {local_size})"
        raise ValueError(f"attn_implementation={NAME!r} has no {feature}; take another one for {_name(config)}")
    position = kwargs.get("cache_position")  # of the queries, which older releases pass in place of their number
    q_length, device = (kwargs["q_length"], kwargs["device"]) if position is None else (len(position), position.device)
    if (
        _is_plain(mask_function, config, **kwargs)
        and q_length == kv_length
        and (attention_mask is None or tuple(attention_mask.shape) == (batch_size, kv_length))
    ):
        if attention_mask is None:
            attention_mask = torch.ones(batch_size, kv_length, dtype=torch.bool, device=device)
        layout = PackedLayout.from_padding_mask(attention_mask, is_causal=mask_function is causal_mask_function)
        return padded_mask(layout)
    return sdpa_mask(
        batch_size=batch_size,
        kv_length=kv_length,
        mask_function=mask_function,
        attention_mask=attention_mask,
        config=config,
        **kwargs,
    )


def _is_plain(
    mask_function: Any,
    config: Any,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    **_kwargs: Any,
) -> bool:
    """Whether the pattern is causal or full and nothing else, and no dense mask is insisted on."""
    if mask_function is causal_mask_function:
        return allow_is_causal_skip
    is_full_decoder = getattr(config, "is_causal", True) is False and not getattr(config, "is_encoder_decoder", False)
    return mask_function is bidirectional_mask_function and is_full_decoder and allow_is_bidirectional_skip


def attention(
    module: torch.nn.Module,
    query: Tensor,  # (B, H, L, D)
    key: Tensor,  # (B, Hkv, K, D)
    value: Tensor,  # (B, Hkv, K, D)
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    layout: PackedLayout | None = None,
    shared_roots: SharedRoots | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An attention function of transformers' AttentionInterface; returns (B, L, H, D) and no weights.

    Raises:
        ValueError: a layout beside more than one batch row or beside a mask, ``packed_mask`` without its layout,
            dropout in ``prefix_attention``, or a feature we have not.
    """
    config = getattr(module, "config", None)
    asked = {**kwargs, "attention_chunk_size": getattr(config, "attention_chunk_size", None)}
    for name, feature in {**_UNSUPPORTED, "attention_chunk_size": "chunked masks"}.items():
        if asked.get(name) is not None:
            raise ValueError(
                f"attn_implementation={NAME!r} has no {feature}, but the layer asks for {name}; take another one for "
                f"{_name(config)}"
            )
    rows, _, length, _ = query.shape
    if shared_roots is not None:
        _refuse_dropout(dropout)
        return _decode(module, query, key, value, shared_roots, scaling), None
    if layout is not None:
        if rows != 1:
            raise ValueError(f"a packed row is a batch of one, but the batch has {rows} rows beside a layout")
        if attention_mask is not None and attention_mask.numel() > 0:
            raise ValueError(
                f"beside a layout stands attention_mask=packed_mask(layout), not a mask of shape "
                f"{tuple(attention_mask.shape)}, which says who sees whom a second time"
            )
    elif attention_mask is not None and attention_mask.dtype == torch.int32:
        layout = _layout_of(attention_mask, rows, length)
    elif attention_mask is not None and attention_mask.numel() == 0 and length > 0:
        raise ValueError(
            f"attention_mask is packed_mask(layout), but no layout reached {type(module).__name__}: pass layout= to "
            f"the model; one that keeps keyword arguments from its layers cannot take packed rows"
        )
    else:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    _refuse_dropout(dropout)
    q, k, v = (tensor.transpose(1, 2).flatten(0, 1) for tensor in (query, key, value))  # (B * L, heads, D)
    return prefix_attention(q, k, v, layout, scale=scaling).unflatten(0, (rows, length)), None


def _refuse_dropout(dropout: float) -> None:
    if dropout != 0.0:
        raise ValueError(
            f"attn_implementation={NAME!r} has no dropout, but attention_dropout is {dropout}; set it to 0"
        )


def _decode(
    module: Any, query: Tensor, key: Tensor, value: Tensor, roots: SharedRoots, scaling: float | None
) -> Tensor:
    q, branch_k, branch_v = (tensor.transpose(1, 2) for tensor in (query, key, value))  # (B, L, heads, D)
    out = prefix_attention_decode(
        q,
        roots.keys[module.layer_idx],
        roots.values[module.layer_idx],
        branch_k,
        branch_v,
        roots.branch_to_root,
        roots.root_lengths,
        roots.branch_lengths,
        scale=scaling,
    )
    assert isinstance(out, Tensor)
    return out


def _layout_of(table: Tensor, rows: int, length: int) -> PackedLayout:
    """The layout whose segments ``padded_mask`` gave."""
    return PackedLayout(
        segments=table[0, 0],
        position_ids=torch.zeros((), dtype=torch.int64, device=table.device).expand(rows * length),  # only counted
        root_is_causal=False,  # of causal rows the table says that they have no root
        max_group_length=length,
        max_root_length=length,
        max_branch_length=length,
        max_branches=1,
    )


def _name(config: Any) -> str:
    return getattr(config, "model_type", None) or "this model"
