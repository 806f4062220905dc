"""Decide whether a kernel may use the weights of a submodule, or the submodule must be called.

A kernel that reads ``child.weight`` is equal to calling the child only if the child is unchanged: it has no hooks, its
forward was not replaced, and its weight is a plain tensor on the device of the input. LoRA, quantisation, offload,
parametrizations, sharding and noise on embeddings each change one of these, so they are detected without knowing about
them. A changed child is called, and the composition of torch's modules runs. ``lynx_kernels.explain(module)`` reports
where and why.
"""

import logging
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from lynx_kernels.backends.dispatch import FLOATING, PLAIN_TENSORS, Explanation

logger = logging.getLogger("lynx_kernels")

KERNELS, PLAIN = "kernels", "plain composition"
_CLASSES: tuple[type[nn.Module], ...] = (nn.Linear, nn.Embedding, nn.LayerNorm, nn.Conv2d)
_FORWARDS = {each: each.forward for each in _CLASSES}
_DIMENSIONS: dict[type[nn.Module], int] = {nn.Linear: 2, nn.Embedding: 2, nn.LayerNorm: 1, nn.Conv2d: 4}
_logged: set[str] = set()


@runtime_checkable
class TakesWeights(Protocol):
    """A module that passes the weights of unchanged children to kernels."""

    def changed_children(self, device: torch.device | None = None) -> dict[str, str]:
        """Child name -> why the child must be called. Empty if kernels run.

        Args:
            device: the device of the input. None: do not compare devices, but reject meta, where offloaded weights are.
        """
        ...


def watched_reason(module: nn.Module) -> str | None:
    """Why ``module`` cannot be bypassed: a replaced forward, a hook on it, or a hook on all modules; or None."""
    if "forward" in vars(module):
        hook = vars(module).get("_hf_hook")
        return "its forward was replaced" + ("" if hook is None else f" (by accelerate's {type(hook).__name__})")
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return "it has hooks"
    if torch_module._has_any_global_hook():
        return "hooks listen to all modules"
    return None


def changed_reason(child: nn.Module, expected: type[nn.Module], device: torch.device | None) -> str | None:
    """Why ``child`` must be called, or None if its weight and bias fully determine the result of calling it.

    Args:
        child: the submodule.
        expected: the class its parent created: ``nn.Linear``, ``nn.Embedding``, ``nn.LayerNorm`` or ``nn.Conv2d``.
        device: the device of the input; None as in ``TakesWeights``.
    """
    if type(child) is not expected:
        return f"it is a {_name(type(child))}, not a {_name(expected)}"
    if expected.forward is not _FORWARDS[expected]:
        return f"the forward of every {_name(expected)} was replaced"
    if (reason := watched_reason(child)) is not None:
        return reason
    parameters = child._parameters
    weight, bias = parameters.get("weight"), parameters.get("bias")
    if weight is None:
        return "its weight is not a parameter of its own"
    if weight.dim() != _DIMENSIONS[expected]:
        return f"its weight has shape {tuple(weight.shape)}: it is kept elsewhere"
    if (reason := _unreal_reason("weight", weight, device)) is not None:
        return reason
    if bias is not None:
        return _unreal_reason("bias", bias, device)
    if "bias" in vars(child):
        return "its bias is not a parameter of its own"
    return None


def changed_reasons(branch: Mapping[str, nn.Module | None], device: torch.device | None) -> dict[str, str]:
    """Child name -> why it must be called, for the children of a bottleneck: a LayerNorm or None, two projections."""
    changed = {}
    for (name, child), expected in zip(branch.items(), (nn.LayerNorm, nn.Linear, nn.Linear), strict=True):
        if child is not None and (reason := changed_reason(child, expected, device)) is not None:
            changed[name] = reason
    return changed


def weight_and_bias(child: nn.Module | None) -> tuple[Any, Any]:
    """Weight and bias of an unchanged child; None and None if there is no child."""
    return (None, None) if child is None else (child._parameters["weight"], child._parameters.get("bias"))


def changed_embedding_reason(table: nn.Module, device: torch.device | None) -> str | None:
    """``changed_reason`` for an embedding table. Some kernels do not support its options."""
    reason = changed_reason(table, nn.Embedding, device)
    if reason is not None or not isinstance(table, nn.Embedding):
        return reason
    if table.max_norm is not None:
        return f"it has max_norm={table.max_norm}, which changes its rows as they are read"
    if not table.weight.requires_grad:
        return None
    for option in ("sparse", "scale_grad_by_freq"):
        if getattr(table, option):
            return f"it trains with {option}=True"
    if table.padding_idx is not None:
        return f"it trains, and the row padding_idx={table.padding_idx} gets no gradient"
    return None


def _unreal_reason(name: str, tensor: Tensor, device: torch.device | None) -> str | None:
    """Why a kernel cannot use ``tensor`` instead of calling its module."""
    if type(tensor) not in PLAIN_TENSORS and not _stands_in(tensor):
        return f"its {name} is a {_name(type(tensor))}"
    if tensor.dtype not in FLOATING:
        return f"its {name} is {tensor.dtype}"
    if tensor.layout is not torch.strided:
        return f"its {name} is {tensor.layout}"
    if not tensor.numel():
        return f"its {name} is empty: it is kept elsewhere"
    if device is None:
        return f"its {name} is offloaded, on meta" if tensor.is_meta else None
    return None if tensor.device == device else f"its {name} is on {tensor.device}, the input on {device}"


def _stands_in(tensor: Tensor) -> bool:
    """Whether the tensor is torch's substitute for a plain one, during a trace or an export."""
    return type(tensor).__module__.startswith("torch._subclasses.")


def _name(each: type) -> str:
    if getattr(nn, each.__qualname__, None) is each:
        return f"torch.nn.{each.__qualname__}"
    return f"{each.__module__}.{each.__qualname__}"


def floating_dtype(child: nn.Module) -> torch.dtype | None:
    """The dtype that ``child`` expects; None if its weight does not tell, for example if it is quantised."""
    weight = getattr(child, "weight", None)
    return weight.dtype if isinstance(weight, Tensor) and weight.dtype in FLOATING else None


def cast_for(child: nn.Module, x: Tensor) -> Tensor:
    """x in the dtype that ``child`` expects."""
    dtype = floating_dtype(child)
    return x if dtype is None else x.to(dtype)


def log_once(module: nn.Module, reasons: Mapping[str, str]) -> None:
    """Log that ``module`` runs as a plain composition: one line per class and reasons, for any number of modules."""
    if torch.compiler.is_compiling():
        return
    line = f"{type(module).__name__} runs as a {PLAIN}: " + "; ".join(
        f"{name}: {reason}" for name, reason in reasons.items()
    )
    if line not in _logged:
        _logged.add(line)
        logger.info(line)


def explain_children(module: nn.Module, x: Tensor | None = None) -> Explanation:
    """Tell where ``module`` and its submodules call children instead of kernels, and why.

    Returns:
        ``name`` is "kernels" or "plain composition". ``reasons`` has one entry per changed child.

    Raises:
        TypeError: none of the modules passes weights to kernels.
    """
    device = None if x is None else x.device
    takers = [(name, each) for name, each in module.named_modules() if isinstance(each, TakesWeights)]
    if not takers:
        raise TypeError(
            f"explain: expected an operation of lynx_kernels or a module that has one of its modules, got {module!r}"
        )
    reasons = {
        f"{KERNELS} for {f'{name}.{child}' if name else child}": reason
        for name, each in takers
        for child, reason in each.changed_children(device).items()
    }
    return Explanation(PLAIN if reasons else KERNELS, reasons)
