"""The loss of a transformers model in training, from ``linear_cross_entropy`` in place of logits.

While the model's ``forward`` runs, and only then, its output head returns a promise of logits. Its loss function
redeems it without ever making them. Whatever else reads the promise gets true logits, so a model with a loss of its own
is as right as before. The loss of a packed row knows the row's layout, in evaluation, too.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.utils import ModelOutput

from lynx_kernels.children import changed_reason, weight_and_bias
from lynx_kernels.integrations import logs
from lynx_kernels.integrations.attention_mask import AttentionMask
from lynx_kernels.layout import PackedLayout
from lynx_kernels.ops.linear_cross_entropy import linear_cross_entropy

_READ = "the model reads its logits, so they are made"
IGNORE = -100  # the label of tokens that no loss scores


class PromisedLogits:
    """``head(hidden)`` with factors and a tanh to come: (..., V), made when something else than the loss reads it."""

    def __init__(self, hidden: Tensor, head: nn.Linear, steps: tuple[tuple[str, float], ...] = ()) -> None:
        self.hidden, self.head, self.steps = hidden, head, steps
        self._made: Tensor | None = None

    @property
    def dtype(self) -> torch.dtype:
        return self.hidden.dtype

    @property
    def device(self) -> torch.device:
        return self.hidden.device

    def __getitem__(self, index: Any) -> Any:
        parts = index if isinstance(index, tuple) else (index, Ellipsis)
        are_slices = all(isinstance(part, slice) or part is Ellipsis for part in parts)
        if are_slices and self._made is None and (parts[-1] is Ellipsis or parts[-1] == slice(None)):
            return PromisedLogits(self.hidden[index], self.head, self.steps)
        return self.make()[index]

    def make(self) -> Tensor:
        """The logits, once."""
        if self._made is None:
            logits = nn.functional.linear(self.hidden, *weight_and_bias(self.head))
            for step, factor in self.steps:
                logits = torch.tanh(logits) if step == "tanh" else logits * factor if step == "mul" else logits / factor
            self._made = logits
        return self._made

    def scale_and_cap(self) -> tuple[float, float | None] | None:
        """``logit_scale`` and ``softcap`` of the loss, or None where it has not these steps."""
        names, factors = [name for name, _ in self.steps], [factor for _, factor in self.steps]
        if names[-3:] == ["div", "tanh", "mul"] and factors[-3] == factors[-1]:
            cap, names, factors = factors[-1], names[:-3], factors[:-3]
        else:
            cap = None
        if "tanh" in names:
            return None
        scale = 1.0
        for name, factor in zip(names, factors, strict=True):
            scale = scale * factor if name == "mul" else scale / factor
        return scale, cap

    def _then(self, step: str, factor: Any = 1.0) -> Any:
        if isinstance(factor, (int, float)) and self._made is None:
            return PromisedLogits(self.hidden, self.head, (*self.steps, (step, float(factor))))
        made = self.make()
        return torch.tanh(made) if step == "tanh" else made * factor if step == "mul" else made / factor

    def __mul__(self, factor: Any) -> Any:
        return self._then("mul", factor)

    __rmul__ = __mul__

    def __truediv__(self, factor: Any) -> Any:
        return self._then("div", factor)

    def tanh(self) -> Any:
        return self._then("tanh")

    def contiguous(self) -> "PromisedLogits":
        return self

    def to(self, *args: Any, **kwargs: Any) -> Any:
        return self if args == (self.hidden.device,) and not kwargs else self.make().to(*args, **kwargs)

    def float(self) -> "PromisedLogits":
        return self  # the loss is computed in fp32 whatever the logits are

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.make(), name)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """PyTorch calls this in place of any of its functions that gets a promise as an argument."""
        if func is torch.tanh and len(args) == 1 and not kwargs:
            return args[0].tanh()

        def made(each: Any) -> Any:
            if isinstance(each, (list, tuple)):
                return type(each)(map(made, each))
            return each.make() if isinstance(each, cls) else each

        return func(*map(made, args), **{name: made(each) for name, each in (kwargs or {}).items()})


def _making(name: str) -> Any:
    def operator(self: PromisedLogits, *arguments: Any) -> Any:
        made = (each.make() if isinstance(each, PromisedLogits) else each for each in arguments)
        return getattr(self.make(), name)(*made)

    return operator


# Python looks operators up in the class, and does not call __getattr__ for them.
for _name in (
    "add",
    "radd",
    "sub",
    "rsub",
    "rtruediv",
    "neg",
    "len",
    "lt",
    "le",
    "gt",
    "ge",
    "matmul",
    "pow",
):
    setattr(PromisedLogits, f"__{_name}__", _making(f"__{_name}__"))


class _PromisingHead(nn.Linear):
    def forward(self, x: Tensor) -> Any:
        return PromisedLogits(x, self)


class HeadLoss:
    """Hooks on a model that change its head and its loss while its ``forward`` runs with labels.

    Without ``promises`` the head stays, and the loss changes for packed rows alone.
    """

    def __init__(self, model: PreTrainedModel, *, promises: bool) -> None:
        self.model, self.promises = model, promises
        self.handles = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after, with_kwargs=True, always_call=True),
        ]
        self._head: nn.Linear | None = None  # while forward runs in training
        self._layout: PackedLayout | None = None  # while forward runs on a packed row
        self._is_redeemed = False

    def _before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling() or argument("labels", model, args, kwargs) is None:
            return
        mask = argument("attention_mask", model, args, kwargs)
        self._layout = mask.layout if isinstance(mask, AttentionMask) and mask.is_packed else None
        head = head_of(self.model) if self.promises else None
        if model.training and head is not None and changed_reason(head, nn.Linear, head.weight.device) is None:
            self._head, self._is_redeemed = head, False
            head.__class__ = _PromisingHead
        if self._head is not None or self._layout is not None:
            self.model._loss_function = self._loss

    def _after(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if self._head is None and self._layout is None:
            return output
        was_promised, self._head, self._layout = self._restore_head(), None, None
        del self.model._loss_function
        if isinstance(output, ModelOutput):
            output = _kept(output)
        elif isinstance(output, tuple):
            output = tuple(_kept(each) for each in output if _kept(each) is not None)
        if was_promised:
            is_made = not self._is_redeemed or getattr(output, "logits", None) is not None
            logs.note(model, *(("its own", _READ) if is_made else ("lynx", "linear_cross_entropy, logits are None")))
        return output

    def _restore_head(self) -> bool:
        if self._head is not None:
            self._head.__class__ = nn.Linear
        return self._head is not None

    def _loss(
        self,
        logits: Any,
        labels: Tensor | None,
        vocab_size: int,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = IGNORE,
        shift_labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """``ForCausalLMLoss``, but a packed row's labels are scored by the rows that predict them on their paths."""
        predictors = None
        if shift_labels is None:
            assert labels is not None
            if self._layout is None:
                shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:].contiguous()
            else:
                shift_labels, predictors = self._layout.select(labels.flatten(), ignore_index=ignore_index)
        options = logits.scale_and_cap() if isinstance(logits, PromisedLogits) else None
        if options is None or logits.head.weight.shape[0] != vocab_size:
            logits = logits.make() if isinstance(logits, PromisedLogits) else logits
            if predictors is not None:
                logits = logits.flatten(0, -2)[predictors.clamp(min=0)]
            loss: Tensor = ForCausalLMLoss(
                logits, labels, vocab_size, num_items_in_batch, ignore_index, shift_labels, **kwargs
            )
            return loss
        self._is_redeemed = True
        weight, bias = weight_and_bias(logits.head)
        scale, cap = options
        return linear_cross_entropy(
            logits.hidden.flatten(0, -2),
            weight,
            shift_labels.flatten().to(logits.hidden.device),
            predictors=predictors,
            bias=bias,
            softcap=cap,
            logit_scale=scale,
            ignore_index=ignore_index,
            num_items=num_items_in_batch,
        )


