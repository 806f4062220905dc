"""Cross attention in Triton: triton_rows over a SpanLayout's table."""

from torch import Tensor

from lynx_kernels.ops.attention_common import triton as triton_rows


def forward(
    q: Tensor,  # (Q, H, D)
    k: Tensor,  # (K, Hkv, D)
    v: Tensor,  # (K, Hkv, D)
    segments: Tensor,  # SpanLayout.segments
    tile_offsets: Tensor,  # SpanLayout's inverse
    tile_segments: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Return the output (Q, H, D) and the LSE (Q, H)."""
    table = triton_rows.Table(segments, inverse=(tile_offsets, tile_segments))
    return triton_rows.forward(q, k, v, table, scale)


def backward(
    grad: Tensor | None,  # (Q, H, D)
    grad_lse: Tensor | None,  # (Q, H)
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Tensor,
    tile_offsets: Tensor,
    tile_segments: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v."""
    table = triton_rows.Table(segments, inverse=(tile_offsets, tile_segments))
    return triton_rows.backward(grad, grad_lse, out, lse, q, k, v, table, scale)
