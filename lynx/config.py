"""The configuration of a Lynx model: two sub-configurations of transformers and what joins them."""

import inspect
from typing import Any

from transformers import AutoConfig, Blip2VisionConfig, PreTrainedConfig

from lynx.fusion import FUSIONS, fusion_of
from lynx.fusion.base import check_choice, check_count

_DEFAULT_TEXT = "llama"
_DEFAULT_VISION = "blip_2_vision_model"  # the architecture of EVA-CLIP ViT-g
_BRIDGES = ("resampler", "mlp", "linear")
_SEES_MEDIA = ("preceding", "all")
_COUNTS = (
    "num_latents", "resampler_depth", "resampler_heads", "resampler_head_dim", "resampler_expansion", "max_frames",
)  # fmt: skip


class LynxConfig(PreTrainedConfig):
    """Configuration of ``LynxForConditionalGeneration`` (arXiv 2307.02469).

    Args:
        text_config: of any Llama-family decoder of transformers, as an object or as a dict with its ``model_type``.
        vision_config: of the vision tower, likewise; ``blip_2_vision_model`` is EVA's architecture.
        fusion: how images and videos reach the language model: ``"prefix"``, as tokens before the text, which adapters
            learn to read; or ``"cross_attention"``, through gated blocks between the decoder's layers, as Flamingo does
            it.
        bridge: what turns the tower's tokens into vision tokens of the language model: ``"resampler"``, which makes a
            fixed number of an image or video; ``"mlp"`` (two layers with GELU between them) or ``"linear"``, which keep
            every token of every frame. Cross-attention needs the resampler.
        prefix_is_causal: whether a vision token of a prefix sees only the tokens before it, or its whole prefix.
        image_token_id: the placeholder id that stands in ``input_ids`` for one vision token of a prefix. It does not
            need a row in the embedding table.
        num_latents: how many tokens the resampler makes of one image or video, whatever its size.
        resampler_depth, resampler_heads, resampler_head_dim, resampler_expansion: the resampler's layers, their
            attention heads, the width of a head, and the feed-forward's width over the model's.
        resampler_concatenates_latents: whether the latents see all latents of their item beside the media, as in
            Flamingo, or the media only, as in Lynx. If they do, both pass one projection, so the resampler has the
            vision tower's width; with prefix fusion that must be the language model's width.
        max_frames: how many frames of a video have a learned position.
        sees_media: with cross-attention, what a text token sees: ``"preceding"``, the image or video right before it,
            or ``"all"`` before it in its text.
        initializer_range: standard deviation of the bridge's fresh weights.
        latent_initializer_range: standard deviation of its fresh latents and frame positions.
        kwargs: the options of the fusions, which ``lynx.fusion.prefix.PrefixFusion`` and
            ``lynx.fusion.cross_attention.CrossAttentionFusion`` describe; the configuration keeps those of every
            fusion. And the fields of ``PreTrainedConfig``; token ids are those of ``text_config`` where none are given.

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
        sees_media: str = "preceding",
        initializer_range: float = 0.02,
        latent_initializer_range: float = 0.02,
        **kwargs: Any,
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
        self.sees_media = sees_media
        self.initializer_range = initializer_range
        self.latent_initializer_range = latent_initializer_range
        for name, default in _fusion_options().items():
            setattr(self, name, kwargs.pop(name, default))
        # They stand in the outer configuration too, where transformers looks for them to tie weights and to generate.
        tied = getattr(self.text_config, "tie_word_embeddings", None)
        if kwargs.setdefault("tie_word_embeddings", tied) != tied:
            raise ValueError(
                f"tie_word_embeddings is {kwargs['tie_word_embeddings']}, but text_config, whose tables they are, has "
                f"{tied}; set it there"
            )
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            kwargs.setdefault(name, getattr(self.text_config, name, None))
        super().__init__(**kwargs)
        self._check()

    @classmethod
    def field_names(cls) -> tuple[str, ...]:
        """The names of all fields of a Lynx model, those of the fusions' options among them."""
        parameters = inspect.signature(cls.__init__).parameters.values()
        named = [each.name for each in parameters if each.kind is not each.VAR_KEYWORD and each.name != "self"]
        return *named, *_fusion_options()

    def _check(self) -> None:
        fusion = fusion_of(self)
        check_choice("bridge", self.bridge, _BRIDGES)
        check_choice("sees_media", self.sees_media, _SEES_MEDIA)
        for name in _COUNTS:
            check_count(name, getattr(self, name))
        for each in FUSIONS.values():
            each.check_options(self)
        for name in ("prefix_is_causal", "resampler_concatenates_latents"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} is {getattr(self, name)!r}, must be True or False")
        if not isinstance(self.image_token_id, int) or self.image_token_id < 0:
            raise ValueError(f"image_token_id is {self.image_token_id!r}, must be an integer of at least 0")
        if not isinstance(getattr(self.vision_config, "hidden_size", None), int):
            raise ValueError(
                f"vision_config ({self.vision_config.model_type}) has no hidden_size, so its width is unknown; use "
                "another vision tower"
            )
        if self.bridge != "resampler" and self.resampler_concatenates_latents:
            raise ValueError(
                f"resampler_concatenates_latents=True, but with bridge={self.bridge!r} there is no resampler"
            )
        fusion.check(self)
        for name in ("text_config", "vision_config"):
            _check_heads(name, getattr(self, name))
        image_size, patch_size = (getattr(self.vision_config, name, None) for name in ("image_size", "patch_size"))
        if isinstance(image_size, int) and isinstance(patch_size, int) and image_size % patch_size:
            raise ValueError(f"vision_config: image_size, {image_size}, must be a multiple of patch_size, {patch_size}")


def _fusion_options() -> dict[str, Any]:
    return {name: default for fusion in FUSIONS.values() for name, default in fusion.options.items()}


def _check_heads(name: str, config: PreTrainedConfig) -> None:
    """Raise ValueError where the number of attention heads of a sub-configuration does not divide what it must."""
    width, heads = (getattr(config, field, None) for field in ("hidden_size", "num_attention_heads"))
    if not isinstance(width, int) or not isinstance(heads, int):
        return
    if heads < 1:
        raise ValueError(f"{name}: num_attention_heads is {heads}, must be at least 1")
    if getattr(config, "head_dim", None) is None and width % heads:
        raise ValueError(f"{name}: hidden_size, {width}, must be a multiple of num_attention_heads, {heads}")
    key_heads = getattr(config, "num_key_value_heads", None)
    if isinstance(key_heads, int) and (key_heads < 1 or heads % key_heads):
        raise ValueError(
            f"{name}: num_attention_heads, {heads}, must be a multiple of num_key_value_heads, {key_heads}"
        )


def _as_config(name: str, config: PreTrainedConfig | dict[str, Any] | None, default_type: str) -> PreTrainedConfig:
    if isinstance(config, PreTrainedConfig):
        return config
    options = dict(config or {})
    model_type = options.pop("model_type", default_type)
    try:
        if model_type == Blip2VisionConfig.model_type:  # which older releases of transformers do not find by name
            return Blip2VisionConfig(**options)
        return AutoConfig.for_model(model_type, **options)
    except Exception as error:  # configurations raise anything, ZeroDivisionError for one
        raise ValueError(f"{name} is not a configuration of model_type {model_type!r}: {error}") from error
