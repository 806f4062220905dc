"""Self-attention over a packed row of tokens, described by a PackedLayout."""

from typing import Literal, overload

from torch import Tensor

from lynx_kernels.backends import dispatch
from lynx_kernels.backends import triton as triton_backend
from lynx_kernels.layout import PackedLayout
from lynx_kernels.ops.attention_common import cpu as common_cpu
from lynx_kernels.ops.attention_common.operator import (
    check_heads,
    check_rows,
    define_attention,
    resolve_scale,
    triton_unsupported_reason,
)
from lynx_kernels.ops.prefix_attention import cpu, reference
from lynx_kernels.ops.prefix_attention.call import PrefixAttentionBackwardCall, PrefixAttentionCall

OPERATION = dispatch.Operation(
    "prefix_attention",
    PrefixAttentionCall,
    PrefixAttentionBackwardCall,
    dispatch.Implementation(
        "triton",
        triton_backend.lazy("lynx_kernels.ops.attention_common.triton", "forward"),
        triton_backend.lazy("lynx_kernels.ops.attention_common.triton", "backward"),
        architectures=triton_backend.ARCHITECTURES,
        unsupported_reason=triton_unsupported_reason,
        not_preferred_reason=triton_backend.not_preferred_reason,
    ),
    dispatch.Implementation(
        "cpu", cpu.forward, cpu.backward, architectures=("cpu",), unsupported_reason=common_cpu.unsupported_reason
    ),
    dispatch.Implementation("reference", reference.forward, reference.backward),
)


def _call(q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout, scale: float | None) -> PrefixAttentionCall:
    if not isinstance(layout, PackedLayout):
        raise TypeError(f"prefix_attention: layout is a {type(layout).__name__}, expected a PackedLayout")
    check_heads("prefix_attention", 3, q, k=k, v=v)
    tokens = layout.num_tokens
    check_rows("prefix_attention", layout.segments, q=(q, tokens), k=(k, tokens), v=(v, tokens))
    return PrefixAttentionCall(q, k, v, layout.segments, layout.root_is_causal, resolve_scale(scale, q))


@overload
def prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: PackedLayout,
    *,
    scale: float | None = None,
    return_lse: Literal[False] = False,
    impl: str | None = None,
) -> Tensor: ...
@overload
def prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: PackedLayout,
    *,
    scale: float | None = None,
    return_lse: Literal[True],
    impl: str | None = None,
) -> tuple[Tensor, Tensor]: ...
@OPERATION.explained_by(_call)
def prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: PackedLayout,
    *,
    scale: float | None = None,
    return_lse: bool = False,
    impl: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention in which every token sees its root and, causally, its own branch, as ``layout`` describes.

    Args:
        q: (T, H, D), fp64, fp32, fp16 or bf16, any strides.
        k, v: (T, Hkv, D); query head h uses key head ``h // (H / Hkv)``.
        layout: which of the T tokens see which, on the same device.
        scale: factor on the scores before the softmax, 1 / sqrt(D) by default.
        return_lse: also return the LSE, the log of each query's softmax denominator. Differentiable; use it to combine
            partial results.
        impl: the name of an implementation; None takes the best that can run.

    Returns:
        (T, H, D) in the dtype of q; with ``return_lse`` also (T, H) in fp32 (fp64 for fp64).

    Raises:
        ValueError: a shape or a device is invalid, or the layout has another number of tokens.
        TypeError: ``layout`` is not a PackedLayout, or a tensor is not floating point or is a DTensor.
    """
    call = _call(q, k, v, layout, scale)
    out, lse = _OPERATOR(*call, OPERATION.choose(impl, call))
    return (out, lse) if return_lse else out


_OPERATOR = define_attention(OPERATION, num_floats=3)
