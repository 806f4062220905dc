"""Lynx: a frozen or trained decoder that reads pictures (arXiv 2307.02469).

pixels -> vision tower -> resampler -> packed embeddings -> decoder with adapters -> logits or loss
(or, with cross-attention: text embeddings -> decoder whose blocks read the resampler's tokens -> logits or loss)
"""

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Cache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from lynx.config import LynxConfig
from lynx.data.conversation import IGNORED
from lynx.fusion import cross_attention, fuse, prefix
from lynx.fusion.cross_attention import Media
from lynx.generation.cache import SharedRootCache, StaticTensors
from lynx.generation.sharing import SharedRootGeneration
from lynx.media import tower
from lynx.media.projection import Projection
from lynx.media.resampler import Resampler, media_layout
from lynx_kernels import PackedLayout, SpanLayout, linear_cross_entropy, pack_embeddings
from lynx_kernels.backends import onednn
from lynx_kernels.integrations import transformers as attention_integration
from lynx_kernels.layout import require


class LynxForConditionalGeneration(PreTrainedModel, SharedRootGeneration, GenerationMixin):
    """A vision tower, a bridge, and a decoder with adapters or cross-attention.

    The bridge is the submodule ``resampler`` or ``projection``, by ``config.bridge``; what fusion adds to the decoder's
    layers is their ``output_adapter`` (prefix) or ``cross_attention``.

    Args:
        config: the whole model's.
        language_model: a decoder to build on, already loaded; made from ``config.text_config`` if None.
        vision_tower: a vision model likewise; made from ``config.vision_config`` if None.
    """

    config_class = LynxConfig
    config: LynxConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    input_modalities = ("image", "video", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_attention_backend = True
    _no_split_modules: list[str] | None = None

    def __init__(
        self,
        config: LynxConfig,
        language_model: PreTrainedModel | None = None,
        vision_tower: PreTrainedModel | None = None,
    ):
        super().__init__(config)
        if language_model is None:
            implementation = config.text_config._attn_implementation or attention_integration.NAME
            language_model = AutoModelForCausalLM.from_config(config.text_config, attn_implementation=implementation)
        _refuse_unknown_heads(language_model)
        self.language_model = language_model
        self.vision_tower = tower.drop_unused(vision_tower or tower.build(config.vision_config))
        if config.bridge == "resampler":
            self.resampler = Resampler.from_config(config)
        else:
            self.projection = Projection.from_config(config)
        changed_layers = fuse(language_model.get_decoder().layers, config)
        self.static_tensors = StaticTensors()
        self.post_init()
        self._no_split_modules = sorted({*(self._no_split_modules or ()), *changed_layers})

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Resampler | Projection):
            module.reset_parameters()

    def _set_gradient_checkpointing(self, *args, **kwargs) -> None:
        for option in (*args, *kwargs.values()):  # one of them is torch's checkpoint function with its options
            if getattr(option, "keywords", {}).get("use_reentrant"):
                raise ValueError(
                    "re-entrant checkpointing loses keyword arguments, the layout too; use_reentrant=False"
                )
        super()._set_gradient_checkpointing(*args, **kwargs)

    def get_input_embeddings(self) -> nn.Embedding:
        """The decoder's embedding table."""
        return self.language_model.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Linear:
        """The decoder's vocabulary projection."""
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        """Another vocabulary projection, as ``resize_token_embeddings`` makes one."""
        self.language_model.set_output_embeddings(new_embeddings)

    def project(self, hidden: Tensor) -> Tensor:
        """The logits (..., V) of rows (..., width)."""
        head = self.get_output_embeddings()
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or not onednn.is_quicker(hidden, head.weight):
            return head(hidden)
        # The largest product of a new token. Whoever changed what the head does is heard.
        is_plain = type(head) is nn.Linear and "forward" not in vars(head)
        is_watched = head._forward_hooks or head._forward_pre_hooks
        return onednn.linear(hidden, head.weight) if is_plain and not is_watched else head(hidden)

    def get_decoder(self) -> PreTrainedModel:
        """The decoder without its vocabulary projection."""
        return self.language_model.get_decoder()

    def encode_media(
        self, pixel_values: Tensor, frame_positions: Tensor | None = None, layout: SpanLayout | None = None
    ) -> Tensor:
        """The vision tokens of all items, one item after another.

        Args:
            pixel_values: of all frames, as ``lynx.media.tower.encode`` wants them.
            frame_positions: (N,) int64, a frame's place in its video or -1 for an image; all images if None.
            layout: which latents see which frames' tokens, from ``lynx.media.resampler.media_layout``; needed for
                videos.
                Without a resampler it says only by its ``num_queries`` how many of the tokens go on, all if None.

        Returns:
            (items * num_latents, width), or without a resampler (frames * tokens, width).
        """
        features = tower.encode(self.vision_tower, pixel_values)  # (N, tokens, media width)
        num_frames, tokens = features.shape[:2]
        if layout is not None and layout.num_keys != num_frames * tokens:
            raise ValueError(
                f"media_layout describes {layout.num_keys} vision tokens, but pixel_values holds {num_frames} frames "
                f"of {tokens} tokens"
            )
        if frame_positions is None:
            frame_positions = torch.full((num_frames,), -1, device=features.device)
        if tuple(frame_positions.shape) != (num_frames,):
            raise ValueError(
                f"frame_positions has shape {tuple(frame_positions.shape)}, but pixel_values holds {num_frames} frames"
            )
        require(
            (frame_positions < self.config.max_frames).all(),
            f"frame_positions must be below max_frames, {self.config.max_frames}",
        )
        if self.config.bridge != "resampler":
            vision_tokens = self.projection(features.to(self.projection.frame_position.dtype), frame_positions)
            return vision_tokens if layout is None else vision_tokens[: layout.num_queries]
        if layout is None:
            layout = media_layout([1] * num_frames, tokens, self.config.num_latents)
        features = features.to(self.resampler.latents.dtype)
        return self.resampler(features, frame_positions, layout.to(features.device))

    def read_media(
        self,
        pixel_values: Tensor | None,
        frame_positions: Tensor | None,
        media_layout: SpanLayout | None,
        cross_layout: SpanLayout | None,
        input_ids: Tensor | None,
    ) -> Media:
        """What cross-attention reads of a batch; the arguments are those of ``forward``.

        Raises:
            ValueError: cross_layout is missing, or describes other vision tokens or another text.
        """
        if cross_layout is None:
            raise ValueError("cross_layout is missing: who sees the pictures? LynxProcessor's batches say it")
        if input_ids is not None and cross_layout.num_queries != input_ids.numel():
            raise ValueError(
                f"cross_layout describes {cross_layout.num_queries} tokens, but input_ids holds {input_ids.numel()}"
            )
        if pixel_values is None:
            tokens = self.get_input_embeddings().weight.new_empty(0, self.resampler.latents.shape[1])
        else:
            tokens = self.encode_media(pixel_values, frame_positions, media_layout)
        if cross_layout.num_keys != tokens.shape[0]:
            raise ValueError(
                f"cross_layout describes {cross_layout.num_keys} vision tokens, but the pictures give {len(tokens)}"
            )
        return Media(tokens, cross_layout)

    def embed(self, input_ids: Tensor, vision_tokens: Tensor | None = None) -> Tensor:
        """Embeddings (B, L, width) of ``input_ids``, its picture placeholders filled with ``vision_tokens`` in order.

        Raises:
            ValueError: another number of placeholders than of vision tokens.
        """
        table = self.get_input_embeddings().weight
        if vision_tokens is None:
            vision_tokens = table.new_empty(0, table.shape[1])
        flat_ids = input_ids.reshape(-1)
        is_picture = flat_ids == self.config.image_token_id
        message = "input_ids must hold one picture token for each vision token"
        if not torch.compiler.is_compiling():  # a number in the text would have every other number compiled anew
            message = f"input_ids must hold one picture token for each of the {vision_tokens.shape[0]} vision tokens"
            if input_ids.device.type == "cpu":
                message += f", but it holds {int(is_picture.sum())}"
        require(is_picture.sum() == vision_tokens.shape[0], message)
        vision_index = torch.where(is_picture, is_picture.cumsum(0) - 1, -1).int()
        return pack_embeddings(flat_ids, table, vision_tokens, vision_index).view(*input_ids.shape, -1)

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        frame_positions: Tensor | None = None,
        media_layout: SpanLayout | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        layout: PackedLayout | None = None,
        cross_layout: SpanLayout | None = None,
        media: Media | None = None,
        prefix_lengths: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        max_supervised: int | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Logits, and the loss where there are labels.

        The batch is padded, (B, L) with an ``attention_mask``, or packed, (1, T) with a ``layout``.

        Args:
            input_ids: (B, L) int64, ``config.image_token_id`` wherever a vision token stands.
            pixel_values, frame_positions, media_layout: the frames, as ``encode_media`` takes them.
            attention_mask: (B, L), zero at pads; for padded batches.
            position_ids: (B, L); by default from the layout, or counted over the tokens of the attention mask.
            layout: who sees whom in a packed row.
            cross_layout: with cross-attention, which text tokens see which vision tokens, from
                ``lynx.fusion.cross_attention.text_layout``; needed beside pixel_values.
            media: with cross-attention, what ``read_media`` made of pixel_values and cross_layout, in their place.
            prefix_lengths: (B,) int64, the vision tokens each padded row begins with; needed where a prefix is not
                causal and only inputs_embeds are there.
            past_key_values, use_cache, logits_to_keep: as everywhere in transformers. A ``SharedRootCache`` with an
                unread prompt has it read in place of the inputs; its rows' last logits, (B, 1, V), are returned.
            inputs_embeds: (B, L, width) instead of input_ids and pixel_values.
            labels: (B, L) int64 token ids, -100 where not supervised. With labels no (B, L, V) logits are computed:
                the output's ``logits`` are None.
            num_items_in_batch: what to divide the summed loss by, the supervised tokens of the whole accumulated
                batch; this batch's own if None.
            max_supervised: at least the number of labels that are not -100, as ``LynxProcessor`` counts them: on a
                device, whose labels the host does not read, only so many rows then reach the vocabulary projection.

        Raises:
            ValueError: the arguments do not fit together; the message names them.
        """
        if cross_layout is not None and self.config.fusion != "cross_attention":
            raise ValueError(f"cross_layout is for fusion='cross_attention', this model has {self.config.fusion!r}")
        if isinstance(past_key_values, SharedRootCache):
            return self.forward_shared(past_key_values, input_ids, inputs_embeds, **kwargs)
        if input_ids is not None and inputs_embeds is None:
            vision_tokens = None
            if self.config.fusion == "cross_attention":
                if pixel_values is not None or cross_layout is not None:
                    if past_key_values is not None and past_key_values.get_seq_length() > 0:
                        raise ValueError("past_key_values holds the media of its text; run the whole text to add more")
                    media = self.read_media(pixel_values, frame_positions, media_layout, cross_layout, input_ids)
            elif pixel_values is not None:
                vision_tokens = self.encode_media(pixel_values, frame_positions, media_layout)
            inputs_embeds = self.embed(input_ids, vision_tokens)
        elif input_ids is not None or inputs_embeds is None:
            raise ValueError("pass input_ids or inputs_embeds, one of them")
        elif pixel_values is not None:
            raise ValueError("pass pixel_values beside input_ids; inputs_embeds already holds the vision tokens")
        if layout is not None:
            if not isinstance(layout, PackedLayout):
                raise TypeError(f"layout is a {type(layout).__name__}, expected a PackedLayout")
            layout = layout.to(inputs_embeds.device)
            self._check_packed(inputs_embeds, layout, attention_mask, past_key_values)
            attention_mask = attention_integration.packed_mask(layout)
            position_ids = layout.position_ids[None] if position_ids is None else position_ids
            kwargs["layout"] = layout
        else:
            if position_ids is None and attention_mask is not None and past_key_values is None:
                rows = inputs_embeds.shape[:2]
                if attention_mask.shape != rows:
                    raise ValueError(f"attention_mask has shape {tuple(attention_mask.shape)}, the batch {tuple(rows)}")
                position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
            begins = past_key_values is None or past_key_values.get_seq_length() == 0
            if begins and not self.config.prefix_is_causal:
                if prefix_lengths is None and input_ids is not None:
                    prefix_lengths = prefix.lengths(input_ids, attention_mask, self.config.image_token_id)
                attention_mask = prefix.full_mask(
                    inputs_embeds, attention_mask, prefix_lengths, self.get_decoder().config._attn_implementation
                )
        if self.config.fusion == "cross_attention":
            config = self.get_decoder().config
            wants_cache = getattr(config, "use_cache", True) if use_cache is None else use_cache
            kwargs["media"], past_key_values = cross_attention.condition(
                media,
                inputs_embeds,
                past_key_values,
                config,
                media_width=self.resampler.latents.shape[1],
                caches=wants_cache and labels is None and layout is None and not self.training,
            )
        outputs = self.get_decoder()(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        loss = logits = None
        if labels is not None:
            loss = self._loss(hidden, labels, layout, num_items_in_batch, max_supervised)
        else:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.project(hidden[:, kept])
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _check_packed(self, inputs_embeds, layout, attention_mask, past_key_values) -> None:
        if attention_mask is not None:
            raise ValueError("pass attention_mask (padded) or layout (packed), not both")
        if past_key_values is not None:
            raise ValueError("a packed row cannot go on from past_key_values; generate takes padded batches")
        if inputs_embeds.shape[:2] != (1, layout.num_tokens):
            raise ValueError(
                f"a packed batch is (1, {layout.num_tokens}) as its layout says, got {tuple(inputs_embeds.shape[:2])}"
            )
        if layout.max_root_length > 0 and layout.root_is_causal != self.config.prefix_is_causal:
            raise ValueError(
                f"the layout has root_is_causal={layout.root_is_causal}, the model prefix_is_causal="
                f"{self.config.prefix_is_causal}"
            )
        implementation = self.get_decoder().config._attn_implementation
        if implementation != attention_integration.NAME:
            raise ValueError(
                f"packed rows need attn_implementation={attention_integration.NAME!r}, the decoder has "
                f"{implementation!r}, which cannot read a layout"
            )

    def _loss(self, hidden, labels, layout, num_items, max_supervised) -> Tensor:
        if labels.shape != hidden.shape[:2]:
            raise ValueError(f"labels have shape {tuple(labels.shape)}, the batch {tuple(hidden.shape[:2])}")
        if layout is not None:
            targets = layout.shift_labels(labels[0])
        else:
            targets = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED).flatten()
        weight = self.get_output_embeddings().weight
        return linear_cross_entropy(
            hidden.flatten(0, 1), weight, targets, num_items=num_items, max_supervised=max_supervised
        )

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        frame_positions: Tensor | None = None,
        media_layout: SpanLayout | None = None,
        cross_layout: SpanLayout | None = None,
        **kwargs,
    ):
        """``GenerationMixin.generate`` for a left-padded batch.

        However many beams, or answers of a row, pictures are encoded and prompts read once, into a
        ``SharedRootCache`` (with ``cache_implementation="static"`` one of static shapes, whose steps are compiled on
        GPUs, and whose tensors stay allocated for the next generation, in ``static_tensors``). Where a cache is passed,
        or something is asked for that needs another one, transformers' own serves.

        Returns what transformers returns: the prompt, its picture placeholders included, and the new tokens.
        """
        if kwargs.get("layout") is not None:
            raise ValueError("generate takes a left-padded batch, as LynxProcessor makes it, not a packed row")
        if self.config.fusion == "cross_attention":
            if pixel_values is not None or cross_layout is not None:
                kwargs["media"] = self.read_media(pixel_values, frame_positions, media_layout, cross_layout, input_ids)
        elif pixel_values is not None:
            if input_ids is None:
                raise ValueError("generate: pixel_values need input_ids with a picture token for each vision token")
            vision_tokens = self.encode_media(pixel_values, frame_positions, media_layout)
            kwargs["inputs_embeds"] = self.embed(input_ids, vision_tokens)
        if not self.config.prefix_is_causal and input_ids is not None:
            mask = kwargs.get("attention_mask")
            kwargs["prefix_lengths"] = prefix.lengths(input_ids, mask, self.config.image_token_id)
        if self.shares_roots(kwargs):
            kwargs = self.with_shared_roots(input_ids, kwargs)
        return super().generate(input_ids, **kwargs)

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **kwargs):
        media: Media | None = kwargs.get("media")
        if media is not None and input_ids is not None:
            kwargs["media"] = media.repeat_rows(input_ids.shape[0], expand_size)
        return super()._expand_inputs_for_generation(expand_size, is_encoder_decoder, input_ids, **kwargs)


def _refuse_unknown_heads(language_model: PreTrainedModel) -> None:
    """Raise ValueError for a decoder whose logits are more than a product with a weight: our loss knows no more."""
    if getattr(language_model.get_output_embeddings(), "bias", None) is not None:
        raise ValueError(
            f"{type(language_model).__name__} has a vocabulary projection with a bias, which Lynx cannot use"
        )
    for name in ("logit_scale", "logits_scaling", "final_logit_softcapping"):
        value = getattr(language_model.config, name, None)
        if value not in (None, 1.0):
            raise ValueError(f"{type(language_model).__name__} has {name}={value}, which Lynx cannot use")
