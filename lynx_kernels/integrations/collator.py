"""Several samples of a vision-language model in one packed row, each as if it were alone."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from lynx_kernels.integrations.head_loss import IGNORE
from lynx_kernels.integrations.transformers import packed_mask
from lynx_kernels.layout import PackedLayout

_ROWS_OF_IMAGES = {"idefics", "idefics2", "idefics3", "mllama", "smolvlm"}  # their pixel values are (rows, images, ...)
_SEEN_IMAGES = ("cross_attention_mask", "image_attention_mask")  # (rows, tokens, images, ...)
_FIRST_POSITION = {"paligemma": 1}
_OF_A_FORMER = "qformer_"  # what a Q-Former reads beside each image

Sample = Mapping[str, Any]


@dataclass(frozen=True)
class PackedSamples:
    """Samples in one packed row.

    Attributes:
        batch: what ``PackedCollator`` returns.
        layout: that of ``batch["attention_mask"]``.
        places: for each sample, for each of its conversations: (L,) int64, where its tokens stand in the row. Tokens
            that conversations share stand once.
    """

    batch: dict[str, Any]
    layout: PackedLayout
    places: list[list[Tensor]]


class PackedCollator:
    """Makes one packed row of samples: a ``data_collator`` for transformers' ``Trainer``.

    A sample is what a processor returns for one conversation, with ``labels`` if it is trained on. Or it is a list of
    them, which begin alike and have the same images: they become a tree, in which what they share stands once. Each
    token gets the position that it has in its own conversation, by the model's ``get_rope_index`` where it has one.

    Args:
        model: of transformers, changed by ``apply``; before other libraries wrap it.
        token_budget: the most tokens of a row. More are an error: plan batches with ``lynx_kernels.PackPlanner``.
        placeholder: a conversation with an image, for training on several ranks: it is added, without labels, to rows
            that hold no image, so that every rank runs the vision tower. It changes no other token.
    """

    def __init__(
        self, model: PreTrainedModel, *, token_budget: int | None = None, placeholder: Sample | None = None
    ) -> None:
        self.name: str = model.config.model_type
        self.token_budget = token_budget
        self.placeholder = placeholder
        self._rope_index: Callable[..., Any] | None = next(
            (each.get_rope_index for each in model.modules() if hasattr(each, "get_rope_index")), None
        )

    def __call__(self, samples: Sequence[Sample | Sequence[Sample]]) -> dict[str, Any]:
        """The row.

        Returns:
            ``input_ids`` and other values per token (1, T), ``attention_mask`` (a packed mask of the layout),
            ``position_ids`` (1, T), or (3, 1, T) for M-RoPE; ``labels`` (1, T), -100 where a tree begins; pixels and
            their sizes, end to end.

        Raises:
            ValueError: names the sample: too many tokens; different keys, images or labels where conversations are to
                share them; inputs that have no packed form.
        """
        packed = self._pack(samples)
        if "labels" in packed.batch:
            unpredicted = packed.layout.predictors < 0
            packed.batch["labels"] = packed.batch["labels"].masked_fill(unpredicted, IGNORE)
        return packed.batch

    def pack(self, samples: Sequence[Sample | Sequence[Sample]]) -> PackedSamples:
        """The row, and where each conversation's tokens stand in it.

        Labels are left out: what conversations share may have other labels in each.

        Raises:
            ValueError: as when called, labels aside.
        """

        def unlabelled(sample: Sample) -> Sample:
            return {name: value for name, value in sample.items() if name != "labels"}

        return self._pack(
            [unlabelled(each) if isinstance(each, Mapping) else list(map(unlabelled, each)) for each in samples]
        )

    def _pack(self, samples: Sequence[Sample | Sequence[Sample]]) -> PackedSamples:
        rows: list[dict[str, Tensor]] = []  # per token, for each segment
        owners: list[int] = []  # of the segments, numbers of samples
        media: list[dict[str, Tensor]] = []
        counts: list[int] = []  # of the images that a cross-attention mask names, of each sample
        places: list[list[Tensor]] = []
        lengths: list[int] = []
        parents: list[int] = []

        def add(members: list[Sample], number: int) -> None:
            read = [self._read(member, number) for member in members]
            tokens, pixels = [each[0] for each in read], [each[1] for each in read]
            if any(not _equal(pixels[0], each) for each in pixels[1:]):
                raise ValueError(
                    f"sample {number}: conversations of one tree must have the same images, in their order"
                )
            media.append(pixels[0])
            counts.append(next((len(tokens[0][name]) for name in _SEEN_IMAGES if name in tokens[0]), 0))
            parts: list[list[Tensor]] = [[] for _ in members]
            _add_tree(tokens, parts, -1, 0, rows, lengths, parents, number)
            owners.extend([len(counts) - 1] * (len(rows) - len(owners)))
            places.append([torch.cat(each) for each in parts])

        for number, sample in enumerate(samples):
            add([sample] if isinstance(sample, Mapping) else list(sample), number)
        if self.placeholder is not None and not any(media):
            add([self.placeholder], len(samples))
            places.pop()
        total = sum(lengths)
        if self.token_budget is not None and total > self.token_budget:
            raise ValueError(
                f"{len(samples)} samples have {total} tokens, and token_budget is {self.token_budget}; "
                f"plan batches with lynx_kernels.PackPlanner, or raise the budget"
            )
        layout = PackedLayout.from_segments(lengths, parents)
        _fill(rows, {"labels": IGNORE} if self.placeholder is not None and len(places) < len(media) else {})
        images = _number_images(rows, owners, counts)
        joined = {name: torch.cat([each[name] for each in rows], -1) for name in _common(rows, "values per token")}
        batch = {
            name: each.movedim(-1, 0)[None] if name in _SEEN_IMAGES else each[..., None, :]  # (1, T), or (3, 1, T)
            for name, each in joined.items()
        }
        side = 1 if self.name in _ROWS_OF_IMAGES else 0
        having = [each for each in media if each]
        for name in _common(having, "images"):
            values = [each[name] for each in having]
            if "image_sizes" in having[0] and name.startswith("pixel"):
                values = _to_one_size(values)  # as a processor does for one batch
            if name.startswith(_OF_A_FORMER):
                longest = max(each.shape[1] for each in values)
                values = [functional.pad(each, (0, longest - each.shape[1])) for each in values]
            batch[name] = torch.cat(values, side)
        mask = replace(packed_mask(layout), images=images)
        return PackedSamples({**batch, "attention_mask": mask}, layout, places)

    def _read(self, sample: Sample, number: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Values per token, (L,) or (3, L), with positions; and the rest."""
        values = {name: torch.as_tensor(value) for name, value in sample.items() if value is not None}
        if "input_ids" not in values:
            raise ValueError(f"sample {number} has no input_ids, but {', '.join(values) or 'nothing'}")
        ids = values["input_ids"]
        if ids.dim() > 2 or (ids.dim() == 2 and len(ids) != 1):
            raise ValueError(f"sample {number}: input_ids are {tuple(ids.shape)}, must be of one conversation")
        is_token = values.pop("attention_mask", torch.ones_like(ids)).flatten().bool()
        length = ids.shape[-1]
        per_token = {
            name: value.reshape(-1)[is_token]
            for name, value in values.items()
            if value.numel() == length
            and value.shape[-1] == length
            and not name.startswith(("pixel", "image_", "video_", _OF_A_FORMER))
        }
        rest = {name: value for name, value in values.items() if name not in per_token}
        if "qformer_input_ids" in rest:  # several are padded to one length
            rest.setdefault("qformer_attention_mask", torch.ones_like(rest["qformer_input_ids"]))
        for name in rest.keys() & set(_SEEN_IMAGES):
            per_token[name] = rest.pop(name)[0][is_token].movedim(0, -1)  # (images, ..., L)
        per_token["position_ids"] = self._positions(per_token, rest)
        return per_token, rest

    def _positions(self, per_token: dict[str, Tensor], rest: dict[str, Tensor]) -> Tensor:
        ids = per_token["input_ids"]
        if self._rope_index is None:
            return torch.arange(len(ids)) + _FIRST_POSITION.get(self.name, 0)
        known = inspect.signature(self._rope_index).parameters
        given = (
            {name: each[None] for name, each in per_token.items()}
            | rest
            | {"attention_mask": torch.ones_like(ids)[None]}
        )
        if "mm_token_type_ids" in known:  # processors may leave them out where all is text
            given.setdefault("mm_token_type_ids", torch.zeros_like(ids)[None])
        positions: Tensor = self._rope_index(**{name: each for name, each in given.items() if name in known})[0]
        return positions[:, 0]


