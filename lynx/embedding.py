"""The rows that enter the decoder: embeddings of tokens, and vision tokens in the places of images."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lynx_kernels import children, pack_embeddings


def embed(
    table: nn.Module, input_ids: Tensor, is_image: Tensor, vision_tokens: Tensor | None, stand_in: int | None
) -> Tensor:
    """Embeddings (B, L, width) of ``input_ids``, the vision tokens in order where ``is_image``.

    One kernel does it with the weight of a table that nobody changed. A table with hooks (NEFTune's noise, for one),
    LoRA or another class is called with all rows of the batch, and what it returns for images is not used.

    Args:
        table: the decoder's embedding.
        input_ids: (B, L) int64.
        is_image: (B, L) bool, as many as there are vision tokens.
        vision_tokens: (M, width), or None for none.
        stand_in: the token that a called table sees in place of an image's, which it may not know; 0 if None.
    """
    reason = children.changed_embedding_reason(table, input_ids.device)
    if reason is None:
        weight, _ = children.weight_and_bias(table)
        if vision_tokens is None:
            vision_tokens = weight.new_empty(0, weight.shape[1])
        packed = pack_embeddings(input_ids.reshape(-1), weight, vision_tokens, _vision_index(is_image).int())
        return packed.view(*input_ids.shape, -1)
    children.log_once(table, {"the embedding table": reason})
    embeddings = table(torch.where(is_image, stand_in or 0, input_ids))
    if vision_tokens is None:
        return embeddings
    # The index -1, "no vision token", takes a last row of zeros. So there is a gradient even without vision tokens, as
    # DDP wants it.
    vision_tokens = F.pad(vision_tokens, (0, 0, 0, 1)).to(embeddings)
    is_image = is_image.to(embeddings.device)
    rows = vision_tokens[_vision_index(is_image)].view_as(embeddings)
    return torch.where(is_image[..., None], rows, embeddings)


def _vision_index(is_image: Tensor) -> Tensor:
    """(B * L,) the number of the vision token that stands in each place, in order; -1 where a token of text stands."""
    flat = is_image.reshape(-1)
    return torch.where(flat, flat.cumsum(0) - 1, -1)
