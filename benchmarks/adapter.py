"""The adapter against what people run today.

Peers: ``eager`` (the module one would write, the baseline), ``compile`` (torch.compile of it), optionally
``max-autotune``, and ``matmuls``, the bare products alone: no implementation that calls the same GEMM can be faster, so
they are the floor. Inference is ``forward``; ``train`` is forward and backward with every gradient.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.harness import Case
from lynx_kernels.adapter import _IMPLEMENTATIONS, adapter
from lynx_kernels.dispatch import which

TOKENS = (1, 8, 64, 512, 2048, 4096)
QUICK_TOKENS = (1, 64, 512, 2048)
WIDTHS = ((1024, 512), (1024, 64))
QUICK_WIDTHS = ((1024, 512),)
# Keeps a wrong provider from being timed, peers included; the tests hold ours to a tighter budget.
_TOLERANCE = 16
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def eager(x, norm_weight, norm_bias, down_weight, down_bias, up_weight, up_bias, scale) -> Tensor:
    normalized = F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias)
    return x + scale * F.linear(F.silu(F.linear(normalized, down_weight, down_bias)), up_weight, up_bias)


def cases(*, quick: bool, max_autotune: bool, device: str) -> Iterator[Case]:
    """Every width, dtype, mode and number of tokens, few tokens first."""
    for width, bottleneck in QUICK_WIDTHS if quick else WIDTHS:
        for name, dtype in DTYPES.items():
            for mode in ("forward", "train"):
                for tokens in QUICK_TOKENS if quick else TOKENS:
                    shape = f"{name} d={width} r={bottleneck} T={tokens}"
                    yield _case(mode, shape, _inputs(tokens, width, bottleneck, dtype, device), max_autotune)


def _inputs(tokens: int, width: int, bottleneck: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    torch.manual_seed(0)
    inputs = [
        torch.randn(tokens, width), torch.rand(width) + 0.5, torch.randn(width) * 0.1,
        torch.randn(bottleneck, width) * width**-0.5, torch.randn(bottleneck) * 0.1,
        torch.randn(width, bottleneck) * bottleneck**-0.5, torch.randn(width) * 0.1, torch.tensor(0.7),
    ]  # fmt: skip
    return [each.to(device, dtype).requires_grad_() for each in inputs]


def _case(mode: str, shape: str, inputs: list[Tensor], max_autotune: bool) -> Case:
    torch._dynamo.reset()  # every shape is compiled for itself: the compiler at its best
    functions: dict[str, Callable[..., Tensor]] = {"eager": eager, "compile": torch.compile(eager, dynamic=False)}
    if max_autotune:
        functions["max-autotune"] = torch.compile(eager, dynamic=False, mode="max-autotune")
    refused = which(adapter, *inputs).refused
    for impl in _IMPLEMENTATIONS.names:
        if impl not in refused:
            functions[impl] = partial(adapter, impl=impl)

    run = _forward if mode == "forward" else _train
    grad = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1)).to(inputs[0])
    wide = [each.detach().double().requires_grad_() for each in inputs]
    exact = run(eager, wide, grad.double())
    # The gradient of the scale is one inner product of these two: as exact as they are long, however small it is.
    branch = (exact[0] - wide[0].detach()) / wide[-1].detach()
    magnitudes = [0.0] * len(exact)
    if mode == "train":
        magnitudes[-1] = (grad.double().norm() * branch.norm()).item()

    def check(name: str) -> None:
        if name == "matmuls":
            return
        for index, (value, truth, magnitude) in enumerate(
            zip(run(functions[name], inputs, grad), exact, magnitudes, strict=True)
        ):
            error = (value.double() - truth).abs().max().item()
            allowed = _TOLERANCE * torch.finfo(value.dtype).eps * max(truth.abs().max().item(), magnitude)
            what = "output" if index == 0 else f"gradient {index - 1}"
            assert error <= allowed, f"{what}: error {error:.1e} exceeds {allowed:.1e}"

    providers: dict[str, Callable[[], object]] = {
        name: partial(run, function, inputs, grad) for name, function in functions.items()
    }
    providers["matmuls"] = partial(_matmuls, mode, inputs, grad)
    return Case("adapter", mode, shape, providers, check)


def _forward(function: Callable[..., Tensor], inputs: list[Tensor], grad: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return [function(*inputs)]


def _train(function: Callable[..., Tensor], inputs: list[Tensor], grad: Tensor) -> list[Tensor]:
    output = function(*inputs)
    return [output.detach(), *torch.autograd.grad(output, inputs, grad)]


@torch.no_grad()
def _matmuls(mode: str, inputs: list[Tensor], grad: Tensor) -> None:
    x, down_weight, up_weight = inputs[0], inputs[3], inputs[5]
    hidden = F.linear(x, down_weight)
    F.linear(hidden, up_weight)
    if mode == "train":
        grad_hidden = grad @ up_weight
        grad.t() @ hidden  # the up weight's gradient
        grad_hidden.t() @ x  # the down weight's
        grad_hidden @ down_weight  # the input's
