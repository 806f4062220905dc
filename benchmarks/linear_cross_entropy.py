"""The output head's loss against what people run today.

Peers: ``plain`` (logits of all rows in the dtype of the head, then cross entropy in fp32: what transformers does, the
baseline), ``plain rows`` (the same at the supervised rows, which a GPU must be waited for to count), ``compile``
(torch.compile of plain), ``torch`` (torch.nn.functional.linear_cross_entropy in chunks, where this torch has it) and
``liger`` (liger-kernel's fused one, on GPUs). Floor: ``matmuls``, the products of the supervised rows alone.

``frozen`` wants the gradient of hidden only, as Lynx does; ``train`` the head's too.
"""

from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.checks import assert_near
from benchmarks.harness import Case, Setup
from benchmarks.rows import OURS
from benchmarks.timing import matmul_rate
from lynx_kernels.backends.dispatch import explain
from lynx_kernels.ops.linear_cross_entropy import OPERATION, linear_cross_entropy

IGNORED = -100
ROWS, VOCABULARY = 4096, 32000
SUPERVISED = (5, 20, 50)  # percent
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# dtype, d, mode, percents. Lynx has d=4096, of which a CPU computes the logits of all rows in ten seconds.
CPU = tuple(
    asked
    for dtype in DTYPES
    for asked in ((dtype, 512, "frozen", SUPERVISED), (dtype, 512, "train", (20,)), (dtype, 1024, "frozen", (20,)))
)
CUDA = tuple((dtype, 4096, mode, SUPERVISED) for dtype in ("bf16", "fp32") for mode in ("frozen", "train"))
QUICK = tuple((dtype, 512, mode, (20,)) for dtype in DTYPES for mode in ("frozen", "train"))
_QUICK_ROWS = 256  # torch's own in bf16 takes seconds a call with 1024 on one thread
# A call of plain may take as long as this; longer, all peers that compute every row's logits are left out.
_MOST_SECONDS = 4.0


def plain(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), labels, ignore_index=IGNORED)


