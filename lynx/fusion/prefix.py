"""Prefix fusion: vision tokens stand before the text, and adapters in the decoder learn to read them."""

from functools import cache

import torch
from torch import Tensor, nn

from lynx.fusion import layers
from lynx_kernels import PackedLayout
from lynx_kernels.integrations import transformers as attention_integration
from lynx_kernels.layout import require
from lynx_kernels.nn import Adapter


def add_adapters(decoder: nn.ModuleList, *, frequency: int, width: int, size: int, activation: str) -> set[str]:
    """Put an adapter on the output of every ``frequency``-th layer of the ``decoder``, from the first one on.

    Returns:
        The class names the changed layers now have, for ``_no_split_modules``.
    """
    return {
        layers.insert(layer, "output_adapter", Adapter(width, size, activation=activation), _with_adapter)
        for layer in decoder[::frequency]
    }


@cache
def _with_adapter(layer_class: type[nn.Module]) -> type[nn.Module]:
    def forward(self, *args, **kwargs):
        output = layer_class.forward(self, *args, **kwargs)
        if isinstance(output, tuple):
            return (self.output_adapter(output[0]), *output[1:])
        return self.output_adapter(output)

    return layers.subclass(layer_class, "WithAdapter", forward, _with_adapter)


def lengths(input_ids: Tensor, attention_mask: Tensor | None, image_token_id: int) -> Tensor:
    """(B,) int64: the vision tokens that each row of a padded batch begins with, after its pads.

    Args:
        input_ids: (B, L), ``image_token_id`` at vision tokens.
        attention_mask: (B, L), zero at pads; None where there are none.

    Raises:
        ValueError: a row has vision tokens elsewhere.
    """
    is_picture = input_ids == image_token_id  # (B, L)
    counts = is_picture.sum(1)
    is_token = torch.ones_like(is_picture) if attention_mask is None else attention_mask != 0
    begins_row = is_token & (is_token.cumsum(1) <= counts[:, None])
    message = "input_ids: with prefix_is_causal=False the picture tokens of a row must be its first tokens"
    require((is_picture == begins_row).all(), message)
    return counts


def full_mask(
    inputs_embeds: Tensor, attention_mask: Tensor | None, prefix_lengths: Tensor | None, implementation: str
) -> Tensor:
    """What a padded batch passes the decoder as its mask where the vision tokens of a row all see each other.

    Args:
        inputs_embeds: (B, L, width).
        attention_mask: (B, L), zero at pads; None where there are none.
        prefix_lengths: (B,), what ``lengths`` gives.
        implementation: the decoder's attention.

    Raises:
        ValueError: the attention cannot say it, prefix_lengths are missing, or the mask is of another shape (dense, as
            for a static cache).
    """
    if implementation != attention_integration.NAME:
        raise ValueError(
            f"prefix_is_causal=False needs attn_implementation={attention_integration.NAME!r}, the decoder has "
            f"{implementation!r}, whose masks are causal"
        )
    if prefix_lengths is None:
        raise ValueError("prefix_is_causal=False: pass prefix_lengths beside inputs_embeds")
    if attention_mask is not None and attention_mask.shape != inputs_embeds.shape[:2]:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}, but beside prefix_is_causal=False it must be "
            f"{tuple(inputs_embeds.shape[:2])}"
        )
    if attention_mask is None:
        attention_mask = inputs_embeds.new_ones(inputs_embeds.shape[:2])
    return attention_integration.padded_mask(
        PackedLayout.from_padding_mask(attention_mask, root_lengths=prefix_lengths)
    )
