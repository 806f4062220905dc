"""Cross-attention fusion: gated blocks between the decoder's layers read the media that stand before a token.

Media stand between the tokens of a text and take no place among them, so that with closed gates the model is its
language model. What the blocks read comes to them as an argument, ``media=``, through the decoder's keyword arguments.
"""

from collections.abc import Iterable, Sequence
from functools import cache
from itertools import groupby, pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedConfig

from lynx.fusion import layers
from lynx_kernels import SpanLayout
from lynx_kernels.nn import GatedCrossAttention


class CrossAttentionCache(DynamicCache):
    """A decoder's cache that holds the keys and values of the media too, those of each block computed once.

    They stand once, however many rows of the batch see them: a row, a beam say, holds only the span of keys that its
    next tokens see.

    Attributes:
        spans: (rows, 2) int32, that span's first key and its end; no rows before the prompt is read.
        keys_values: of the blocks so far, by their number.
    """

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config=config)
        self.spans = torch.empty(0, 2, dtype=torch.int32)
        self.keys_values: dict[int, tuple[Tensor, Tensor]] = {}
        self.num_keys = self.max_span_length = 0

    def start(self, layout: SpanLayout, rows: int) -> None:
        """Note what tokens after the prompt will see: what the last token of each of its rows sees."""
        last = torch.arange(1, rows + 1, device=layout.segments.device) * (layout.num_queries // rows) - 1
        segment = torch.searchsorted(layout.segments[:, 0].contiguous(), last.int(), right=True) - 1
        self.spans = layout.segments[segment, 1:]
        self.keys_values = {}
        self.num_keys, self.max_span_length = layout.num_keys, layout.max_span_length

    def layout(self, length: int) -> SpanLayout:
        """Which media the next ``length`` tokens of every row see."""
        return SpanLayout.from_equal_segments(self.spans, length, self.num_keys, max_span_length=self.max_span_length)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i goes on from what row ``beam_idx[i]`` was."""
        super().reorder_cache(beam_idx)
        self.spans = self.spans.index_select(0, beam_idx.to(self.spans.device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row ``repeats`` times."""
        super().batch_repeat_interleave(repeats)
        self.spans = self.spans.repeat_interleave(repeats, 0)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only the rows ``indices``."""
        super().batch_select_indices(indices)
        self.spans = self.spans[indices]


class Media(NamedTuple):
    """What the blocks read in one pass through the decoder.

    Attributes:
        tokens: (K, width), the vision tokens of all items.
        layout: which of the batch's text tokens see which of them.
        cache: keeps the blocks' keys and values from one pass to the next; None where there is only one.
    """

    tokens: Tensor
    layout: SpanLayout
    cache: CrossAttentionCache | None = None

    def repeat_rows(self, rows: int, repeats: int) -> "Media":
        """For a batch of ``rows`` rows in which each is repeated, as ``generate`` does it for beams."""
        spans = [each for row in _rows_of(self.layout, rows) for each in row * repeats]
        return self._replace(layout=_from_rows(spans, self.layout.num_keys))

    def lengthen_rows(self, rows: int, length: int) -> "Media":
        """For rows of ``length`` tokens, more than there were: the new ones see what the last one saw."""
        more = length - self.layout.num_queries // rows
        spans = [each for row in _rows_of(self.layout, rows) for each in (*row, (more, *row[-1][1:]))]
        return self._replace(layout=_from_rows(spans, self.layout.num_keys))


def text_layout(
    rows: Iterable[tuple[int, Sequence[int]] | tuple[int, Sequence[int], Sequence[int]]], num_latents: int, *, sees: str
) -> SpanLayout:
    """Which tokens of some texts see which vision tokens.

    A token sees the media before it: all of its text (``sees="all"``) or those of the nearest place where some stand
    (``"preceding"``; where several stand together, with no token between them, it sees them all). Before the first
    place it sees none.

    Args:
        rows: of each text the number of its tokens, and of each of its items, in order, the number of tokens before it;
            and, where more texts follow about the same items, the lengths of these: in them, what the first text ends
            with seeing stands behind the first token.
        num_latents: vision tokens of an item; those of all items stand one after another.
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


def condition(
    media: Media | None,
    inputs_embeds: Tensor,
    past_key_values: Cache | None,
    config: PreTrainedConfig,
    *,
    media_width: int,
    caches: bool,
) -> tuple[Media, Cache | None]:
    """What the blocks read in this pass, and the cache it goes on from or begins.

    Args:
        media: of the batch; None where it has none. Of no meaning where the cache is not empty: it holds them.
        inputs_embeds: (B, L, width) of the text.
        past_key_values: None, or a cache of transformers' default kind, which a ``CrossAttentionCache`` replaces.
        config: the decoder's.
        media_width: of vision tokens.
        caches: whether to begin a cache where there is none.

    Raises:
        ValueError: the cache is of another kind or holds no media, or ``media`` describes other rows.
    """
    rows, length = inputs_embeds.shape[:2]
    if past_key_values is not None and not isinstance(past_key_values, CrossAttentionCache):
        # An empty one is what generate makes by itself.
        is_default = type(past_key_values) is DynamicCache and not getattr(past_key_values, "offloading", False)
        if not is_default or past_key_values.get_seq_length() > 0:
            raise ValueError(
                f"past_key_values is a {type(past_key_values).__name__} that cannot hold media; with "
                "fusion='cross_attention' pass none, or the CrossAttentionCache that came out before"
            )
        past_key_values = CrossAttentionCache(config)
    if past_key_values is not None and past_key_values.get_seq_length() > 0:
        tokens = inputs_embeds.new_empty(0)  # every block's keys and values are there
        return Media(tokens, past_key_values.layout(length), past_key_values), past_key_values
    if media is None:
        no_media = SpanLayout.from_spans([rows * length], [(0, 0)], 0)
        media = Media(inputs_embeds.new_empty(0, media_width), no_media)
    if media.layout.num_queries < rows * length and media.layout.num_queries % rows == 0:
        media = media.lengthen_rows(rows, length)
    if media.layout.num_queries != rows * length:
        raise ValueError(f"cross_layout describes {media.layout.num_queries} tokens, the batch has {rows} x {length}")
    media = media._replace(layout=media.layout.to(inputs_embeds.device))
    if past_key_values is None and caches:
        past_key_values = CrossAttentionCache(config)
    if past_key_values is not None:
        past_key_values.start(media.layout, rows)
    return media._replace(cache=past_key_values), past_key_values


def add_blocks(decoder: nn.ModuleList, *, frequency: int, width: int, media_width: int, **options) -> set[str]:
    """Put a gated block before every ``frequency``-th layer of the ``decoder``: the k-th, the 2k-th and so on.

    Args:
        options: of ``GatedCrossAttention``.

    Returns:
        The class names the changed layers now have, for ``_no_split_modules``.
    """
    names = set()
    for number, layer in enumerate(decoder[frequency - 1 :: frequency]):
        names.add(
            layers.insert(layer, "cross_attention", GatedCrossAttention(width, media_width, **options), _with_block)
        )
        layer.cross_attention_number = number  # type: ignore[assignment]  # its place in the cache
    return names


@cache
def _with_block(layer_class: type[nn.Module]) -> type[nn.Module]:
    def forward(self, hidden_states, *args, media: Media | None = None, **kwargs):
        if media is None:
            raise ValueError(
                f"no media reached {type(self).__name__}: run the decoder through its Lynx model; one that keeps "
                "keyword arguments from its layers cannot have cross-attention"
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
    """Of each row of a batch the (length, first key, end of the keys) of its segments, cut where a row ends."""
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
