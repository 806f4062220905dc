"""Our operators under ``torch.func``: ``grad`` and ``vjp`` work, and the rest is refused in our name.

An operator of ``torch.library`` with an autograd formula has no rule for the transforms. ``vmap`` would loop over it,
and forward mode would drop its tangents in silence.
"""

import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch
from torch.autograd import forward_ad


class _Inside(threading.local):
    backward = False  # what it saved may be wrapped by a transform that has ended: only the dispatcher can unwrap it


_inside = _Inside()


def are_active() -> bool:
    """Whether some transform or forward mode runs. Takes 0.1 us."""
    return _functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0 or _inside.backward


def refuse(operation: str, arguments: Iterable[Any]) -> None:
    """Raise NotImplementedError for tensors of ``vmap`` or of forward mode."""
    stack = _functorch.get_interpreter_stack() or []
    forward_levels = [each.level() for each in stack if each.key() == _functorch.TransformType.Jvp]
    for tensor in _tensors(arguments):
        layer = tensor
        while True:
            has_tangent = forward_ad._current_level >= 0 and forward_ad.unpack_dual(layer).tangent is not None
            if has_tangent or _functorch.maybe_get_level(layer) in forward_levels:
                raise NotImplementedError(
                    f"{operation}: there is no forward-mode derivative (torch.func.jvp, jacfwd, hessian, dual "
                    "tensors); use reverse mode, torch.func.grad or vjp"
                )
            if not _functorch.is_functorch_wrapped_tensor(layer):
                break
            if _functorch.is_batchedtensor(layer):
                raise NotImplementedError(
                    f"{operation}: torch.func.vmap cannot batch it (and jacrev calls vmap); put the samples into one "
                    "packed row, or call it in a loop"
                )
            layer = _functorch.get_unwrapped(layer)


def is_differentiated(arguments: Iterable[Any]) -> bool:
    """Whether ``torch.func.grad`` or ``vjp`` tracks a tensor."""
    return any(_functorch.is_gradtrackingtensor(tensor) for tensor in _tensors(arguments))


def differentiable(run: Callable, setup_context: Callable | None, backward: Callable) -> Callable:
    """``run`` as a function that ``torch.func.grad`` can differentiate.

    Args:
        run: of the operator's arguments; called again one transform further in.
        setup_context, backward: as ``torch.library.register_autograd`` takes them.
    """

    class Transformed(torch.autograd.Function):
        @staticmethod
        def forward(*args: Any) -> Any:
            outputs = run(*args)
            return tuple(outputs) if isinstance(outputs, list) else outputs

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
            if setup_context is not None:
                setup_context(ctx, inputs, output)

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            before, _inside.backward = _inside.backward, True
            try:
                return backward(ctx, *gradients)
            finally:
                _inside.backward = before

    return Transformed.apply


def _tensors(arguments: Iterable[Any]) -> Iterator[Tensor]:
    for each in arguments:
        for tensor in each if isinstance(each, list) else (each,):
            if isinstance(tensor, Tensor):
                yield tensor
