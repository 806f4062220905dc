"""Which implementation of an operation runs, and why not the others.

Every operation lists its implementations, best first, and each says for a given call whether it can run. ``impl=None``
takes the first that can; naming one that cannot is an error carrying its reason. Nothing falls back in silence:
``which`` tells the choice, and the reasons against the rest, for the very arguments of a call.
"""

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch

PLAIN_TENSORS = (torch.Tensor, torch.nn.Parameter)
FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def _no_gradient(*args: Any) -> None:
    raise RuntimeError("this operation has no gradient")


@dataclass(frozen=True)
class Implementation:
    """One way to compute an operation.

    Attributes:
        name: what ``impl=`` calls it.
        forward: computes the operation.
        backward: computes its gradients; absent where the operation has none.
        refusal: given the call's tensors, and options that matter, the reason why this implementation cannot run it,
            or None if it can.
        reluctance: likewise, the reason why one that can run should not unless it is named.
    """

    name: str
    forward: Callable
    backward: Callable[..., Any] = _no_gradient
    unsupported_reason: Callable[..., str | None] = lambda *tensors: None
    not_preferred_reason: Callable[..., str | None] = lambda *tensors: None


@dataclass(frozen=True)
class Choice:
    """What would run: the implementation's ``name``, and ``refused``: the reason against each that cannot."""

    name: str
    refused: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return "\n".join([self.name, *(f"  not {name}: {why}" for name, why in self.refused.items())])


class _Answer(Exception):
    def __init__(self, choice: Choice):
        self.choice = choice


_asking: ContextVar[bool] = ContextVar("asking", default=False)


class Operation:
    """The implementations of one operation, best first."""

    def __init__(self, name: str, *implementations: Implementation):
        self.name = name
        self._implementations = {each.name: each for each in implementations}

    @property
    def names(self) -> list[str]:
        """What ``impl=`` can be, best first."""
        return list(self._implementations)

    def forward(self, *args):
        """The registered forward kernel: run the implementation that the last argument names on the others."""
        *inputs, impl = args
        return self._implementations[impl].forward(*inputs)

    def backward(self, *args):
        """The registered backward kernel, likewise."""
        *inputs, impl = args
        return self._implementations[impl].backward(*inputs)

    def choose(self, impl: str | None, *tensors: Any) -> str:
        """The name of the implementation to run.

        Raises:
            ValueError: ``impl`` names no implementation of this operation.
            RuntimeError: the implementation ``impl`` names cannot run this call, or none can.
        """
        if impl is not None and impl not in self._implementations:
            raise ValueError(f"{self.name}: impl={impl!r} is not an implementation; there are {self.names}")
        asking = not torch.compiler.is_compiling() and _asking.get()  # Dynamo cannot trace a context variable
        refused: dict[str, str] = {}
        chosen = None
        for name, implementation in self._implementations.items():
            if impl is not None and name != impl and not asking:
                continue
            why = implementation.unsupported_reason(*tensors)
            if why is None and name != impl:
                why = implementation.not_preferred_reason(*tensors)
            if why is not None:
                refused[name] = why
            elif chosen is None:
                chosen = name
                if not asking:
                    return chosen
        if impl is not None:
            if impl in refused:
                raise RuntimeError(f"{self.name}: impl={impl!r} cannot run this call: {refused[impl]}")
            chosen = impl
        if chosen is None:
            raise RuntimeError(f"{self.name}: no implementation can run this call: {refused}")
        raise _Answer(Choice(chosen, refused))


def explain(operation: Callable, *args: Any, **kwargs: Any) -> Choice:
    """What ``operation(*args, **kwargs)`` would run, and why not the others; nothing is computed.

    >>> print(which(lynx_kernels.adapter, x, *weights))
    reference
    """
    token = _asking.set(True)
    try:
        operation(*args, **kwargs)
    except _Answer as answer:
        return answer.choice
    finally:
        _asking.reset(token)
    raise TypeError(f"which() needs an operation of lynx_kernels, got {operation!r}")


def gradient_unsupported_reason(kernels: str, *tensors: torch.Tensor | None) -> str | None:
    """Why ``kernels`` that only go forward cannot take these tensors, or None if nothing asks for a gradient."""
    if torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in tensors):
        return f"{kernels} have no gradient, and an argument requires one"
    return None


def refuse_dtensors(operation: str, **tensors: torch.Tensor | None) -> None:
    """Raise TypeError for a DTensor: our kernels would read one rank's shard as if it were the whole."""
    for name, tensor in tensors.items():
        # Looking in vain for an attribute takes a tensor longer than all our other checks.
        if tensor is None or type(tensor) in PLAIN_TENSORS:
            continue
        if hasattr(tensor, "placements"):
            raise TypeError(
                f"{operation}: {name} is a DTensor with placements {tensor.placements}; pass a plain tensor "
                "(.full_tensor() or .to_local()), or let FSDP2 gather the parameter before the forward pass"
            )


def require_same_device(operation: str, device: torch.device, **tensors: torch.Tensor | None) -> None:
    """Raise ValueError for a tensor that is not on ``device``."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{operation}: {name} is on {tensor.device}, expected {device} like the rest")


def require_floating(operation: str, **tensors: torch.Tensor | None) -> None:
    """Raise TypeError for a tensor that is neither fp64, fp32, fp16 nor bf16."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in FLOATING:
            raise TypeError(f"{operation}: {name} is {tensor.dtype}, expected a floating-point tensor")
