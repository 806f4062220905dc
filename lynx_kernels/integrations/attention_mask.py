"""The masks of ``attn_implementation="lynx"``, which only our attention function can read.

A model outside transformers' AttentionInterface asks for a mask and adds it to scores of its own. With a tensor, the
result would be silently wrong where the shapes happen to fit. So the mask is not a tensor. It has the shape of the mask
that it stands for, moves between devices and can be cropped, as models do on the way to their layers. Any other use is
an error that names the model.
"""

from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

import torch
from torch import Tensor

from lynx_kernels.layout import PackedLayout


class ForeignAttentionError(ValueError, AttributeError):
    """A model computes with our mask itself. Also an AttributeError, so that ``hasattr`` works."""


@dataclass(frozen=True, eq=False)
class AttentionMask:
    """Which keys each query sees, (B, 1, Q, K): given by a layout, by a dense mask, or by neither.

    Attributes:
        model: the name of the model, for errors.
        shape: (B, 1, Q, K), or (1, 1, 0, 0) for ``packed_mask``.
        device: of the tokens.
        is_causal: without ``seen``, and without ``layout`` or padding: query i sees keys up to i if true, all if false.
        layout: of the B * Q tokens, if queries and keys are the same tokens.
        seen: (B, 1, Q, K) bool, true where a query sees a key.
        is_plain: with ``layout``: whether it is known that ``is_causal`` says the same.
        has_pattern: whether the pattern of the model is in it.
        is_packed: whether ``packed_mask`` made it. Then ``layout`` is that of one row, whatever ``shape`` is.
        images: which images of the row each token has in its own sample, (T, 2): the first one and the end of them.
        has_samples: whether positions that start again said so, which layers without attention do not know.
        unsupported_reason: why a layer that uses the mask is refused; layers that do not are none the worse.
        is_split: whether layers that mix tokens without being attention get the samples of the row as rows.
    """

    model: str
    shape: torch.Size
    device: torch.device
    is_causal: bool = False
    layout: PackedLayout | None = None
    seen: Tensor | None = None
    is_plain: bool = False
    has_pattern: bool = False
    is_packed: bool = False
    images: Tensor | None = None
    has_samples: bool = False
    unsupported_reason: str | None = None
    is_split: bool = False
    _dense: list[Tensor] = field(default_factory=list)  # the result of dense(), for all layers

    dtype = torch.bool
    ndim = 4
    requires_grad = False

    def dim(self) -> int:
        return 4

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def dense(self) -> Tensor:
        """(B, 1, Q, K) bool, true where a query sees a key."""
        if self.seen is not None:
            return self.seen
        if self._dense:
            return self._dense[0]
        rows, _, queries, keys = self.shape
        query = torch.arange(queries, device=self.device)[:, None]
        if self.layout is None:
            key = torch.arange(keys, device=self.device)
            seen = (key <= query if self.is_causal else key >= 0).expand(rows, 1, queries, keys)
        else:
            seen = self.layout.visible(torch.arange(rows * queries, device=self.device).view(rows, queries))[:, None]
        if not torch.compiler.is_compiling():
            self._dense.append(seen)
        return seen

    def check(self) -> None:
        """Raise ValueError if no layer can use it."""
        if self.unsupported_reason is not None:
            raise ValueError(self.unsupported_reason)

    def for_sdpa(self) -> tuple[Tensor | None, bool]:
        """``attn_mask`` and ``is_causal`` of scaled_dot_product_attention: no mask if ``is_causal`` is enough."""
        self.check()
        if self.seen is None and (self.layout is None or self.is_plain):
            return None, self.is_causal
        return self.dense(), False

    def to(self, device: Any = None, dtype: torch.dtype | None = None, **_options: Any) -> "AttentionMask":
        """The mask on another device. Another dtype than bool is an error: it would be for foreign arithmetic."""
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        if isinstance(device, Tensor) or dtype not in (None, torch.bool):
            self.refuse("to another dtype")
        if device is None or torch.device(device) == self.device:
            return self
        return replace(
            self,
            device=torch.device(device),
            layout=None if self.layout is None else self.layout.to(device),
            seen=None if self.seen is None else self.seen.to(device),
            _dense=[],
        )

    def contiguous(self) -> "AttentionMask":
        return self

    def __getitem__(self, index: Any) -> "AttentionMask":
        """The mask for fewer rows, queries or keys: up to four slices. Another index is an error."""
        parts = list(index) if isinstance(index, tuple) else [index]
        if sum(part is Ellipsis for part in parts) == 1:
            where = parts.index(Ellipsis)
            parts[where : where + 1] = [slice(None)] * (5 - len(parts))
        if len(parts) > 4 or not all(isinstance(part, slice) for part in parts):
            self.refuse("[...]")
        if all(_takes_all(part, size) for part, size in zip(parts, self.shape, strict=False)):
            return self
        seen = self.dense()[tuple(parts)]
        return replace(self, shape=seen.shape, layout=None, seen=seen, _dense=[])

    def refuse(self, operation: str) -> NoReturn:
        if self.is_packed:
            raise ForeignAttentionError(
                f"{self.model} changes packed_mask(layout) or computes with it itself ({operation}), so it cannot take "
                f'packed rows: only attn_implementation="lynx" can read this mask; pass padded rows'
            )
        raise ForeignAttentionError(
            f"{self.model} computes with its attention mask itself ({operation}), but only the attention function of "
            f'attn_implementation="lynx" can read this mask; load {self.model} with '
            f'attn_implementation="sdpa" or "eager"; after apply(), undo it and apply it with attention=False'
        )

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        """PyTorch calls this in place of any of its functions that gets the mask as an argument."""
        flat = [*args, *(kwargs or {}).values()]
        flat += [each for argument in flat if isinstance(argument, (list, tuple)) for each in argument]
        found = [each for each in flat if isinstance(each, cls)]
        mask = found[0] if found else cls("this model", torch.Size(), torch.device("cpu"))  # deep in an argument
        mask.refuse(getattr(func, "__name__", str(func)))

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)
        self.refuse(name)

    def __eq__(self, other: object) -> Any:  # `mask == 0` is arithmetic, `mask in [...]` is not
        if isinstance(other, (int, float, Tensor)):
            self.refuse("==")
        return self is other

    __hash__ = object.__hash__


def _takes_all(part: slice, size: int) -> bool:
    return part.start in (None, 0) and part.step in (None, 1) and (part.stop is None or part.stop >= size)


def _refusing(operation: str) -> Any:
    def refused(self: AttentionMask, *_arguments: Any) -> NoReturn:
        self.refuse(operation)

    return refused


# Python looks operators up in the class, and does not call __getattr__ for them.
for _name in (
    *(f"__{prefix}{name}__" for name in ("add", "sub", "mul", "truediv", "and", "or", "xor") for prefix in ("", "r")),
    *("__neg__", "__invert__", "__lt__", "__le__", "__gt__", "__ge__", "__len__", "__iter__", "__contains__"),
    *("__float__", "__int__", "__array__", "__setitem__"),
):
    setattr(AttentionMask, _name, _refusing(_name.strip("_")))
