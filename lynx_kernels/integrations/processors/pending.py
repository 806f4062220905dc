"""Images and patches that look like numpy's arrays and are computed when somebody reads them.

A processor resizes an image, cuts tiles from it, pads, rescales and normalises. Here each of these steps only notes
what is asked for, and one call of ``pack_frames`` does them all. Whatever else is done to a pending image computes it
first: it gets what the processor would have had at that place.

Arrays are made by numpy, which asks the system for large pages: to fault small ones in takes longer than to compute.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from numpy.lib.mixins import NDArrayOperatorsMixin

from lynx_kernels.ops.pack_frames import pack_frames
from lynx_kernels.ops.pack_frames.levels import levels_of


class Levels(NamedTuple):
    """What every byte of every channel becomes.

    Attributes:
        table: (3, 256).
        mean, std: with these, ``pack_frames`` computes the same table; None if there are none.
    """

    table: np.ndarray
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    @classmethod
    def of(cls, table: np.ndarray, mean: Any = (0.0, 0.0, 0.0), std: Any = (1.0, 1.0, 1.0)) -> Self:
        """Find out whether ``mean`` and ``std`` give this table."""
        mean, std = (tuple(map(float, np.broadcast_to(each, 3))) for each in (mean, std))
        is_same = table.dtype == np.float32 and min(std) >= 1e-30 and np.isfinite([*mean, *std]).all()
        if is_same and np.array_equal(levels_of(mean, std, torch.float32).numpy(), table):
            return cls(table, mean, std)
        return cls(table)


class Pending(NDArrayOperatorsMixin):
    """What pending images and patches share: all that arrays can do is done to the computed array."""

    shape: tuple[int, ...]

    def compute(self) -> np.ndarray:
        """The array."""
        raise NotImplementedError

    @property  # type: ignore[misc]  # isinstance() asks for it, type() does not
    def __class__(self) -> type:
        return np.ndarray

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.compute(), dtype, copy=copy)

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **kwargs: Any) -> Any:
        return getattr(ufunc, method)(*computed(inputs), **computed(kwargs))

    def __array_function__(self, function: Callable, types: Any, args: Any, kwargs: Any) -> Any:
        return function(*computed(args), **computed(kwargs))

    def __getitem__(self, key: Any) -> Any:
        return self.compute()[key]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.compute(), name)


class PendingImage(Pending):
    """An image (3, height, width): a part of a resized frame, of which every byte becomes a level.

    Args:
        frame: (height, width, 3) uint8.
        size: (height, width) that it is resized to.
        resample: the filter.
        window: (top, left, height, width) of what is kept. What lies outside is zeros before ``levels``.
        levels: None leaves bytes as they are.
    """

    def __init__(
        self,
        frame: np.ndarray,
        size: tuple[int, int] | None = None,
        resample: str = "bilinear",
        window: tuple[int, int, int, int] | None = None,
        levels: Levels | None = None,
    ) -> None:
        self.frame, self.resample, self.levels = frame, resample, levels
        self.size = size or frame.shape[:2]
        self.window = window or (0, 0, *self.size)
        self.shape = (3, *self.window[2:])
        self.dtype = np.dtype(np.uint8) if levels is None else levels.table.dtype
        self._computed: np.ndarray | None = None

    def with_levels(self, levels: Levels) -> "PendingImage":
        return PendingImage(self.frame, self.size, self.resample, self.window, levels)

    def with_window(self, top: int, left: int, height: int, width: int) -> "PendingImage":
        """The part of this image from (top, left) on, which may reach beyond it."""
        window = (self.window[0] + top, self.window[1] + left, height, width)
        return PendingImage(self.frame, self.size, self.resample, window, self.levels)

    def resized(self, size: tuple[int, int], resample: str) -> "PendingImage":
        """Resized by Pillow's filter. Only of bytes."""
        if size == self.shape[1:]:
            return self
        top, left, height, width = self.window
        if self.size == self.frame.shape[:2] and self.is_inside:
            return PendingImage(self.frame[top : top + height, left : left + width], size, resample)
        return PendingImage(np.moveaxis(self.compute(), 0, -1), size, resample)

    @property
    def is_inside(self) -> bool:
        """Whether nothing is padded."""
        (top, left, height, width), (whole_height, whole_width) = self.window, self.size
        return top >= 0 and left >= 0 and top + height <= whole_height and left + width <= whole_width

    @property
    def is_packable(self) -> bool:
        """Whether one call of ``pack_frames`` computes it."""
        return self.is_inside and (self.levels is None or self.levels.mean is not None)

    def pack_into(self, out: np.ndarray, **options: Any) -> None:
        """Fill an array with what ``pack_frames`` makes of this image. For packable images."""
        frame, size, window = self.frame, self.size, self.window
        if size == frame.shape[:2]:
            top, left, height, width = window
            frame, size, window = frame[top : top + height, left : left + width], window[2:], (0, 0, height, width)
        normal: dict[str, Any] = {"mean": None, "std": None, "dtype": torch.uint8}
        if self.levels is not None:
            normal = {"mean": self.levels.mean, "std": self.levels.std}
        pack_frames(
            [frame], size=size, resize="exact", resample=self.resample,
            windows=None if window == (0, 0, *size) else [window], out=torch.from_numpy(out), **normal, **options,
        )  # fmt: skip

    def compute(self) -> np.ndarray:
        if self._computed is None:
            self._computed = self._compute()
        return self._computed

    def _compute(self) -> np.ndarray:
        if not self.is_inside:
            return self._padded()
        if self.levels is None and self.size == self.frame.shape[:2]:
            top, left, height, width = self.window
            return np.moveaxis(self.frame[top : top + height, left : left + width], -1, 0)
        if self.is_packable:
            array = np.empty(self.shape, self.dtype)
            self.pack_into(array[None], output="pixels", patch_size=None)
            return array
        assert self.levels is not None
        levels = PendingImage(self.frame, self.size, self.resample, self.window).compute()
        return np.stack([table[channel] for table, channel in zip(self.levels.table, levels, strict=True)])

    def _padded(self) -> np.ndarray:
        top, left, height, width = self.window
        rows, columns = (
            (max(start, 0), min(start + length, whole))
            for start, length, whole in ((top, height, self.size[0]), (left, width, self.size[1]))
        )
        array = np.zeros(self.shape, self.dtype)
        if self.levels is not None:
            array += self.levels.table[:, :1, None]
        if rows[0] < rows[1] and columns[0] < columns[1]:
            inside = (rows[0] - top, columns[0] - left, rows[1] - rows[0], columns[1] - columns[0])
            to = array[:, inside[0] : inside[0] + inside[2], inside[1] : inside[1] + inside[3]]
            to[...] = self.with_window(*inside).compute()
        return array

    def __getitem__(self, key: Any) -> Any:
        """Slices of rows and columns stay pending."""
        if isinstance(key, tuple) and len(key) == 3 and (key[0] is Ellipsis or key[0] == slice(None)):
            spans = []
            for each, side in zip(key[1:], self.shape[1:], strict=True):
                start, stop, step = each.indices(side) if isinstance(each, slice) else (0, 0, 0)
                if step == 1 and start < stop:
                    spans.append((start, stop - start))
            if len(spans) == 2:
                (top, height), (left, width) = spans
                return self.with_window(top, left, height, width)
        return super().__getitem__(key)

    def __array_function__(self, function: Callable, types: Any, args: Any, kwargs: Any) -> Any:
        """Zeros around bytes stay pending."""
        if function is np.pad and (padding := _zeros_around(*args, **kwargs)) is not None and self.levels is None:
            (above, below), (before, behind) = padding
            height, width = self.shape[1:]
            return self.with_window(-above, -before, above + height + below, before + width + behind)
        return super().__array_function__(function, types, args, kwargs)


