"""Prefix and cross attention in Triton: one launch forward (two where few queries split their keys), three backward.

Grids follow from shapes alone, and programs find their tiles in the layout's table: nothing is read on the host and
nothing planned, so calls capture into CUDA graphs. Work is cut by tiles, not by samples: a grid's programs are as long
as their tile sees keys, and a long causal sequence starts with its longest.
"""

import math
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from lynx_kernels.attention import triton_backward, triton_forward
from lynx_kernels.layout import KEY_TILE


@dataclass(frozen=True)
class Launch:
    """How a kernel is cut: queries and keys a tile, and what Triton makes of it."""

    block_queries: int
    block_keys: int
    num_warps: int
    num_stages: int


# None of these is measured: no GPU yet. They follow what the compiler reports, with heads that share keys, which costs
# registers: bf16 at a head_dim of up to 128 spills nothing, but for tens of bytes that tests/compilation names.

# 128 x 64 on 8 warps: 64 fp32 sums and 32 scores a thread.
FORWARD = Launch(128, 64, num_warps=8, num_stages=3)
# Three operands beside the sums: 64 keys spill on sm_80 (96 bytes), 32 do not.
QUERY_GRADIENT = Launch(128, 32, num_warps=8, num_stages=2)
# Two sums and two tiles of scores: 64 queries spill 140 bytes on sm_90, and two stages 928 on sm_100.
KEY_GRADIENT = Launch(32, 64, num_warps=8, num_stages=1)
# Half the queries on half the warps, for segments that would leave most of 128 rows empty.
SHORT_FORWARD = Launch(64, 64, num_warps=4, num_stages=3)
SHORT_QUERY_GRADIENT = Launch(64, 64, num_warps=4, num_stages=2)
# Beyond a head_dim of 128 three stages of 128 x 64 take 256 KiB, more than a block may have.
WIDE_FORWARD = Launch(128, 32, num_warps=8, num_stages=2)
WIDE_QUERY_GRADIENT = Launch(64, 32, num_warps=8, num_stages=1)
# IEEE fp32 has no tensor cores: operands live in registers, spread over 8 warps. Fewer than 64 rows, or Triton 3.7
# compiles TF32 on sm_100.
IEEE = Launch(32, 32, num_warps=8, num_stages=1)
_STATISTICS_ROWS = 32


def columns(head_dim: int) -> tuple[int, int]:
    """Widths of the one or two tiles, side by side, that hold a row of a head: powers of two, at least 16."""
    whole = triton.next_power_of_2(max(head_dim, 16))
    half = whole // 2
    rest = triton.next_power_of_2(max(head_dim - half, 16))
    return (half, rest) if half >= 16 and half + rest < whole else (whole, 0)


def choose_launches(head_dim: int, compute: torch.dtype, rows: int, n_segments: int) -> tuple[Launch, Launch, Launch]:
    """The launches of the forward, of the gradient of queries and of that of keys."""
    if compute == torch.float32:
        return (IEEE,) * 3
    if head_dim > 128:
        return WIDE_FORWARD, WIDE_QUERY_GRADIENT, KEY_GRADIENT
    if rows <= SHORT_FORWARD.block_queries * n_segments:  # on average; empty segments count
        return SHORT_FORWARD, SHORT_QUERY_GRADIENT, KEY_GRADIENT
    return FORWARD, QUERY_GRADIENT, KEY_GRADIENT


def _readable(tensor: Tensor, compute: torch.dtype) -> Tensor:
    # Values of a row side by side, or loads are no vectors; rows near enough for the offsets inside a tile to be int32.
    tensor = tensor.to(compute)
    return tensor if tensor.stride(-1) == 1 and tensor.stride(0) < 2**24 else tensor.contiguous()


def _compute_dtype(*tensors: Tensor) -> torch.dtype:
    dtypes = {tensor.dtype for tensor in tensors}
    return dtypes.pop() if len(dtypes) == 1 else torch.float32


