"""Another image size for a model: the vision tower's position embedding is resized."""

from torch import nn

from lynx.media import tower
from lynx.model import LynxForConditionalGeneration
from lynx.processor import LynxProcessor


def set_resolution(model: LynxForConditionalGeneration, processor: LynxProcessor, size: int) -> None:
    """Make a model and its processor take images of ``size`` x ``size`` pixels.

    Raises:
        ValueError: ``size`` is not a multiple of the patch size, or the tower's size cannot change, for its
            architecture is not EVA's.
    """
    config = model.config.vision_config
    if config.image_size == size:
        return
    if not tower.takes_patches(config):
        raise ValueError(
            f"resolution is {size}, but a {config.model_type} takes images of {config.image_size} pixels, which cannot "
            "be changed"
        )
    if size < config.patch_size or size % config.patch_size:
        raise ValueError(
            f"resolution is {size}, which is not a multiple of the vision tower's patch_size, {config.patch_size}"
        )
    embeddings = model.vision_tower.embeddings
    position, patches = embeddings.position_embedding, (size // config.patch_size) ** 2
    resized = tower.resized_positions(position.detach(), patches + 1).to(position.dtype)
    embeddings.position_embedding = nn.Parameter(resized, requires_grad=position.requires_grad)
    embeddings.image_size, embeddings.num_patches, embeddings.num_positions = size, patches, patches + 1
    config.image_size = size
    model.vision_tower.config.image_size = size
    processor.image_processor.size = size
    processor.tokens_per_frame = tower.tokens_per_frame(config)
