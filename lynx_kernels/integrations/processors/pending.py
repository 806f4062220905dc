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

from lynx_kernels.integrations.processors.pillow import lent
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
        window: (top, left, height, width) of what is kept; it may reach outside.
        levels: None leaves bytes as they are.
        outside: what stands outside; None: what a byte of 0 becomes.
        whole: the resized frame, all bytes of it. If somebody computes it, its parts are taken from there.
    """

    def __init__(
        self,
        frame: np.ndarray,
        size: tuple[int, int] | None = None,
        resample: str = "bilinear",
        window: tuple[int, int, int, int] | None = None,
        levels: Levels | None = None,
        outside: float | None = None,
        whole: "PendingImage | None" = None,
    ) -> None:
        self.frame, self.resample, self.levels, self.outside = frame, resample, levels, outside
        self.size = size or frame.shape[:2]
        self.window = window or (0, 0, *self.size)
        self.shape = (3, *self.window[2:])
        self.dtype = np.dtype(np.uint8) if levels is None else levels.table.dtype
        self._whole = whole  # None: this is it. A reference to itself would keep its memory from being freed at once
        self._computed: np.ndarray | None = None

    def _with(self, **changes: Any) -> "PendingImage":
        names = ("frame", "size", "resample", "window", "levels", "outside", "whole")
        return PendingImage(**({name: getattr(self, name) for name in names} | changes))

    @property
    def whole(self) -> "PendingImage":
        return self if self._whole is None else self._whole

    def with_levels(self, levels: Levels) -> "PendingImage":
        return self._with(levels=levels)

    def with_window(self, top: int, left: int, height: int, width: int) -> "PendingImage":
        """The part of this image from (top, left) on, which may reach beyond it."""
        return self._with(window=(self.window[0] + top, self.window[1] + left, height, width))

    def with_zeros(self, above: int, below: int, before: int, behind: int) -> "PendingImage | None":
        """With so many rows and columns of zeros around it; or None if other things than zeros are there."""
        top, left, height, width = self.window
        if not self._is_resized and self._is_inside:
            image = PendingImage(self.frame[top : top + height, left : left + width], levels=self.levels)
        elif top <= 0 and left <= 0 and top + height >= self.size[0] and left + width >= self.size[1]:
            image = self
        else:
            return None
        outside = None if self.levels is None else 0.0
        if not image._is_inside and image.outside != outside:
            return None
        image = image._with(outside=outside)
        return image.with_window(-above, -before, above + height + below, before + width + behind)

    def resized(self, size: tuple[int, int], resample: str) -> "PendingImage":
        """Resized by Pillow's filter. Only of bytes."""
        if size == self.shape[1:]:  # images with one filter can be made by one call, even if it has nothing to do
            return self if self._is_resized else self._with(resample=resample)
        top, left, height, width = self.window
        if self._is_resized or not self._is_inside:
            is_whole = self.window == (0, 0, *self.size)
            return PendingImage(np.moveaxis((self.whole if is_whole else self).compute(), 0, -1), size, resample)
        return PendingImage(self.frame[top : top + height, left : left + width], size, resample)

    @property
    def _is_resized(self) -> bool:
        return self.size != self.frame.shape[:2]

    @property
    def _is_inside(self) -> bool:
        top, left, height, width = self.window
        return top >= 0 and left >= 0 and top + height <= self.size[0] and left + width <= self.size[1]

    @property
    def is_packable(self) -> bool:
        """Whether one call of ``pack_frames`` computes it."""
        return self._is_inside and (self.levels is None or self.levels.mean is not None)

    def job(self) -> tuple[np.ndarray, tuple[int, int], tuple[int, int, int, int]]:
        """The frame, the size that it is resized to, and what is kept of that."""
        frame, (top, left, height, width) = self.frame, self.window
        if self._is_resized and self.whole._computed is not None:
            frame = np.moveaxis(self.whole._computed, 0, -1)
        if self.size != frame.shape[:2]:
            return lent(frame), self.size, self.window
        return lent(frame[top : top + height, left : left + width]), (height, width), (0, 0, height, width)

    def compute(self) -> np.ndarray:
        if self._computed is None:
            if self.levels is None and not self._is_resized and self._is_inside:
                top, left, height, width = self.window
                part = self.frame[top : top + height, left : left + width]
                # A part of what belongs to others, such as Pillow's memory, is not given away.
                self._computed = np.moveaxis(part if part.flags.writeable else part.copy(), -1, 0)
            else:
                array = np.empty((1, *self.shape), self.dtype)
                write([self], array)
                self._computed = array[0]
        return self._computed

    def look_up(self, array: np.ndarray) -> None:
        """Fill an array (3, height, width) with levels that ``pack_frames`` does not compute."""
        assert self.levels is not None
        for table, plane, to in zip(self.levels.table, self._with(levels=None).compute(), array, strict=True):
            to[...] = table[plane]

    def fill_outside(self, array: np.ndarray) -> "tuple[PendingImage, np.ndarray] | None":
        """Fill what lies outside in an array (3, height, width). Returns what lies inside, if any, and its place."""
        if self._is_inside:
            return self, array
        top, left, height, width = self.window
        above, below = (min(max(each, 0), height) for each in (-top, self.size[0] - top))
        before, behind = (min(max(each, 0), width) for each in (-left, self.size[1] - left))
        if self.outside is not None:
            outside: Any = self.outside
        else:
            outside = 0 if self.levels is None else self.levels.table[:, :1, None]
        if below <= above or behind <= before:
            array[...] = outside
            return None
        array[:, :above], array[:, below:] = outside, outside
        array[:, above:below, :before], array[:, above:below, behind:] = outside, outside
        return self.with_window(above, before, below - above, behind - before), array[:, above:below, before:behind]

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
        """Zeros around an image stay pending, and so do images in a stack."""
        padded: Any = None
        if function is np.pad and (padding := _zeros_around(*args, **kwargs)) is not None and not any(padding[0]):
            padded = self.with_zeros(*padding[1], *padding[2])
        elif function is np.stack:
            padded = stack_of(*args, **kwargs)
        return super().__array_function__(function, types, args, kwargs) if padded is None else padded


