"""The arguments of pack_embeddings's operators and implementations.

T rows, V tokens in the table, M vision rows, width d.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class PackEmbeddingsCall(NamedTuple):
    """The forward call."""

    token_ids: Tensor  # (T,) int64
    embedding: Tensor  # (V, d)
    vision: Tensor  # (M, d)
    vision_index: Tensor  # (T,) int32

    @property
    def device(self) -> torch.device:
        """The device it runs on."""
        return self.embedding.device


class PackEmbeddingsBackwardCall(NamedTuple):
    """The backward call."""

    grad: Tensor  # (T, d), in the dtype of embedding
    token_ids: Tensor  # (T,)
    vision_index: Tensor  # (T,)
    num_embeddings: int
    num_vision: int
    vision_dtype: torch.dtype
    needs: list[bool]  # which of embedding and vision need a gradient
