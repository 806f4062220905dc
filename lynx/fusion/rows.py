"""Rows of tokens as they enter the decoder, packed or padded: the position of each token, and what it sees."""

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Cache

from lynx.data.conversation import IGNORED
from lynx_kernels import PackedLayout
from lynx_kernels.integrations import transformers as attention_integration
from lynx_kernels.integrations.attention_mask import AttentionMask
from lynx_kernels.layout import require

if TYPE_CHECKING:
    from lynx.config import LynxConfig
    from lynx.model import LynxForConditionalGeneration


class Targets(NamedTuple):
    """The arguments of ``heads.loss``: labels (N,), and their predictors and weights."""

    labels: Tensor
    predictors: Tensor | None
    weights: Tensor | None


@dataclass
class Rows:
    """A batch of rows: what the decoder is called with, and what a fusion needs to know to change it.

    Attributes:
        inputs_embeds: (B, L, width), or (1, T, width) of a packed row.
        input_ids: (B, L) int64; None where the caller passed embeddings.
        attention_mask: (B, L), zero at pads; or a mask as the decoder takes it.
        position_ids: (B, L) int64; None where the decoder counts.
        layout: who sees whom in a packed row; None for padded rows.
        past_key_values: the cache that the rows continue.
        use_cache: as in transformers.
        labels: (B, L) int64; None where logits are wanted.
        label_weights: (B, L), of the labels; None where all weigh the same.
        keywords: what the decoder hands to its layers.
    """

    inputs_embeds: Tensor
    input_ids: Tensor | None = None
    attention_mask: Tensor | AttentionMask | None = None
    position_ids: Tensor | None = None
    layout: PackedLayout | None = None
    past_key_values: Cache | None = None
    use_cache: bool | None = None
    labels: Tensor | None = None
    label_weights: Tensor | None = None
    keywords: dict[str, Any] = field(default_factory=dict)

    @property
    def starts(self) -> bool:
        """Whether these are the first tokens: the cache holds nothing yet."""
        return self.past_key_values is None or self.past_key_values.get_seq_length() == 0

    def decoder_arguments(self) -> dict[str, Any]:
        """The keyword arguments to call the decoder with."""
        names = ("inputs_embeds", "attention_mask", "position_ids", "past_key_values", "use_cache")
        return {**{name: getattr(self, name) for name in names}, **self.keywords}

    def targets(self) -> Targets:
        """What is to be predicted, and from which rows.

        The first token of a branch is predicted by the last one of what it continues, which may predict several.

        Raises:
            ValueError: the labels are missing, labels or weights have another shape than the rows, or a supervised
                token is seen by the token that would predict it.
        """
        shape = self.inputs_embeds.shape[:2]
        if self.labels is None:
            raise ValueError("these rows have no labels; pass labels to get a loss")
        for name, each in (("labels", self.labels), ("label_weights", self.label_weights)):
            if each is not None and each.shape != shape:
                raise ValueError(f"{name} have shape {tuple(each.shape)}, the batch {tuple(shape)}")
        weights = self.label_weights
        if self.layout is None:
            shifted = F.pad(self.labels[:, 1:], (0, 1), value=IGNORED).flatten()
            weights = None if weights is None else F.pad(weights[:, 1:], (0, 1)).flatten()
            return Targets(shifted, None, weights)
        token = torch.arange(self.layout.num_tokens, device=self.labels.device)
        tokens, predictors = self.layout.select(torch.where(self.labels[0] == IGNORED, IGNORED, token))
        is_token = tokens != IGNORED
        found = tokens.clamp(min=0)
        labels = torch.where(is_token, self.labels[0][found], IGNORED)
        weights = None if weights is None else torch.where(is_token, weights[0][found], 0)
        return Targets(labels, predictors, weights)

    def arranged(self, model: "LynxForConditionalGeneration") -> "Rows":
        """These rows with the mask and the positions that causal text has, packed or padded.

        Raises:
            ValueError: the layout or the mask does not fit the rows, the cache, the model or its attention.
            TypeError: the layout is not a PackedLayout.
        """
        if self.layout is None:
            return _padded(self)
        return _packed(self, model.config, model.get_decoder().config._attn_implementation)


def _packed(rows: Rows, config: "LynxConfig", implementation: str) -> Rows:
    layout, shape = rows.layout, rows.inputs_embeds.shape[:2]
    if not isinstance(layout, PackedLayout):
        raise TypeError(f"layout is a {type(layout).__name__}, expected a PackedLayout")
    if rows.attention_mask is not None:
        raise ValueError("pass attention_mask (padded) or layout (packed), not both")
    if rows.past_key_values is not None:
        raise ValueError("a packed row cannot continue past_key_values; pass a padded batch")
    if shape != (1, layout.num_tokens):
        raise ValueError(f"a packed batch is (1, {layout.num_tokens}) as its layout says, got {tuple(shape)}")
    if layout.has_full and config.prefix_is_causal:
        raise ValueError("the layout has full segments, but the model was made with prefix_is_causal=True")
    if not (layout.has_full or config.prefix_is_causal) and rows.input_ids is not None:
        is_image = rows.input_ids == config.image_token_id
        message = "the layout has no full segment, but vision tokens, and the model prefix_is_causal=False"
        require(~(is_image[:, 1:] & is_image[:, :-1]).any(), message)
    if implementation != attention_integration.NAME:
        raise ValueError(
            f"packed rows need attn_implementation={attention_integration.NAME!r}, the decoder has {implementation!r}, "
            "which cannot read a layout"
        )
    layout = layout.to(rows.inputs_embeds.device)
    return replace(
        rows,
        layout=layout,
        attention_mask=attention_integration.packed_mask(layout),
        position_ids=layout.position_ids[None] if rows.position_ids is None else rows.position_ids,
    )


def _padded(rows: Rows) -> Rows:
    mask, shape = rows.attention_mask, rows.inputs_embeds.shape[:2]
    if rows.position_ids is not None or mask is None or rows.past_key_values is not None:
        return rows
    if mask.shape != shape:
        raise ValueError(f"attention_mask has shape {tuple(mask.shape)}, the batch {tuple(shape)}")
    return replace(rows, position_ids=(mask.long().cumsum(-1) - 1).clamp(min=0))
