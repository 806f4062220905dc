"""How pictures enter the language model."""

from torch import nn

from lynx.config import LynxConfig
from lynx.fusion import cross_attention, prefix


def fuse(decoder: nn.ModuleList, config: LynxConfig) -> set[str]:
    """Put into the decoder's layers what reads the pictures.

    Returns:
        The class names the changed layers now have, for ``_no_split_modules``.
    """
    width = config.text_config.hidden_size
    if config.fusion == "prefix":
        return prefix.add_adapters(
            decoder,
            frequency=config.adapter_frequency,
            width=width,
            size=config.adapter_size,
            activation=config.adapter_activation,
        )
    return cross_attention.add_blocks(
        decoder,
        frequency=config.cross_attention_frequency,
        width=width,
        media_width=config.vision_config.hidden_size if config.resampler_concatenates_latents else width,
        num_heads=config.cross_attention_heads,
        head_dim=config.cross_attention_head_dim,
        expansion=config.cross_attention_expansion,
    )
