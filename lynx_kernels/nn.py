"""Drop-in modules that use the operations.

A kernel may use the weights of a submodule. If the submodule was changed (LoRA, hooks, quantisation, offload), it is
called, and a composition of torch's modules runs instead of the kernel. ``lynx_kernels.explain(module)`` reports this,
and so does the log of ``lynx_kernels`` (INFO).
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lynx_kernels import children
from lynx_kernels.backends import dispatch
from lynx_kernels.backends.dtypes import acc_dtype
from lynx_kernels.layout import SpanLayout
from lynx_kernels.ops.adapter import adapter
from lynx_kernels.ops.adapter.activations import ACTIVATIONS
from lynx_kernels.ops.cross_attention import cross_attention


class Adapter(nn.Module):
    """A bottleneck adapter: ``x + scale * up(dropout(act(down(LayerNorm(x)))))``.

    The defaults are the adapter of Lynx (arXiv 2307.02469, section 2.2). ``norm=None`` with ``starts_as_identity`` is
    the adapter of Houlsby et al. (arXiv 1902.00751, section 2.1). ``norm="post"`` has the order of a post-norm
    transformer: ``LayerNorm(x + scale * up(act(down(x))))``. ``residual=None`` leaves x out, for an adapter beside
    another module, to whose output this one's is added (He et al., arXiv 2110.04366, section 4.1). Without a residual,
    and while dropout drops, a composition of torch's modules runs instead of the kernel.

    Args:
        width: d, the width of x.
        bottleneck: r, the width between the projections.
        activation: ``"silu"``, ``"relu"``, ``"gelu"`` or ``"gelu_tanh"``.
        norm: ``"pre"``, a LayerNorm before the projections; ``"post"``, one after the residual sum; or None.
        bias: whether the projections have biases.
        scale: the initial value of ``scale``.
        trains_scale: whether ``scale`` is a parameter. Otherwise it is a buffer.
        scale_per_channel: whether ``scale`` has d elements, one for each channel, in place of one.
        residual: what the branch is added to: ``"input"``, x; ``"norm"``, LayerNorm(x), which needs ``norm="pre"``; or
            None, nothing.
        dropout: the probability that an activation is dropped in training, from 0 to less than 1.
        starts_as_identity: initialise the up-projection and its bias to 0. A new module then returns x (normalised if
            ``norm="post"``). Otherwise the weights of both projections start from N(0, 0.02), as in Lynx. Biases
            always start at 0.
        eps: epsilon of the LayerNorm.

    Raises:
        ValueError: ``activation``, ``norm`` or ``residual`` is not one of the values above, or ``eps``, ``scale`` or
            ``dropout`` not a number that can be used.
    """

    norm: nn.LayerNorm | None
    dropout: nn.Dropout | None
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
        scale_per_channel: bool = False,
        residual: Literal["input", "norm"] | None = "input",
        dropout: float = 0.0,
        starts_as_identity: bool = False,
        eps: float = 1e-5,
    ):
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"Adapter: activation={activation!r}, expected one of {sorted(ACTIVATIONS)}")
        if norm not in ("pre", "post", None):
            raise ValueError(f"Adapter: norm={norm!r}, expected 'pre', 'post' or None")
        if residual not in ("input", "norm", None) or (residual == "norm" and norm != "pre"):
            raise ValueError(
                f"Adapter: residual={residual!r} with norm={norm!r}, expected 'input', None, or 'norm' with norm='pre'"
            )
        dispatch.require_finite("Adapter", scale=scale)
        dispatch.require_finite("Adapter", least=0, eps=eps, dropout=dropout)
        if dropout >= 1:
            raise ValueError(f"Adapter: dropout={dropout}, expected less than 1")
        self.activation = activation
        self.is_post_norm = norm == "post"
        self.residual = residual
        self.initial_scale = scale
        self.starts_as_identity = starts_as_identity
        self.norm = None if norm is None else nn.LayerNorm(width, eps=eps)
        self.down = nn.Linear(width, bottleneck, bias=bias)
        self.up = nn.Linear(bottleneck, width, bias=bias)
        self.dropout = nn.Dropout(dropout) if dropout > 0 else None
        scales = torch.empty(width if scale_per_channel else 1)
        if trains_scale:
            self.scale = nn.Parameter(scales)
        else:
            self.register_buffer("scale", scales)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the parameters again."""
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
        if self.norm is not None and self.residual == "norm":
            x = self.norm(children.cast_for(self.norm, x)).to(x.dtype)
        branch, reasons = self._branch(), self._reasons()
        out = _bottleneck(self, branch, x, self.scale, self.activation, reasons, self.dropout, self.residual is None)
        return self.norm(out) if self.norm is not None and self.is_post_norm else out

    def changed_children(self, device: torch.device | None = None) -> dict[str, str]:
        """Child name -> why the child must be called (see ``lynx_kernels.children``). Empty if the kernel runs."""
        return {**children.changed_reasons(self._branch(), device), **self._reasons()}

    def _branch(self) -> dict[str, Any]:
        found = self._modules  # faster than the attributes of a module
        has_norm = not self.is_post_norm and self.residual != "norm"
        return {"norm": found.get("norm") if has_norm else None, "down": found["down"], "up": found["up"]}

    def _reasons(self) -> dict[str, str]:
        """Why the kernel cannot run, whatever the children are."""
        reasons = {}
        if self.dropout is not None and self.training:
            reasons["dropout"] = "it drops numbers in training"
        if self.residual is None:
            reasons["residual"] = "the kernel adds x"
        return reasons

    def extra_repr(self) -> str:
        """The settings that the submodules do not show."""
        return f"activation={self.activation!r}, is_post_norm={self.is_post_norm}, residual={self.residual!r}"


