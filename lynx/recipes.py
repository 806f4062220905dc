"""Model shapes, by name."""

from transformers import Blip2VisionConfig, LlamaConfig, PreTrainedTokenizerBase

from lynx.config import LynxConfig

# Fresh weights of 0.02, the usual, are made for widths of thousands; a small model starts better from 1 / sqrt(width).
_WIDTH = 128
_SPREAD = 0.12


def tiny(tokenizer: PreTrainedTokenizerBase) -> LynxConfig:
    """Small enough to train all of it from nothing on two processor cores in minutes: 16 x 16 pixels, 1.2 M weights."""
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=_WIDTH,
        intermediate_size=2 * _WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
        initializer_range=_SPREAD,
    )
    vision = Blip2VisionConfig(
        image_size=16,
        patch_size=8,  # of 4 x 4 patches the model learns to read digits, too, in several times as many steps
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=4,
        initializer_range=0.05,  # the default, 1e-10, is for towers that are loaded
    )
    return LynxConfig(
        text,
        vision,
        image_token_id=len(tokenizer),
        num_latents=8,
        resampler_depth=2,
        resampler_heads=4,
        resampler_head_dim=32,
        resampler_expansion=2,
        adapter_frequency=1,
        adapter_size=64,
        initializer_range=_SPREAD,
        latent_initializer_range=1.0,  # as large as the vision tower's output, or videos seem to have no order
    )
