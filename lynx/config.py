"""The configuration of a Lynx model: two sub-configurations of transformers and what joins them."""

from typing import Any

from transformers import AutoConfig, Blip2VisionConfig, PreTrainedConfig

from lynx_kernels.adapter.activations import ACTIVATIONS

_DEFAULT_TEXT = "llama"
_DEFAULT_VISION = "blip_2_vision_model"  # the architecture of EVA-CLIP ViT-g


class LynxConfig(PreTrainedConfig):
    """Configuration of ``LynxForConditionalGeneration`` (arXiv 2307.02469).

    Args:
        text_config: of any Llama-family decoder of transformers, as an object or as a dict with its ``model_type``.
        vision_config: of the vision tower, likewise; ``blip_2_vision_model`` is EVA's architecture.
        fusion: how pictures reach the language model: ``"prefix"``, as tokens before the text.
        image_token_id: the placeholder id that stands in ``input_ids`` for one vision token. It needs no row in the
            embedding table.
        num_latents: tokens the resampler makes of one image or video, whatever its size.
        resampler_depth, resampler_heads, resampler_head_dim, resampler_expansion: the resampler's layers, their
            attention heads, the width of a head, and the feed-forward's width over the model's.
        max_frames: frames of a video that have a learned position.
        adapter_frequency: an adapter follows every k-th decoder layer, from the first one on (paper 1, release 2).
        adapter_size: width of the adapter's bottleneck.
        adapter_activation: as ``lynx_kernels.adapter`` names it.
        initializer_range: standard deviation of the resampler's fresh weights.
        latent_initializer_range: standard deviation of its fresh latents and frame positions.

    Raises:
        ValueError: a field contradicts another or is out of range; the message names it.
    """

    model_type = "lynx"
    sub_configs = {"text_config": AutoConfig, "vision_config": AutoConfig}  # noqa: RUF012 (transformers reads it so)

    def __init__(
        self,
        text_config: PreTrainedConfig | dict[str, Any] | None = None,
        vision_config: PreTrainedConfig | dict[str, Any] | None = None,
        *,
        fusion: str = "prefix",
        image_token_id: int = 32001,
        num_latents: int = 32,
        resampler_depth: int = 3,
        resampler_heads: int = 8,
        resampler_head_dim: int = 64,
        resampler_expansion: int = 4,
        max_frames: int = 5,
        adapter_frequency: int = 1,
        adapter_size: int = 2048,
        adapter_activation: str = "silu",
        initializer_range: float = 0.02,
        latent_initializer_range: float = 0.02,
        **kwargs,
    ):
        self.text_config = _as_config(text_config, _DEFAULT_TEXT)
        self.vision_config = _as_config(vision_config, _DEFAULT_VISION)
        self.fusion = fusion
        self.image_token_id = image_token_id
        self.num_latents = num_latents
        self.resampler_depth = resampler_depth
        self.resampler_heads = resampler_heads
        self.resampler_head_dim = resampler_head_dim
        self.resampler_expansion = resampler_expansion
        self.max_frames = max_frames
        self.adapter_frequency = adapter_frequency
        self.adapter_size = adapter_size
        self.adapter_activation = adapter_activation
        self.initializer_range = initializer_range
        self.latent_initializer_range = latent_initializer_range
        # Known to the outer configuration too, where transformers looks for them when it ties and generates.
        for name in ("tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id"):
            kwargs[name] = getattr(self.text_config, name, None)
        super().__init__(**kwargs)
        self._check()

    def _check(self) -> None:
        if self.fusion != "prefix":
            raise ValueError(f"fusion={self.fusion!r} is not known; there is 'prefix'")
        positive = (
            "num_latents", "resampler_depth", "resampler_heads", "resampler_head_dim", "resampler_expansion",
            "max_frames", "adapter_frequency", "adapter_size",
        )  # fmt: skip
        for name in positive:
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}, must be an integer of at least 1")
        if self.adapter_activation not in ACTIVATIONS:
            raise ValueError(f"adapter_activation is {self.adapter_activation!r}, must be one of {sorted(ACTIVATIONS)}")
        if not isinstance(getattr(self.vision_config, "hidden_size", None), int):
            raise ValueError(
                f"vision_config ({self.vision_config.model_type}) has no hidden_size: its width is unknown"
            )
        layers = self.text_config.num_hidden_layers
        if self.adapter_frequency > layers:
            raise ValueError(f"adapter_frequency is {self.adapter_frequency}, but text_config has {layers} layers")


def _as_config(config: PreTrainedConfig | dict[str, Any] | None, model_type: str) -> PreTrainedConfig:
    if isinstance(config, PreTrainedConfig):
        return config
    options = dict(config or {})
    model_type = options.pop("model_type", model_type)
    if model_type == Blip2VisionConfig.model_type:  # which older releases of transformers do not find by name
        return Blip2VisionConfig(**options)
    return AutoConfig.for_model(model_type, **options)
