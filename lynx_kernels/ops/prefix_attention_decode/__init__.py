"""Decoding attention: the newest tokens of many branches attend to a cache that stores shared keys once."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from lynx_kernels.backends import dispatch
from lynx_kernels.backends import triton as triton_backend
from lynx_kernels.layout.packed import checked_locality
from lynx_kernels.ops.attention_common import cpu as common_cpu
from lynx_kernels.ops.attention_common.operator import (
    check_heads,
    check_scores,
    define_attention,
    resolve_scale,
    triton_unsupported_reason,
)
from lynx_kernels.ops.prefix_attention_decode import cpu, cuda, reference
from lynx_kernels.ops.prefix_attention_decode.call import DecodeBackwardCall, DecodeCall

_FEW_QUERIES = 32  # of a branch


def _check(call: DecodeCall) -> None:
    operation = "prefix_attention_decode"
    caches, indices = call.caches, call.indices
    q, shared_k, shared_v, branch_k, branch_v = call.floats
    check_heads(operation, 4, q, ("shared_v", "branch_v"), ("shared_k", "shared_v"), **caches)
    check_scores(operation, q, call.softcap, call.sinks)
    dispatch.require_same_device(operation, q.device, **indices)
    num_branches = q.shape[0]
    if shared_v.shape[:1] != shared_k.shape[:1] or branch_v.shape[:2] != branch_k.shape[:2]:
        raise ValueError(
            f"{operation}: keys and values differ in number: shared {tuple(shared_k.shape)} and "
            f"{tuple(shared_v.shape)}, branch {tuple(branch_k.shape)} and {tuple(branch_v.shape)}"
        )
    if shared_v.shape[-1] != branch_v.shape[-1]:
        raise ValueError(
            f"{operation}: shared_v has head dimension {shared_v.shape[-1]}, branch_v has {branch_v.shape[-1]}"
        )
    if branch_k.shape[0] != num_branches:
        raise ValueError(f"{operation}: branch_k has {branch_k.shape[0]} branches, but q has {num_branches}")
    if branch_k.shape[1] < q.shape[1]:
        raise ValueError(
            f"{operation}: branch_k has room for {branch_k.shape[1]} keys per branch, fewer than the {q.shape[1]} "
            "queries in q; the cache must include the keys of the queries themselves"
        )
    for name, index in indices.items():
        if index.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{operation}: {name} is {index.dtype}, expected int32 or int64")
    if call.ranges.dim() != 3 or call.ranges.shape[0] != num_branches or call.ranges.shape[2] != 2:
        raise ValueError(
            f"{operation}: ranges has shape {tuple(call.ranges.shape)}, expected ({num_branches}, P, 2): for each "
            "branch the start and the end of every range of shared keys that it reads"
        )
    if tuple(call.branch_lengths.shape) != (num_branches,):
        raise ValueError(
            f"{operation}: branch_lengths has shape {tuple(call.branch_lengths.shape)}, expected ({num_branches},)"
        )
    if q.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_values(call)


def _check_values(call: DecodeCall) -> None:
    num_shared, queries, room = call.shared_k.shape[0], call.q.shape[1], call.branch_k.shape[1]
    for branch, ranges in enumerate(call.ranges.tolist()):
        for number, (start, end) in enumerate(ranges):
            if not 0 <= start <= end <= num_shared:
                raise ValueError(
                    f"prefix_attention_decode: ranges[{branch}, {number}] is [{start}, {end}], expected "
                    f"0 <= start <= end <= {num_shared}"
                )
    for branch, length in enumerate(call.branch_lengths.tolist()):
        if not queries <= length <= room:
            raise ValueError(
                f"prefix_attention_decode: branch_lengths[{branch}] is {length}, expected {queries} to {room}"
            )


def _note(call: DecodeCall) -> str | None:
    if (queries := call.q.shape[1]) <= _FEW_QUERIES:
        return None
    return (
        f"a branch has {queries} queries, and this operation is written for one or a few; many queries against a "
        "longer cache (the next turn of a chat) stay with torch's scaled_dot_product_attention, over keys that stand "
        "together"
    )


def _forward_only(kernels: str, unsupported_reason: Callable[[DecodeCall], str | None]) -> Callable[..., str | None]:
    name = f"the {kernels} kernels for decoding"
    return lambda call: dispatch.gradient_unsupported_reason(name, *call[:6]) or unsupported_reason(call)


OPERATION = dispatch.Operation(
    "prefix_attention_decode",
    DecodeCall,
    DecodeBackwardCall,
    dispatch.Implementation(
        "cuda",
        cuda.forward,
        architectures=dispatch.NVIDIA,
        unsupported_reason=cuda.unsupported_reason,
        not_preferred_reason=cuda.not_preferred_reason,
    ),
    dispatch.Implementation(
        "triton",
        triton_backend.lazy("lynx_kernels.ops.prefix_attention_decode.triton", "forward"),
        architectures=triton_backend.ARCHITECTURES,
        unsupported_reason=_forward_only("Triton", partial(triton_unsupported_reason, max_head_dim=512)),
        not_preferred_reason=triton_backend.not_preferred_reason,
    ),
    dispatch.Implementation(
        "cpu",
        cpu.forward,
        architectures=("cpu",),
        unsupported_reason=_forward_only("C++", common_cpu.unsupported_reason),
    ),
    dispatch.Implementation("reference", reference.forward, reference.backward),
    check=_check,
    note=_note,
)


def _call(
    q: Tensor, shared_k: Tensor, shared_v: Tensor, branch_k: Tensor, branch_v: Tensor, ranges: Tensor,
    branch_lengths: Tensor, scale: float | None, window: int | None, chunk: int | None, softcap: float | None,
    sinks: Tensor | None,
) -> DecodeCall:  # fmt: skip
    if window is not None or chunk is not None:
        try:
            window, chunk = checked_locality(window, chunk)
        except (TypeError, ValueError) as error:
            raise type(error)(f"prefix_attention_decode: {error}") from None
    scale = resolve_scale("prefix_attention_decode", scale, q)
    return DecodeCall(
        q, shared_k, shared_v, branch_k, branch_v, sinks, ranges, branch_lengths, window, chunk, scale, softcap
    )


@OPERATION.explained_by(_call)
def prefix_attention_decode(
    q: Tensor,
    shared_k: Tensor,
    shared_v: Tensor,
    branch_k: Tensor,
    branch_v: Tensor,
    ranges: Tensor,
    branch_lengths: Tensor,
    *,
    scale: float | None = None,
    window: int | None = None,
    chunk: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    impl: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention of the newest tokens of each branch to the shared keys on its path and its own keys.

    What branches share (an image, a prompt, the turns before a conversation forked) is cached once. The path of a
    branch is its ranges of shared keys, one after another, then its own keys. The queries of a branch are its last Q
    tokens. The cache of the branch already holds their keys. Among themselves they are causal.

    The operation is written for one or a few queries a branch. Many queries against a longer cache (the next turn of a
    chat) stay with torch's ``scaled_dot_product_attention``.

    Args:
        q: (B, Q, H, D), fp64, fp32, fp16 or bf16, any strides; B branches.
        shared_k: (K, Hkv, D), all shared keys in any order; query head h uses key head ``h // (H / Hkv)``.
        shared_v: (K, Hkv, Dv); Dv may be smaller than D.
        branch_k: (B, Lb, Hkv, D). Of each branch, the first ``branch_lengths`` are used.
        branch_v: (B, Lb, Hkv, Dv).
        ranges: (B, P, 2) int32 or int64: start and end of each range of shared keys that a branch reads, in the order
            of its path. Empty ranges fill up the rows of branches that read fewer. Branches with the same range in the
            same place read it together; ranges that only overlap are read one by one. The values of the two index
            tensors are checked only on the CPU.
        branch_lengths: (B,) int32 or int64, Q to Lb; includes the keys of the queries themselves.
        scale: factor on the scores before the softmax, 1 / sqrt(D) by default.
        window: a query at place p of its branch's path sees places above ``p - window``, at least 1.
        chunk: a query at place p sees the places p' with ``p' // chunk == p // chunk``, at least 1.
        softcap: a score s becomes ``softcap * tanh(s / softcap)`` (Gemma 2).
        sinks: (H,), a score that each query of the head gives to nothing, in units of scores, not scaled (gpt-oss).
        return_lse: also return the LSE, the log of each query's softmax denominator, its sink included.
        impl: the name of an implementation; None takes the best that can run. Only the reference has gradients. The
            others need ``torch.no_grad()`` or inputs that do not require gradients.

    Returns:
        (B, Q, H, Dv) in the dtype of q; with ``return_lse`` also (B, Q, H) in fp32 (fp64 for fp64).

    Raises:
        ValueError: a shape, a device or (on the CPU) an index is invalid, window and chunk are both given, or an option
            is out of range; the message names the argument.
        TypeError: an index tensor is not int32 or int64, another tensor is not floating point, or one is a DTensor.
    """
    call = _call(
        q, shared_k, shared_v, branch_k, branch_v, ranges, branch_lengths, scale, window, chunk, softcap, sinks
    )
    out, lse = _OPERATOR(*call, OPERATION.choose(impl, call))
    return (out, lse) if return_lse else out


_OPERATOR = define_attention(OPERATION, num_floats=6)
