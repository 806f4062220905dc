"""``attn_implementation="lynx"`` for the decoders of transformers: packed rows through ``prefix_attention``.

A packed row is one batch row with its ``PackedLayout`` in the model's keyword arguments. Rows without a layout, padded
ones and cached decoding, run through PyTorch's scaled_dot_product_attention with transformers' own masks.
"""

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from lynx_kernels.attention import prefix_attention
from lynx_kernels.layout import PackedLayout

NAME = "lynx"
_UNSUPPORTED = ("sliding_window", "softcap", "s_aux", "position_bias")  # what layers pass for features we lack


def register() -> None:
    """Make ``attn_implementation="lynx"`` known to transformers. Calling it again changes nothing."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def packed_mask(layout: PackedLayout) -> Tensor:
    """What to pass a decoder as ``attention_mask`` beside a ``layout``, (1, 1, 0, 0).

    A 4-D mask is transformers' sign that the mask is ready: it builds none, and does not search ``position_ids`` for
    packed sequences, which would read the device on the host. The layout says all there is to say.
    """
    return torch.empty(1, 1, 0, 0, dtype=torch.bool, device=layout.segments.device)


def attention(
    module: torch.nn.Module,
    query: Tensor,  # (B, H, L, D)
    key: Tensor,  # (B, Hkv, L, D)
    value: Tensor,  # (B, Hkv, L, D)
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    layout: PackedLayout | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """An attention function of transformers' AttentionInterface; returns (B, L, H, D) and no weights.

    Raises:
        ValueError: a layout beside more than one batch row, dropout, or a feature that packed attention has not.
    """
    if layout is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if query.shape[0] != 1:
        raise ValueError(f"a packed row is a batch of one, but the batch has {query.shape[0]} rows beside a layout")
    if dropout != 0.0:
        raise ValueError(f"packed attention has no dropout, but attention_dropout is {dropout}")
    for feature in _UNSUPPORTED:
        if kwargs.get(feature) is not None:
            raise ValueError(f"packed attention has no {feature}, but the layer asks for it: {kwargs[feature]}")
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))  # (L, heads, D)
    return prefix_attention(q, k, v, layout, scale=scaling).unsqueeze(0), None
