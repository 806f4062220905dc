"""The adapter in Triton. launches.py chooses one of three forms by shape:

- tiled: three launches. Statistics; normalise, down-projection, bias, activation; up-projection, bias, scale, residual.
- fused, for small bottlenecks: one launch. A block of rows keeps its bottleneck on the chip.
- small_m, for small M: three launches. The down-projection with its sum split; the combine of the splits; the
  up-projection in narrow tiles. Each byte of the weights is read once, by enough programs to occupy the GPU.

Forward writes the output and tensors of width r, nothing else. Backward is tiled (at most three launches) or fused (at
most two). It recomputes the activation and, if the down-projection trains, LayerNorm's output. The gradients of the
weights are plain products, which cuBLAS computes best. No atomics: two runs agree bit by bit. The host reads nothing
from the device.
"""

from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

from lynx_kernels.ops.adapter.call import AdapterBackwardCall, AdapterCall
from lynx_kernels.ops.adapter.triton import bwd, fwd, small_m
from lynx_kernels.ops.adapter.triton.launches import Call, Launch, choose_plan

_GROUP = 8  # row tiles per group; 8 tiles of 128 rows and d = 4096 in bf16 are 8 MiB, which fit in L2
_BLOCK_WIDTH = 1024  # row kernels: one block of 4 warps reads 8 values per thread, in one or two vector loads
_ROW_WARPS = 4
_COMBINE_ROWS, _COMBINE_COLUMNS = 16, 64  # combine: 64 tokens and r = 2048 make 128 programs
_MIN_FACTOR = 2.0**-6


