"""The cache of generation, which stores once what rows share.

Beams of one prompt, and questions about one image, have the same first keys and values. A prompt is one packed row of
roots, which several rows of the batch begin with, and the rest of each row's prompt. ``prefix_attention`` reads it, and
its keys and values are stored as they stand, once. A row reads one or two ranges of them, its root and its own rest,
however many beams of that row there are. Its new tokens, which ``prefix_attention_decode`` reads, are its *branch*.

Beam search moves branches and ``ranges``, never the prompt's keys.
"""

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from lynx_kernels import PackedLayout
from lynx_kernels.integrations.transformers import SharedRoots, packed_mask

BLOCK = 64  # tokens that branches grow by, so that they do not grow at every token


class StaticTensors:
    """The tensors of caches of static shapes, reused from one generation to the next.

    They keep their addresses, so that CUDA graphs which write to them can be replayed. While a cache is alive, another
    one gets tensors of its own.
    """

    def __init__(self) -> None:
        self._tensors: dict[str, Tensor] = {}
        self._owner: weakref.ref[Cache] | None = None

    def __reduce__(self) -> tuple:
        return StaticTensors, ()  # a copied or saved model begins without tensors

    def lend(self, owner: Cache) -> "StaticTensors":
        """These tensors if no other cache uses them, or else new ones."""
        if self._owner is not None and self._owner() is not None:
            return StaticTensors()
        self._owner = weakref.ref(owner)
        return self

    def empty(self, name: str, like: Tensor, shape: Sequence[int]) -> Tensor:
        """The tensor of this name, made anew if its shape, dtype or device changed."""
        old = self._tensors.get(name)
        if old is None or (old.shape, old.dtype, old.device) != (torch.Size(shape), like.dtype, like.device):
            self._tensors[name] = like.new_empty(shape)
            if not torch.compiler.is_compiling():
                # Unguarded: tensors at other addresses must not cause a recompilation.
                torch._dynamo.mark_static_address(self._tensors[name], guard=False)
        return self._tensors[name]

    def filled(self, name: str, values: Tensor) -> Tensor:
        """The tensor of this name, filled with these values."""
        return self.empty(name, values, values.shape).copy_(values)


