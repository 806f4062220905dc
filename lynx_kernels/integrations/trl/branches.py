"""Padded rows of a batch, as TRL makes them, in one packed row in which what they share stands once."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lynx_kernels.integrations.collator import IGNORE, PackedCollator

_PER_TOKEN = ("input_ids", "attention_mask", "labels", "token_type_ids", "mm_token_type_ids")


@dataclass(frozen=True)
class Branches:
    """Padded rows (B, L) in a packed row of T tokens.

    Attributes:
        inputs: of the model: ``input_ids`` (1, T), a packed mask, positions, media.
        labels: (N,) int64, the supervised tokens of all rows. A token that rows share is there once for each.
        predictors: (N,) int64, the row of the packed row that predicts each.
        entries: (N,) int64, where they stand in (B, L - 1), flat, as next tokens.
        shape: (B, L - 1).
        weights: (N,) fp32, or None: factors of the log-probabilities in training.
    """

    inputs: dict[str, Any]
    labels: Tensor
    predictors: Tensor
    entries: Tensor
    shape: tuple[int, int]
    weights: Tensor | None = None

    def to(self, device: Any, **_options: Any) -> "Branches":
        """The same on another device."""
        inputs = {name: value.to(device) for name, value in self.inputs.items()}
        weights = None if self.weights is None else self.weights.to(device)
        moved = {name: getattr(self, name).to(device) for name in ("labels", "predictors", "entries")}
        return replace(self, inputs=inputs, weights=weights, **moved)

    @property
    def num_tokens(self) -> int:
        """T."""
        return int(self.inputs["input_ids"].shape[1])


def pack_rows(rows: Sequence[Mapping[str, Any]], collator: PackedCollator, length: int | None = None) -> Branches:
    """Pack the rows of a padded batch.

    Args:
        rows: the inputs of a model for each row alone: ``input_ids``, ``attention_mask`` and ``labels`` (1, L), -100
            where not supervised, on the CPU; media on any device.
        collator: of the model.

    Raises:
        ValueError: a row has no tokens, or see ``PackedCollator``.
    """
    for number, row in enumerate(rows):
        if not row["attention_mask"].any():
            raise ValueError(f"row {number} of the batch has no tokens")
    trees = _trees(rows)
    packed = collator.pack([[rows[row] for row in tree] for tree in trees])
    columns = (rows[0]["input_ids"].shape[1] if length is None else length) - 1
    labels, predictors, entries = [], [], []
    for tree, places in zip(trees, packed.places, strict=True):
        for number, place in zip(tree, places, strict=True):
            token = rows[number]["attention_mask"][0].nonzero()[:, 0]  # its columns
            label = rows[number]["labels"][0, token]
            is_scored = label != IGNORE
            is_scored[0] = False  # nothing predicts it
            labels.append(label[is_scored])
            predictors.append(place[is_scored.nonzero()[:, 0] - 1])
            entries.append(number * columns + token[is_scored] - 1)
    order = torch.cat(entries).argsort()
    return Branches(
        packed.batch,
        torch.cat(labels)[order],
        torch.cat(predictors)[order],
        torch.cat(entries)[order],
        (len(rows), columns),
    )


def _trees(rows: Sequence[Mapping[str, Any]]) -> list[list[int]]:
    """The numbers of the rows that have the same media, together."""
    found: list[tuple[dict[str, Tensor], list[int]]] = []
    for number, row in enumerate(rows):
        media = {name: value for name, value in row.items() if name not in _PER_TOKEN}
        for other, members in found:
            if other.keys() == media.keys() and all(torch.equal(other[name], media[name]) for name in media):
                members.append(number)
                break
        else:
            found.append((media, [number]))
    return [members for _, members in found]