def _with_dense_rows(tensor: Tensor) -> Tensor:
    # The kernels take any row stride but need unit stride inside a row. Without it, every vector load would become
    # scalar loads, which cost more than this copy.
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _dense(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def describe(direction: str, x: Tensor, down_weight: Tensor, *others: Tensor) -> Call:
    """The properties of a call that plans depend on. Takes every 2-D tensor that the kernels read."""
    (tokens, width), bottleneck = x.shape, down_weight.shape[0]
    strides = [width, bottleneck, *(each.stride(0) for each in (x, down_weight, *others))]
    return Call(
        direction, tokens, width, bottleneck, x.dtype, down_weight.dtype,
        all(each % 16 == 0 for each in strides), *(_gpu(x.device) if x.is_cuda else ()),
    )  # fmt: skip


@cache
def _gpu(device: torch.device) -> tuple[str, int]:
    properties = torch.cuda.get_device_properties(device)
    return properties.name, properties.multi_processor_count


def _tile(launch: Launch) -> dict[str, int]:
    return {
        "BLOCK_M": launch.block_m, "BLOCK_N": launch.block_n, "BLOCK_K": launch.block_k,
        "num_warps": launch.num_warps, "num_stages": launch.num_stages,
    }  # fmt: skip


def _product(kernel: Any, launch: Launch, rows: int, columns: int, *args: Any, **constants: Any) -> None:
    kernel[(launch.programs(rows, columns),)](*args, **constants, **_tile(launch), GROUP=_GROUP)


def _row_block(width: int) -> int:
    return min(triton.next_power_of_2(max(width, 1)), _BLOCK_WIDTH)


def forward(call: AdapterCall) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the output (T, d) and what backward needs: mean (T,), rstd (T,) and the pre-activation (T, r)."""
    x, norm_weight, norm_bias, down_weight, down_bias, up_weight, up_bias, scale, eps, activation = call
    (tokens, width), bottleneck = x.shape, down_weight.shape[0]
    eps, has_norm = float(eps), norm_weight is not None
    x, down_weight, up_weight = map(_with_dense_rows, (x, down_weight, up_weight))
    norm_weight, norm_bias, down_bias, up_bias = map(_dense, (norm_weight, norm_bias, down_bias, up_bias))
    mean = x.new_empty(tokens if has_norm else 0, dtype=torch.float32)
    rstd = torch.empty_like(mean)
    preactivation = x.new_empty(tokens, bottleneck, dtype=down_weight.dtype)
    out = x.new_empty(tokens, width)
    plan = choose_plan(describe("forward", x, down_weight, up_weight))
    with torch.cuda.device_of(x):  # Triton launches on the current device, not on that of the arguments
        if plan.form == "fused":
            fwd.adapter_fwd_fused_kernel[(plan.down.programs(tokens, 1),)](
                x, norm_weight, norm_bias, down_weight, down_bias, up_weight, up_bias, scale,
                mean, rstd, preactivation, out,
                x.stride(0), down_weight.stride(0), up_weight.stride(0), tokens, width, bottleneck, eps,
                ACTIVATION=activation, **_tile(plan.down),
            )  # fmt: skip
            return out, mean, rstd, preactivation
        activated = torch.empty_like(preactivation)
        if plan.form == "small_m":
            dense = AdapterCall(
                x, norm_weight, norm_bias, down_weight, down_bias, up_weight, up_bias, scale, eps, activation
            )
            _split_down(plan.down, dense, mean, rstd, preactivation, activated)
        else:
            if has_norm:
                fwd.adapter_fwd_stats_kernel[(tokens,)](
                    x, mean, rstd, x.stride(0), tokens, width, eps,
                    BLOCK_M=1, BLOCK_K=_row_block(width), num_warps=_ROW_WARPS,
                )  # fmt: skip
            _product(
                fwd.adapter_fwd_down_kernel, plan.down, tokens, bottleneck,
                x, norm_weight, norm_bias, mean, rstd, down_weight, down_bias, preactivation, activated,
                x.stride(0), down_weight.stride(0), tokens, width, bottleneck,
                ACTIVATION=activation,
            )  # fmt: skip
        _product(
            fwd.adapter_fwd_up_kernel, plan.up, tokens, width,
            activated, up_weight, up_bias, scale, x, out,
            x.stride(0), up_weight.stride(0), tokens, width, bottleneck,
        )  # fmt: skip
    return out, mean, rstd, preactivation


def _split_down(
    launch: Launch, call: AdapterCall, mean: Tensor, rstd: Tensor, preactivation: Tensor, activated: Tensor
) -> None:
    """Write the down-projection and its activation to the last two arguments. The tensors of ``call`` are dense."""
    x, norm_weight, norm_bias, down_weight, down_bias, _, _, _, eps, activation = call
    (tokens, width), bottleneck = x.shape, down_weight.shape[0]
    # A multiple of block_k, so that no split is empty.
    split_size = triton.cdiv(triton.cdiv(width, launch.num_splits), launch.block_k) * launch.block_k
    num_splits = triton.cdiv(width, split_size)
    sums = x.new_empty(num_splits, tokens, bottleneck, dtype=torch.float32)
    statistics = weight_rows = None
    if norm_weight is not None:
        statistics = x.new_empty(num_splits, 2, tokens, dtype=torch.float32)
        weight_rows = x.new_empty(num_splits, 2, bottleneck, dtype=torch.float32)
    small_m.adapter_fwd_small_m_kernel[(launch.programs(tokens, bottleneck) // launch.num_splits * num_splits,)](
        x, norm_weight, norm_bias, down_weight, sums, statistics, weight_rows,
        x.stride(0), down_weight.stride(0), tokens, width, bottleneck, split_size, eps,
        **_tile(launch),
    )  # fmt: skip
    combine_programs = triton.cdiv(tokens, _COMBINE_ROWS) * triton.cdiv(bottleneck, _COMBINE_COLUMNS)
    small_m.adapter_fwd_small_m_combine_kernel[(combine_programs,)](
        sums, statistics, weight_rows, down_bias, mean, rstd, preactivation, activated,
        tokens, width, bottleneck, split_size, num_splits, eps,
        ACTIVATION=activation, BLOCK_M=_COMBINE_ROWS, BLOCK_N=_COMBINE_COLUMNS,
    )  # fmt: skip


def backward(call: AdapterBackwardCall) -> list[Tensor]:
    """Return the gradients listed in ``needs``, in order. The others are not computed."""
    grad, x, norm_weight, norm_bias, down_weight, down_bias, up_weight, up_bias, scale = call[:9]
    mean, rstd, preactivation, activation = call.mean, call.rstd, call.preactivation, call.activation
    needs_x, needs_norm, needs_norm_bias, needs_down, needs_down_bias, needs_up, needs_up_bias, needs_scale = call.needs
    has_norm = norm_weight is not None
    (tokens, width), bottleneck = x.shape, down_weight.shape[0]
    compute = down_weight.dtype
    grad, x, down_weight, up_weight = map(_with_dense_rows, (grad, x, down_weight, up_weight))
    norm_weight, norm_bias, down_bias = map(_dense, (norm_weight, norm_bias, down_bias))
    preactivation = preactivation.contiguous()

    def empty(wanted: bool, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor | None:
        return x.new_empty(shape, dtype=dtype) if wanted else None

    below = needs_x or needs_norm or needs_norm_bias  # the gradient of LayerNorm's output is needed
    down = below or needs_down or needs_down_bias  # the gradient of the pre-activation is needed
    plan = choose_plan(describe("backward" if below else "weights", x, down_weight, up_weight, grad))
    fused = plan.form == "fused"
    row_tiles = triton.cdiv(tokens, plan.up.block_m)
    n_sums = 1 if fused else triton.cdiv(bottleneck, plan.down.block_n)
    factor = _overflow_guard(scale) if compute == torch.float16 and grad.dtype != compute else None
    grad_preactivation = empty(
        needs_down or needs_down_bias or (below and not fused), tokens, bottleneck, dtype=compute
    )
    scaled_activated = empty(needs_up, tokens, bottleneck, dtype=compute)
    scale_sums = empty(needs_scale, n_sums, tokens)
    along, offset = empty(needs_x and has_norm, bottleneck), empty(needs_x and has_norm, bottleneck)
    row_sums = empty(needs_x and has_norm and not fused, n_sums, 2, tokens)
    grad_x = empty(needs_x, tokens, width, dtype=x.dtype)
    norm_weight_sums, norm_bias_sums = empty(needs_norm, row_tiles, width), empty(needs_norm_bias, row_tiles, width)
    normalized = empty(needs_down and has_norm, tokens, width, dtype=compute)
    with torch.cuda.device_of(x):
        if along is not None:
            bwd.adapter_bwd_weight_rows_kernel[(bottleneck,)](
                down_weight, norm_weight, norm_bias, down_bias, along, offset,
                down_weight.stride(0), width,
                BD=_row_block(width), num_warps=_ROW_WARPS,
            )  # fmt: skip
        if fused:
            bwd.adapter_bwd_fused_kernel[(row_tiles,)](
                grad, x, norm_weight, norm_bias, mean, rstd, down_weight, up_weight, scale, factor, preactivation,
                along, offset, grad_preactivation, scaled_activated, scale_sums,
                grad_x, normalized, norm_weight_sums, norm_bias_sums,
                grad.stride(0), x.stride(0), down_weight.stride(0), up_weight.stride(0), tokens, width, bottleneck,
                ACTIVATION=activation, **_tile(plan.down),
            )  # fmt: skip
        elif down or needs_up or needs_scale:
            _product(
                bwd.adapter_bwd_bottleneck_kernel, plan.down, tokens, bottleneck,
                grad, up_weight, scale, factor, preactivation, along, offset,
                grad_preactivation, scaled_activated, row_sums, scale_sums,
                grad.stride(0), up_weight.stride(0), tokens, width, bottleneck,
                ACTIVATION=activation, PRODUCT=down or needs_scale,
            )  # fmt: skip
        if not fused and (needs_x or (has_norm and (below or needs_down))):
            _product(
                bwd.adapter_bwd_input_kernel, plan.up, tokens, width,
                grad, x, norm_weight, norm_bias, mean, rstd, grad_preactivation, down_weight, row_sums,
                grad_x, normalized, norm_weight_sums, norm_bias_sums,
                grad.stride(0), x.stride(0), down_weight.stride(0), n_sums, tokens, width, bottleneck,
                PRODUCT=below,
            )  # fmt: skip
    gradients: dict[str, Tensor] = {}
    if grad_x is not None:
        gradients["x"] = grad_x
    if norm_weight_sums is not None:
        gradients["norm_weight"] = norm_weight_sums.sum(0)
    if norm_bias_sums is not None:
        gradients["norm_bias"] = norm_bias_sums.sum(0)
    if grad_preactivation is not None:
        if needs_down:
            gradients["down_weight"] = grad_preactivation.t() @ (x.to(compute) if normalized is None else normalized)
        if needs_down_bias:
            gradients["down_bias"] = grad_preactivation.sum(0, dtype=torch.float32)
    if scaled_activated is not None:
        narrow = (
            grad.to(compute) if factor is None else torch.mul(grad, factor, out=torch.empty_like(grad, dtype=compute))
        )
        gradients["up_weight"] = narrow.t() @ scaled_activated
    if scale_sums is not None:
        gradients["scale"] = scale_sums.sum().reshape(scale.shape)
    if up_bias is not None and (needs_up_bias or needs_scale):
        grad_sums = grad.sum(0, dtype=torch.float32)
        if needs_up_bias:
            gradients["up_bias"] = scale.float().reshape(()) * grad_sums
        if needs_scale:
            gradients["scale"] += (grad_sums * up_bias.float()).sum()
    return call.wanted(gradients)


def _overflow_guard(scale: Tensor) -> Tensor:
    """The factor on a wider gradient before it is cast to fp16: |scale|, as in the reference, within bounds.

    The factor is at least 2^-6, because the gradient of scale divides by it again. It is at most 1, because a larger
    factor gains nothing.
    """
    return scale.detach().float().reshape(()).abs().clamp(_MIN_FACTOR, 1.0)
