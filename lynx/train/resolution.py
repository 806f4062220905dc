"""Another picture size for a model: the vision tower's position embedding is resized."""

import torch
from torch import nn
from torch.nn import functional as F

from lynx import vision
from lynx.model import LynxForConditionalGeneration
from lynx.processor import LynxProcessor


def set_resolution(model: LynxForConditionalGeneration, processor: LynxProcessor, size: int) -> None:
    """Make a model and its processor take pictures of ``size`` x ``size`` pixels.

    The position embedding of EVA's architecture is a grid of patches behind the class token's; the grid is resized
    bicubically, as the paper does between its two pretraining phases, and the class token's stays.

    Raises:
        ValueError: ``size`` is no multiple of the patch size, or the tower has another architecture and another size.
    """
    config = model.config.vision_config
    if config.image_size == size:
        return
    if not vision.takes_patches(config):
        raise ValueError(f"{config.model_type} takes pictures of {config.image_size} pixels, not of {size}")
    if size < config.patch_size or size % config.patch_size:
        raise ValueError(f"resolution {size} is no multiple of the vision tower's patches of {config.patch_size}")
    embeddings = model.vision_tower.embeddings
    old, new = config.image_size // config.patch_size, size // config.patch_size
    position = embeddings.position_embedding
    with torch.no_grad():
        grid = position[:, 1:].unflatten(1, (old, old)).permute(0, 3, 1, 2).float()  # [1, width, old, old]
        grid = F.interpolate(grid, (new, new), mode="bicubic", align_corners=False)
        grid = grid.flatten(2).transpose(1, 2).to(position.dtype)  # [1, new * new, width]
        resized = torch.cat([position[:, :1], grid], 1)
    embeddings.position_embedding = nn.Parameter(resized, requires_grad=position.requires_grad)
    embeddings.image_size, embeddings.num_patches, embeddings.num_positions = size, new**2, new**2 + 1
    config.image_size = size
    model.vision_tower.config.image_size = size
    processor.image_processor.size = size
    processor.tokens_per_frame = vision.tokens_per_frame(config)