def _zeros_around(
    array: Any, pad_width: Any, mode: Any = "constant", *, constant_values: Any = 0, **kwargs: Any
) -> list[list[int]] | None:
    """How many zeros a call of ``np.pad`` adds, by dimension, before and behind; or None if it adds anything else."""
    if not issubclass(type(array), Pending) or mode != "constant" or kwargs or np.any(constant_values):
        return None
    if np.shape(pad_width) != (array.ndim, 2) or np.min(pad_width) < 0:
        return None
    return [[int(each) for each in side] for side in pad_width]


class PendingStack(Pending):
    """Images of one shape (images, 3, height, width), then ``zeros`` of zeros; or stacks of such images and stacks."""

    def __init__(self, parts: "Sequence[PendingImage | PendingStack]", zeros: int = 0) -> None:
        self.parts, self.zeros = parts, zeros
        self.shape = (len(parts) + zeros, *parts[0].shape)
        self.dtype: np.dtype = parts[0].dtype

    def compute(self) -> np.ndarray:
        array = np.empty(self.shape, self.dtype)
        write(self.images(), array.reshape(-1, *self.shape[-3:]))
        return array

    def images(self) -> "list[PendingImage | None]":
        """All images in order; None are zeros."""
        found: list[PendingImage | None] = []
        for part in self.parts:
            found += [part] if type(part) is PendingImage else part.images()
        return found + [None] * (self.zeros * (len(found) // len(self.parts)))

    def __array_function__(self, function: Callable, types: Any, args: Any, kwargs: Any) -> Any:
        """Zeros behind the last image stay pending."""
        padding = _zeros_around(*args, **kwargs) if function is np.pad else None
        if padding is not None and not padding[0][0] and not np.any(padding[1:]):
            return PendingStack(self.parts, self.zeros + padding[0][1])
        return super().__array_function__(function, types, args, kwargs)


def stack_of(value: Any, *args: Any, **kwargs: Any) -> PendingStack | None:
    """Lists, and lists of lists, of pending images of one shape as what numpy would make of them; else None."""
    if args or kwargs or not isinstance(value, list | tuple) or not value:
        return None
    parts: list[Any] = [each if type(each) in (PendingImage, PendingStack) else stack_of(each) for each in value]
    is_alike = all(each is not None and (each.shape, each.dtype) == (parts[0].shape, parts[0].dtype) for each in parts)
    return PendingStack(parts) if is_alike else None


def write(images: "Sequence[PendingImage | None]", array: np.ndarray) -> None:
    """Fill a contiguous array (images, 3, height, width); None are zeros.

    Calls of ``pack_frames`` are few, since threads meet at the end of each: one for all images of a kind.
    """
    kinds: dict[Any, list[tuple[PendingImage, np.ndarray, int]]] = {}
    for index, image in enumerate(images):
        if image is None:
            array[index] = 0
        elif (inside := image.fill_outside(array[index])) is not None:
            part, place = inside
            kinds.setdefault((part.shape, part.resample, part.levels and part.levels[1:]), []).append((*inside, index))
    for (shape, *_), parts in kinds.items():
        some, places, indices = zip(*parts, strict=True)
        if some[0].levels is not None and some[0].levels.mean is None:
            for part, place in zip(some, places, strict=True):
                part.look_up(place)
        elif shape == array.shape[1:] and len(parts) == indices[-1] - indices[0] + 1:  # neighbours in the array
            pack_into(array[indices[0] : indices[-1] + 1], some, output="pixels", patch_size=None)
        elif len(parts) == 1:
            pack_into(places[0][None], some, output="pixels", patch_size=None)
        else:
            together = np.empty((len(parts), *shape), array.dtype)
            pack_into(together, some, output="pixels", patch_size=None)
            for place, part in zip(places, together, strict=True):
                place[...] = part


def pack_into(array: np.ndarray, images: "Sequence[PendingImage]", **options: Any) -> None:
    """Fill an array with what one call of ``pack_frames`` makes of packable images of one kind."""
    frames, sizes, windows = zip(*(each.job() for each in images), strict=True)
    levels = images[0].levels
    normal: dict[str, Any] = {"mean": None, "std": None, "dtype": torch.uint8}
    if levels is not None:
        normal = {"mean": levels.mean, "std": levels.std}
    pack_frames(
        frames, size=sizes, resize="exact", resample=images[0].resample, windows=windows, out=torch.from_numpy(array),
        **normal, **options,
    )  # fmt: skip


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
        pack_into(array, [self.image], **self.options)
        return array

    def __array_function__(self, function: Callable, types: Any, args: Any, kwargs: Any) -> Any:
        if function is np.concatenate and (all_patches := _end_to_end(*args, **kwargs)) is not None:
            array = np.empty((sum(map(len, all_patches)), self.shape[1]), self.dtype)
            start = 0
            for each in all_patches:
                pack_into(array[start : start + len(each)], [each.image], **each.options)
                start += len(each)
            return array
        return super().__array_function__(function, types, args, kwargs)


def _end_to_end(arrays: Any, axis: Any = 0, **kwargs: Any) -> "list[PendingPatches] | None":
    """What a call of ``np.concatenate`` puts end to end, or None if it is anything but patches of one size."""
    if kwargs or axis != 0 or not isinstance(arrays, list | tuple):
        return None
    is_alike = all(type(each) is PendingPatches and each.shape[1] == arrays[0].shape[1] for each in arrays)
    return list(arrays) if is_alike else None


def computed(value: Any) -> Any:
    """A value with every pending image and patch in it computed, in lists, tuples and mappings."""
    if issubclass(type(value), Pending):
        return value.compute()
    if type(value) in (list, tuple):
        return type(value)(map(computed, value))
    if type(value) is dict:
        return {key: computed(each) for key, each in value.items()}
    return value
