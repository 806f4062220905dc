"""Log-probabilities of chosen tokens against what people who train on preferences or rewards run today.

Peers: ``plain`` (logits of all rows in the dtype of the head, then log_softmax in fp32 and gather, the baseline),
``plain rows`` (the same at the rows that predict) and ``compile`` (torch.compile of plain). Floor: ``matmuls``, the
products of the rows that predict alone.

``forward`` is the reference model's, ``frozen`` wants the gradient of hidden only, ``train`` the head's too.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import linear_cross_entropy as loss
from benchmarks.checks import assert_near
from benchmarks.harness import Case, Setup
from benchmarks.rows import OURS
from benchmarks.timing import matmul_rate
from lynx_kernels.backends.dispatch import explain
from lynx_kernels.ops.token_log_probs import OPERATION, token_log_probs

VOCABULARY = 32000
SIZES = {"cpu": (1024, 512), "cuda": (4096, 4096)}  # rows and width
QUICK = (256, 512)
PERCENTS = (20, 50)  # of the rows that predict a token of a completion
MODES = ("forward", "frozen", "train")
_PRODUCTS = dict(zip(MODES, (1, 2, 3), strict=True))


def plain(hidden: Tensor, weight: Tensor, labels: Tensor, predictors: Tensor) -> Tensor:
    log_probs = F.linear(hidden, weight).float().log_softmax(-1)
    return log_probs[predictors, labels]


def plain_rows(hidden: Tensor, weight: Tensor, labels: Tensor, predictors: Tensor) -> Tensor:
    return plain(hidden[predictors], weight, labels, torch.arange(len(labels), device=labels.device))


def ours(impl: str, hidden: Tensor, weight: Tensor, labels: Tensor, predictors: Tensor) -> Tensor:
    return token_log_probs(hidden, weight, labels, predictors=predictors, impl=impl)


MAKERS: dict[str, Callable[[], Callable[..., Tensor]]] = {
    "plain": lambda: plain,
    "plain rows": lambda: plain_rows,
    "compile": lambda: torch.compile(plain, dynamic=False),
}


def cases(*, quick: bool, device: str) -> Iterator[Case]:
    """Every dtype and mode, few tokens first."""
    rows, width = QUICK if quick else SIZES[device]
    for dtype in loss.DTYPES:
        for mode in MODES:
            for percent in (20,) if quick else PERCENTS:
                yield Case(
                    "token_log_probs",
                    mode,
                    f"{dtype} T={rows} V={VOCABULARY} d={width} tokens={percent}",
                    partial(setup, mode, rows, VOCABULARY, width, percent, loss.DTYPES[dtype], device),
                    (*MAKERS, *(OURS + impl for impl in OPERATION.names), "matmuls"),
                    _flops(mode, rows * percent // 100, VOCABULARY, width) / matmul_rate(device, loss.DTYPES[dtype]),
                )


def _flops(mode: str, rows: int, vocabulary: int, width: int) -> int:
    return 2 * _PRODUCTS[mode] * rows * vocabulary * width


def setup(mode: str, rows: int, vocabulary: int, width: int, percent: int, dtype: torch.dtype, device: str) -> Setup:
    """The providers of one case, and a check of each against fp64."""
    torch._dynamo.reset()
    hidden, weight, labels = loss.make(rows, vocabulary, width, percent, dtype, device)
    predictors = (labels != loss.IGNORED).nonzero()[:, 0]
    inputs = [hidden.requires_grad_(mode != "forward"), weight.requires_grad_(mode == "train")]
    entries = labels[predictors], predictors
    wanted = [each for each in inputs if each.requires_grad]
    grad = torch.randn(len(predictors), generator=torch.Generator().manual_seed(1)).to(device)
    functions: dict[str, Callable[..., Tensor]] = {name: maker() for name, maker in MAKERS.items()}
    refused = explain(token_log_probs, *inputs, entries[0], predictors=predictors).reasons
    for impl in OPERATION.names:
        if impl not in refused:
            functions[OURS + impl] = partial(ours, impl)

    def run(function: Callable[..., Tensor], copies: Any = None) -> list[Tensor]:
        output = function(*inputs, *entries)
        return [output.detach(), *(torch.autograd.grad(output, wanted, grad) if wanted else ())]

    exact = _exact(inputs, *entries, grad)

    def check(name: str) -> None:
        if name != "matmuls":
            output, *gradients = run(functions[name])
            # Log-probabilities are fp32, but of logits in the dtype of the head.
            assert_near([output.to(dtype), *gradients], exact)

    return Setup(
        providers={
            **{name: partial(run, function) for name, function in functions.items()},
            "matmuls": matmuls(mode, inputs, predictors),
        },
        check=check,
        floors=("matmuls",),
        flops=_flops(mode, len(predictors), vocabulary, width),
        device=device,
        parameters=inputs[1:2],
        left_out={OURS + impl: reason for impl, reason in refused.items()},
    )


def _exact(inputs: list[Tensor], labels: Tensor, predictors: Tensor, grad: Tensor) -> list[Tensor]:
    """Log-probabilities and the gradients wanted in fp64."""
    hidden, weight = (each.detach().double().requires_grad_(each.requires_grad) for each in inputs)
    output = F.linear(hidden[predictors], weight).log_softmax(-1).gather(1, labels[:, None])[:, 0]
    wanted = [each for each in (hidden, weight) if each.requires_grad]
    return [output.detach(), *(torch.autograd.grad(output, wanted, grad.double()) if wanted else ())]


def matmuls(mode: str, inputs: list[Tensor], predictors: Tensor) -> Callable[[Any], None]:
    """The products that no implementation can spare."""
    hidden, weight = (each.detach() for each in inputs)
    x = hidden[predictors]
    logits = F.linear(x, weight)

    def run(copies: Any) -> None:
        F.linear(x, weight)
        if mode != "forward":
            logits @ weight  # hidden's gradient
        if mode == "train":
            logits.t() @ x

    return run