class PerceiverAttention(nn.Module):
    """Latents attend to media: the cross-attention of a Perceiver resampler.

    By default keys and values come from the media only (Lynx, arXiv 2307.02469, section 2.2). With a layout of the
    latents they come from the media and the latents, in one softmax (Flamingo, arXiv 2204.14198, figure 5). Both inputs
    pass a LayerNorm first. The four projections have no bias.

    Args:
        width: width of the latents and of the output.
        media_width: width of the media, ``width`` by default.
        num_heads, head_dim: heads of the attention, and their dimension.
        eps: epsilon of both LayerNorms.
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
        dispatch.require_finite("PerceiverAttention", least=0, eps=eps)
        media_width = width if media_width is None else media_width
        inner = num_heads * head_dim
        self.head_dim = head_dim
        self.norm_media = nn.LayerNorm(media_width, eps=eps)
        self.norm_latents = nn.LayerNorm(width, eps=eps)
        self.to_q = nn.Linear(width, inner, bias=False)
        self.to_kv = nn.Linear(media_width, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, width, bias=False)

    def forward(
        self, latents: Tensor, media: Tensor, layout: SpanLayout, latents_layout: SpanLayout | None = None
    ) -> Tensor:
        """Compute the attention.

        Args:
            latents: (Q, width).
            media: (K, media_width).
            layout: which latents see which media.
            latents_layout: which latents also see which latents. Latents then pass the projection of the media, so
                ``width`` and ``media_width`` must be equal.

        Returns:
            (Q, width).

        Raises:
            ValueError: latents_layout is given, and the widths differ.
        """
        latents = self.norm_latents(latents)
        q = self.to_q(latents).unflatten(-1, (-1, self.head_dim))  # (Q, H, D)
        k, v = _keys_values(self.to_kv(self.norm_media(media)), self.head_dim)
        if latents_layout is None:
            return self.to_out(cross_attention(q, k, v, layout).flatten(-2))
        if self.to_q.in_features != self.to_kv.in_features:
            raise ValueError(
                f"PerceiverAttention: latents of width {self.to_q.in_features} cannot pass the projection of media of "
                f"width {self.to_kv.in_features}; use equal widths, or omit latents_layout"
            )
        out, lse = cross_attention(q, k, v, layout, return_lse=True)
        k, v = _keys_values(self.to_kv(latents), self.head_dim)
        own, own_lse = cross_attention(q, k, v, latents_layout, return_lse=True)
        share = torch.sigmoid(lse - own_lse)[..., None]  # the media's share of one softmax over both
        return self.to_out((own + share * (out - own)).to(out.dtype).flatten(-2))


class GatedCrossAttention(nn.Module):
    """Text attends to media: Flamingo's gated cross-attention block, placed before a decoder layer.

    ``x + tanh(gate) * attention(LayerNorm(x), media)``, then ``x + tanh(gate) * feed_forward(LayerNorm(x))``. Each
    gate starts at 0, so a new block returns x bit for bit (arXiv 2204.14198, figure 4). As in Open-Flamingo, no
    projection has a bias, and the feed-forward uses the exact GELU. The media pass no LayerNorm here, because the
    output of a resampler has already passed one. A token that sees no media gets 0 from the attention. The feed-forward
    applies to every token. Projections are initialised as in ``torch.nn.Linear``.

    Matrix products run in the dtype of the parameters (under autocast, in the autocast dtype). Residual sums run in
    the dtype of x or a wider one.

    Args:
        width: width of the text's hidden states.
        media_width: width of the media, ``width`` by default.
        num_heads, head_dim: heads of the attention, and their dimension.
        expansion: width of the feed-forward divided by ``width``.
        eps: epsilon of both LayerNorms.
    """

    def __init__(
        self,
        width: int,
        media_width: int | None = None,
        *,
        num_heads: int = 8,
        head_dim: int = 64,
        expansion: int = 4,
        eps: float = 1e-5,
    ):
        super().__init__()
        dispatch.require_finite("GatedCrossAttention", least=0, eps=eps)
        inner = num_heads * head_dim
        self.head_dim = head_dim
        self.norm = nn.LayerNorm(width, eps=eps)
        self.to_q = nn.Linear(width, inner, bias=False)
        self.to_kv = nn.Linear(width if media_width is None else media_width, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, width, bias=False)
        self.attention_gate = nn.Parameter(torch.empty(1))
        self.feed_forward_norm = nn.LayerNorm(width, eps=eps)
        self.feed_forward_in = nn.Linear(width, expansion * width, bias=False)
        self.feed_forward_out = nn.Linear(expansion * width, width, bias=False)
        self.feed_forward_gate = nn.Parameter(torch.empty(1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the parameters again, with both gates at 0."""
        for module in self.children():
            module.reset_parameters()  # type: ignore[operator]
        nn.init.zeros_(self.attention_gate)
        nn.init.zeros_(self.feed_forward_gate)

    def keys_values(self, media: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values, each (K, H, D), of media (K, media_width). Generation computes them only once."""
        return _keys_values(self.to_kv(children.cast_for(self.to_kv, media)), self.head_dim)

    def forward(self, x: Tensor, media: Tensor | tuple[Tensor, Tensor], layout: SpanLayout) -> Tensor:
        """Let every token of x attend to the media it sees.

        Args:
            x: (..., width), the tokens of all rows end to end.
            media: (K, media_width), or the result of ``keys_values``.
            layout: which tokens see which media.

        Returns:
            The shape and dtype of x.
        """
        k, v = self.keys_values(media) if isinstance(media, Tensor) else media
        q = self.to_q(children.cast_for(self.to_q, self.norm(children.cast_for(self.norm, x))))
        q = q.reshape(-1, k.shape[1], self.head_dim)  # (Q, H, D)
        attended = self.to_out(cross_attention(q, k, v, layout).flatten(-2)).view(x.shape)
        x = (x + self.attention_gate.tanh() * attended).to(x.dtype)
        return _bottleneck(self, self._feed_forward(), x, self.feed_forward_gate.tanh(), "gelu")

    def changed_children(self, device: torch.device | None = None) -> dict[str, str]:
        """Child name of the feed-forward -> why it must be called. The attention's children are always called."""
        return children.changed_reasons(self._feed_forward(), device)

    def _feed_forward(self) -> dict[str, Any]:
        return {name: self._modules[name] for name in ("feed_forward_norm", "feed_forward_in", "feed_forward_out")}


def _bottleneck(
    owner: nn.Module,
    branch: dict[str, Any],
    x: Tensor,
    scale: Tensor,
    activation: str,
    reasons: Mapping[str, str] | None = None,
    dropout: nn.Module | None = None,
    is_branch: bool = False,
) -> Tensor:
    """``x + scale * up(dropout(act(down(norm(x)))))``, or without x.

    Args:
        branch: the owner's norm (or None) and its two projections.
        scale: one element or (d,).
        reasons: why the kernel cannot run, whatever the children are.
        is_branch: whether x is not added.
    """
    norm, down, up = branch.values()
    changed = {**children.changed_reasons(branch, x.device), **(reasons or {})}
    if not changed:
        norm_weight, norm_bias = children.weight_and_bias(norm)
        down_weight, down_bias = children.weight_and_bias(down)
        up_weight, up_bias = children.weight_and_bias(up)
        eps = 1e-5 if norm is None else norm.eps
        if scale.numel() > 1:  # the kernel has one scale for all channels, so the weights of a channel take theirs
            up_weight, up_bias = _scaled(up_weight, scale[:, None]), _scaled(up_bias, scale)
            scale = torch.ones_like(scale[:1])
        return adapter(
            x, norm_weight, norm_bias, down_weight, down_bias, up_weight, up_bias, scale, eps=eps, activation=activation
        )
    children.log_once(owner, changed)
    normalized = x if norm is None else norm(children.cast_for(norm, x))
    activated = ACTIVATIONS[activation](down(children.cast_for(down, normalized)))
    if dropout is not None:
        activated = dropout(activated)
    out = up(children.cast_for(up, activated))
    x_acc = x.to(acc_dtype(x.dtype))
    out = scale.to(x_acc) * out.to(x_acc)
    return (out if is_branch else x_acc + out).to(x.dtype)


def _scaled(weight: Tensor | None, scale: Tensor) -> Tensor | None:
    acc = acc_dtype(scale.dtype)
    return None if weight is None else (weight.to(acc) * scale.to(acc)).to(weight.dtype)


def _keys_values(projected: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """Split (K, 2 * H * D), keys before values, into two tensors (K, H, D)."""
    keys, values = projected.unflatten(-1, (2, -1, head_dim)).unbind(-3)
    return keys, values
