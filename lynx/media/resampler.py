"""The Perceiver resampler: a fixed number of tokens from any number of frames (arXiv 2307.02469, section 2.2)."""

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Self

import torch
from torch import Tensor, nn

from lynx.config import LynxConfig
from lynx.media.projection import add_frame_positions
from lynx_kernels import SpanLayout
from lynx_kernels.nn import PerceiverAttention


def media_layout(frame_counts: Sequence[int], tokens_per_frame: int, num_latents: int) -> SpanLayout:
    """Which latents see which vision tokens: the latents of item i see all of its ``frame_counts[i]`` frames."""
    ends = [tokens_per_frame * frames for frames in accumulate(frame_counts, initial=0)]
    spans = list(pairwise(ends))
    return SpanLayout.from_spans([num_latents] * len(frame_counts), spans, ends[-1])


class ResamplerLayer(nn.Module):
    """Latents read the media, then pass a feed-forward layer; both are residual."""

    def __init__(self, width: int, media_width: int, *, num_heads: int, head_dim: int, expansion: int):
        super().__init__()
        self.attention = PerceiverAttention(width, media_width, num_heads=num_heads, head_dim=head_dim)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, expansion * width, bias=False),
            nn.GELU(),
            nn.Linear(expansion * width, width, bias=False),
        )

    def forward(self, latents: Tensor, media: Tensor, layout: SpanLayout, latents_layout: SpanLayout | None) -> Tensor:
        """(Q, width) latents and (K, media_width) media -> (Q, width)."""
        latents = latents + self.attention(latents, media, layout, latents_layout)
        return latents + self.feed_forward(latents)


class Resampler(nn.Module):
    """Learned latents read the vision tokens of an item through ``depth`` layers of attention and feed-forward.

    Args:
        width: of the latents and of the output.
        media_width: of the vision tokens.
        concatenates_latents: whether the latents of an item see each other beside its media; both widths must be equal.
        num_latents, depth, num_heads, head_dim, expansion, max_frames, latent_initializer_range: as in ``LynxConfig``.
    """

    def __init__(
        self,
        width: int,
        media_width: int,
        *,
        num_latents: int,
        depth: int,
        num_heads: int,
        head_dim: int,
        expansion: int,
        max_frames: int,
        latent_initializer_range: float,
        concatenates_latents: bool = False,
    ):
        super().__init__()
        self.num_latents = num_latents
        self.concatenates_latents = concatenates_latents
        self.latent_initializer_range = latent_initializer_range
        self.latents = nn.Parameter(torch.empty(num_latents, width))
        self.frame_position = nn.Parameter(torch.empty(max_frames, media_width))
        self.layers = nn.ModuleList(
            ResamplerLayer(width, media_width, num_heads=num_heads, head_dim=head_dim, expansion=expansion)
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        self.reset_parameters()

    @classmethod
    def from_config(cls, config: LynxConfig) -> Self:
        """The resampler of a model of this configuration."""
        media_width = config.vision_config.hidden_size
        return cls(
            media_width if config.resampler_concatenates_latents else config.text_config.hidden_size,
            media_width,
            num_latents=config.num_latents,
            depth=config.resampler_depth,
            num_heads=config.resampler_heads,
            head_dim=config.resampler_head_dim,
            expansion=config.resampler_expansion,
            max_frames=config.max_frames,
            latent_initializer_range=config.latent_initializer_range,
            concatenates_latents=config.resampler_concatenates_latents,
        )

    def reset_parameters(self) -> None:
        """Draw new initial values of the latents and frame positions."""
        for parameter in (self.latents, self.frame_position):
            nn.init.trunc_normal_(parameter, std=self.latent_initializer_range)

    def forward(self, features: Tensor, frame_positions: Tensor, layout: SpanLayout) -> Tensor:
        """Resample all items at once.

        Args:
            features: (N, tokens, media_width) of all frames, items one after another.
            frame_positions: (N,) int64, a frame's place in its video, -1 for an image.
            layout: which latents see which tokens, from ``media_layout``.

        Returns:
            (items * num_latents, width).
        """
        media = add_frame_positions(features, self.frame_position, frame_positions).flatten(0, 1)
        items = layout.num_queries // self.num_latents
        latents_layout = self._latents_layout(items, media.device) if self.concatenates_latents else None
        latents = self.latents.repeat(items, 1)
        for layer in self.layers:
            latents = layer(latents, media, layout, latents_layout)
        return self.norm(latents)

    def _latents_layout(self, items: int, device: torch.device) -> SpanLayout:
        """Which latents see each other: all of an item."""
        first = torch.arange(items, device=device) * self.num_latents
        return SpanLayout.from_equal_segments(
            torch.stack([first, first + self.num_latents], 1),
            self.num_latents,
            items * self.num_latents,
            max_span_length=self.num_latents,
        )
