"""Helpers for the tests of all operations."""

import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor, distributed
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

from tests.numbers import assert_within_budget

Function = Callable[..., Tensor]


def permuted(tensor: Tensor) -> Tensor:
    """The same values in storage twice as large, with the dimensions in reverse order."""
    storage = torch.full((*reversed(tensor.shape), 2), -7, dtype=tensor.dtype, device=tensor.device)
    return storage[..., 0].permute(tuple(reversed(range(tensor.dim())))).copy_(tensor.detach())


def shifted(tensor: Tensor, by: int) -> Tensor:
    """The same values, starting ``by`` elements after the start of their storage."""
    return tensor.new_empty(tensor.numel() + by)[by:].view(tensor.shape).copy_(tensor)


def run(function: Function, inputs: Sequence[Tensor | None], grad: Tensor | None) -> list[Tensor]:
    """The output of ``function(*inputs)`` and the gradient of each floating-point input. ``grad=None`` uses the sum."""
    leaves = [
        each.detach().requires_grad_() if each is not None and each.is_floating_point() else each for each in inputs
    ]
    output = function(*leaves)
    wanted = [each for each in leaves if each is not None and each.requires_grad]
    if grad is None:
        return [output.detach(), *torch.autograd.grad(output.sum(), wanted, materialize_grads=True)]
    grads = torch.autograd.grad(output, wanted, grad.to(output.dtype), materialize_grads=True)
    return [output.detach(), *grads]


def check(
    operation: Function,
    naive: Function,
    inputs: Sequence[Tensor | None],
    grad: Tensor | None = None,
    *,
    last_magnitude: float = 0.0,
    precision: torch.dtype | None = None,
) -> None:
    """Check output and gradients of ``operation`` against the error budget from ``naive`` in fp64 and in their dtype.

    ``last_magnitude`` is the ``magnitude`` of the budget of the last gradient, ``precision`` the ``precision`` of all.
    """
    actual = run(operation, inputs, grad)
    check_results(actual, naive, inputs, grad, last_magnitude=last_magnitude, precision=precision)


def check_results(
    actual: Sequence[Tensor],
    naive: Function,
    inputs: Sequence[Tensor | None],
    grad: Tensor | None = None,
    *,
    last_magnitude: float = 0.0,
    precision: torch.dtype | None = None,
) -> None:
    """The same check for the results of ``run``."""
    exact_inputs = [each.double() if each is not None and each.is_floating_point() else each for each in inputs]
    exact, plain = run(naive, exact_inputs, grad), run(naive, inputs, grad)
    for index, (ours, truth, theirs) in enumerate(zip(actual, exact, plain, strict=True)):
        assert ours.dtype == theirs.dtype
        if ours.dtype == torch.float64:  # no budget where the plain result is itself the exact one
            torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-12)
        else:
            magnitude = last_magnitude if index == len(actual) - 1 else 0.0
            what = "output" if index == 0 else f"gradient {index - 1}"
            assert_within_budget(ours, truth, theirs, what, magnitude, precision=precision)


def count_compilations(function: Callable, calls: Sequence[tuple], backend: str = "aot_eager") -> list[int]:
    """Compile ``function`` as one graph, run it forward and backward. Return the number of graphs after each call."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(function, backend=counter, fullgraph=True)
    counts = []
    for arguments in calls:
        compiled(*arguments).sum().backward()
        counts.append(counter.frame_count)
    return counts


def assert_child_ends_well(function: Callable[[], bool]) -> None:
    """Run ``function`` in a forked process. It must return True there and must not hang."""
    child = os.fork()
    if child == 0:
        os._exit(0 if function() else 1)
    for _ in range(200):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        time.sleep(0.1)
    else:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        pytest.fail("the child process hangs")
    assert os.waitstatus_to_exitcode(status) == 0


@contextmanager
def dtensors(folder: Path) -> Iterator[Callable[[Tensor], DTensor]]:
    """A function that makes DTensors, in a process group of one process that ends with the block."""
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        yield lambda tensor: distribute_tensor(tensor, mesh, [Replicate()])
    finally:
        distributed.destroy_process_group()
