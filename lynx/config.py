"""The configuration of a Lynx model: two sub-configurations of transformers and what joins them."""

from typing import Any

from transformers import AutoConfig, Blip2VisionConfig, PreTrainedConfig

from lynx_kernels.ops.adapter.activations import ACTIVATIONS

_DEFAULT_TEXT = "llama"
_DEFAULT_VISION = "blip_2_vision_model"  # the architecture of EVA-CLIP ViT-g
_CHOICES = {
    "fusion": ("prefix", "cross_attention"),
    "bridge": ("resampler", "mlp", "linear"),
    "sees_media": ("preceding", "all"),
    "adapter_activation": tuple(sorted(ACTIVATIONS)),
}
_COUNTS = (
    "num_latents", "resampler_depth", "resampler_heads", "resampler_head_dim", "resampler_expansion", "max_frames",
    "adapter_frequency", "adapter_size", "cross_attention_frequency", "cross_attention_heads",
    "cross_attention_head_dim", "cross_attention_expansion",
)  # fmt: skip


class LynxConfig(PreTrainedConfig):
    """Configuration of ``LynxForConditionalGeneration`` (arXiv 2307.02469).

    Args:
        text_config: of any Llama-family decoder of transformers, as an object or as a dict with its ``model_type``.
        vision_config: of the vision tower, likewise; ``blip_2_vision_model`` is EVA's architecture.
        fusion: how pictures reach the language model: ``"prefix"``, as tokens before the text, which adapters learn to
            read; or ``"cross_attention"``, through gated blocks between the decoder's layers, as Flamingo does it.
        bridge: what makes the language model's vision tokens of the tower's: ``"resampler"``, a fixed number for an
            image or video; ``"mlp"`` (two layers, GELU between) or ``"linear"``, which keep every token of every frame.
            Cross-attention needs the resampler.
        prefix_is_causal: whether a vision token of a prefix sees only what stands before it, or all of its prefix.
        image_token_id: the placeholder id that stands in ``input_ids`` for one vision token of a prefix. It needs no
            row in the embedding table.
        num_latents: tokens the resampler makes of one image or video, whatever its size.
        resampler_depth, resampler_heads, resampler_head_dim, resampler_expansion: the resampler's layers, their
            attention heads, the width of a head, and the feed-forward's width over the model's.
        resampler_concatenates_latents: whether its latents see, beside the media, all latents of their item, as in
            Flamingo, or the media only, as in Lynx. As both pass one projection, the resampler then has the vision
            tower's width, which with prefix fusion must be the language model's.
        max_frames: frames of a video that have a learned position.
        adapter_frequency: with prefix fusion an adapter follows every k-th decoder layer, from the first one on (paper
            1, release 2).
        adapter_size: width of the adapter's bottleneck.
        adapter_activation: as ``lynx_kernels.adapter`` names it.
        cross_attention_frequency: with cross-attention fusion a gated block stands before every k-th decoder layer, the
            k-th, the 2k-th and so on, as in Open-Flamingo.
        cross_attention_heads, cross_attention_head_dim, cross_attention_expansion: the blocks' attention heads, the
            width of a head, and the feed-forward's width over the model's.
        sees_media: what the blocks show a text token: ``"preceding"``, the image or video right before it, or
            ``"all"`` before it in its text.
        initializer_range: standard deviation of the bridge's fresh weights.
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
        bridge: str = "resampler",
        prefix_is_causal: bool = True,
        image_token_id: int = 32001,
        num_latents: int = 32,
        resampler_depth: int = 3,
        resampler_heads: int = 8,
        resampler_head_dim: int = 64,
        resampler_expansion: int = 4,
        resampler_concatenates_latents: bool = False,
        max_frames: int = 5,
        adapter_frequency: int = 1,
        adapter_size: int = 2048,
        adapter_activation: str = "silu",
        cross_attention_frequency: int = 1,
        cross_attention_heads: int = 8,
        cross_attention_head_dim: int = 64,
        cross_attention_expansion: int = 4,
        sees_media: str = "preceding",
        initializer_range: float = 0.02,
        latent_initializer_range: float = 0.02,
        **kwargs,
    ):
        self.text_config = _as_config("text_config", text_config, _DEFAULT_TEXT)
        self.vision_config = _as_config("vision_config", vision_config, _DEFAULT_VISION)
        self.fusion = fusion
        self.bridge = bridge
        self.prefix_is_causal = prefix_is_causal
        self.image_token_id = image_token_id
        self.num_latents = num_latents
        self.resampler_depth = resampler_depth
        self.resampler_heads = resampler_heads
        self.resampler_head_dim = resampler_head_dim
        self.resampler_expansion = resampler_expansion
        self.resampler_concatenates_latents = resampler_concatenates_latents
        self.max_frames = max_frames
        self.adapter_frequency = adapter_frequency
        self.adapter_size = adapter_size
        self.adapter_activation = adapter_activation
        self.cross_attention_frequency = cross_attention_frequency
        self.cross_attention_heads = cross_attention_heads
        self.cross_attention_head_dim = cross_attention_head_dim
        self.cross_attention_expansion = cross_attention_expansion
        self.sees_media = sees_media
        self.initializer_range = initializer_range
        self.latent_initializer_range = latent_initializer_range
        # Known to the outer configuration too, where transformers looks for them when it ties and generates.
        for name in ("tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id"):
            kwargs[name] = getattr(self.text_config, name, None)
        super().__init__(**kwargs)
        self._check()

    def _check(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r} is not known; there is {_listed(choices)}")
        for name in _COUNTS:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} is {value!r}, must be an integer of at least 1")
        for name in ("prefix_is_causal", "resampler_concatenates_latents"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} is {getattr(self, name)!r}, must be true or false")
        if not isinstance(self.image_token_id, int) or self.image_token_id < 0:
            raise ValueError(f"image_token_id is {self.image_token_id!r}, must be an integer of at least 0")
        if not isinstance(getattr(self.vision_config, "hidden_size", None), int):
            raise ValueError(
                f"vision_config ({self.vision_config.model_type}) has no hidden_size: its width is unknown"
            )
        self._check_fusion()
        for name in ("text_config", "vision_config"):
            _check_heads(name, getattr(self, name))
        image_size, patch_size = (getattr(self.vision_config, name, None) for name in ("image_size", "patch_size"))
        if isinstance(image_size, int) and isinstance(patch_size, int) and image_size % patch_size:
            raise ValueError(f"vision_config: patches of patch_size {patch_size} do not fill image_size {image_size}")

    def _check_fusion(self) -> None:
        """Raise ValueError for a field that speaks of something this fusion or bridge has not."""
        frequency = "adapter_frequency" if self.fusion == "prefix" else "cross_attention_frequency"
        layers = self.text_config.num_hidden_layers
        if getattr(self, frequency) > layers:
            raise ValueError(f"{frequency} is {getattr(self, frequency)}, but text_config has {layers} layers")
        if self.fusion == "cross_attention" and self.bridge != "resampler":
            raise ValueError(f"fusion='cross_attention' reads media through bridge='resampler', not {self.bridge!r}")
        if self.fusion == "cross_attention" and not self.prefix_is_causal:
            raise ValueError("prefix_is_causal=False, but with fusion='cross_attention' there is no prefix")
        if self.fusion == "prefix" and self.sees_media != "preceding":
            raise ValueError(f"sees_media={self.sees_media!r} needs fusion='cross_attention'; a prefix is seen by all")
        if self.bridge != "resampler" and self.resampler_concatenates_latents:
            raise ValueError(
                f"resampler_concatenates_latents=True, but with bridge={self.bridge!r} there is no resampler"
            )
        widths = self.vision_config.hidden_size, self.text_config.hidden_size
        if self.fusion == "prefix" and self.resampler_concatenates_latents and widths[0] != widths[1]:
            raise ValueError(
                f"resampler_concatenates_latents=True gives tokens of vision_config's hidden_size, {widths[0]}, but a "
                f"prefix needs text_config's, {widths[1]}"
            )


def _check_heads(name: str, config: PreTrainedConfig) -> None:
    """Raise ValueError where the attention heads of a sub-configuration do not divide what they must."""
    width, heads = (getattr(config, field, None) for field in ("hidden_size", "num_attention_heads"))
    if not isinstance(width, int) or not isinstance(heads, int):
        return
    if heads < 1:
        raise ValueError(f"{name}: num_attention_heads is {heads}, must be at least 1")
    if getattr(config, "head_dim", None) is None and width % heads:
        raise ValueError(f"{name}: num_attention_heads, {heads}, do not divide hidden_size, {width}")
    key_heads = getattr(config, "num_key_value_heads", None)
    if isinstance(key_heads, int) and (key_heads < 1 or heads % key_heads):
        raise ValueError(f"{name}: num_key_value_heads, {key_heads}, do not divide num_attention_heads, {heads}")


def _listed(choices: tuple[str, ...]) -> str:
    return ", ".join(map(repr, choices))


def _as_config(name: str, config: PreTrainedConfig | dict[str, Any] | None, default_type: str) -> PreTrainedConfig:
    if isinstance(config, PreTrainedConfig):
        return config
    options = dict(config or {})
    model_type = options.pop("model_type", default_type)
    try:
        if model_type == Blip2VisionConfig.model_type:  # which older releases of transformers do not find by name
            return Blip2VisionConfig(**options)
        return AutoConfig.for_model(model_type, **options)
    except Exception as error:  # configurations raise what they like, ZeroDivisionError among it
        raise ValueError(f"{name} is no configuration of model_type {model_type!r}: {error}") from error
