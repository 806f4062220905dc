"""Prefix attention in Triton: triton_rows over a PackedLayout's table."""

from torch import Tensor

from lynx_kernels.ops.attention_common import triton as triton_rows


def forward(
    q: Tensor,  # (T, H, D)
    k: Tensor,  # (T, Hkv, D)
    v: Tensor,  # (T, Hkv, D)
    segments: Tensor,  # PackedLayout.segments
    root_is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Return the output (T, H, D) and the LSE (T, H)."""
    return triton_rows.forward(q, k, v, triton_rows.Table(segments, root_is_causal), scale)


def backward(
    grad: Tensor | None,  # (T, H, D)
    grad_lse: Tensor | None,  # (T, H)
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Tensor,
    root_is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v."""
    table = triton_rows.Table(segments, root_is_causal)
    return triton_rows.backward(grad, grad_lse, out, lse, q, k, v, table, scale)