def _add_tree(
    members: list[dict[str, Tensor]],
    places: list[list[Tensor]],
    parent: int,
    start: int,
    rows: list[dict[str, Tensor]],
    lengths: list[int],
    parents: list[int],
    number: int,
) -> None:
    """Append the segments of conversations alike up to ``start``, depth first, and to ``places`` where they stand."""
    ids = [each["input_ids"][start:] for each in members]
    shortest = min(map(len, ids))
    same = torch.stack([each[:shortest] == ids[0][:shortest] for each in ids]).all(0)
    shared = int(same.int().cumprod(0).sum())
    end = start + shared
    segment = {name: each[..., start:end] for name, each in members[0].items()}
    for each in members[1:]:
        if not _equal(segment, {name: value[..., start:end] for name, value in each.items()}):
            raise ValueError(
                f"sample {number}: conversations of one tree have the same tokens up to token {end}, but other labels "
                f"or types there"
            )
    place = torch.arange(shared) + sum(lengths)
    rows.append(segment)
    lengths.append(shared)
    parents.append(parent)
    index = len(lengths) - 1
    branches: dict[int, list[int]] = {}
    for member, each in enumerate(members):
        places[member].append(place)
        if len(each["input_ids"]) > end:
            branches.setdefault(int(each["input_ids"][end]), []).append(member)
    for branch in branches.values():
        of_branch = [members[member] for member in branch], [places[member] for member in branch]
        _add_tree(*of_branch, index, end, rows, lengths, parents, number)


