"""The adapter in Triton, for bottlenecks too wide for one kernel: three launches forward, at most three backward.

Forward: statistics; normalise, down-projection, bias, activation; up-projection, bias, scale, residual. Besides the
output only r-wide tensors are written. Backward recomputes the activation and, where the down-projection trains,
LayerNorm's output; the weights' gradients are products that cuBLAS does best. No atomics: two runs agree bit by bit.
"""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from lynx_kernels.adapter import triton_kernels as kernels


@dataclass(frozen=True)
class Launch:
    """How one product is cut: the output's tile, the step along the sum, and what Triton makes of it."""

    block_rows: int
    block_columns: int
    block_inner: int
    num_warps: int
    num_stages: int

    def programs(self, rows: int, columns: int) -> int:
        return triton.cdiv(rows, self.block_rows) * triton.cdiv(columns, self.block_columns)


# None of these is measured: no GPU yet. The reasons are arithmetic and what the compiler reports (tests/compilation).

# Many tokens. 128 x 128 outputs use every loaded value 128 times, so L2 keeps up with the tensor cores; on 8 warps the
# fp32 sum takes 64 registers a thread and leaves room to normalise; three stages take 96 of sm_80's 163 KiB.
LARGE = Launch(128, 128, 64, num_warps=8, num_stages=3)
# Too few large tiles to occupy the GPU: half the rows on half the warps. Not half the columns: with 64 of them ptxas
# serialises sm_90's products, whose left operand comes normalised from registers.
MEDIUM = Launch(64, 128, 64, num_warps=4, num_stages=3)
# Backward's epilogues hold up to four tiles at once (sum, pre-activation, activation, slope): 128 x 128 spills 1 KiB
# on 8 warps and 0.5 KiB on 16, half the columns on 8 warps nothing, on 4 warps 1 KiB again.
LARGE_BACKWARD = Launch(128, 64, 64, num_warps=8, num_stages=3)
MEDIUM_BACKWARD = Launch(64, 64, 64, num_warps=4, num_stages=4)
# A few tokens: 16 rows is the least a tensor core takes. The weights are read once and bound the time, so the step
# along the sum is long and the stages many: loads in flight, not arithmetic.
SMALL = Launch(16, 64, 128, num_warps=4, num_stages=4)
# IEEE fp32 has no tensor cores: operands live in registers, and a short step keeps them few. Fewer than 64 rows:
# from there on Triton 3.7 compiles an fp32 product of widened bf16 or fp16 values to TF32 on sm_100, whatever was asked
# for (triton-lang/triton #10176).
IEEE = Launch(32, 64, 16, num_warps=4, num_stages=3)

_OCCUPYING = 132  # large tiles from which on they keep the GPU busy: the multiprocessors of an H100 (an A100 has 108)
_GROUP = 8  # tiles of rows that go together; 8 of 128 rows times d = 4096 in bf16 are 8 MiB, well inside L2
_BLOCK_WIDTH = 1024  # row kernels: one block of 4 warps reads 8 values a thread, one or two vector loads
_ROW_WARPS = 4


def choose_launch(rows: int, columns: int, compute: torch.dtype, *, backward: bool = False) -> Launch:
    """The launch of a product with an output of (rows, columns) whose operands are ``compute``."""
    if compute == torch.float32:
        return IEEE
    if rows <= SMALL.block_rows:
        return SMALL
    large, medium = (LARGE_BACKWARD, MEDIUM_BACKWARD) if backward else (LARGE, MEDIUM)
    return large if large.programs(rows, columns) >= _OCCUPYING else medium


