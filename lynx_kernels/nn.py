"""Drop-in modules over the operations."""

from typing import Literal

import torch
from torch import Tensor, nn

from lynx_kernels.adapter import adapter
from lynx_kernels.adapter.activations import ACTIVATIONS
from lynx_kernels.attention import cross_attention
from lynx_kernels.layout import SpanLayout


class Adapter(nn.Module):
    """A bottleneck adapter: ``x + scale * up(act(down(LayerNorm(x))))``.

    As it stands by default it is the adapter of Lynx (arXiv 2307.02469, section 2.2). With ``norm=None`` and
    ``starts_as_identity`` it is that of Houlsby et al. (arXiv 1902.00751, section 2.1). With ``norm="post"`` the order
    is that of a post-norm transformer: ``LayerNorm(x + scale * up(act(down(x))))``.

    Args:
        width: d, the width of x.
        bottleneck: r, the width between the projections.
        activation: ``"silu"``, ``"relu"``, ``"gelu"`` or ``"gelu_tanh"``.
        norm: ``"pre"``, a LayerNorm before the projections; ``"post"``, one after the residual sum; or None.
        bias: whether the projections have biases.
        scale: the first value of the branch's weight.
        trains_scale: whether that weight is a parameter, or a buffer that stays as it is.
        starts_as_identity: up-projection and its bias start at 0, so that x comes out as it came in (``norm="post"``:
            normalised) until training moves them. Otherwise both projections' weights start from N(0, 0.02), as in
            Lynx, and biases at 0.
        eps: of the LayerNorm.

    Raises:
        ValueError: ``activation`` or ``norm`` is none of those above.
    """

    norm: nn.LayerNorm | None
    scale: Tensor

    def __init__(
        self,
        width: int,
        bottleneck: int,
        *,
        activation: str = "silu",
        norm: Literal["pre", "post"] | None = "pre",
        bias: bool = True,
        scale: float = 1.0,
        trains_scale: bool = True,
        starts_as_identity: bool = False,
        eps: float = 1e-5,
    ):
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"Adapter: activation={activation!r}, expected one of {sorted(ACTIVATIONS)}")
        if norm not in ("pre", "post", None):
            raise ValueError(f"Adapter: norm={norm!r}, expected 'pre', 'post' or None")
        self.activation = activation
        self.is_post_norm = norm == "post"
        self.initial_scale = scale
        self.starts_as_identity = starts_as_identity
        self.norm = None if norm is None else nn.LayerNorm(width, eps=eps)
        self.down = nn.Linear(width, bottleneck, bias=bias)
        self.up = nn.Linear(bottleneck, width, bias=bias)
        if trains_scale:
            self.scale = nn.Parameter(torch.empty(1))
        else:
            self.register_buffer("scale", torch.empty(1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the initial values anew."""
        if self.norm is not None:
            self.norm.reset_parameters()
        for projection in (self.down, self.up):
            nn.init.normal_(projection.weight, std=0.02)
            if projection.bias is not None:
                nn.init.zeros_(projection.bias)
        if self.starts_as_identity:
            nn.init.zeros_(self.up.weight)
        nn.init.constant_(self.scale, self.initial_scale)

    def forward(self, x: Tensor) -> Tensor:
        """(..., d) -> (..., d)."""
        pre_norm = None if self.is_post_norm else self.norm
        out = adapter(
            x,
            None if pre_norm is None else pre_norm.weight,
            None if pre_norm is None else pre_norm.bias,
            self.down.weight,
            self.down.bias,
            self.up.weight,
            self.up.bias,
            self.scale,
            eps=1e-5 if pre_norm is None else pre_norm.eps,
            activation=self.activation,
        )
        return self.norm(out) if self.norm is not None and self.is_post_norm else out

    def extra_repr(self) -> str:
        """What the submodules do not show."""
        return f"activation={self.activation!r}, is_post_norm={self.is_post_norm}"


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
