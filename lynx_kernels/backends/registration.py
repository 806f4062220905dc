"""Register operations as ``torch.library`` operators.

Every operation has two operators, forward and backward. The arguments of an operator are the fields of its call, a
named tuple, followed by the name of the chosen implementation. So all implementations share one fake kernel, one
autograd formula and one autocast rule. ``torch.compile`` and export see the same opaque operator for all of them.
"""

from collections.abc import Callable
from typing import Any, NoReturn, get_type_hints

import torch
from torch import Tensor

from lynx_kernels.backends import transforms
from lynx_kernels.backends.dispatch import PLAIN_TENSORS

_LIBRARY = torch.library.Library("lynx_kernels", "DEF")
_AUTOCAST_KEYS = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}


# Annotation of a call's field -> type in the schema.
_SCHEMA_TYPES = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    list[Tensor]: "Tensor[]",
    int: "SymInt",
    int | None: "SymInt?",
    list[int]: "SymInt[]",
    float: "float",
    float | None: "float?",
    list[float]: "float[]",
    bool: "bool",
    list[bool]: "bool[]",
    str: "str",
    torch.dtype: "ScalarType",
}


def schema_arguments(call: type, mutated: str | None = None) -> str:
    """The fields of a named tuple as the arguments of a schema. The operator writes to the field ``mutated``."""
    arguments = []
    for name, annotation in get_type_hints(call).items():
        kind = _SCHEMA_TYPES[annotation]
        arguments.append(f"{kind.replace('Tensor', 'Tensor(a!)') if name == mutated else kind} {name}")
    return ", ".join(arguments)


def define(
    name: str,
    call: type,
    returns: str,
    kernel: Callable,
    *,
    fake: Callable,
    autograd: tuple[Callable, Callable] | None = None,
    autocast: Callable | None = None,
    mutated: str | None = None,
) -> Callable:
    """Register ``lynx_kernels::<name>`` and return a function that runs it.

    The function calls the operator. It calls ``kernel`` directly where nothing can see the difference, because the
    dispatcher takes 25-50 us, a tenth of a small operation.

    Args:
        name: the name of the operator.
        call: a named tuple. Its fields are the operator's arguments; the name of the implementation comes last.
        returns: the return type, in schema syntax.
        kernel: runs the operator on any device; takes the operator's arguments.
        fake: takes a call and returns outputs of the right shape, dtype and device without computing them.
        autograd: ``(setup_context, backward)``. ``setup_context(ctx, call, impl, output)`` saves what ``backward``
            needs. ``backward(ctx, *gradients)`` returns a gradient or None for each field of the call. Without
            ``autograd``, differentiating the operator is an error. Backward operators have none, so second
            derivatives are errors too.
        autocast: ``autocast(dtype, call) -> call`` returns the call that runs in an autocast region of that dtype.
            Without it the call is unchanged. In both cases nothing is cast inside the operator.
        mutated: the field that the operator writes to, if any.
    """
    make: Any = call
    _LIBRARY.define(
        f"{name}({schema_arguments(call, mutated)}, str impl) -> {returns}", tags=(torch.Tag.pt2_compliant_tag,)
    )
    _LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    operator = getattr(torch.ops.lynx_kernels, name).default
    torch.library.register_fake(f"lynx_kernels::{name}", lambda *args: fake(make(*args[:-1])), lib=_LIBRARY)
    setup_context, backward = _over_arguments(make, *autograd) if autograd else (None, _refuse_gradient(name))
    if mutated is None:
        torch.library.register_autograd(f"lynx_kernels::{name}", backward, setup_context=setup_context, lib=_LIBRARY)
    for device_type in _AUTOCAST_KEYS:
        _register_autocast(operator, name, device_type, make, autocast or (lambda dtype, call: call))

    def run(*args: Any) -> Any:
        if _can_bypass_dispatcher(args):
            return kernel(*args)
        if transforms.are_active() and not torch.compiler.is_compiling():
            transforms.refuse(f"lynx_kernels::{name}", args)
            if mutated is None and transforms.is_differentiated(args):
                outputs = transformed(*args)
                return list(outputs) if returns == "Tensor[]" else outputs
        return operator(*args)

    transformed = transforms.differentiable(run, setup_context, backward)

    return run


def _over_arguments(make: Any, setup_context: Callable, backward: Callable) -> tuple[Callable, Callable]:
    """Adapt functions of a call to ``torch.library.register_autograd``, which passes all arguments."""

    def setup(ctx: Any, inputs: tuple, output: Any) -> None:
        setup_context(ctx, make(*inputs[:-1]), inputs[-1], output)

    return setup, lambda ctx, *gradients: (*backward(ctx, *gradients), None)


def _can_bypass_dispatcher(args: tuple[Any, ...]) -> bool:
    """Whether nothing needs to see the operator.

    An autograd graph, a trace, a dispatch mode, a functorch transform, a profiler and an autocast region need it.
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or torch._C._is_any_autocast_enabled():
        return False
    if transforms.are_active() or torch.autograd._profiler_enabled():
        return False
    records = torch.is_grad_enabled()
    for each in args:
        if type(each) is torch.Tensor and not (records and each.requires_grad):
            continue  # the common case, in half the time of the loop below
        for tensor in each if isinstance(each, list) else (each,):
            if isinstance(tensor, torch.Tensor) and (
                type(tensor) not in PLAIN_TENSORS or (records and tensor.requires_grad)
            ):
                return False
    return True


def autocast_to(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Cast ``tensor`` to the autocast ``dtype``. fp64 stays fp64, as everywhere in PyTorch's autocast."""
    return tensor if tensor.dtype == torch.float64 else tensor.to(dtype)


def _refuse_gradient(name: str) -> Callable:
    def refuse(ctx: Any, *gradients: Tensor | None) -> NoReturn:
        raise NotImplementedError(
            f"lynx_kernels::{name} is not differentiable: our operators have no second derivatives"
        )

    return refuse


def _register_autocast(operator: torch._ops.OpOverload, name: str, device_type: str, make: Any, rule: Callable) -> None:
    # torch.library.register_autocast casts every argument to one dtype, fixed at registration. Our operators leave some
    # arguments uncast (the residual stream, norm weights) and use the dtype of the current autocast region.
    key = getattr(torch._C.DispatchKey, _AUTOCAST_KEYS[device_type])
    excluded = torch._C.DispatchKeySet(key)

    @operator.py_impl(key)
    def run(*args: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(excluded):
            return operator(*rule(torch.get_autocast_dtype(device_type), make(*args[:-1])), args[-1])

    _LIBRARY.impl(name, lambda keyset, *args: run(*args), _AUTOCAST_KEYS[device_type], with_keyset=True)
