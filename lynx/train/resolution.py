"""Another picture size for a model: the vision tower's position embedding is resized."""

from torch import nn

from lynx.media import tower
from lynx.model import LynxForConditionalGeneration
from lynx.processor import LynxProcessor


def set_resolution(model: LynxForConditionalGeneration, processor: LynxProcessor, size: int) -> None:
    """Make a model and its processor take pictures of ``size`` x ``size`` pixels.

    Raises:
        ValueError: ``size`` is no multiple of the patch size, or the tower has another architecture and another size.
    """
    config = model.config.vision_config
    if config.image_size == size:
        return
    if not tower.takes_patches(config):
        raise ValueError(f"{config.model_type} takes pictures of {config.image_size} pixels, not of {size}")
    if size < config.patch_size or size % config.patch_size:
        raise ValueError(f"resolution {size} is no multiple of the vision tower's patches of {config.patch_size}")
    embeddings = model.vision_tower.embeddings
    position, patches = embeddings.position_embedding, (size // config.patch_size) ** 2
    resized = tower.resized_positions(position.detach(), patches + 1).to(position.dtype)
    embeddings.position_embedding = nn.Parameter(resized, requires_grad=position.requires_grad)
    embeddings.image_size, embeddings.num_patches, embeddings.num_positions = size, patches, patches + 1
    config.image_size = size
    model.vision_tower.config.image_size = size
    processor.image_processor.size = size
    processor.tokens_per_frame = tower.tokens_per_frame(config)
