"""Decoding attention: the newest tokens of many branches attend to a cache that stores each root's keys once."""

from collections.abc import Callable

import torch
from torch import Tensor

from lynx_kernels.backends import dispatch
from lynx_kernels.backends import triton as triton_backend
from lynx_kernels.ops.attention_common import cpu as common_cpu
from lynx_kernels.ops.attention_common.operator import (
    check_heads,
    define_attention,
    resolve_scale,
    triton_unsupported_reason,
)
from lynx_kernels.ops.prefix_attention_decode import cpu, cuda, reference
from lynx_kernels.ops.prefix_attention_decode.call import DecodeBackwardCall, DecodeCall


def _check_range(name: str, index: Tensor, lowest: int, highest: int) -> None:
    values = index.tolist()  # one reduction of a tensor takes as long as min() of a list of hundreds of numbers
    if values and not (lowest <= min(values) and max(values) <= highest):
        raise ValueError(f"prefix_attention_decode: {name} is {values}, expected values from {lowest} to {highest}")


def _check(call: DecodeCall) -> None:
    operation = "prefix_attention_decode"
    caches, indices = call.caches, call.indices
    q, root_k, root_v, branch_k, branch_v = call.floats
    check_heads(operation, 4, q, **caches)
    dispatch.require_same_device(operation, q.device, **indices)
    num_branches, num_roots = q.shape[0], root_k.shape[0]
    if root_v.shape != root_k.shape or branch_v.shape != branch_k.shape:
        raise ValueError(
            f"{operation}: keys and values differ in shape: root {tuple(root_k.shape)} and {tuple(root_v.shape)}, "
            f"branch {tuple(branch_k.shape)} and {tuple(branch_v.shape)}"
        )
    if branch_k.shape[0] != num_branches:
        raise ValueError(f"{operation}: branch_k has {branch_k.shape[0]} branches, but q has {num_branches}")
    if branch_k.shape[1] < q.shape[1]:
        raise ValueError(
            f"{operation}: branch_k has room for {branch_k.shape[1]} keys per branch, fewer than the {q.shape[1]} "
            "queries in q; the cache must include the keys of the queries themselves"
        )
    expected = {"branch_to_root": num_branches, "root_lengths": num_roots, "branch_lengths": num_branches}
    for name, length in expected.items():
        if indices[name].dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{operation}: {name} is {indices[name].dtype}, expected int32 or int64")
        if tuple(indices[name].shape) != (length,):
            raise ValueError(f"{operation}: {name} has shape {tuple(indices[name].shape)}, expected ({length},)")
    if q.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_range("branch_to_root", call.branch_to_root, 0, num_roots - 1)
        _check_range("root_lengths", call.root_lengths, 0, root_k.shape[1])
        _check_range("branch_lengths", call.branch_lengths, q.shape[1], branch_k.shape[1])


def _forward_only(kernels: str, unsupported_reason: Callable[[DecodeCall], str | None]) -> Callable[..., str | None]:
    name = f"the {kernels} kernels for decoding"
    return lambda call: dispatch.gradient_unsupported_reason(name, *call.floats) or unsupported_reason(call)


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
        unsupported_reason=_forward_only("Triton", triton_unsupported_reason),
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
)


def _call(
    q: Tensor, root_k: Tensor, root_v: Tensor, branch_k: Tensor, branch_v: Tensor,
    branch_to_root: Tensor, root_lengths: Tensor, branch_lengths: Tensor, scale: float | None,
) -> DecodeCall:  # fmt: skip
    scale = resolve_scale("prefix_attention_decode", scale, q)
    return DecodeCall(q, root_k, root_v, branch_k, branch_v, branch_to_root, root_lengths, branch_lengths, scale)


@OPERATION.explained_by(_call)
def prefix_attention_decode(
    q: Tensor,
    root_k: Tensor,
    root_v: Tensor,
    branch_k: Tensor,
    branch_v: Tensor,
    branch_to_root: Tensor,
    root_lengths: Tensor,
    branch_lengths: Tensor,
    *,
    scale: float | None = None,
    return_lse: bool = False,
    impl: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention of the newest tokens of each branch to the keys of its root and its own keys.

    A root (an image, a shared prompt) is cached once for any number of branches (beams, answers). The queries of a
    branch are its last Q tokens. The cache of the branch already holds their keys. Among themselves they are causal.

    Args:
        q: (B, Q, H, D), fp64, fp32, fp16 or bf16, any strides; B branches.
        root_k, root_v: (R, Lr, Hkv, D). Of each root, the first ``root_lengths`` are used.
        branch_k, branch_v: (B, Lb, Hkv, D). Of each branch, the first ``branch_lengths`` are used.
        branch_to_root: (B,) int32 or int64, the root of each branch. The values of the three index tensors are checked
            only on the CPU.
        root_lengths: (R,) int32 or int64, 0 to Lr.
        branch_lengths: (B,) int32 or int64, Q to Lb; includes the keys of the queries themselves.
        scale: factor on the scores before the softmax, 1 / sqrt(D) by default.
        return_lse: also return the LSE, the log of each query's softmax denominator.
        impl: the name of an implementation; None takes the best that can run. Only the reference has gradients. The
            others need ``torch.no_grad()`` or inputs that do not require gradients.

    Returns:
        (B, Q, H, D) in the dtype of q; with ``return_lse`` also (B, Q, H) in fp32 (fp64 for fp64).

    Raises:
        ValueError: a shape, a device or (on the CPU) an index is invalid; the message names the argument.
        TypeError: an index tensor is not int32 or int64, another tensor is not floating point, or one is a DTensor.
    """
    call = _call(q, root_k, root_v, branch_k, branch_v, branch_to_root, root_lengths, branch_lengths, scale)
    out, lse = _OPERATOR(*call, OPERATION.choose(impl, call))
    return (out, lse) if return_lse else out


_OPERATOR = define_attention(OPERATION, num_floats=5)