def _kept(each: Any) -> Any:
    """What a model returns, with logits only if something has read them."""
    if isinstance(each, ModelOutput):  # that of an inner model, among others
        return type(each)(**{name: _kept(value) for name, value in each.items()})
    return each._made if isinstance(each, PromisedLogits) else each


def head_of(model: PreTrainedModel) -> nn.Linear | None:
    """The output head, if it is a child of the model."""
    head = model.get_output_embeddings()
    return head if isinstance(head, nn.Linear) and any(head is child for child in model.modules()) else None


def promised_logits(model: PreTrainedModel, forward: Callable[..., Any], **inputs: Any) -> PromisedLogits:
    """The logits of a model, not made, for what needs its last hidden states, its head, and what lies behind the head.

    Args:
        model: whose head promises.
        forward: calls the model's own forward.
        inputs: of ``forward``, without labels.

    Raises:
        ValueError: the head is not as the model made it, or the model does more with its logits than scale and cap.
    """
    head = head_of(model)
    name = type(model).__name__
    if head is None:
        raise ValueError(f"{name} has no output head that is a torch.nn.Linear; take adapters off the head")
    was = type(head)
    if was is not _PromisingHead and (reason := changed_reason(head, nn.Linear, head.weight.device)) is not None:
        raise ValueError(f"the output head of {name} must be called: {reason}")
    head.__class__ = _PromisingHead
    try:
        logits = forward(**inputs).logits
    finally:
        head.__class__ = was
    if not isinstance(logits, PromisedLogits) or logits.scale_and_cap() is None:
        raise ValueError(f"{name} does more with its logits than to scale and cap them")
    return logits


def why_not(model: PreTrainedModel) -> str | None:
    """Why the loss of a model cannot come from ``linear_cross_entropy``, or None."""
    head = head_of(model)
    if head is None:
        return "it has no output head that is a torch.nn.Linear"
    return why_own(model) or changed_reason(head, nn.Linear, head.weight.device)


def why_own(model: PreTrainedModel) -> str | None:
    """Why the loss of a model is its own, also that of packed rows, or None."""
    if "labels" not in inspect.signature(model.forward).parameters:
        return "its forward takes no labels"
    used = inspect.unwrap(type(model).forward).__code__.co_names
    if "loss_function" not in used and "super" not in used:
        return "its forward has a loss of its own"
    if model.loss_function is not ForCausalLMLoss:
        return f"its loss is {getattr(model.loss_function, '__name__', model.loss_function)}"
    return None


def argument(name: str, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a model got for an argument, by name or by position; None without."""
    if name in kwargs:
        return kwargs[name]
    return dict(zip(inspect.signature(model.forward).parameters, args, strict=False)).get(name)
