"""One way for every operation to become a ``torch.library`` operator.

An operation is registered twice, forward and backward. Both carry the name of the chosen implementation in their
schema, so that one fake kernel, one autograd formula and one autocast rule serve all implementations, and
``torch.compile`` and export see an opaque operator whichever of them runs.
"""

from collections.abc import Callable
from typing import Any

import torch

from lynx_kernels.backends.dispatch import PLAIN_TENSORS

_LIBRARY = torch.library.Library("lynx_kernels", "DEF")
_AUTOCAST_KEYS = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}


def define(
    schema: str,
    kernel: Callable,
    *,
    fake: Callable,
    autograd: tuple[Callable, Callable] | None = None,
    autocast: Callable | None = None,
) -> Callable:
    """Register ``lynx_kernels::<schema>`` and return a function that runs it.

    The function calls the operator, or ``kernel`` itself where nothing would see the difference: the way through the
    dispatcher takes 25-50 us, a tenth of a small operation.

    Args:
        schema: the operator's string schema, sizes as ``SymInt``.
        kernel: runs the operator on any device.
        fake: the same signature; gives outputs of the right shape, dtype and device without computing them.
        autograd: ``(setup_context, backward)`` as ``torch.library.register_autograd`` takes them. Without it
            differentiating the operator is an error: so are second derivatives, our backwards having no autograd.
        autocast: ``autocast(dtype, *args) -> args`` gives the arguments the operator runs with in an autocast region
            of that dtype. Without it they stay as they are, and nothing inside the operator is cast either.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    operator = getattr(torch.ops.lynx_kernels, name).default
    torch.library.register_fake(f"lynx_kernels::{name}", fake, lib=_LIBRARY)
    if not operator._schema.is_mutable:
        setup_context, backward = autograd or (None, _refuse_gradient(name))
        torch.library.register_autograd(f"lynx_kernels::{name}", backward, setup_context=setup_context, lib=_LIBRARY)
    for device_type in _AUTOCAST_KEYS:
        _register_autocast(operator, name, device_type, autocast or (lambda dtype, *args: args))

    def run(*args):
        return kernel(*args) if _nobody_watches(args) else operator(*args)

    return run


def _nobody_watches(args: tuple[Any, ...]) -> bool:
    """Whether nothing would notice that the dispatcher is passed by: no graph, trace, mode or autocast region."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or torch._C._is_any_autocast_enabled():
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    records = torch.is_grad_enabled()
    for each in args:
        if type(each) is torch.Tensor and not (records and each.requires_grad):
            continue  # nearly all: half the time of what follows
        for tensor in each if isinstance(each, list) else (each,):
            if isinstance(tensor, torch.Tensor) and (
                type(tensor) not in PLAIN_TENSORS or (records and tensor.requires_grad)
            ):
                return False
    return True


def autocast_to(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``tensor`` in the autocast ``dtype``; fp64 stays, as everywhere in PyTorch's autocast."""
    return tensor if tensor.dtype == torch.float64 else tensor.to(dtype)


def _refuse_gradient(name: str) -> Callable:
    def refuse(ctx, *gradients):
        raise RuntimeError(f"lynx_kernels::{name} is not differentiable: our operators have no second derivatives")

    return refuse


def _register_autocast(operator: torch._ops.OpOverload, name: str, device_type: str, rule: Callable) -> None:
    # torch.library.register_autocast casts every argument to one dtype fixed at registration. Our operators keep some
    # arguments wide (the residual stream, norm weights) and follow whatever dtype the region asks for.
    key = getattr(torch._C.DispatchKey, _AUTOCAST_KEYS[device_type])
    excluded = torch._C.DispatchKeySet(key)

    @operator.py_impl(key)
    def run(*args):
        with torch._C._ExcludeDispatchKeyGuard(excluded):
            return operator(*rule(torch.get_autocast_dtype(device_type), *args))

    _LIBRARY.impl(name, lambda keyset, *args: run(*args), _AUTOCAST_KEYS[device_type], with_keyset=True)
