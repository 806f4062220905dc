"""Lynx: a frozen or trained decoder that reads images and videos (arXiv 2307.02469).

pixels -> vision tower -> resampler -> packed embeddings -> decoder with adapters -> logits or loss
(or, with cross-attention: text embeddings -> decoder whose blocks read the resampler's tokens -> logits or loss)
"""

from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Cache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from lynx import heads, trainer_inputs
from lynx.config import LynxConfig
from lynx.embedding import embed
from lynx.fusion import fusion_of, take_inputs
from lynx.fusion.base import Fusion
from lynx.fusion.rows import Rows
from lynx.generation import options
from lynx.generation.cache import SharedRootCache, StaticTensors
from lynx.generation.checkpointing import drops_caches, no_checkpointing
from lynx.generation.guessing import GuessingGeneration
from lynx.generation.sharing import SharedRootGeneration
from lynx.media import tower
from lynx.media.projection import Projection
from lynx.media.resampler import Resampler, media_layout
from lynx_kernels import PackedLayout, SpanLayout, children
from lynx_kernels.integrations import transformers as attention_integration
from lynx_kernels.layout import require


class LynxForConditionalGeneration(PreTrainedModel, SharedRootGeneration, GuessingGeneration, GenerationMixin):
    """A vision tower, a bridge, and a decoder with adapters or cross-attention.

    The bridge is the submodule ``resampler`` or ``projection``, as ``config.bridge`` says. The fusion adds one module
    to layers of the decoder: ``output_adapter`` (prefix) or ``cross_attention``.

    Args:
        config: of the model.
        language_model: a loaded decoder to build on; made from ``config.text_config`` if None.
        vision_tower: a loaded vision model to build on; made from ``config.vision_config`` if None.
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
        changed_layers = self.fusion.install(language_model.get_decoder().layers, config)
        self.static_tensors = StaticTensors()
        self.post_init()
        self._no_split_modules = sorted({*(self._no_split_modules or ()), *changed_layers})

    @property
    def fusion(self) -> Fusion:
        """How images and videos reach the decoder."""
        return fusion_of(self.config)

    @property
    def input_device(self) -> torch.device:
        """Where inputs belong: where the first parameter is, or where it is used if accelerate offloads it."""
        hooks = (vars(module).get("_hf_hook") for module in self.modules()) if self.device.type == "meta" else ()
        devices = (getattr(hook, "execution_device", None) for hook in hooks)
        return next((torch.device(each) for each in devices if each is not None), self.device)

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Resampler | Projection):
            module.reset_parameters()

    def _set_gradient_checkpointing(self, *args: Any, **kwargs: Any) -> None:
        for option in (*args, *kwargs.values()):  # one of them is torch's checkpoint function with its options
            if getattr(option, "keywords", {}).get("use_reentrant"):
                raise ValueError(
                    "re-entrant checkpointing drops keyword arguments, among them the layout; pass use_reentrant=False"
                )
        super()._set_gradient_checkpointing(*args, **kwargs)

    def get_input_embeddings(self) -> nn.Embedding:
        """The decoder's embedding table."""
        return self.language_model.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Linear:
        """The decoder's vocabulary projection."""
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        """Replace the vocabulary projection, as ``resize_token_embeddings`` does."""
        self.language_model.set_output_embeddings(new_embeddings)

    def project(self, hidden: Tensor) -> Tensor:
        """The logits (..., V) of rows (..., width)."""
        return heads.logits(self.get_output_embeddings(), hidden)

    def changed_children(self, device: torch.device | None = None) -> dict[str, str]:
        """Why the table, the head or the vision tower must be called where kernels could take their weights, by name.

        ``lynx_kernels.explain(model)`` tells it of all modules.
        """
        table, head = self.get_input_embeddings(), self.get_output_embeddings()
        return {
            name: reason
            for name, reason in (
                ("the embedding table", children.changed_embedding_reason(table, device)),
                ("the head", heads.changed_reason(head, device)),
                ("the vision tower", tower.changed_reason(self.vision_tower, device)),
            )
            if reason is not None
        }

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
                videos. Without a resampler only its ``num_queries`` counts: how many tokens to return, all if None.

        Returns:
            (items * num_latents, width), or without a resampler (frames * tokens, width).

        Raises:
            ValueError: the layout or the positions are not those of these frames.
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

    def embed(self, input_ids: Tensor, vision_tokens: Tensor | None = None) -> Tensor:
        """Embeddings (B, L, width) of ``input_ids``, its image placeholders filled with ``vision_tokens`` in order.

        Raises:
            ValueError: there are not as many placeholders as vision tokens.
        """
        is_image = input_ids == self.config.image_token_id  # (B, L)
        num_vision = 0 if vision_tokens is None else vision_tokens.shape[0]
        message = "input_ids must hold one image token for each vision token"
        if not torch.compiler.is_compiling():  # a number in the message would recompile for every other number
            message = f"input_ids must hold one image token for each of the {num_vision} vision tokens"
            if input_ids.device.type == "cpu":
                message += f", but it holds {int(is_image.sum())}"
        require(is_image.sum() == num_vision, message)
        return embed(self.get_input_embeddings(), input_ids, is_image, vision_tokens, self.config.pad_token_id)

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        frame_positions: Tensor | None = None,
        media_layout: SpanLayout | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        layout: PackedLayout | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        max_supervised: int | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        skip_logits: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits, or the loss where there are labels, or both.

        The batch is padded, (B, L) with an ``attention_mask``, or packed, (1, T) with a ``layout``.

        Args:
            input_ids: (B, L) int64, ``config.image_token_id`` wherever a vision token stands.
            pixel_values, frame_positions, media_layout: the frames, as ``encode_media`` takes them.
            attention_mask: (B, L), zero at pads; for padded batches.
            position_ids: (B, L); by default from the layout, or counted over the tokens of the attention mask.
            layout: who sees whom in a packed row.
            past_key_values, use_cache, logits_to_keep: as everywhere in transformers, but no cache is filled beside a
                loss unless use_cache asks for it. If a ``SharedRootCache`` has an
                unread prompt, that is read in place of the inputs, and the last logits of its rows, (B, 1, V), are
                returned.
            inputs_embeds: (B, L, width) instead of input_ids and pixel_values.
            labels: (B, L) int64 token ids, -100 where not supervised.
            num_items_in_batch: what to divide the summed loss by: the supervised tokens of the whole accumulated
                batch, or the sum of their weights. Those of this batch if None.
            max_supervised: an upper bound of the labels that are not -100, as ``LynxProcessor`` counts them. The host
                does not read labels on a device; with this bound only so many rows reach the vocabulary projection.
            skip_logits: whether the output's ``logits`` are None beside a loss, and no (B, L, V) matrix is computed; by
                default in training, and not in evaluation, where metrics may want them. False also says that the caller
                makes a loss of the logits, as a compute_loss_func of ``Trainer`` does.
            kwargs: ``label_weights``, (B, L), by how much each label counts; one weight for all if None.
                ``label_smoothing``, in [0, 1], as in ``torch.nn.functional.cross_entropy``; 0 by default. And the
                inputs of the fusion, which its class describes: ``cross_layout`` or ``media`` for cross-attention,
                ``prefix_lengths`` for a prefix. All others go to the decoder.

        Raises:
            ValueError: the arguments do not fit together; the message names them.
        """
        # Not parameters: Trainer evaluates no loss of a batch that lacks one of those with "label" in their names.
        label_weights, label_smoothing = kwargs.pop("label_weights", None), kwargs.pop("label_smoothing", 0.0)
        fusion_inputs = take_inputs(self.fusion, kwargs)
        trainer_inputs.check(labels, position_ids, num_items_in_batch, skip_logits, kwargs)
        if (past_key_values is not None or use_cache) and drops_caches(self.get_decoder()):
            raise ValueError(
                "gradient checkpointing keeps no keys and values while the model trains: leave out past_key_values "
                "and use_cache=True, or call model.eval() first"
            )
        if isinstance(past_key_values, SharedRootCache):
            given = {"pixel_values": pixel_values, "labels": labels, "layout": layout, **fusion_inputs}
            if names := [name for name, value in given.items() if value is not None]:
                raise ValueError(f"{', '.join(names)} cannot be read into a SharedRootCache; use another cache")
            return self.forward_shared(past_key_values, input_ids, inputs_embeds, attention_mask, **kwargs)
        if use_cache is None and past_key_values is None and not (labels is None and num_items_in_batch is None):
            use_cache = False  # beside a cache, transformers does not look for the texts of a flattened row
        for name in ("output_attentions", "output_hidden_states"):
            if getattr(self.config, name):
                kwargs.setdefault(name, True)
        vision_tokens = None
        if pixel_values is not None:
            vision_tokens = self.encode_media(pixel_values, frame_positions, media_layout)
        if input_ids is not None and inputs_embeds is None:
            inputs_embeds = self.fusion.embed(self, input_ids, vision_tokens)
        elif input_ids is not None or inputs_embeds is None:
            raise ValueError("pass input_ids or inputs_embeds, one of them")
        elif pixel_values is not None:
            raise ValueError("pass pixel_values beside input_ids; inputs_embeds already holds the vision tokens")
        rows = Rows(
            inputs_embeds,
            input_ids,
            attention_mask,
            position_ids,
            layout,
            past_key_values,
            use_cache,
            labels,
            label_weights,
        ).arranged(self)
        rows = self.fusion.feed(self, rows, vision_tokens, fusion_inputs)
        outputs = self.get_decoder()(**rows.decoder_arguments(), **kwargs)
        if kwargs.get("output_attentions") and (
            not outputs.attentions or any(each is None for each in outputs.attentions)
        ):
            raise ValueError(
                f"output_attentions: attn_implementation={self.get_decoder().config._attn_implementation!r} returns no "
                "attention weights; load the model with attn_implementation='eager'"
            )

        hidden = outputs.last_hidden_state
        loss = logits = None
        if labels is None or not (self.training if skip_logits is None else skip_logits):
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            keeps_all = isinstance(logits_to_keep, int) and logits_to_keep == 0
            logits = self.project(hidden[:, kept])
        if labels is not None:
            targets = rows.targets()
            loss = heads.loss(
                self.get_output_embeddings(),
                hidden.flatten(0, 1),
                targets.labels,
                logits=None if logits is None or not keeps_all else logits.flatten(0, 1),
                predictors=targets.predictors,
                weights=targets.weights,
                num_items=num_items_in_batch,
                max_supervised=max_supervised,
                label_smoothing=label_smoothing,
            )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        frame_positions: Tensor | None = None,
        media_layout: SpanLayout | None = None,
        **kwargs: Any,
    ) -> Any:
        """``GenerationMixin.generate`` for a left-padded batch.

        Images are encoded once and prompts are read once, however many beams a row has or answers it gets: the prompts
        go into a ``SharedRootCache``. With ``cache_implementation="static"`` its shapes are static, its steps are
        compiled on GPUs, and its tensors stay allocated for the next generation, in ``static_tensors``. Another cache
        is used where the caller passes one, or where an option needs it.

        Options are transformers' own; ``lynx.generation.options`` refuses those that a Lynx model cannot have. Logits
        processors, stopping criteria and streamers are given what is returned so far: the prompt, its image
        placeholders included (``config.image_token_id``, which no logit stands for), and the new tokens; without
        ``input_ids``, beside ``inputs_embeds``, the new tokens alone.

        Returns:
            What transformers returns: the prompt, its image placeholders included, and the new tokens.

        Raises:
            ValueError: the batch is packed, its inputs do not fit together, or an option is not supported.
        """
        if kwargs.get("layout") is not None:
            raise ValueError("generate takes a left-padded batch, not a packed row; make it with LynxProcessor.pad")
        if (ids := kwargs.pop("inputs", None)) is not None:  # transformers' name for them
            if input_ids is not None:
                raise ValueError("generate: pass input_ids or inputs, not both")
            input_ids = ids
        vision_tokens = None
        if pixel_values is not None:
            vision_tokens = self.encode_media(pixel_values, frame_positions, media_layout)
        inputs = take_inputs(self.fusion, kwargs)
        kwargs |= self.fusion.generation_inputs(self, input_ids, vision_tokens, kwargs.get("attention_mask"), inputs)
        options.check(self, input_ids, kwargs)
        if self.shares_roots(kwargs):
            kwargs = self.with_shared_roots(input_ids, kwargs)
        elif (cache := kwargs.get("past_key_values")) is not None:
            self.check_continued(cache, input_ids, kwargs)
        with no_checkpointing(self):
            return super().generate(input_ids, **kwargs)

    def _replicate_for_data_parallel(self) -> NoReturn:
        """Refused: each tensor of a batch would be cut by its first dimension, but frames are not rows."""
        raise ValueError(
            "torch.nn.DataParallel, which Trainer takes where a process sees several GPUs, does not support a Lynx "
            "model: start the run with torchrun, or set CUDA_VISIBLE_DEVICES to one of them"
        )

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: it reads ids alone."""
        raise ValueError("continuous batching reads input_ids alone, so a Lynx model does not have it; call generate")

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        # Transformers knows the arguments that forward names. Those of the fusion are as good.
        names = self.fusion.inputs
        super()._validate_model_kwargs({name: value for name, value in model_kwargs.items() if name not in names})

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, dict[str, Any]]:
        if input_ids is not None:
            kwargs = self.fusion.repeat_rows(kwargs, input_ids.shape[0], expand_size)
        return super()._expand_inputs_for_generation(expand_size, is_encoder_decoder, input_ids, **kwargs)


def _refuse_unknown_heads(language_model: PreTrainedModel) -> None:
    """Raise ValueError for a decoder whose logits are more than a product with a weight, which is all our loss does."""
    if getattr(language_model.get_output_embeddings(), "bias", None) is not None:
        raise ValueError(
            f"{type(language_model).__name__} has a vocabulary projection with a bias, which Lynx does not support; "
            "use another decoder"
        )
    for name in ("logit_scale", "logits_scaling", "final_logit_softcapping"):
        value = getattr(language_model.config, name, None)
        if value not in (None, 1.0):
            raise ValueError(
                f"{type(language_model).__name__} has {name}={value}, which Lynx does not support; use another decoder"
            )
