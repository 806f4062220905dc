"""Cross-attention fusion: gated blocks between the decoder's layers read the media that come before a token.

Media stand between the tokens of a text and are not tokens themselves, so with closed gates the model is its language
model. What the blocks read reaches them as an argument, ``media=``, through the decoder's keyword arguments.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from itertools import groupby, pairwise
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedConfig

from lynx.fusion.base import Fusion, check_frequency
from lynx.fusion.rows import Rows
from lynx_kernels import SpanLayout
from lynx_kernels.integrations import layers
from lynx_kernels.nn import GatedCrossAttention

if TYPE_CHECKING:
    from lynx.config import LynxConfig
    from lynx.data.conversation import Sample
    from lynx.model import LynxForConditionalGeneration


class CrossAttentionCache(DynamicCache):
    """A decoder's cache that also holds the keys and values of the media, computed once for each block.

    They are stored once, however many rows of the batch see them. A row (a beam, for instance) holds only the span of
    keys that its next tokens see.

    Attributes:
        spans: (rows, 2) int32, the first key and the end of that span; (0, 2) before the prompt is read.
        keys_values: the keys and values of the blocks that have run, by the number of the block.
    """

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config=config)
        self._hold_no_media()

    @classmethod
    def adopt(cls, cache: DynamicCache) -> "CrossAttentionCache":
        """Make an empty cache hold media too: the same object, so that whoever passed it can go on from it."""
        cache.__class__ = cls
        assert isinstance(cache, cls)
        cache._hold_no_media()
        return cache

    def _hold_no_media(self) -> None:
        self.spans = torch.empty(0, 2, dtype=torch.int32)
        self.keys_values: dict[int, tuple[Tensor, Tensor]] = {}
        self.num_keys = self.max_span_length = 0

    def start(self, layout: SpanLayout, rows: int) -> None:
        """Remember what the tokens after the prompt will see: what the last token of each row sees."""
        last = torch.arange(1, rows + 1, device=layout.segments.device) * (layout.num_queries // rows) - 1
        segment = torch.searchsorted(layout.segments[:, 0].contiguous(), last.int(), right=True) - 1
        self.spans = layout.segments[segment, 1:]
        self.keys_values = {}
        self.num_keys, self.max_span_length = layout.num_keys, layout.max_span_length

    def layout(self, length: int) -> SpanLayout:
        """Which media the next ``length`` tokens of each row see."""
        return SpanLayout.from_equal_segments(self.spans, length, self.num_keys, max_span_length=self.max_span_length)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i continues what was row ``beam_idx[i]``."""
        self.holds_beams = True
        super().reorder_cache(beam_idx)
        self.spans = self.spans.index_select(0, beam_idx.to(self.spans.device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row ``repeats`` times."""
        super().batch_repeat_interleave(repeats)
        self.spans = self.spans.repeat_interleave(repeats, 0)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only the rows ``indices``."""
        super().batch_select_indices(indices)
        self.spans = self.spans[indices]


class Media(NamedTuple):
    """What the blocks read in one pass through the decoder.

    Attributes:
        tokens: (K, width), the vision tokens of all items.
        layout: which text tokens of the batch see which of them.
        cache: keeps the blocks' keys and values from one pass to the next; None where there is only one pass.
    """

    tokens: Tensor
    layout: SpanLayout
    cache: CrossAttentionCache | None = None

    def repeat_rows(self, rows: int, repeats: int) -> "Media":
        """The media for a batch of ``rows`` rows after each row is repeated, as ``generate`` does for beams."""
        spans = [each for row in _rows_of(self.layout, rows) for each in row * repeats]
        return self._replace(layout=_from_rows(spans, self.layout.num_keys))

    def lengthen_rows(self, rows: int, length: int) -> "Media":
        """The media for rows lengthened to ``length`` tokens; the new tokens see what the last one saw."""
        more = length - self.layout.num_queries // rows
        spans = [each for row in _rows_of(self.layout, rows) for each in (*row, (more, *row[-1][1:]))]
        return self._replace(layout=_from_rows(spans, self.layout.num_keys))


def text_layout(
    rows: Iterable[tuple[int, Sequence[int]] | tuple[int, Sequence[int], Sequence[int]]], num_latents: int, *, sees: str
) -> SpanLayout:
    """Which tokens of some texts see which vision tokens.

    A token sees the media before it in its text: all of them (``sees="all"``), or those at the nearest place
    (``"preceding"``; where several stand together, with no token between them, it sees all of these). Before the first
    place it sees nothing.

    Args:
        rows: for each text the number of its tokens, and for each of its items, in order, the number of tokens before
            it. Where more texts follow about the same items, also their lengths: each of them sees, from its second
            token on, what the last token of the first text sees.
        num_latents: vision tokens of an item; those of all items are concatenated.
        sees: as ``LynxConfig.sees_media``.
    """
    lengths, spans, end = [], [], 0
    for length, places, *more in rows:
        token, first = 0, end
        span = first, first
        for place, items in groupby(places):
            lengths.append(place - token)
            spans.append(span)
            begin, end = end, end + num_latents * len(list(items))
            token, span = place, (first if sees == "all" else begin, end)
        lengths.append(length - token)
        spans.append(span)
        for other in more[0] if more else ():
            lengths += [1, other - 1]
            spans += [(end, end), span]
    return SpanLayout.from_spans(lengths, spans, end)


class CrossAttentionFusion(Fusion):
    """A gated block before every k-th layer of the decoder, whose text tokens read the resampler's tokens.

    Options of the configuration:
        cross_attention_frequency: a block stands before every k-th decoder layer, the k-th, the 2k-th and so on, as in
            Open-Flamingo.
        cross_attention_heads, cross_attention_head_dim, cross_attention_expansion: the blocks' attention heads, the
            width of a head, and the feed-forward's width over the model's.

    Inputs of the model:
        cross_layout: which text tokens see which vision tokens, from ``text_layout``; needed with pixel_values.
        media: what ``read_media`` made of pixel_values and cross_layout, instead of these.
    """

    name = "cross_attention"
    options = {  # noqa: RUF012
        "cross_attention_frequency": 1, "cross_attention_heads": 8, "cross_attention_head_dim": 64,
        "cross_attention_expansion": 4,
    }  # fmt: skip
    inputs = ("cross_layout", "media")
    submodule = "cross_attention"
    param_group = "cross_attention"
    param_group_help = "the gated cross-attention blocks in the decoder"
    shares_roots = False

    def check(self, config: "LynxConfig") -> None:
        check_frequency("cross_attention_frequency", config)
        if config.bridge != "resampler":
            raise ValueError(f"fusion='cross_attention' needs bridge='resampler', not {config.bridge!r}")
        if not config.prefix_is_causal:
            raise ValueError(
                "prefix_is_causal=False, but with fusion='cross_attention' there is no prefix; leave it out"
            )

    def install(self, decoder: nn.ModuleList, config: "LynxConfig") -> set[str]:
        width, frequency = config.text_config.hidden_size, config.cross_attention_frequency
        names = set()
        for number, layer in enumerate(decoder[frequency - 1 :: frequency]):
            block = GatedCrossAttention(
                width,
                config.vision_config.hidden_size if config.resampler_concatenates_latents else width,
                num_heads=config.cross_attention_heads,
                head_dim=config.cross_attention_head_dim,
                expansion=config.cross_attention_expansion,
            )
            names.add(layers.insert(layer, self.submodule, block, _with_block))
            layer.cross_attention_number = number  # type: ignore[assignment]  # its place in the cache
        return names

    def flops_rows(self, name: str) -> Literal["tokens", "latents"]:
        return "latents" if ".to_kv." in name else "tokens"

    def prefix_length(self, num_vision_tokens: int) -> int:
        return 0

    def batch_inputs(
        self, samples: Sequence["Sample"], *, num_latents: int, sees_media: str, padded_length: int | None = None
    ) -> dict[str, Any]:
        texts: list[tuple[int, list[int], tuple[int, ...]]] = []
        for sample in samples:
            first, *others = sample.branch_lengths or [len(sample.token_ids)]
            if padded_length is not None:
                texts.append((padded_length - first, [], ()))
            places = [0] * len(sample.media) if sample.places is None else sample.places
            texts.append((first, places, tuple(others)))
        return {"cross_layout": text_layout(texts, num_latents, sees=sees_media)}

    def embed(self, model: "LynxForConditionalGeneration", input_ids: Tensor, vision_tokens: Tensor | None) -> Tensor:
        return model.embed(input_ids)

    def feed(
        self,
        model: "LynxForConditionalGeneration",
        rows: Rows,
        vision_tokens: Tensor | None,
        inputs: Mapping[str, Any],
    ) -> Rows:
        media, cross_layout = inputs.get("media"), inputs.get("cross_layout")
        if vision_tokens is not None or cross_layout is not None:
            if not rows.starts:
                raise ValueError(
                    "past_key_values already holds the media of its text; to add media, run the whole text again"
                )
            media = read_media(model, vision_tokens, cross_layout, rows.input_ids)
        config = model.get_decoder().config
        wanted = getattr(config, "use_cache", True) and not model.training if rows.use_cache is None else rows.use_cache
        begins_cache = wanted and rows.labels is None and rows.layout is None
        past_key_values = _media_cache(rows.past_key_values, config, begins_cache)
        media = _in_this_pass(model, media, rows, past_key_values)
        return replace(rows, past_key_values=past_key_values, keywords={**rows.keywords, "media": media})

    def generation_inputs(
        self,
        model: "LynxForConditionalGeneration",
        input_ids: Tensor | None,
        vision_tokens: Tensor | None,
        attention_mask: Tensor | None,
        inputs: Mapping[str, Any],
    ) -> dict[str, Any]:
        media, cross_layout = inputs.get("media"), inputs.get("cross_layout")
        if vision_tokens is not None or cross_layout is not None:
            media = read_media(model, vision_tokens, cross_layout, input_ids)
        return {} if media is None else {"media": media}

    def repeat_rows(self, inputs: dict[str, Any], rows: int, repeats: int) -> dict[str, Any]:
        media: Media | None = inputs.get("media")
        return inputs if media is None else {**inputs, "media": media.repeat_rows(rows, repeats)}


def read_media(
    model: "LynxForConditionalGeneration",
    vision_tokens: Tensor | None,
    cross_layout: SpanLayout | None,
    input_ids: Tensor | None,
) -> Media:
    """What the blocks read of a batch.

    Args:
        model: whose blocks they are.
        vision_tokens: (K, width) of all items; None where there are no media.
        cross_layout: which text tokens see which of them.
        input_ids: (B, L) of the text; None where it is not known.

    Raises:
        ValueError: cross_layout is missing, or describes other vision tokens or another text.
    """
    if cross_layout is None:
        raise ValueError("cross_layout is missing, which says who sees the images; LynxProcessor's batches have one")
    if input_ids is not None and cross_layout.num_queries != input_ids.numel():
        raise ValueError(
            f"cross_layout describes {cross_layout.num_queries} tokens, but input_ids holds {input_ids.numel()}"
        )
    if vision_tokens is None:
        latents = model.resampler.latents
        device = cross_layout.segments.device if latents.is_meta else latents.device  # offloaded, they are on meta
        vision_tokens = torch.empty(0, latents.shape[1], dtype=latents.dtype, device=device)
    if cross_layout.num_keys != vision_tokens.shape[0]:
        raise ValueError(
            f"cross_layout describes {cross_layout.num_keys} vision tokens, but the images give {len(vision_tokens)}"
        )
    return Media(vision_tokens, cross_layout)


def _no_media(model: "LynxForConditionalGeneration", like: Tensor) -> Media:
    """The media of a batch of text alone, (B, L, width): there are no vision tokens."""
    width = model.resampler.latents.shape[1]
    return Media(like.new_empty(0, width), SpanLayout.from_spans([like.shape[:2].numel()], [(0, 0)], 0))


def _media_cache(
    past_key_values: Cache | None, config: PreTrainedConfig, begins_cache: bool
) -> CrossAttentionCache | None:
    """The cache that a pass continues or begins; None for neither.

    Raises:
        ValueError: the cache is of a kind that cannot hold media.
    """
    if isinstance(past_key_values, CrossAttentionCache):
        return past_key_values
    if past_key_values is None:
        return CrossAttentionCache(config) if begins_cache else None
    # generate passes an empty DynamicCache, and so may its caller.
    is_default = type(past_key_values) is DynamicCache and not getattr(past_key_values, "offloading", False)
    if not is_default or past_key_values.get_seq_length() > 0:
        raise ValueError(
            f"past_key_values is a {type(past_key_values).__name__}, which cannot hold media; with "
            "fusion='cross_attention' leave out cache_implementation, and pass no past_key_values or the "
            "CrossAttentionCache of an earlier output"
        )
    return CrossAttentionCache.adopt(past_key_values)


def _in_this_pass(
    model: "LynxForConditionalGeneration",
    media: Media | None,
    rows: Rows,
    past_key_values: CrossAttentionCache | None,
) -> Media:
    """What the blocks read in this pass: the content of a cache that is not empty, or else ``media``.

    Raises:
        ValueError: ``media`` describes other rows.
    """
    batch_size, length = rows.inputs_embeds.shape[:2]
    if past_key_values is not None and past_key_values.get_seq_length() > 0:
        tokens = rows.inputs_embeds.new_empty(0)  # every block's keys and values are there
        return Media(tokens, past_key_values.layout(length), past_key_values)
    if media is None:
        media = _no_media(model, rows.inputs_embeds)
    if media.layout.num_queries < batch_size * length and media.layout.num_queries % batch_size == 0:
        media = media.lengthen_rows(batch_size, length)
    if media.layout.num_queries != batch_size * length:
        raise ValueError(
            f"cross_layout describes {media.layout.num_queries} tokens, the batch has {batch_size} x {length}"
        )
    media = media._replace(layout=media.layout.to(rows.inputs_embeds.device), cache=past_key_values)
    if past_key_values is not None:
        past_key_values.start(media.layout, batch_size)
    return media


@cache
def _with_block(layer_class: type[nn.Module]) -> type[nn.Module]:
    def forward(self: Any, hidden_states: Tensor, *args: Any, media: Media | None = None, **kwargs: Any) -> Any:
        if media is None:
            raise ValueError(
                f"no media reached {type(self).__name__}: run the decoder through its Lynx model; a decoder that does "
                "not pass keyword arguments to its layers cannot have cross-attention"
            )
        keys_values = _keys_values(self.cross_attention, self.cross_attention_number, media)
        hidden_states = self.cross_attention(hidden_states, keys_values, media.layout)
        return layer_class.forward(self, hidden_states, *args, **kwargs)

    return layers.subclass(layer_class, "WithCrossAttention", forward, _with_block)


def _keys_values(block: GatedCrossAttention, number: int, media: Media) -> tuple[Tensor, Tensor]:
    if media.cache is None:
        return block.keys_values(media.tokens)
    if number not in media.cache.keys_values:
        media.cache.keys_values[number] = block.keys_values(media.tokens)
    return media.cache.keys_values[number]


def _rows_of(layout: SpanLayout, rows: int) -> list[list[tuple[int, int, int]]]:
    """For each row of a batch its segments, cut where a row ends: (length, first key, end of the keys)."""
    table, length = layout.segments.tolist(), layout.num_queries // rows
    result: list[list[tuple[int, int, int]]] = [[] for _ in range(rows)]
    for (query, start, end), (next_query, _, _) in pairwise(table):
        while query < next_query:
            row = query // length
            stop = min(next_query, (row + 1) * length)
            result[row].append((stop - query, start, end))
            query = stop
    return result


def _from_rows(segments: list[tuple[int, int, int]], num_keys: int) -> SpanLayout:
    return SpanLayout.from_spans([each[0] for each in segments], [each[1:] for each in segments], num_keys)
