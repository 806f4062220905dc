"""Data sets without the samples whose images cannot be decoded, which would end a run when it comes to them."""

import io
import logging
from collections.abc import Sequence
from typing import Any

import PIL.Image
from datasets import Dataset, Image

logger = logging.getLogger("lynx_kernels")


def readable(dataset: Dataset, *, num_proc: int | None = None) -> Dataset:
    """The samples whose images all decode. Each that does not is logged by number, and their number at the end.

    Args:
        dataset: with columns ``image`` or ``images`` of ``datasets.Image``, or of what Pillow opens.
        num_proc: processes that decode.
    """
    columns = [name for name in ("image", "images") if name in dataset.column_names]
    stored = dataset
    for name in columns:
        feature = dataset.features[name]
        if isinstance(feature, Image):
            stored = stored.cast_column(name, Image(decode=False))
        elif isinstance(getattr(feature, "feature", None), Image):
            stored = stored.cast_column(name, type(feature)(Image(decode=False)))
    keep = stored.filter(_decodes, fn_kwargs={"columns": columns}, with_indices=True, num_proc=num_proc)
    if len(keep) < len(dataset):
        logger.warning(
            "%d of %d samples are left out: their images cannot be decoded", len(dataset) - len(keep), len(dataset)
        )
    return keep.cast(dataset.features)


def _decodes(sample: dict[str, Any], number: int, columns: Sequence[str]) -> bool:
    for name in columns:
        images = sample[name] if isinstance(sample[name], list) else [sample[name]]
        for each in images:
            try:
                _decode(each)
            except (OSError, SyntaxError, ValueError) as error:  # Pillow's, of broken files
                logger.warning("sample %d is left out: %s: %s", number, type(error).__name__, error)
                return False
    return True


def _decode(image: Any) -> None:
    if image is None:
        return
    if isinstance(image, dict):
        image = io.BytesIO(image["bytes"]) if image.get("bytes") is not None else image["path"]
    if isinstance(image, PIL.Image.Image):
        image.load()
        return
    with PIL.Image.open(image) as opened:
        opened.load()
