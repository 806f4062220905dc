"""The release's weights and inputs at a small size, for the tests of its checkpoints."""

import torch

from lynx import checkpoint
from lynx.media.resampler import media_layout

HEADS = {"text_config": {"num_attention_heads": 4}, "vision_config": {"num_attention_heads": 4}}
IDS = torch.tensor([1, 17, 4, 33, 8, 21, 2])


def load(weights, **options):
    """Our model of these weights, whose attention has four heads."""
    return checkpoint.load_reference(weights, **{"config": HEADS, **options})


def frames_of(kind, dtype=torch.float64):
    """One image, (3, 12, 12), or video of three frames, (3, 3, 12, 12)."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(*((3,) if kind == "video" else ()), 3, 12, 12, generator=generator, dtype=dtype)


def inputs(model, frames, ids):
    """One sample for ours: patches, positions, and a placeholder for each vision token."""
    count, patch = frames.unsqueeze(0).flatten(0, -4).shape[0], model.config.vision_config.patch_size
    grid = frames.shape[-1] // patch
    patches = frames.reshape(count, 3, grid, patch, grid, patch).permute(0, 2, 4, 1, 3, 5).flatten(0, 2).flatten(1)
    positions = torch.arange(count) if frames.dim() == 4 else torch.tensor([-1])
    latents = model.config.num_latents
    return {
        "input_ids": torch.cat([torch.full((latents,), model.config.image_token_id), ids])[None],
        "pixel_values": patches,
        "frame_positions": positions,
        "media_layout": media_layout([count], grid * grid + 1, latents),
    }


def original_eva(weights):
    """The vision tower's weights, and those only, in EVA's original layout."""
    state = {}
    for key, tensor in weights.items():
        if key.startswith("vision_encoder."):
            state[key.removeprefix("vision_encoder.")] = tensor
    for block in range(2):
        attention = f"blocks.{block}.attn."
        state[attention + "qkv.weight"] = torch.cat([state.pop(f"{attention}{part}_proj.weight") for part in "qkv"])
        state[attention + "q_bias"] = state.pop(attention + "q_proj.bias")
        state[attention + "v_bias"] = state.pop(attention + "v_proj.bias")
    return state


def parts_of(weights):
    """The release's file without what is frozen, and the two others."""
    language = {key.removeprefix("LLM."): weights[key] for key in weights if key.startswith("LLM.")}
    language = {key: tensor for key, tensor in language.items() if "adapter" not in key}
    rest = {
        key: tensor
        for key, tensor in weights.items()
        if not key.startswith("vision_encoder.") and key.removeprefix("LLM.") not in language
    }
    return rest, original_eva(weights), language