def _fill(rows: list[dict[str, Tensor]], values: dict[str, int]) -> None:
    """Give all segments the token types that some have: 0 is text; and ``values`` by name, likewise."""
    types = {name for each in rows for name in each if name.endswith("token_type_ids")}
    values = dict.fromkeys(types, 0) | values
    for name in values.keys() & {name for each in rows for name in each}:
        for each in rows:
            each.setdefault(name, torch.full_like(each["input_ids"], values[name]))


def _number_images(rows: list[dict[str, Tensor]], owners: list[int], counts: list[int]) -> Tensor | None:
    """Let cross-attention masks of segments name the images of the whole row; (T, 2) those of each token's sample."""
    some = next(((name, each[name]) for each in rows for name in _SEEN_IMAGES if name in each), None)
    if some is None:
        return None
    name, like = some
    ends = torch.tensor(counts).cumsum(0)
    ranges = []
    for each, owner in zip(rows, owners, strict=True):
        end, length = int(ends[owner]), len(each["input_ids"])
        start = end - counts[owner]
        seen = like.new_zeros(int(ends[-1]), *like.shape[1:-1], length)
        if name in each:
            seen[start:end] = each[name]
        each[name] = seen
        ranges.append(torch.tensor([[start, end]]).expand(length, 2))
    return torch.cat(ranges)


def _to_one_size(images: list[Tensor]) -> list[Tensor]:
    """Images (..., H, W) with zeros at their right and below them."""
    height, width = (max(each.shape[dim] for each in images) for dim in (-2, -1))
    return [functional.pad(each, (0, width - each.shape[-1], 0, height - each.shape[-2])) for each in images]


def _common(each: list[dict[str, Tensor]], what: str) -> list[str]:
    """The names that all have; an error if some have others."""
    names = list(each[0]) if each else []
    for other in each[1:]:
        if other.keys() != each[0].keys():
            differing = ", ".join(sorted(other.keys() ^ each[0].keys()))
            raise ValueError(f"samples of one row differ in their {what}: only some have {differing}")
    return names


def _equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
