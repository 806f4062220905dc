"""Choose which implementation of an operation runs, and say why the others do not.

Every operation lists its implementations, best first. Each implementation names the architectures it is written for
and says whether it can run a given call. ``impl=None`` takes the first that can run. Naming one that cannot run is an
error that states the reason. No fallback is hidden: ``explain`` returns the choice and the reasons against the others.
"""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NoReturn, TypeVar

import torch

from lynx_kernels.backends import transforms

PLAIN_TENSORS = (torch.Tensor, torch.nn.Parameter)
FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# The architectures that GPU kernels are written and compiled for.
NVIDIA = ("sm_80", "sm_90", "sm_100")
GPUS = (*NVIDIA, "gfx942")

_Function = TypeVar("_Function", bound=Callable[..., Any])


def architecture(device: torch.device) -> str:
    """The architecture whose code runs on ``device``: "cpu", one of ``GPUS``, or the name of another device or GPU.

    An NVIDIA GPU from sm_80 on runs the code of the newest architecture it is compatible with. 8.6 and 8.9 run code for
    sm_80. So does 12.0, because it has neither the special instructions of sm_90 nor those of sm_100.
    """
    if device.type != "cuda":
        return device.type
    if torch.version.hip is not None:
        return torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"sm_{major}{minor}"
    return {9: "sm_90", 10: "sm_100"}.get(major, "sm_80")


def _no_gradient(*args: Any) -> NoReturn:
    raise RuntimeError("this operation has no gradient")


def _no_reason(call: Any) -> str | None:
    return None


@dataclass(frozen=True)
class Implementation:
    """One way to compute an operation.

    Attributes:
        name: its name for ``impl=``.
        forward: computes the operation; takes the call, a named tuple of the operation.
        backward: computes the gradients; takes the operation's backward call. Omitted if there is no gradient.
        architectures: names as ``architecture`` returns them; empty means every device.
        unsupported_reason: returns why it cannot run the call, or None if it can.
        not_preferred_reason: returns why it should run only when named by ``impl=``, or None.
    """

    name: str
    forward: Callable[[Any], Any]
    backward: Callable[[Any], Any] = _no_gradient
    architectures: tuple[str, ...] = ()
    unsupported_reason: Callable[[Any], str | None] = _no_reason
    not_preferred_reason: Callable[[Any], str | None] = _no_reason

    def reason_against(self, call: Any, *, named: bool) -> str | None:
        """Why it does not run the call, or None. With ``named=True``, preference does not count."""
        if self.architectures and (found := architecture(call.device)) not in self.architectures:
            return f"it is written for {', '.join(self.architectures)}, and the tensors are on {found}"
        reason = self.unsupported_reason(call)
        return reason if reason is not None or named else self.not_preferred_reason(call)


@dataclass(frozen=True)
class Explanation:
    """The implementation that a call would run.

    Attributes:
        name: the implementation; None if none can run, or if the one named by ``impl=`` cannot.
        reasons: implementation name -> why it does not run.
        note: what else to know about such a call, or None.
    """

    name: str | None
    reasons: dict[str, str] = field(default_factory=dict)
    note: str | None = None

    def __str__(self) -> str:
        lines = [str(self.name), *(f"  not {name}: {reason}" for name, reason in self.reasons.items())]
        return "\n".join(lines if self.note is None else [*lines, f"  note: {self.note}"])


class Operation:
    """The implementations of one operation, best first.

    Args:
        name: the name of the operation.
        call: a named tuple of the operator's arguments, in the order of its schema, with a property ``device``.
        backward_call: the same for the backward operator.
        implementations: best first.
        check: raises for an invalid call, before any implementation is considered.
        note: returns what ``explain`` adds about a call, or None.
    """

    def __init__(
        self,
        name: str,
        call: type,
        backward_call: type | None,
        *implementations: Implementation,
        check: Callable[[Any], Any] = _no_reason,
        note: Callable[[Any], str | None] = _no_reason,
    ):
        self.name = name
        self.check = check
        self._note = note
        self.call: Any = call
        self.backward_call: Any = backward_call
        self._implementations = {each.name: each for each in implementations}

    @property
    def names(self) -> list[str]:
        """The values that ``impl=`` accepts, best first."""
        return list(self._implementations)

    def forward(self, *args: Any) -> Any:
        """The registered forward kernel. The last argument names the implementation; the others are the call."""
        *inputs, impl = args
        return self._implementations[impl].forward(self.call(*inputs))

    def backward(self, *args: Any) -> Any:
        """The registered backward kernel; arguments as for ``forward``."""
        *inputs, impl = args
        return self._implementations[impl].backward(self.backward_call(*inputs))

    def choose(self, impl: str | None, call: Any) -> str:
        """The name of the implementation that runs ``call``.

        Raises:
            TypeError, ValueError: ``check`` found the call invalid.
            ValueError: ``impl`` is not an implementation of this operation.
            RuntimeError: the implementation named by ``impl`` cannot run this call, or none can.
            NotImplementedError: a tensor is one of ``torch.func.vmap`` or of forward mode.
        """
        if transforms.are_active() and not torch.compiler.is_compiling():
            transforms.refuse(self.name, call)
        self.check(call)
        if impl is not None:
            reason = self._named(impl).reason_against(call, named=True)
            if reason is not None:
                raise RuntimeError(f"{self.name}: impl={impl!r} cannot run this call: {reason}")
            return impl
        for name, implementation in self._implementations.items():
            if implementation.reason_against(call, named=False) is None:
                return name
        raise RuntimeError(f"{self.name}: no implementation can run this call: {self.explain(None, call).reasons}")

    def explain(self, impl: str | None, call: Any) -> Explanation:
        """What ``choose`` would return, and why the others do not run."""
        self.check(call)
        if impl is not None:
            self._named(impl)
        reasons, chosen = {}, None
        for name, implementation in self._implementations.items():
            reason = implementation.reason_against(call, named=name == impl)
            if reason is not None:
                reasons[name] = reason
            elif chosen is None and impl in (None, name):
                chosen = name
        return Explanation(chosen, reasons, self._note(call))

    def _named(self, impl: str) -> Implementation:
        if impl not in self._implementations:
            raise ValueError(f"{self.name}: impl={impl!r} is not an implementation; choose one of {self.names}")
        return self._implementations[impl]

    def explained_by(self, make_call: Callable[..., Any]) -> Callable[[_Function], _Function]:
        """A decorator that registers the public function with ``explain``.

        Args:
            make_call: makes the call. Its parameters are a subset of the function's, with the same names. It raises
                what the function would raise for these arguments.
        """

        def register(function: _Function) -> _Function:
            _EXPLAINED[function] = self, make_call
            return function

        return register


