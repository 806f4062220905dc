"""Model shapes, by name."""

from transformers import Blip2VisionConfig, LlamaConfig, PreTrainedTokenizerBase

from lynx.config import LynxConfig


def tiny(tokenizer: PreTrainedTokenizerBase) -> LynxConfig:
    """Small enough to train all of it from nothing on two processor cores in minutes: 16 x 16 pixels, 1.6 M weights."""
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
    )
    vision = Blip2VisionConfig(
        image_size=16,
        patch_size=4,
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
        adapter_frequency=1,
        adapter_size=64,
    )
