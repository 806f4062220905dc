"""The vision tower: any vision model of transformers, EVA's architecture through Blip2VisionModel."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel, Blip2VisionConfig, Blip2VisionModel, PreTrainedConfig, PreTrainedModel
from transformers.models.blip_2.modeling_blip_2 import Blip2VisionEmbeddings

from lynx_kernels import PackedLayout, children
from lynx_kernels.integrations import transformers as attention_integration

attention_integration.register()


def build(config: PreTrainedConfig) -> PreTrainedModel:
    """A fresh vision tower of this configuration."""
    if isinstance(config, Blip2VisionConfig):
        implementation = config._attn_implementation or attention_integration.NAME
        # AutoModel does not know this configuration.
        return Blip2VisionModel._from_config(config, attn_implementation=implementation)
    return AutoModel.from_config(config)


def takes_patches(config: PreTrainedConfig) -> bool:
    """Whether ``encode`` takes packed patches; a tower whose patch embedding we do not know takes pixels."""
    return isinstance(config, Blip2VisionConfig)


def encode(tower: PreTrainedModel, pixel_values: Tensor) -> Tensor:
    """The tokens of every frame, (N, tokens, width).

    Args:
        tower: a vision model.
        pixel_values: what ``pack_frames`` makes: patches (N * patches, 3 * p * p) for EVA's architecture, pixels
            (N, 3, S, S) for all others.

    Raises:
        ValueError: ``pixel_values`` has another shape, or the tower does not return a sequence of tokens.
    """
    if not takes_patches(tower.config):
        if pixel_values.dim() != 4:
            raise ValueError(f"pixel_values must be (frames, 3, S, S) pixels, got {tuple(pixel_values.shape)}")
        tokens = tower(pixel_values=pixel_values.to(tower.dtype)).last_hidden_state
        if tokens.dim() != 3:
            shape = tuple(tokens.shape)
            raise ValueError(f"{type(tower).__name__} returns features {shape}, expected (frames, tokens, width)")
        return tokens
    embeddings = tower.embeddings
    num_patches, width = embeddings.num_patches, 3 * embeddings.patch_size**2
    if pixel_values.dim() != 2 or pixel_values.shape[1] != width or pixel_values.shape[0] % num_patches:
        raise ValueError(
            f"pixel_values must be (frames * {num_patches}, {width}) packed patches, got "
            f"{tuple(pixel_values.shape)}; the image processor needs size={embeddings.image_size} and patch_size="
            f"{embeddings.patch_size}"
        )
    if (reason := changed_reason(tower, pixel_values.device)) is not None:
        children.log_once(tower, {"the vision tower": reason})
        return tower(pixel_values=_pixels(pixel_values, embeddings)).last_hidden_state
    kernel = embeddings.patch_embedding.weight.flatten(1)  # (width, 3 * p * p)
    patches = F.linear(pixel_values.to(kernel.dtype), kernel, embeddings.patch_embedding.bias)
    patches = patches.unflatten(0, (-1, num_patches))  # (N, patches, width)
    # Indexed, not only expanded: DDP warns of the strides that the gradient of a single frame would have.
    class_token = embeddings.class_embedding[0, 0].expand(patches.shape[0], 1, -1)
    hidden = torch.cat([class_token, patches], 1) + embeddings.position_embedding
    # Lynx takes the tokens before the tower's last LayerNorm.
    if tower.config._attn_implementation != attention_integration.NAME:
        return tower.encoder(inputs_embeds=hidden).last_hidden_state
    frames, tokens = hidden.shape[:2]
    layout = PackedLayout.equal(frames, tokens, device=hidden.device)
    packed = tower.encoder(inputs_embeds=hidden.flatten(0, 1)[None], encoder_layout=layout).last_hidden_state
    return packed.view_as(hidden)


def changed_reason(tower: PreTrainedModel, device: torch.device | None) -> str | None:
    """Why the tower must be called with pixels, or None where ``encode`` may take the weights of its first layers."""
    if not takes_patches(tower.config):
        return None  # it is called in any case
    embeddings: Any = tower.embeddings
    if type(tower) is not Blip2VisionModel or type(embeddings) is not Blip2VisionEmbeddings:
        return f"it is a {type(tower).__name__} with {type(embeddings).__name__}"
    for module, name in ((tower, "it"), (embeddings, "its embeddings")):
        if (reason := children.watched_reason(module)) is not None:
            return f"{name}: {reason}"
    reason = children.changed_reason(embeddings.patch_embedding, nn.Conv2d, device)
    return None if reason is None else f"its patch_embedding: {reason}"


def _pixels(patches: Tensor, embeddings: nn.Module) -> Tensor:
    """(frames * patches, 3 * p * p) packed patches as the pixels (frames, 3, S, S) they were made of."""
    size: Any = embeddings.patch_size
    grid: Any = embeddings.image_size // size
    pixels = patches.view(-1, grid, grid, 3, size, size).permute(0, 3, 1, 4, 2, 5)
    return pixels.reshape(-1, 3, grid * size, grid * size)


def resized_positions(positions: Tensor, num_tokens: int) -> Tensor:
    """(1, 1 + g * g, width) position embeddings for a grid of ``num_tokens - 1`` patches, in fp32 at least.

    The grid is resized bicubically, as in the paper between its resolutions; that of the class token stays.
    """
    old, new = (math.isqrt(tokens - 1) for tokens in (positions.shape[1], num_tokens))
    wide = positions.to(torch.promote_types(positions.dtype, torch.float32))
    grid = wide[:, 1:].unflatten(1, (old, old)).permute(0, 3, 1, 2)  # (1, width, g, g)
    grid = F.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False)
    return torch.cat([wide[:, :1], grid.permute(0, 2, 3, 1).flatten(1, 2)], 1)


def drop_unused(tower: PreTrainedModel) -> PreTrainedModel:
    """Remove the last LayerNorm of EVA's architecture, which ``encode`` never runs; other towers do not change."""
    if takes_patches(tower.config):
        tower.post_layernorm = nn.Identity()
    return tower


def unused_parameters(config: PreTrainedConfig) -> set[str]:
    """The names of the tower's parameters that ``encode`` never uses, such as a pooling head: they get no gradient."""
    if takes_patches(config):
        return set()  # drop_unused has removed them
    with torch.device("meta"):
        tower = build(config)
        encode(tower, torch.empty(1, 3, config.image_size, config.image_size)).sum().backward()
    return {name for name, parameter in tower.named_parameters() if parameter.grad is None}


def tokens_per_frame(config: PreTrainedConfig) -> int:
    """How many tokens ``encode`` returns for one frame."""
    if takes_patches(config):
        return (config.image_size // config.patch_size) ** 2 + 1
    with torch.device("meta"):
        frame = torch.empty(1, 3, config.image_size, config.image_size)
        return encode(build(config), frame).shape[1]
