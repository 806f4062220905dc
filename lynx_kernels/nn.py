"""Drop-in modules over the operations."""

import torch
from torch import Tensor, nn

from lynx_kernels.adapter import adapter
from lynx_kernels.attention import cross_attention
from lynx_kernels.layout import SpanLayout


class Adapter(nn.Module):
    """``x + scale * up(act(down(LayerNorm(x))))``, the bottleneck adapter of Lynx (arXiv 2307.02469, section 2.2).

    Args:
        width: d, the width of x.
        bottleneck: r, the width between the projections.
        activation: ``"silu"``, ``"relu"``, ``"gelu"`` or ``"gelu_tanh"``.
        eps: of the LayerNorm.

    Weights start from N(0, 0.02), biases at 0, ``scale`` at 1, as in Lynx: it is not the identity at first.
    """

    def __init__(self, width: int, bottleneck: int, *, activation: str = "silu", eps: float = 1e-5):
        super().__init__()
        self.activation = activation
        self.norm = nn.LayerNorm(width, eps=eps)
        self.down = nn.Linear(width, bottleneck)
        self.up = nn.Linear(bottleneck, width)
        self.scale = nn.Parameter(torch.ones(1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the initial values anew."""
        self.norm.reset_parameters()
        for projection in (self.down, self.up):
            nn.init.normal_(projection.weight, std=0.02)
            nn.init.zeros_(projection.bias)
        nn.init.ones_(self.scale)

    def forward(self, x: Tensor) -> Tensor:
        """(..., d) -> (..., d)."""
        return adapter(
            x,
            self.norm.weight,
            self.norm.bias,
            self.down.weight,
            self.down.bias,
            self.up.weight,
            self.up.bias,
            self.scale,
            eps=self.norm.eps,
            activation=self.activation,
        )


class PerceiverAttention(nn.Module):
    """Latents attend to media: the cross-attention of a Perceiver resampler, keys and values from the media only.

    Both inputs pass a LayerNorm first; the four projections have no bias (Lynx, arXiv 2307.02469, section 2.2).

    Args:
        width: of the latents and of the output.
        media_width: of the media, ``width`` by default.
        num_heads, head_dim: of the attention.
        eps: of both LayerNorms.
    """

    def __init__(
        self,
        width: int,
        media_width: int | None = None,
        *,
        num_heads: int = 8,
        head_dim: int = 64,
        eps: float = 1e-5,
    ):
        super().__init__()
        media_width = width if media_width is None else media_width
        inner = num_heads * head_dim
        self.head_dim = head_dim
        self.norm_media = nn.LayerNorm(media_width, eps=eps)
        self.norm_latents = nn.LayerNorm(width, eps=eps)
        self.to_q = nn.Linear(width, inner, bias=False)
        self.to_kv = nn.Linear(media_width, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, width, bias=False)

    def forward(self, latents: Tensor, media: Tensor, layout: SpanLayout) -> Tensor:
        """(Q, width) latents, (K, media_width) media -> (Q, width); ``layout`` says which latents see which media."""
        q = self.to_q(self.norm_latents(latents)).unflatten(-1, (-1, self.head_dim))  # (Q, H, D)
        k, v = self.to_kv(self.norm_media(media)).unflatten(-1, (2, -1, self.head_dim)).unbind(-3)  # (K, H, D) each
        return self.to_out(cross_attention(q, k, v, layout).flatten(-2))