def _with_dense_rows(tensor: Tensor) -> Tensor:
    # The kernels take any distance between rows, but values of a row side by side: strided ones would turn every
    # vector load into single ones, which costs more than the copy.
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _dense(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _product(kernel, launch: Launch, rows: int, columns: int, *args, **constants) -> None:
    kernel[(launch.programs(rows, columns),)](
        *args,
        **constants,
        BROWS=launch.block_rows,
        BCOLUMNS=launch.block_columns,
        BINNER=launch.block_inner,
        GROUP=_GROUP,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )


def _row_block(width: int) -> int:
    return min(triton.next_power_of_2(max(width, 1)), _BLOCK_WIDTH)


def forward(
    x: Tensor,  # (T, d)
    norm_weight: Tensor | None,  # (d,)
    norm_bias: Tensor | None,  # (d,)
    down_weight: Tensor,  # (r, d)
    down_bias: Tensor | None,  # (r,)
    up_weight: Tensor,  # (d, r)
    up_bias: Tensor | None,  # (d,)
    scale: Tensor,  # one element
    eps: float,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the output (T, d) and what backward needs: mean (T,), rstd (T,) and the pre-activation (T, r)."""
    (tokens, width), bottleneck = x.shape, down_weight.shape[0]
    compute = down_weight.dtype
    x, down_weight, up_weight = map(_with_dense_rows, (x, down_weight, up_weight))
    norm_weight, norm_bias, down_bias, up_bias = map(_dense, (norm_weight, norm_bias, down_bias, up_bias))
    mean = x.new_empty(0 if norm_weight is None else tokens, dtype=torch.float32)
    rstd = torch.empty_like(mean)
    preactivation = x.new_empty(tokens, bottleneck, dtype=compute)
    activated = torch.empty_like(preactivation)
    out = x.new_empty(tokens, width)
    with torch.cuda.device_of(x):  # Triton launches on the current device, whatever its arguments are on
        if norm_weight is not None:
            kernels.statistics_kernel[(tokens,)](
                x, mean, rstd, x.stride(0), width, float(eps), BD=_row_block(width), num_warps=_ROW_WARPS
            )
        _product(
            kernels.down_kernel, choose_launch(tokens, bottleneck, compute), tokens, bottleneck,
            x, norm_weight, norm_bias, mean, rstd, down_weight, down_bias, preactivation, activated,
            x.stride(0), down_weight.stride(0), tokens, width, bottleneck,
            ACTIVATION=activation,
        )  # fmt: skip
        _product(
            kernels.up_kernel, choose_launch(tokens, width, compute), tokens, width,
            activated, up_weight, up_bias, scale, x, out,
            x.stride(0), up_weight.stride(0), tokens, width, bottleneck,
        )  # fmt: skip
    return out, mean, rstd, preactivation


def backward(
    grad: Tensor,  # (T, d)
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    down_weight: Tensor,
    down_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    scale: Tensor,
    mean: Tensor,
    rstd: Tensor,
    preactivation: Tensor,  # (T, r)
    activation: str,
    needs: list[bool],  # which of the eight tensor arguments of forward want a gradient
) -> list[Tensor]:
    """Return the gradients that ``needs`` asks for, in the order of forward's arguments; the rest is not computed."""
    needs_x, needs_norm, needs_norm_bias, needs_down, needs_down_bias, needs_up, needs_up_bias, needs_scale = needs
    inputs = {
        "x": x, "norm_weight": norm_weight, "norm_bias": norm_bias, "down_weight": down_weight,
        "down_bias": down_bias, "up_weight": up_weight, "up_bias": up_bias, "scale": scale,
    }  # fmt: skip
    has_norm = norm_weight is not None
    (tokens, width), bottleneck = x.shape, down_weight.shape[0]
    compute = down_weight.dtype
    grad, x, down_weight, up_weight = map(_with_dense_rows, (grad, x, down_weight, up_weight))
    norm_weight, norm_bias, down_bias = map(_dense, (norm_weight, norm_bias, down_bias))
    preactivation = preactivation.contiguous()
    gradients: dict[str, Tensor] = {}
    with torch.cuda.device_of(x):
        grad_preactivation = row_sums = None
        n_sums = 0
        below = needs_x or needs_norm or needs_norm_bias
        if below or needs_down or needs_down_bias or needs_up or needs_scale:
            launch = choose_launch(tokens, bottleneck, compute, backward=True)
            n_sums = triton.cdiv(bottleneck, launch.block_columns)
            along = offset = scaled_activated = scale_sums = None
            if below or needs_down or needs_down_bias:
                grad_preactivation = torch.empty_like(preactivation)
            if needs_up:
                scaled_activated = torch.empty_like(preactivation)
            if needs_scale:
                scale_sums = x.new_empty(n_sums, tokens, dtype=torch.float32)
            if needs_x and has_norm:
                along = x.new_empty(bottleneck, dtype=torch.float32)
                offset = torch.empty_like(along)
                kernels.weight_rows_kernel[(bottleneck,)](
                    down_weight, norm_weight, norm_bias, down_bias, along, offset,
                    down_weight.stride(0), width,
                    BD=_row_block(width), num_warps=_ROW_WARPS,
                )  # fmt: skip
                row_sums = x.new_empty(n_sums, 2, tokens, dtype=torch.float32)
            _product(
                kernels.backward_bottleneck_kernel, launch, tokens, bottleneck,
                grad, up_weight, scale, preactivation, along, offset,
                grad_preactivation, scaled_activated, row_sums, scale_sums,
                grad.stride(0), up_weight.stride(0), tokens, width, bottleneck,
                ACTIVATION=activation, PRODUCT=grad_preactivation is not None or needs_scale,
            )  # fmt: skip
            if scaled_activated is not None:
                gradients["up_weight"] = grad.to(compute).t() @ scaled_activated
            if scale_sums is not None:
                gradients["scale"] = scale_sums.sum().reshape(scale.shape)
        normalized = None
        if needs_down:
            normalized = x.new_empty(tokens, width, dtype=compute) if has_norm else x.to(compute)
        if needs_x or (has_norm and (below or needs_down)):
            launch = choose_launch(tokens, width, compute, backward=True)
            tiles = (triton.cdiv(tokens, launch.block_rows), width)
            grad_x = x.new_empty(tokens, width) if needs_x else None
            norm_weight_sums = x.new_empty(tiles, dtype=torch.float32) if needs_norm else None
            norm_bias_sums = x.new_empty(tiles, dtype=torch.float32) if needs_norm_bias else None
            _product(
                kernels.backward_input_kernel, launch, tokens, width,
                grad, x, norm_weight, norm_bias, mean, rstd, grad_preactivation, down_weight, row_sums,
                grad_x, normalized if has_norm else None, norm_weight_sums, norm_bias_sums,
                grad.stride(0), x.stride(0), down_weight.stride(0), n_sums, tokens, width, bottleneck,
                PRODUCT=below,
            )  # fmt: skip
            if grad_x is not None:
                gradients["x"] = grad_x
            if norm_weight_sums is not None:
                gradients["norm_weight"] = norm_weight_sums.sum(0)
            if norm_bias_sums is not None:
                gradients["norm_bias"] = norm_bias_sums.sum(0)
        if grad_preactivation is not None:
            if normalized is not None:
                gradients["down_weight"] = grad_preactivation.t() @ normalized
            if needs_down_bias:
                gradients["down_bias"] = grad_preactivation.sum(0, dtype=torch.float32)
    if up_bias is not None and (needs_up_bias or needs_scale):
        grad_sums = grad.sum(0, dtype=torch.float32)
        if needs_up_bias:
            gradients["up_bias"] = scale.float().reshape(()) * grad_sums
        if needs_scale:
            gradients["scale"] += (grad_sums * up_bias.float()).sum()
    return [
        gradients[name].to(tensor.dtype).contiguous()
        for (name, tensor), needed in zip(inputs.items(), needs, strict=True)
        if needed and tensor is not None
    ]
