"""Prefix fusion: the vision tokens come before the text, and adapters in the decoder learn to read them."""

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lynx.fusion.base import Fusion, check_choice, check_frequency
from lynx.fusion.rows import Rows
from lynx_kernels import PackedLayout
from lynx_kernels.integrations import layers
from lynx_kernels.integrations import transformers as attention_integration
from lynx_kernels.integrations.attention_mask import AttentionMask
from lynx_kernels.layout import require
from lynx_kernels.nn import Adapter
from lynx_kernels.ops.adapter.activations import ACTIVATIONS

if TYPE_CHECKING:
    from lynx.config import LynxConfig
    from lynx.model import LynxForConditionalGeneration


class PrefixFusion(Fusion):
    """Vision tokens in the row, before the text, and an adapter on the output of every k-th layer.

    Options of the configuration:
        adapter_frequency: an adapter follows every k-th decoder layer, from the first one on (paper 1, release 2).
        adapter_size: width of the adapter's bottleneck.
        adapter_activation: as ``lynx_kernels.adapter`` names it.

    Inputs of the model:
        prefix_lengths: (B,) int64, the vision tokens each padded row begins with; needed where ``prefix_is_causal`` is
            False and only ``inputs_embeds`` are there.
    """

    name = "prefix"
    options = {"adapter_frequency": 1, "adapter_size": 2048, "adapter_activation": "silu"}  # noqa: RUF012
    inputs = ("prefix_lengths",)
    submodule = "output_adapter"
    param_group = "adapters"
    param_group_help = "the adapters in the decoder"
    shares_roots = True

    def check_options(self, config: "LynxConfig") -> None:
        super().check_options(config)
        check_choice("adapter_activation", config.adapter_activation, sorted(ACTIVATIONS))

    def check(self, config: "LynxConfig") -> None:
        check_frequency("adapter_frequency", config)
        if config.sees_media != "preceding":
            raise ValueError(
                f"sees_media={config.sees_media!r}, but with fusion='prefix' text sees its whole prefix; leave out "
                "sees_media"
            )
        widths = config.vision_config.hidden_size, config.text_config.hidden_size
        if config.resampler_concatenates_latents and widths[0] != widths[1]:
            raise ValueError(
                f"resampler_concatenates_latents=True gives tokens of vision_config's hidden_size, {widths[0]}, but a "
                f"prefix needs text_config's, {widths[1]}"
            )

    def install(self, decoder: nn.ModuleList, config: "LynxConfig") -> set[str]:
        width, size, activation = config.text_config.hidden_size, config.adapter_size, config.adapter_activation
        return {
            layers.insert(layer, self.submodule, Adapter(width, size, activation=activation), _with_adapter)
            for layer in decoder[:: config.adapter_frequency]
        }

    def prefix_length(self, num_vision_tokens: int) -> int:
        return num_vision_tokens

    def embed(self, model: "LynxForConditionalGeneration", input_ids: Tensor, vision_tokens: Tensor | None) -> Tensor:
        return model.embed(input_ids, vision_tokens)

    def feed(
        self,
        model: "LynxForConditionalGeneration",
        rows: Rows,
        vision_tokens: Tensor | None,
        inputs: Mapping[str, Any],
    ) -> Rows:
        if model.config.prefix_is_causal or rows.layout is not None or not rows.starts:
            return rows
        if isinstance(rows.attention_mask, AttentionMask):
            raise ValueError("attention_mask is already a mask of queries and keys; pass that of the tokens, (B, L)")
        if rows.attention_mask is None and rows.position_ids is not None:  # transformers then looks for several texts
            require(
                (rows.position_ids.diff(dim=-1) > 0).all(),
                "position_ids that start again in a row need prefix_is_causal=True, or a layout in their place",
            )
        prefix_lengths = inputs.get("prefix_lengths")
        if prefix_lengths is None and rows.input_ids is not None:
            prefix_lengths = lengths(rows.input_ids, rows.attention_mask, model.config.image_token_id)
        implementation = model.get_decoder().config._attn_implementation
        return replace(
            rows, attention_mask=full_mask(rows.inputs_embeds, rows.attention_mask, prefix_lengths, implementation)
        )

    def generation_inputs(
        self,
        model: "LynxForConditionalGeneration",
        input_ids: Tensor | None,
        vision_tokens: Tensor | None,
        attention_mask: Tensor | None,
        inputs: Mapping[str, Any],
    ) -> dict[str, Any]:
        found = dict(inputs)
        if vision_tokens is not None:
            if input_ids is None:
                raise ValueError("generate: pixel_values need input_ids with an image token for each vision token")
            found["inputs_embeds"] = model.embed(input_ids, vision_tokens)
        if not model.config.prefix_is_causal and input_ids is not None:
            found["prefix_lengths"] = lengths(input_ids, attention_mask, model.config.image_token_id)
        return found


@cache
def _with_adapter(layer_class: type[nn.Module]) -> type[nn.Module]:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = layer_class.forward(self, *args, **kwargs)
        if isinstance(output, tuple):
            return (self.output_adapter(output[0]), *output[1:])
        return self.output_adapter(output)

    return layers.subclass(layer_class, "WithAdapter", forward, _with_adapter)


def lengths(input_ids: Tensor, attention_mask: Tensor | None, image_token_id: int) -> Tensor:
    """(B,) int64: the number of vision tokens that each row of a padded batch begins with, after its pads.

    Args:
        input_ids: (B, L), ``image_token_id`` at vision tokens.
        attention_mask: (B, L), zero at pads; None where there are no pads.

    Raises:
        ValueError: a row has vision tokens in another place.
    """
    is_image = input_ids == image_token_id  # (B, L)
    counts = is_image.sum(1)
    is_token = torch.ones_like(is_image) if attention_mask is None else attention_mask != 0
    begins_row = is_token & (is_token.cumsum(1) <= counts[:, None])
    message = "input_ids: with prefix_is_causal=False the image tokens of a row must be its first tokens"
    require((is_image == begins_row).all(), message)
    return counts


def full_mask(
    inputs_embeds: Tensor,
    attention_mask: Tensor | None,
    prefix_lengths: Tensor | None,
    implementation: str,
) -> AttentionMask:
    """The decoder's mask of a padded batch in which the vision tokens of a row all see each other.

    Args:
        inputs_embeds: (B, L, width).
        attention_mask: (B, L), zero at pads; None where there are no pads.
        prefix_lengths: (B,), what ``lengths`` returns.
        implementation: the decoder's attention.

    Raises:
        ValueError: the attention does not support such a mask, prefix_lengths are missing, or the mask has another
            shape (dense, as for a static cache).
    """
    if implementation != attention_integration.NAME:
        raise ValueError(
            f"prefix_is_causal=False needs attn_implementation={attention_integration.NAME!r}, the decoder has "
            f"{implementation!r}, whose masks are causal"
        )
    if prefix_lengths is None:
        raise ValueError("prefix_is_causal=False: pass prefix_lengths with inputs_embeds")
    if attention_mask is not None and attention_mask.shape != inputs_embeds.shape[:2]:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}, but with prefix_is_causal=False it must be "
            f"{tuple(inputs_embeds.shape[:2])}"
        )
    if attention_mask is None:
        attention_mask = inputs_embeds.new_ones(inputs_embeds.shape[:2])
    return attention_integration.padded_mask(
        PackedLayout.from_padding_mask(attention_mask, root_lengths=prefix_lengths)
    )