def _zeros_around(
    array: Any, pad_width: Any, mode: Any = "constant", *, constant_values: Any = 0, **kwargs: Any
) -> Sequence[Sequence[int]] | None:
    """The rows and columns that a call of ``np.pad`` adds, or None if it adds anything but zeros."""
    if type(array) is not PendingImage or mode != "constant" or kwargs or np.any(constant_values):
        return None
    if np.shape(pad_width) != (3, 2) or any(pad_width[0]) or np.min(pad_width) < 0:
        return None
    return [[int(each) for each in side] for side in pad_width[1:]]


class PendingPatches(Pending):
    """Patches (patches, 3 * T * p * p) of an image, in blocks, as ``pack_frames`` cuts them.

    Put end to end with others, they are written to where they belong.
    """

    def __init__(self, image: PendingImage, patch_size: int, merge_size: int, temporal_patch_size: int) -> None:
        self.image = image
        self.options = {
            "patch_size": patch_size, "merge_size": merge_size, "temporal_patch_size": temporal_patch_size,
        }  # fmt: skip
        height, width = image.shape[1:]
        self.shape = (height // patch_size * (width // patch_size), 3 * temporal_patch_size * patch_size**2)
        self.dtype = np.dtype(np.float32)

    def compute(self) -> np.ndarray:
        array = np.empty(self.shape, self.dtype)
        self.image.pack_into(array, **self.options)
        return array

    def __array_function__(self, function: Callable, types: Any, args: Any, kwargs: Any) -> Any:
        if function is np.concatenate and (all_patches := _end_to_end(*args, **kwargs)) is not None:
            array = np.empty((sum(map(len, all_patches)), self.shape[1]), self.dtype)
            start = 0
            for each in all_patches:
                each.image.pack_into(array[start : start + len(each)], **each.options)
                start += len(each)
            return array
        return super().__array_function__(function, types, args, kwargs)


def _end_to_end(arrays: Any, axis: Any = 0, **kwargs: Any) -> "list[PendingPatches] | None":
    """What a call of ``np.concatenate`` puts end to end, or None if it is anything but patches of one size."""
    if kwargs or axis != 0 or not isinstance(arrays, list | tuple):
        return None
    is_alike = all(type(each) is PendingPatches and each.shape[1] == arrays[0].shape[1] for each in arrays)
    return list(arrays) if is_alike else None


def stacked(value: Any) -> Any:
    """A list of pending images of one shape as one array (images, 3, height, width); other values as they are."""
    if not isinstance(value, list | tuple) or not value or not all(type(each) is PendingImage for each in value):
        return value
    if len({(each.shape, each.dtype) for each in value}) != 1 or not all(each.is_packable for each in value):
        return value
    array = np.empty((len(value), *value[0].shape), value[0].dtype)
    for index, each in enumerate(value):
        each.pack_into(array[index : index + 1], output="pixels", patch_size=None)
    return array


def computed(value: Any) -> Any:
    """A value with every pending image and patch in it computed, in lists, tuples and mappings."""
    if issubclass(type(value), Pending):
        return value.compute()
    if type(value) in (list, tuple):
        return type(value)(map(computed, value))
    if type(value) is dict:
        return {key: computed(each) for key, each in value.items()}
    return value
