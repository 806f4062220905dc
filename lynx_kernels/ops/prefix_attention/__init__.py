"""Self-attention over a packed row of tokens, described by a PackedLayout."""

from functools import partial
from typing import Literal, overload

from torch import Tensor

from lynx_kernels.backends import dispatch
from lynx_kernels.backends import triton as triton_backend
from lynx_kernels.layout import PackedLayout
from lynx_kernels.layout.tables import check_shapes
from lynx_kernels.ops.attention_common import cpu as common_cpu
from lynx_kernels.ops.attention_common.operator import (
    check_heads,
    check_rows,
    check_scores,
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
        triton_backend.lazy("lynx_kernels.ops.prefix_attention.triton", "forward"),
        triton_backend.lazy("lynx_kernels.ops.prefix_attention.triton", "backward"),
        architectures=triton_backend.ARCHITECTURES,
        unsupported_reason=partial(triton_unsupported_reason, max_head_dim=512),
        not_preferred_reason=triton_backend.not_preferred_reason,
    ),
    dispatch.Implementation(
        "cpu", cpu.forward, cpu.backward, architectures=("cpu",), unsupported_reason=common_cpu.unsupported_reason
    ),
    dispatch.Implementation("reference", reference.forward, reference.backward),
)


def _call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: PackedLayout,
    scale: float | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> PrefixAttentionCall:
    if not isinstance(layout, PackedLayout):
        raise TypeError(f"prefix_attention: layout is a {type(layout).__name__}, expected a PackedLayout")
    check_heads("prefix_attention", 3, q, ("v",), k=k, v=v)
    tokens = layout.num_tokens
    check_rows("prefix_attention", layout.runs, q=(q, tokens), k=(k, tokens), v=(v, tokens))
    tables = {
        "runs": (layout.runs, (None, None)),
        "tokens": (layout.tokens, (3, tokens)),
        "key_runs": (layout.key_runs, (None,)),
    }
    check_shapes("prefix_attention", {"window": layout.window, "chunk": layout.chunk}, **tables)
    check_scores("prefix_attention", q, softcap, sinks)
    fields = layout.runs, layout.tokens, layout.key_runs, layout.window, layout.chunk
    return PrefixAttentionCall(q, k, v, sinks, *fields, resolve_scale("prefix_attention", scale, q), softcap)


@overload
def prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: PackedLayout,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
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
    softcap: float | None = None,
    sinks: Tensor | None = None,
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
    softcap: float | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    impl: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention over a packed row in which each token sees those that ``layout`` says.

    Args:
        q: (T, H, D), fp64, fp32, fp16 or bf16, any strides.
        k: (T, Hkv, D); query head h uses key head ``h // (H / Hkv)``.
        v: (T, Hkv, Dv); Dv may be smaller than D.
        layout: which of the T tokens see which, on the same device.
        scale: factor on the scores before the softmax, 1 / sqrt(D) by default.
        softcap: a score s becomes ``softcap * tanh(s / softcap)`` (Gemma 2).
        sinks: (H,), a score that each query of the head gives to nothing, in units of scores, not scaled (gpt-oss).
            Differentiable.
        return_lse: also return the LSE, the log of each query's softmax denominator, its sink included.
            Differentiable; use it to combine partial results.
        impl: the name of an implementation; None takes the best that can run.

    Returns:
        (T, H, Dv) in the dtype of q; with ``return_lse`` also (T, H) in fp32 (fp64 for fp64).

    Raises:
        ValueError: a shape or a device is invalid, or the layout has another number of tokens; on a CPU also tables
            that no layout has.
        TypeError: ``layout`` is not a PackedLayout, or a tensor is not floating point or is a DTensor.
    """
    call = _call(q, k, v, layout, scale, softcap, sinks)
    out, lse = _OPERATOR(*call, OPERATION.choose(impl, call))
    return (out, lse) if return_lse else out


_OPERATOR = define_attention(OPERATION, num_floats=4)
