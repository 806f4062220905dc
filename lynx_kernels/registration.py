"""One way for every operation to become a ``torch.library`` operator.

An operation is registered twice, forward and backward. Both carry the name of the chosen implementation in their
schema, so that one fake kernel, one autograd formula and one autocast rule serve all implementations, and
``torch.compile`` and export see an opaque operator whichever of them runs.
"""

from collections.abc import Callable

import torch

_LIBRARY = torch.library.Library("lynx_kernels", "DEF")
_AUTOCAST_KEYS = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}


def define(
    schema: str,
    kernel: Callable,
    *,
    fake: Callable,
    autograd: tuple[Callable, Callable] | None = None,
    autocast: Callable | None = None,
) -> torch._ops.OpOverload:
    """Register ``lynx_kernels::<schema>`` and return the operator.

    Args:
        schema: the operator's string schema, sizes as ``SymInt``.
        kernel: runs the operator on any device.
        fake: the same signature; gives outputs of the right shape, dtype and device without computing them.
        autograd: ``(setup_context, backward)`` as ``torch.library.register_autograd`` takes them. Without it the
            operator is not differentiable.
        autocast: ``autocast(dtype, *args) -> args`` gives the arguments the operator runs with in an autocast region
            of that dtype. Without it autocast does not touch the operator.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    operator = getattr(torch.ops.lynx_kernels, name).default
    torch.library.register_fake(f"lynx_kernels::{name}", fake, lib=_LIBRARY)
    if autograd is not None:
        setup_context, backward = autograd
        torch.library.register_autograd(f"lynx_kernels::{name}", backward, setup_context=setup_context, lib=_LIBRARY)
    if autocast is not None:
        for device_type in _AUTOCAST_KEYS:
            _register_autocast(operator, name, device_type, autocast)
    return operator


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