class SharedRootCache(Cache):
    """Keys and values of the prompt (layers, K, Hkv, D) and of new tokens (layers, B, Lb, Hkv, D).

    It begins with an unread prompt. The model's first forward pass with it reads ``prompt`` in place of its own inputs.
    These may have each row of the prompt several times: for its beams, or for several answers.

    Args:
        prompt: (1, T, width) embeddings of the packed row.
        groups: ``(root length, [branch length, ...])`` of each group of the row, in tokens. A branch, which may be
            empty, is a row of the batch.
        num_layers: of the decoder.
        root_is_causal: as in ``PackedLayout``.
        prompt_length: how many tokens of a row stand for the prompt in the first forward pass. Another number is an
            error, as some ways of decoding pass more than a prompt.
        max_new_tokens: if given, shapes are static: branches have room for so many more tokens, and on GPUs the steps
            of ``generate`` are compiled. Otherwise branches grow.
        static_tensors: of earlier generations with static shapes, reused where they fit.

    Raises:
        ValueError: a row has no tokens, or ``prompt`` does not have as many tokens as the groups.
    """

    def __init__(
        self,
        prompt: Tensor,
        groups: Sequence[tuple[int, Sequence[int]]],
        *,
        num_layers: int,
        root_is_causal: bool = True,
        prompt_length: int = 1,
        max_new_tokens: int | None = None,
        static_tensors: StaticTensors | None = None,
    ):
        super().__init__(layers=[])  # all layers share tensors, so that beams move in one step
        self.layout = PackedLayout.from_groups(groups, root_is_causal=root_is_causal, device=prompt.device)
        if tuple(prompt.shape[:2]) != (1, self.layout.num_tokens):
            raise ValueError(f"prompt is {tuple(prompt.shape)}, but its groups hold {self.layout.num_tokens} tokens")
        self.prompt: Tensor | None = prompt
        self._num_layers = num_layers
        self._prompt_length = prompt_length
        self._max_new_tokens = max_new_tokens
        self._static = None if max_new_tokens is None else (static_tensors or StaticTensors()).lend(self)
        self._allocated = 0  # layers that have read the prompt
        self._read: list[tuple[range, range]] = []  # of each row, the tokens of its root and of its rest
        start = 0
        for root_length, branches in groups:
            root = range(start, start + root_length)
            start += root_length
            for length in branches:
                if root_length + length == 0:
                    raise ValueError(f"row {len(self._read)} of the prompt has no token")
                self._read.append((root, range(start, start + length)))
                start += length

    @property
    def last_tokens(self) -> Tensor:
        """(rows,): the index in the packed row of the last token of each row."""
        ends = [(rest or root)[-1] for root, rest in self._read]
        return torch.tensor(ends, device=self.layout.runs.device)

    def read(self, rows: int, length: int) -> dict[str, Any]:
        """What a decoder is called with to read the prompt, in place of ``rows`` rows of ``length`` tokens.

        Raises:
            ValueError: the rows are not a multiple of the prompt's rows, or not as long as the prompt.
        """
        repeats, rest = divmod(rows, len(self._read))
        if rest or length != self._prompt_length:
            raise ValueError(
                f"the input has {rows} rows of {length} tokens, but the cache's unread prompt needs a multiple of "
                f"{len(self._read)} rows of {self._prompt_length}; pass past_key_values=DynamicCache() to generate"
            )
        device = self.layout.runs.device
        bounds = torch.tensor([[[each.start, each.stop] for each in both] for both in self._read], dtype=torch.int32)
        if not any(rest for _, rest in self._read):
            bounds = bounds[:, :1]
        self.ranges = bounds.to(device).repeat_interleave(repeats, 0)  # (B, 1 or 2, 2)
        self.branch_lengths = torch.zeros(rows, dtype=torch.int64, device=device)
        self._rows = torch.arange(rows, device=device)[:, None]
        self._filled = 0  # tokens of a branch; a bound where static
        self._capacity = _in_blocks(self._max_new_tokens or 1)
        if self._static is not None:
            self._filled = self._capacity
            for name in ("ranges", "branch_lengths", "_rows"):
                setattr(self, name, self._static.filled(name, getattr(self, name)))
        prompt, self.prompt = self.prompt, None
        return {
            "inputs_embeds": prompt,
            "attention_mask": packed_mask(self.layout),
            "position_ids": self.layout.position_ids[None],
            "layout": self.layout,
        }

    def advance(self, length: int) -> dict[str, Any]:
        """What a decoder is called with, beside the embeddings, to read the next ``length`` tokens of each row."""
        if not self.is_compileable:
            self._filled += length
            if self._filled > self._capacity:
                self._grow(_in_blocks(self._filled))
        self.branch_lengths += length
        self._new_slots = self.branch_lengths[:, None] + torch.arange(-length, 0, device=self.branch_lengths.device)
        return {
            "attention_mask": packed_mask(self.layout),
            "position_ids": self._prompt_lengths[:, None] + self._new_slots,
            "shared_roots": SharedRoots(self.shared_keys, self.shared_values, self.ranges, self.branch_lengths),
        }

    @property
    def lengths(self) -> Tensor:
        """(rows,): the tokens of each row, its prompt included."""
        return self._prompt_lengths + self.branch_lengths

    @property
    def _prompt_lengths(self) -> Tensor:
        return (self.ranges[..., 1] - self.ranges[..., 0]).sum(1)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store a layer's new keys and values.

        Args:
            key_states, value_states: (1, Hkv, T, D) of the prompt, then (B, Hkv, length, D).

        Returns:
            For the prompt, its own keys and values; then those of the branches, (B, Hkv, Lb, D).
        """
        keys, values = key_states.transpose(1, 2), value_states.transpose(1, 2)
        if self._allocated < self._num_layers:
            if layer_idx == 0:
                self.shared_keys, self.branch_keys = self._allocate("keys", keys)
                self.shared_values, self.branch_values = self._allocate("values", values)
            self._allocated += 1
            for shared, new in ((self.shared_keys, keys[0]), (self.shared_values, values[0])):
                shared[layer_idx, : len(new)] = new
            return key_states, value_states
        slots = (self._rows, self._new_slots)
        branch_keys = self.branch_keys[layer_idx].index_put_(slots, keys)
        branch_values = self.branch_values[layer_idx].index_put_(slots, values)
        return branch_keys.transpose(1, 2), branch_values.transpose(1, 2)

    def _allocate(self, name: str, new: Tensor) -> tuple[Tensor, Tensor]:
        tokens, *heads = new.shape[1:]
        branches = (self._num_layers, len(self._rows), self._capacity, *heads)
        if self._static is None:
            return new.new_empty(self._num_layers, tokens, *heads), new.new_empty(branches)
        shared = (self._num_layers, _in_blocks(tokens), *heads)  # so prompts of a similar length fit
        return self._static.empty(f"shared_{name}", new, shared), self._static.empty(f"branch_{name}", new, branches)

    def _grow(self, capacity: int) -> None:
        old = self._capacity
        self._capacity = capacity
        for name in ("branch_keys", "branch_values"):
            before = getattr(self, name)
            after = before.new_empty(*before.shape[:2], capacity, *before.shape[3:])
            after[:, :, :old] = before
            setattr(self, name, after)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i continues what was row ``beam_idx[i]``; in place, so that addresses stay."""
        self.holds_beams = True
        beam_idx = beam_idx.to(self.ranges.device)
        for index in (self.ranges, self.branch_lengths):
            index.copy_(index[beam_idx])
        for branches in (self.branch_keys, self.branch_values):
            branches[:, :, : self._filled] = branches[:, beam_idx, : self._filled]

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows ``indices``, as numbers or as a (rows,) bool mask, in this order."""
        self.ranges, self.branch_lengths = self.ranges[indices], self.branch_lengths[indices]
        self.branch_keys, self.branch_values = self.branch_keys[:, indices], self.branch_values[:, indices]
        self._rows = torch.arange(len(self.ranges), device=self._rows.device)[:, None]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row ``repeats`` times; the prompt is still stored once."""
        self.batch_select_indices(torch.arange(self.batch_size, device=self._rows.device).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest ``-tokens_to_remove`` tokens of each row; a positive number is the length to keep.

        Raises:
            ValueError: a branch is shorter than that; tokens of the prompt are never removed.
        """
        remove = max(0, self.get_seq_length() - tokens_to_remove) if tokens_to_remove > 0 else -tokens_to_remove
        shortest = int(self.branch_lengths.min())
        if remove > shortest:
            raise ValueError(f"cannot remove {remove} tokens of each row: one row has only {shortest} after its prompt")
        self.branch_lengths -= remove
        if not self.is_compileable:
            self._filled -= remove

    def reset(self) -> None:
        """Raise ValueError: the prompt cannot be read again."""
        raise ValueError("a SharedRootCache is for one prompt; make a new one for another generation")

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens of the longest row, its prompt included; 0 until the prompt is read. Reads the device."""
        if self.prompt is not None:
            return 0
        return int(self.lengths.max())

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Length and offset of the keys, for transformers' masks; the forward pass over this cache needs none."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """How long rows can be; -1 where branches grow."""
        return self.shared_keys.shape[1] + self._capacity if self.is_compileable else -1

    def __len__(self) -> int:
        return self._num_layers

    @property
    def batch_size(self) -> int:
        """The number of rows, B."""
        return len(self._read) if self.prompt is not None else len(self._rows)

    @property
    def is_compileable(self) -> bool:
        """Whether shapes are static."""
        return self._max_new_tokens is not None

    @property
    def is_initialized(self) -> bool:
        """Whether the prompt has been read."""
        return self._allocated == self._num_layers


def _in_blocks(tokens: int) -> int:
    return -(-tokens // BLOCK) * BLOCK
