"""The cache of generation, which stores once what rows share.

Beams of one prompt, and questions about one image, have the same first keys and values. These are the *root*, computed
and stored once however many rows read it. What a row has for itself, the rest of its prompt and its new tokens, is its
*branch*. A prompt is one packed row of roots and branches. ``prefix_attention`` reads the prompt, and
``prefix_attention_decode`` the new tokens.

Beam search moves branches and ``branch_to_root``, never a root. If rows of one root have several beams each, the rest
of a row's prompt, its question, is stored for each beam. The root holds the image.
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
    """Keys and values of roots (layers, R, Lr, Hkv, D) and of branches (layers, B, Lb, Hkv, D).

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
        self._roots: list[range] = []  # tokens of the packed row
        self._branches: list[tuple[int, range]] = []  # a root's number, tokens
        start = 0
        for number, (root, branches) in enumerate(groups):
            self._roots.append(range(start, start + root))
            start += root
            for length in branches:
                if root + length == 0:
                    raise ValueError(f"row {len(self._branches)} of the prompt has no token")
                self._branches.append((number, range(start, start + length)))
                start += length

    @property
    def last_tokens(self) -> Tensor:
        """(rows,): the index in the packed row of the last token of each row."""
        ends = [(branch or self._roots[root])[-1] for root, branch in self._branches]
        return torch.tensor(ends, device=self.layout.runs.device)

    def read(self, rows: int, length: int) -> dict[str, Any]:
        """What a decoder is called with to read the prompt, in place of ``rows`` rows of ``length`` tokens.

        Raises:
            ValueError: the rows are not a multiple of the prompt's rows, or not as long as the prompt.
        """
        repeats, rest = divmod(rows, len(self._branches))
        if rest or length != self._prompt_length:
            raise ValueError(
                f"the input has {rows} rows of {length} tokens, but the cache's unread prompt needs a multiple of "
                f"{len(self._branches)} rows of {self._prompt_length}; pass past_key_values=DynamicCache() to generate"
            )
        device = self.layout.runs.device
        branches = [each for each in self._branches for _ in range(repeats)]
        self._root_tokens, self._root_slots, self.root_lengths = _slots(self._roots, device)
        self._branch_tokens, self._branch_slots, self.branch_lengths = _slots([each for _, each in branches], device)
        self.branch_to_root = torch.tensor([root for root, _ in branches], device=device)
        self._rows = torch.arange(rows, device=device)[:, None]
        self._filled = max(len(each) for _, each in branches)  # tokens of the longest branch; a bound where static
        self._capacity = _in_blocks(self._filled + (self._max_new_tokens or 1))
        if self._static is not None:
            self._filled = self._capacity
            for name in ("root_lengths", "branch_lengths", "branch_to_root", "_rows"):
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
            "position_ids": self.root_lengths[self.branch_to_root][:, None] + self._new_slots,
            "shared_roots": SharedRoots(
                self.root_keys, self.root_values, self.branch_to_root, self.root_lengths, self.branch_lengths
            ),
        }

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
                self.root_keys, self.branch_keys = self._allocate("keys", keys)
                self.root_values, self.branch_values = self._allocate("values", values)
            self._allocated += 1
            for roots, branches, new in (
                (self.root_keys, self.branch_keys, keys[0]),
                (self.root_values, self.branch_values, values[0]),
            ):
                roots[layer_idx].index_put_(self._root_slots, new[self._root_tokens])
                branches[layer_idx].index_put_(self._branch_slots, new[self._branch_tokens])
            return key_states, value_states
        slots = (self._rows, self._new_slots)
        branch_keys = self.branch_keys[layer_idx].index_put_(slots, keys)
        branch_values = self.branch_values[layer_idx].index_put_(slots, values)
        return branch_keys.transpose(1, 2), branch_values.transpose(1, 2)

    def _allocate(self, name: str, new: Tensor) -> tuple[Tensor, Tensor]:
        heads = new.shape[2:]
        longest = max(len(root) for root in self._roots)
        branches = (self._num_layers, len(self._rows), self._capacity, *heads)
        if self._static is None:
            return new.new_empty(self._num_layers, len(self._roots), longest, *heads), new.new_empty(branches)
        roots = (self._num_layers, len(self._roots), _in_blocks(longest), *heads)  # so prompts of a similar length fit
        return self._static.empty(f"root_{name}", new, roots), self._static.empty(f"branch_{name}", new, branches)

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
        beam_idx = beam_idx.to(self.branch_to_root.device)
        for index in (self.branch_to_root, self.branch_lengths):
            index.copy_(index[beam_idx])
        for branches in (self.branch_keys, self.branch_values):
            branches[:, :, : self._filled] = branches[:, beam_idx, : self._filled]

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows ``indices``, as numbers or as a (rows,) bool mask, in this order."""
        self.branch_to_root, self.branch_lengths = self.branch_to_root[indices], self.branch_lengths[indices]
        self.branch_keys, self.branch_values = self.branch_keys[:, indices], self.branch_values[:, indices]
        self._rows = torch.arange(len(self.branch_to_root), device=self._rows.device)[:, None]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row ``repeats`` times; roots are still stored once."""
        self.batch_select_indices(torch.arange(self.batch_size, device=self._rows.device).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest ``-tokens_to_remove`` tokens of each row; a positive number is the length to keep.

        Raises:
            ValueError: a branch is shorter than that; tokens of a root are never removed.
        """
        remove = max(0, self.get_seq_length() - tokens_to_remove) if tokens_to_remove > 0 else -tokens_to_remove
        shortest = int(self.branch_lengths.min())
        if remove > shortest:
            raise ValueError(f"cannot remove {remove} tokens of each row: one row has only {shortest} after its root")
        self.branch_lengths -= remove
        if not self.is_compileable:
            self._filled -= remove

    def reset(self) -> None:
        """Raise ValueError: the prompt cannot be read again."""
        raise ValueError("a SharedRootCache is for one prompt; make a new one for another generation")

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens of the longest row, root and branch together; 0 until the prompt is read. Reads the device."""
        if self.prompt is not None:
            return 0
        return int((self.root_lengths[self.branch_to_root] + self.branch_lengths).max())

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Length and offset of the keys, for transformers' masks; the forward pass over this cache needs none."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """How long rows can be; -1 where branches grow."""
        return self.root_keys.shape[2] + self._capacity if self.is_compileable else -1

    def __len__(self) -> int:
        return self._num_layers

    @property
    def batch_size(self) -> int:
        """The number of rows, B."""
        return len(self._branches) if self.prompt is not None else len(self._rows)

    @property
    def is_compileable(self) -> bool:
        """Whether shapes are static."""
        return self._max_new_tokens is not None

    @property
    def is_initialized(self) -> bool:
        """Whether the prompt has been read."""
        return self._allocated == self._num_layers


def _slots(ranges: Sequence[range], device: torch.device) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor]:
    """Where ranges of tokens go if each range is a row.

    Returns:
        The tokens of all ranges; their rows and columns; the lengths of the ranges.
    """
    tokens = [token for each in ranges for token in each]
    rows = [row for row, each in enumerate(ranges) for _ in each]
    columns = [column for each in ranges for column in range(len(each))]
    lengths = torch.tensor([len(each) for each in ranges], device=device)
    all_three = torch.tensor([tokens, rows, columns], dtype=torch.int64, device=device)
    return all_three[0], (all_three[1], all_three[2]), lengths


def _in_blocks(tokens: int) -> int:
    return -(-tokens // BLOCK) * BLOCK
