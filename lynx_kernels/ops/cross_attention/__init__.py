"""Attention of query segments to spans of other tokens, described by a SpanLayout."""

from typing import Literal, overload

from torch import Tensor

from lynx_kernels.backends import dispatch
from lynx_kernels.backends import triton as triton_backend
from lynx_kernels.layout import SpanLayout
from lynx_kernels.layout.tables import check_shapes
from lynx_kernels.ops.attention_common import cpu as common_cpu
from lynx_kernels.ops.attention_common.operator import (
    check_heads,
    check_rows,
    define_attention,
    resolve_scale,
    triton_unsupported_reason,
)
from lynx_kernels.ops.cross_attention import cpu, reference
from lynx_kernels.ops.cross_attention.call import CrossAttentionBackwardCall, CrossAttentionCall

OPERATION = dispatch.Operation(
    "cross_attention",
    CrossAttentionCall,
    CrossAttentionBackwardCall,
    dispatch.Implementation(
        "triton",
        triton_backend.lazy("lynx_kernels.ops.cross_attention.triton", "forward"),
        triton_backend.lazy("lynx_kernels.ops.cross_attention.triton", "backward"),
        architectures=triton_backend.ARCHITECTURES,
        unsupported_reason=triton_unsupported_reason,
        not_preferred_reason=triton_backend.not_preferred_reason,
    ),
    dispatch.Implementation(
        "cpu", cpu.forward, cpu.backward, architectures=("cpu",), unsupported_reason=common_cpu.unsupported_reason
    ),
    dispatch.Implementation("reference", reference.forward, reference.backward),
)


def _call(q: Tensor, k: Tensor, v: Tensor, layout: SpanLayout, scale: float | None) -> CrossAttentionCall:
    if not isinstance(layout, SpanLayout):
        raise TypeError(f"cross_attention: layout is a {type(layout).__name__}, expected a SpanLayout")
    check_heads("cross_attention", 3, q, k=k, v=v)
    queries, keys = layout.num_queries, layout.num_keys
    check_rows("cross_attention", layout.segments, q=(q, queries), k=(k, keys), v=(v, keys))
    table = layout.segments, layout.tile_offsets, layout.tile_segments
    shapes = {"segments": (None, 3), "tile_offsets": (None,), "tile_segments": (None,)}
    check_shapes("cross_attention", {}, **{name: (getattr(layout, name), shape) for name, shape in shapes.items()})
    return CrossAttentionCall(q, k, v, *table, resolve_scale("cross_attention", scale, q))


@overload
def cross_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: SpanLayout,
    *,
    scale: float | None = None,
    return_lse: Literal[False] = False,
    impl: str | None = None,
) -> Tensor: ...
@overload
def cross_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: SpanLayout,
    *,
    scale: float | None = None,
    return_lse: Literal[True],
    impl: str | None = None,
) -> tuple[Tensor, Tensor]: ...
@OPERATION.explained_by(_call)
def cross_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: SpanLayout,
    *,
    scale: float | None = None,
    return_lse: bool = False,
    impl: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention in which every query sees the span of keys of its segment.

    Args:
        q: (Q, H, D), fp64, fp32, fp16 or bf16, any strides.
        k, v: (K, Hkv, D); query head h uses key head ``h // (H / Hkv)``.
        layout: the segments of the Q queries and their spans of the K keys, on the same device.
        scale: factor on the scores before the softmax, 1 / sqrt(D) by default.
        return_lse: also return the LSE, the log of each query's softmax denominator. Differentiable; -inf for an empty
            span.
        impl: the name of an implementation; None takes the best that can run.

    Returns:
        (Q, H, D) in the dtype of q, 0 for an empty span; with ``return_lse`` also (Q, H) in fp32 (fp64 for fp64).

    Raises:
        ValueError: a shape or a device is invalid, or the layout has another number of queries or keys; on a CPU also
            tables that no layout has.
        TypeError: ``layout`` is not a SpanLayout, or a tensor is not floating point or is a DTensor.
    """
    call = _call(q, k, v, layout, scale)
    out, lse = _OPERATOR(*call, OPERATION.choose(impl, call))
    return (out, lse) if return_lse else out


_OPERATOR = define_attention(OPERATION, num_floats=3)