def plain_rows(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    supervised = labels != IGNORED
    return plain(hidden[supervised], weight, labels[supervised])


def _torchs() -> Callable[..., Tensor]:
    options = torch.nn.LinearCrossEntropyOptions()
    return lambda hidden, weight, labels: F.linear_cross_entropy(
        hidden, weight, labels, ignore_index=IGNORED, options=options
    )


def _ligers() -> Callable[..., Tensor]:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    fused = LigerFusedLinearCrossEntropyLoss(ignore_index=IGNORED)
    return lambda hidden, weight, labels: fused(weight, hidden, labels)


MAKERS: dict[str, Callable[[], Callable[..., Tensor]]] = {
    "plain": lambda: plain,
    "plain rows": lambda: plain_rows,
    "compile": lambda: torch.compile(plain, dynamic=False),
    "torch": _torchs,
    "liger": _ligers,
}


def missing(name: str, device: str) -> str | None:
    """Why a peer cannot run here, or None."""
    if name == "torch" and not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        return f"torch {torch.__version__} has no linear_cross_entropy in chunks"
    if name == "liger":
        if device != "cuda":
            return "runs on GPUs only"
        if find_spec("liger_kernel") is None:
            return "liger_kernel is not installed"
    return None


def cases(*, quick: bool, device: str) -> Iterator[Case]:
    """Every dtype, width and mode, few supervised rows first."""
    for dtype, width, mode, percents in QUICK if quick else {"cpu": CPU, "cuda": CUDA}[device]:
        rows = _QUICK_ROWS if quick else ROWS
        for percent in percents:
            yield Case(
                "linear_cross_entropy",
                mode,
                f"{dtype} T={rows} V={VOCABULARY} d={width} supervised={percent}",
                partial(setup, mode, rows, VOCABULARY, width, percent, DTYPES[dtype], device),
                (*MAKERS, *(OURS + impl for impl in OPERATION.names), "matmuls"),
                _flops(mode, rows * percent // 100, VOCABULARY, width) / matmul_rate(device, DTYPES[dtype]),
            )


def _flops(mode: str, rows: int, vocabulary: int, width: int) -> int:
    return (4 if mode == "frozen" else 6) * rows * vocabulary * width


def make(rows: int, vocabulary: int, width: int, percent: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    """Hidden, weight and labels, so many percent of which are supervised."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, width, generator=generator)
    weight = torch.randn(vocabulary, width, generator=generator) * width**-0.5
    labels = torch.full((rows,), IGNORED)
    chosen = torch.randperm(rows, generator=generator)[: rows * percent // 100]
    labels[chosen] = torch.randint(vocabulary, chosen.shape, generator=generator)
    return [hidden.to(device, dtype).requires_grad_(), weight.to(device, dtype), labels.to(device)]


def setup(mode: str, rows: int, vocabulary: int, width: int, percent: int, dtype: torch.dtype, device: str) -> Setup:
    """The providers of one case, and a check of each against the supervised rows in fp64."""
    torch._dynamo.reset()
    inputs = make(rows, vocabulary, width, percent, dtype, device)
    inputs[1].requires_grad_(mode == "train")
    wanted = [each for each in inputs if each.requires_grad]
    functions: dict[str, Callable[..., Tensor]] = {}
    left_out = {}
    seconds = _flops(mode, rows, vocabulary, width) / matmul_rate(device, dtype)
    for name, maker in MAKERS.items():
        why = missing(name, device)
        if why is None and name != "plain rows" and seconds > _MOST_SECONDS:
            why = f"a call would take about {seconds:.0f} s, more than {_MOST_SECONDS:g}"
        if why is None:
            functions[name] = maker()
        else:
            left_out[name] = why
    refused = explain(linear_cross_entropy, *inputs).reasons
    at_most = rows * percent // 100  # whoever builds a batch knows it
    for impl in OPERATION.names:
        if impl in refused:
            left_out[OURS + impl] = refused[impl]
        else:
            functions[OURS + impl] = partial(linear_cross_entropy, max_supervised=at_most, impl=impl)

    def run(function: Callable[..., Tensor], copies: Any = None) -> list[Tensor]:
        output = function(*inputs)
        return [output.detach(), *torch.autograd.grad(output, wanted)]

    exact = _exact(inputs)

    def check(name: str) -> None:
        if name != "matmuls":
            output, *gradients = run(functions[name])
            # The loss is fp32, but of logits in the dtype of the head.
            assert_near([output.to(dtype), *gradients], exact)

    return Setup(
        providers={
            **{name: partial(run, function) for name, function in functions.items()},
            "matmuls": matmuls(inputs),
        },
        check=check,
        floors=("matmuls",),
        flops=_flops(mode, at_most, vocabulary, width),
        device=device,
        parameters=inputs[1:2],
        left_out=left_out,
    )


def _exact(inputs: list[Tensor]) -> list[Tensor]:
    """Loss and the gradients wanted in fp64, rows in chunks: the logits of all at once would not fit."""
    hidden, weight, labels = inputs
    supervised = (labels != IGNORED).nonzero()[:, 0]
    doubled = [each.detach().double().requires_grad_(each.requires_grad) for each in (hidden, weight)]
    wanted = [each for each in doubled if each.requires_grad]
    total, *gradients = (torch.zeros_like(each) for each in (doubled[0][0, 0], *wanted))
    for rows in supervised.split(256):
        loss = (
            F.cross_entropy(F.linear(doubled[0][rows], doubled[1]), labels[rows], reduction="sum") / supervised.shape[0]
        )
        for gradient, part in zip(gradients, torch.autograd.grad(loss, wanted), strict=True):
            gradient += part
        total = total + loss.detach()
    return [total.detach(), *gradients]


def matmuls(inputs: list[Tensor]) -> Callable[[Any], None]:
    """The products that no implementation can spare."""
    hidden, weight, labels = (each.detach() for each in inputs)
    x = hidden[labels != IGNORED]
    requires_grad = inputs[1].requires_grad
    logits = F.linear(x, weight)

    def run(copies: Any) -> None:
        F.linear(x, weight)
        logits @ weight  # hidden's gradient
        if requires_grad:
            logits.t() @ x

    return run