_EXPLAINED: dict[Callable, tuple[Operation, Callable[..., Any]]] = {}


def explain(operation: Callable, *args: Any, **kwargs: Any) -> Explanation:
    """Tell which implementation ``operation(*args, **kwargs)`` would run, and why not the others. Computes nothing.

    The operation may be a ``functools.partial``. It may also be a module, its input ``x`` optional: the answer is then
    whether kernels take the weights of its submodules, "kernels", or which of them are called, and why.

    >>> print(lynx_kernels.explain(lynx_kernels.adapter, x, *weights))
    cpu
      not cuda: it is written for sm_80, sm_90, sm_100, and the tensors are on cpu

    Raises:
        TypeError: ``operation`` is neither an operation of lynx_kernels nor a module that contains one of its modules.
        TypeError, ValueError: the operation itself would raise this for these arguments.
    """
    if isinstance(operation, torch.nn.Module):
        from lynx_kernels import children  # which needs this file

        return children.explain_children(operation, *args, **kwargs)
    while isinstance(operation, partial):
        args, kwargs, operation = (*operation.args, *args), {**operation.keywords, **kwargs}, operation.func
    try:
        table, make_call = _EXPLAINED[operation]
    except (KeyError, TypeError):  # TypeError: not hashable
        raise TypeError(f"explain: expected an operation of lynx_kernels, got {operation!r}") from None
    bound = inspect.signature(operation).bind(*args, **kwargs)
    bound.apply_defaults()
    wanted = inspect.signature(make_call).parameters
    call = make_call(**{name: value for name, value in bound.arguments.items() if name in wanted})
    return table.explain(bound.arguments["impl"], call)


def gradient_unsupported_reason(kernels: str, *tensors: torch.Tensor | None) -> str | None:
    """Why the forward-only ``kernels`` cannot take these tensors, or None if no tensor requires a gradient."""
    if torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in tensors):
        return f"{kernels} have no gradient, and an argument requires one"
    return None


def refuse_dtensors(operation: str, **tensors: torch.Tensor | None) -> None:
    """Raise TypeError for a DTensor: our kernels would read one rank's shard as the full tensor."""
    for name, tensor in tensors.items():
        # A failed attribute lookup on a tensor takes longer than all our other checks.
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
            raise ValueError(
                f"{operation}: {name} is on {tensor.device}, expected {device} like the other arguments; move it there"
            )


def require_finite(operation: str, *, least: float = -math.inf, **numbers: Any) -> None:
    """Raise TypeError for what is no number, ValueError for one that is NaN, infinite or below ``least``."""
    for name, value in numbers.items():
        expected = "a finite number" + ("" if least == -math.inf else f" of at least {least:g}")
        # hasattr last: it takes NumPy's numbers, and torch.compile cannot trace it for its own.
        if not isinstance(value, int | float) and (isinstance(value, torch.Tensor) or not hasattr(value, "__float__")):
            raise TypeError(f"{operation}: {name} is a {type(value).__name__}, expected {expected}")
        if not (-math.inf < value < math.inf and value >= least):  # math.isfinite cannot be compiled
            raise ValueError(f"{operation}: {name}={value}, expected {expected}")


def require_floating(operation: str, **tensors: torch.Tensor | None) -> None:
    """Raise TypeError for a tensor that is neither fp64, fp32, fp16 nor bf16."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in FLOATING:
            raise TypeError(f"{operation}: {name} is {tensor.dtype}, expected a floating-point tensor")
