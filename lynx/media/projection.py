"""The bridges that keep every token of the vision tower: a linear layer, or an MLP."""

from typing import Self

import torch
from torch import Tensor, nn

from lynx.config import LynxConfig


def add_frame_positions(features: Tensor, table: Tensor, frame_positions: Tensor) -> Tensor:
    """Add to the frames of videos a vector for their place.

    Args:
        features: (N, tokens, width) of all frames.
        table: (max_frames, width), the vector of each place.
        frame_positions: (N,) int64, a frame's place in its video, -1 for an image.
    """
    position = table[frame_positions.clamp(min=0)]  # (N, width)
    position = position * (frame_positions >= 0).to(position.dtype)[:, None]
    return features + position[:, None].to(features.dtype)


class Projection(nn.Module):
    """Every vision token, projected to the language model's width.

    Args:
        width: the language model's.
        media_width: of the vision tokens.
        is_mlp: ``Linear, GELU, Linear`` with ``width`` in the middle; or one Linear.
        max_frames, latent_initializer_range: as in ``LynxConfig``.
    """

    def __init__(self, width: int, media_width: int, *, is_mlp: bool, max_frames: int, latent_initializer_range: float):
        super().__init__()
        self.latent_initializer_range = latent_initializer_range
        self.frame_position = nn.Parameter(torch.empty(max_frames, media_width))
        first = nn.Linear(media_width, width)
        self.layers = nn.Sequential(first, nn.GELU(), nn.Linear(width, width)) if is_mlp else nn.Sequential(first)
        self.reset_parameters()

    @classmethod
    def from_config(cls, config: LynxConfig) -> Self:
        """The projection of a model of this configuration."""
        return cls(
            config.text_config.hidden_size,
            config.vision_config.hidden_size,
            is_mlp=config.bridge == "mlp",
            max_frames=config.max_frames,
            latent_initializer_range=config.latent_initializer_range,
        )

    def reset_parameters(self) -> None:
        """Draw new initial values of the frame positions."""
        nn.init.trunc_normal_(self.frame_position, std=self.latent_initializer_range)

    def forward(self, features: Tensor, frame_positions: Tensor) -> Tensor:
        """Project all frames: (N, tokens, media_width) -> (N * tokens, width); frame_positions as for the resampler."""
        return self.layers(add_frame_positions(features, self.frame_position, frame_positions)).flatten(0, 1)
