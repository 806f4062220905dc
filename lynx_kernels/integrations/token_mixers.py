"""Packed rows in layers that mix tokens without being attention: linear attention, state spaces, convolutions.

Such a layer reads a row from left to right. So each path of the layout, from a root to a leaf, becomes a row of its
own, with padding behind it, which no token before it sees. What branches share is computed there once for each.
"""

import inspect
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lynx_kernels.integrations.attention_mask import AttentionMask
from lynx_kernels.layout import PackedLayout

KINDS = {"linear_attention", "conv"}  # values of layer_types in configurations
_PATHS = "packed_paths"  # among the keyword arguments that models of transformers pass down to their layers
_TAKES = {"hidden_states", "cache_params", "past_key_values", "attention_mask", "conv_mask", "kwargs"}
_OF_THE_ROW = {"seq_idx", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "position_ids"}


@dataclass(frozen=True)
class Paths:
    """The paths of a packed row as padded rows.

    Attributes:
        rows: tensors (P, L) of tokens, of paths with similar lengths, so that padding is less than the paths.
        back: (T,) where each token stands in all of them, end to end; of a token on several paths, one place.
    """

    rows: tuple[Tensor, ...]
    back: Tensor


def paths_of(layout: PackedLayout) -> Paths:
    """Reads the layout on the host."""
    device = layout.runs.device
    last, total = layout.tokens[2].cpu().long(), layout.num_tokens
    token = torch.arange(total)
    paths, root = [], 0
    for end in ((last == token + 1).nonzero()[:, 0] + 1).tolist():  # behind each leaf
        while last[root] < end:
            root = int(last[root])  # the next tree
        paths.append(root + (last[root:end] >= end).nonzero()[:, 0])
    paths.sort(key=len)
    rows, back, start = [], torch.zeros(total, dtype=torch.int64), 0
    while paths:
        group = [each for each in paths if 2 * len(each) > len(paths[-1])]
        del paths[-len(group) :]
        index = torch.zeros(len(group), len(group[-1]), dtype=torch.int64)
        for number, path in enumerate(group):
            index[number, : len(path)] = path
            back[path] = start + number * index.shape[1] + torch.arange(len(path))
        rows.append(index.to(device))
        start += index.numel()
    return Paths(tuple(rows), back.to(device))


def takes_rows(layer: nn.Module) -> bool:
    """Whether a layer's rows may become other rows: it gets nothing else of their tokens."""
    parameters = inspect.signature(layer.forward).parameters
    return set(parameters) <= _TAKES and next(iter(parameters)) == "hidden_states"


class TokenMixers:
    """Hooks on a model and on its layers that mix tokens, for packed rows."""

    def __init__(self, model: nn.Module, layers: list[nn.Module]) -> None:
        self.handles = [
            model.register_forward_pre_hook(self._before_model, with_kwargs=True),
            model.register_forward_hook(self._after_model, always_call=True),
        ]
        for layer in layers:
            self.handles.append(layer.register_forward_pre_hook(self._before, with_kwargs=True))
            self.handles.append(layer.register_forward_hook(self._after, always_call=True))
        self._is_packed = False  # while forward runs on a packed row
        self._waiting: dict[nn.Module, tuple[Paths, Tensor, dict[str, Any]]] = {}  # while a layer runs

    def _before_model(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        mask = kwargs.get("attention_mask")
        if not isinstance(mask, AttentionMask) or not mask.is_packed or torch.compiler.is_compiling():
            return None
        assert mask.layout is not None
        self._is_packed = True
        return args, {**kwargs, "attention_mask": replace(mask, is_split=True), _PATHS: paths_of(mask.layout)}

    def _after_model(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._is_packed = False

    def _before(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = {**dict(zip(inspect.signature(layer.forward).parameters, args, strict=False)), **kwargs}
        paths, hidden = given.pop(_PATHS, None), given.pop("hidden_states")
        if paths is None:
            if self._is_packed:
                raise ValueError(
                    f"{type(layer).__name__} would mix the samples of a packed row: its decoder layer does not pass it "
                    f"what says where they are; pass padded rows"
                )
            return None
        # The cache is of the packed row, and so is what says where its samples are.
        kept = {name: each for name, each in given.items() if name not in _TAKES | _OF_THE_ROW}
        self._waiting[layer] = paths, hidden, kept
        return (hidden[0][paths.rows[0]],), kept

    def _after(self, layer: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if layer not in self._waiting:
            return output
        paths, hidden, kept = self._waiting.pop(layer)
        if output is None:  # it has failed
            return None
        outputs = [output, *(layer.forward(hidden[0][rows], **kept) for rows in paths.rows[1:])]
        if not all(isinstance(each, Tensor) for each in outputs):
            raise ValueError(
                f"{type(layer).__name__} returns more than hidden states; pass padded rows, not packed ones"
            )
        return torch.cat([each.flatten(0, 1) for each in outputs])[paths.back][None]
