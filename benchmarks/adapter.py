"""The adapter against what people run today.

Peers: ``eager`` (the module one would write, the baseline), ``compile`` (torch.compile of it) and ``max-autotune`` (its
slow mode). Floor: ``matmuls``, the bare products alone; no implementation that calls the same GEMM can be faster.
Inference is ``forward``; ``train`` is forward and backward with every gradient.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.checks import assert_near, forward, train
from benchmarks.harness import Case, Setup
from benchmarks.rows import OURS
from benchmarks.timing import cold_copies, matmul_rate
from lynx_kernels.ops.adapter import OPERATION, adapter
from lynx_kernels.ops.adapter.call import AdapterCall

TOKENS = (1, 4, 16, 64, 512, 2048, 8192, 65536)
# dtype, d, r, tokens. Lynx has d=4096 and a bottleneck of half that width; a CPU reads such weights in 2 ms, so few
# tokens are all that is asked of it there.
CPU = (
    ("fp32", 1024, 512, TOKENS), ("bf16", 1024, 512, TOKENS),
    ("fp32", 1024, 64, (1, 64, 2048, 65536)), ("bf16", 1024, 64, (1, 64, 2048, 65536)),
    ("fp32", 4096, 2048, (1, 16)), ("bf16", 4096, 2048, (1, 16)),
)  # fmt: skip
CUDA = (
    ("bf16", 4096, 2048, TOKENS), ("bf16", 4096, 256, TOKENS), ("bf16", 4096, 64, TOKENS), ("bf16", 1024, 512, TOKENS),
    ("fp32", 4096, 2048, TOKENS),
)  # fmt: skip
QUICK = (("fp32", 1024, 512, (1, 64, 512, 2048)), ("bf16", 1024, 512, (1, 64, 512, 2048)))
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Up to here reading the weights is most of the work: they are read cold, and the rate is in bytes.
_SMALL_M = 64
# Up to here launching eager's ten kernels from Python takes longer than running them.
_CAPTURED_TOKENS = 2048


def eager(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    down_weight: Tensor,
    down_bias: Tensor,
    up_weight: Tensor,
    up_bias: Tensor,
    scale: Tensor,
) -> Tensor:
    normalized = F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias)
    return x + scale * F.linear(F.silu(F.linear(normalized, down_weight, down_bias)), up_weight, up_bias)


def cases(*, quick: bool, device: str) -> Iterator[Case]:
    """Every dtype, width, mode and number of tokens, few tokens first."""
    for name, width, bottleneck, all_tokens in QUICK if quick else {"cpu": CPU, "cuda": CUDA}[device]:
        for mode in ("forward", "train"):
            for tokens in all_tokens:
                # torch.compile's slow mode tries its own C++ products on CPUs only where weights are constants of the
                # graph, which trained ones are not: measured once a dtype and mode, to show that, it is enough.
                autotuned = not quick and (device == "cuda" or (bottleneck, tokens) == (512, 512))
                peers = ("eager", "compile", *(["max-autotune"] if autotuned else []))
                yield Case(
                    "adapter",
                    mode,
                    f"{name} d={width} r={bottleneck} T={tokens}",
                    partial(setup, mode, tokens, width, bottleneck, DTYPES[name], device, peers),
                    (*peers, *(OURS + impl for impl in OPERATION.names), "matmuls"),
                    _flops(mode, tokens, width, bottleneck) / matmul_rate(device, DTYPES[name]),
                )


def _flops(mode: str, tokens: int, width: int, bottleneck: int) -> int:
    return (4 if mode == "forward" else 12) * tokens * width * bottleneck


def _traffic(mode: str, inputs: list[Tensor]) -> int:
    """The least that any implementation moves: bytes of parameters, x-sized and r-wide tensors."""
    x, parameters = inputs[0], sum(each.nbytes for each in inputs[1:])
    if mode == "forward":  # reads x and the parameters, writes the output
        return parameters + 2 * x.nbytes
    # Forward as above and writes the pre-activation; backward reads the gradient, x, the pre-activation and the
    # parameters, and writes the gradients of both.
    preactivation = x.nbytes // x.shape[1] * inputs[3].shape[0]
    return 3 * parameters + 5 * x.nbytes + 2 * preactivation


def _inputs(tokens: int, width: int, bottleneck: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    torch.manual_seed(0)
    inputs = [
        torch.randn(tokens, width), torch.rand(width) + 0.5, torch.randn(width) * 0.1,
        torch.randn(bottleneck, width) * width**-0.5, torch.randn(bottleneck) * 0.1,
        torch.randn(width, bottleneck) * bottleneck**-0.5, torch.randn(width) * 0.1, torch.tensor(0.7),
    ]  # fmt: skip
    return [each.to(device, dtype).requires_grad_() for each in inputs]


def setup(
    mode: str, tokens: int, width: int, bottleneck: int, dtype: torch.dtype, device: str, peers: tuple[str, ...]
) -> Setup:
    """The providers of one case on random inputs, and a check of each against eager in fp64."""
    torch._dynamo.reset()  # every shape is compiled for itself: the compiler at its best
    inputs = _inputs(tokens, width, bottleneck, dtype, device)
    compiled = partial(torch.compile, eager, dynamic=False)
    # Its CUDA graphs would copy the inputs at each call; ours, around every provider alike, do not.
    makers: dict[str, Callable] = {
        "eager": lambda: eager,
        "compile": compiled,
        "max-autotune": partial(compiled, mode="max-autotune-no-cudagraphs"),
    }
    functions: dict[str, Callable[..., Tensor]] = {name: makers[name]() for name in peers}
    run = forward if mode == "forward" else train
    with torch.set_grad_enabled(mode == "train"):  # some implementations only go forward
        functions |= {OURS + impl: partial(adapter, impl=impl) for impl in OPERATION.names if _runs(impl, inputs)}
    grad = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1)).to(inputs[0])
    exact, magnitudes = _exact(run, inputs, grad)

    def check(name: str) -> None:
        if name == "matmuls":
            return
        assert_near(run(functions[name], grad, inputs), exact, magnitudes)

    is_small_m = tokens <= _SMALL_M
    return Setup(
        providers={
            **{name: partial(run, function, grad) for name, function in functions.items()},
            "matmuls": partial(_matmuls, mode, grad),
        },
        copies=cold_copies(inputs, device) if is_small_m else [inputs],
        check=check,
        floors=("matmuls",),
        flops=0 if is_small_m else _flops(mode, tokens, width, bottleneck),
        traffic=_traffic(mode, inputs) if is_small_m else 0,
        device=device,
        captured=tokens <= _CAPTURED_TOKENS,
        parameters=inputs[1:] if mode == "train" else (),
    )


def _runs(impl: str, inputs: list[Tensor]) -> bool:
    """Whether it can, even where it would not unasked: where one form overtakes another is what is to be seen."""
    return OPERATION.explain(impl, AdapterCall._make([*inputs, 1e-5, "silu"])).name is not None


def _exact(run: Callable, inputs: list[Tensor], grad: Tensor) -> tuple[list[Tensor], list[float]]:
    """What fp64 gives, and for each of it a magnitude that rounding errors may be measured by where it is larger."""
    doubled = [each.detach().double().requires_grad_() for each in inputs]
    exact = run(eager, grad.double(), doubled)
    magnitudes = [0.0] * len(exact)
    if len(exact) > 1:
        # The gradient of the scale is one inner product of these two: as exact as they are long, however small it is.
        branch = (exact[0] - doubled[0].detach()) / doubled[-1].detach()
        magnitudes[-1] = (grad.double().norm() * branch.norm()).item()
    return exact, magnitudes


@torch.no_grad()
def _matmuls(mode: str, grad: Tensor, inputs: list[Tensor]) -> None:
    x, down_weight, up_weight = inputs[0], inputs[3], inputs[5]
    hidden = F.linear(x, down_weight)
    F.linear(hidden, up_weight)
    if mode == "train":
        grad_hidden = grad @ up_weight
        grad.t() @ hidden  # the up weight's gradient
        grad_hidden.t() @ x  # the down weight's
        grad_hidden @ down_weight  # the input's