def _strides(*tensors: Tensor) -> tuple[list[int], int]:
    """Strides of tokens and heads of every tensor, and their unit, in elements."""
    strides = [tensor.stride(dim) for tensor in tensors for dim in (0, 1)]
    unit = 8 if all(stride % 8 == 0 for stride in strides) else 1
    return [stride // unit for stride in strides], unit


def _head(head_dim: int, unit: int) -> dict[str, int]:
    width, rest = columns(head_dim)
    return {"UNIT": unit, "D": head_dim, "BD": width, "REST": rest}


def _cut(launch: Launch) -> dict[str, int]:
    return {
        "BQ": launch.block_queries, "BK": launch.block_keys,
        "num_warps": launch.num_warps, "num_stages": launch.num_stages,
    }  # fmt: skip


def prefix_forward(
    q: Tensor,  # (T, H, D)
    k: Tensor,  # (T, Hkv, D)
    v: Tensor,  # (T, Hkv, D)
    segments: Tensor,  # PackedLayout.segments
    root_is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Return the output (T, H, D) and the LSE (T, H)."""
    (tokens, heads, head_dim), shared = q.shape, q.shape[1] // k.shape[1]
    out, lse = q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    compute = _compute_dtype(q, k, v)
    q, k, v, segments = *(_readable(each, compute) for each in (q, k, v)), segments.contiguous()
    strides, unit = _strides(q, k, v)
    n_segments = segments.shape[0] - 1
    launch, _, _ = choose_launches(head_dim, compute, tokens, n_segments)
    with torch.cuda.device_of(q):  # Triton launches on the current device, whatever its arguments are on
        triton_forward.forward_kernel[(tokens // launch.block_queries + n_segments, heads, 1)](
            q, k, v, segments, out, lse, *strides, n_segments, tokens, shared, _exponent(scale),
            NEGATIVE=scale < 0, SPANS=False, ROOT_IS_CAUSAL=root_is_causal, **_head(head_dim, unit), **_cut(launch),
        )  # fmt: skip
    return out, lse


def _exponent(scale: float) -> float:
    # Scores of 0 must not be made of -inf times 0 where keys are hidden.
    return max(abs(scale) * math.log2(math.e), 1e-30)


def prefix_backward(
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
    (tokens, heads, head_dim), (keys, kv_heads, _) = q.shape, k.shape
    grad_q, grad_k, grad_v = (each.new_empty(each.shape) for each in (q, k, v))
    if q.numel() == 0:
        return grad_q, grad_k, grad_v
    compute = _compute_dtype(q, k, v)
    grad = torch.zeros_like(out) if grad is None else grad
    grad, q, k, v = (_readable(each, compute) for each in (grad, q, k, v))
    out, lse, segments = out.contiguous(), lse.contiguous(), segments.contiguous()
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    statistics = q.new_empty(2, heads, tokens, dtype=torch.float32)
    strides, unit = _strides(grad, q, k, v)
    n_segments, head = segments.shape[0] - 1, _head(head_dim, unit)
    table = {"SPANS": False, "ROOT_IS_CAUSAL": root_is_causal}
    _, query_launch, key_launch = choose_launches(head_dim, compute, tokens, n_segments)
    with torch.cuda.device_of(q):
        triton_backward.statistics_kernel[(triton.cdiv(tokens, _STATISTICS_ROWS), heads)](
            grad, out, lse, grad_lse, statistics, *strides[:2], tokens,
            UNIT=unit, D=head_dim, BD=triton.next_power_of_2(head_dim), BQ=_STATISTICS_ROWS,
        )  # fmt: skip
        triton_backward.query_gradient_kernel[(tokens // query_launch.block_queries + n_segments, heads, 1)](
            grad, q, k, v, statistics, segments, grad_q, *strides, n_segments, tokens, heads // kv_heads, scale,
            **table, **head, **_cut(query_launch),
        )  # fmt: skip
        triton_backward.key_gradient_kernel[(tokens // key_launch.block_keys + n_segments, kv_heads)](
            grad, q, k, v, statistics, segments, None, None, grad_k, grad_v, *strides,
            n_segments, tokens, keys, heads // kv_heads, scale,
            **table, KEY_TILE=KEY_TILE, **head, **_cut(key_launch),
        )  # fmt: skip
    return grad_q, grad_k, grad_v
