"""transformers' Pillow backend with another arithmetic: its methods only note what is to be computed.

What sizes an image gets, and what becomes of it when, stays the processors' own code: the methods of each family, and
those of the backend that they call, in which the functions that resize, rescale and normalise are others.
"""

import logging
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, partialmethod
from types import FunctionType
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from transformers import image_transforms
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_processing_backends import PilBackend

from lynx_kernels.integrations import logs
from lynx_kernels.integrations.processors.pending import Levels, PendingImage, PendingPatches, computed, stack_of
from lynx_kernels.integrations.processors.pillow import pixels_of

_FILTERS = {
    Image.Resampling.BICUBIC: "bicubic", Image.Resampling.BILINEAR: "bilinear", Image.Resampling.LANCZOS: "lanczos",
}  # fmt: skip
_BYTES = np.broadcast_to(np.arange(256, dtype=np.uint8), (3, 256))[:, None]  # an image of all bytes

counts: "weakref.WeakKeyDictionary[Any, Counter[str]]" = weakref.WeakKeyDictionary()
"""By processor: how often something went its own way, by reason; under "" the images that did not."""


class _Call(NamedTuple):
    """A call of a processor, and what is to be counted if it succeeds."""

    processor: Any
    notes: Counter[str]


_running: ContextVar[_Call | None] = ContextVar("running", default=None)


@contextmanager
def _as_running(call: _Call | None) -> Iterator[None]:
    """Images that its processor takes in are pending. None: no images are."""
    token = _running.set(call)
    try:
        yield
    finally:
        _running.reset(token)


def _note(reason: str) -> None:
    """Something goes the processor's own way."""
    if (call := _running.get()) is not None:
        call.notes[reason] += 1


def _count(call: _Call) -> None:
    counts.setdefault(call.processor, Counter()).update(call.notes)
    for reason in call.notes:
        if reason:
            logs.say(logging.INFO, type(call.processor).__name__, f"in its own way: {reason}")


def _resize(image: Any, size: tuple[int, int], resample: Any, reducing_gap: Any = None, **formats: Any) -> Any:
    reason = None
    if type(image) is not PendingImage:
        pass  # why not was noted when it came in
    elif image.levels is not None:
        reason = "resized after it was normalised"
    elif resample not in _FILTERS:
        reason = f"resample={Image.Resampling(resample).name}: we have bilinear, bicubic and Lanczos"
    elif reducing_gap is not None:
        reason = f"reducing_gap={reducing_gap!r}"
    elif min(size) < 1:
        reason = f"resized to {tuple(size)}"
    else:
        return image.resized((int(size[0]), int(size[1])), _FILTERS[resample])
    if reason is not None:
        _note(reason)
    return image_transforms.resize(image, size, resample=resample, reducing_gap=reducing_gap, **formats)


def _convert_to_rgb(image: Any, *args: Any, **kwargs: Any) -> Any:
    if _running.get() is not None and isinstance(image, Image.Image) and image.info.get("transparency") is None:
        pixels = pixels_of(image) if kwargs.get("return_numpy") else None
        if pixels is not None:
            return pixels
    return image_transforms.convert_to_rgb(image, *args, **kwargs)


def _rescale(image: Any, scale: float, **formats: Any) -> Any:
    if type(image) is PendingImage and image.levels is None:
        table = image_transforms.rescale(_BYTES, scale, **formats)
        return image.with_levels(Levels.of(table[:, 0]))
    return image_transforms.rescale(image, scale, **formats)


def _normalize(image: Any, mean: Any, std: Any, **formats: Any) -> Any:
    if type(image) is PendingImage and image.outside is None:
        levels = _BYTES if image.levels is None else image.levels.table[:, None]
        table = image_transforms.normalize(levels, mean, std, **formats)
        return image.with_levels(Levels.of(table[:, 0], mean, std))
    return image_transforms.normalize(image, mean, std, **formats)


def _rebound(method: Callable, **functions: Callable) -> Callable:
    """The same code, for which these global names are other functions."""
    names = method.__globals__
    if missing := [name for name in functions if name not in names or name not in method.__code__.co_names]:
        raise ImportError(f"{method.__qualname__} of this release of transformers does not call {', '.join(missing)}")
    made = FunctionType(method.__code__, names | functions, method.__name__, method.__defaults__, method.__closure__)
    made.__kwdefaults__ = method.__kwdefaults__
    return made


class _Numpy:
    """numpy, whose stacks of pending images are pending."""

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)

    @staticmethod
    def array(value: Any, *args: Any, **kwargs: Any) -> Any:
        stack = stack_of(value, *args, **kwargs)
        return np.array(value, *args, **kwargs) if stack is None else stack

    @staticmethod
    def asarray(value: Any, *args: Any, **kwargs: Any) -> Any:
        stack = stack_of(value, *args, **kwargs)
        return np.asarray(value, *args, **kwargs) if stack is None else stack


def _stacking(method: Callable) -> Callable:
    """The same code, by which images are written to where they belong in the tensor that becomes of them."""
    if not isinstance(method, FunctionType):
        return method
    names: Any = method.__globals__
    others: dict[str, Any] = {}
    if names.get("np") is np:
        others["np"] = _Numpy()
    if isinstance(make := names.get("BatchFeature"), type):

        def batch_feature(data: Any = None, *args: Any, **kwargs: Any) -> Any:
            if type(data) is dict and kwargs.get("tensor_type") is not None:
                data = {name: stack_of(value) or value for name, value in data.items()}
            return make(computed(data), *args, **kwargs)

        others["BatchFeature"] = batch_feature
    return _rebound(method, **{name: each for name, each in others.items() if name in method.__code__.co_names})


class PendingBackend(PilBackend):
    """Between a processor's class and ``PilBackend``."""

    resize = _rebound(PilBackend.resize, np_resize=_resize)
    rescale = _rebound(PilBackend.rescale, np_rescale=_rescale)
    normalize = _rebound(PilBackend.normalize, np_normalize=_normalize)
    convert_to_rgb = _rebound(PilBackend.convert_to_rgb, convert_to_rgb_pil=_convert_to_rgb)
    _preprocess = _stacking(PilBackend._preprocess)

    def process_image(self, *args: Any, **kwargs: Any) -> Any:
        image = super().process_image(*args, **kwargs)  # (channels, height, width)
        call = _running.get()
        if call is None or call.processor is not self:
            return image
        if image.dtype != np.uint8:
            _note(f"an image of {image.dtype}, not of bytes")
        elif image.ndim != 3 or image.shape[0] != 3:
            _note(f"an image of shape {image.shape}, not (3, height, width)")
        elif 0 in image.shape:
            _note("an image without pixels")
        else:
            _note("")
            return PendingImage(np.moveaxis(image, 0, -1))
        return image

    def __reduce_ex__(self, protocol: Any) -> Any:
        _, (found, *args), *rest = super().__reduce_ex__(max(protocol, 2))
        return (_new, (found.__mro__[1], *args), *rest)


def _new(own: type, *args: Any) -> Any:
    """An object of the class that an accelerated processor has, without its attributes: for copies."""
    made = accelerated(own)
    return made.__new__(made, *args)


@cache
def accelerated(own: type) -> type:
    """A subclass of a processor's class, of the same name, with ``PendingBackend`` before ``PilBackend``."""

    def preprocess(self: Any, *args: Any, **kwargs: Any) -> Any:
        call, failure = _Call(self, Counter()), ""
        try:
            with _as_running(call):
                features = super(made, self).preprocess(*args, **kwargs)
                if isinstance(features, BatchFeature):
                    features.update({name: computed(value) for name, value in features.items()})
                else:
                    features = computed(features)
        except Exception as error:
            failure = f"a whole call, after {type(error).__name__}: {error}"
        if failure:
            # Its code may do to images what only arrays can. If it fails with arrays, too, then that is its error.
            with _as_running(None):
                features = super(made, self).preprocess(*args, **kwargs)
            call = _Call(self, Counter({failure: 1}))
        _count(call)
        return features

    names = {"__module__": own.__module__, "__qualname__": own.__qualname__, "__doc__": own.__doc__}
    own_methods: Any = own
    methods: dict[str, Any] = {"preprocess": preprocess, "_preprocess": _stacking(own_methods._preprocess)}
    if hasattr(own, "patchify"):
        methods["patchify"] = partialmethod(_patchify, own_methods.patchify)
    made: Any = type(own)(own.__name__, (own, PendingBackend), methods | names)
    return made


def _patchify(
    self: Any, own: Callable, image: Any, patch_size: int, merge_size: int, temporal_patch_size: int
) -> tuple[Any, int, int]:
    """As ``own``, a method of Qwen2-VL and those that have learned it, if it cuts patches as ``pack_frames`` does."""
    sizes = (patch_size, merge_size, temporal_patch_size)
    if type(image) is PendingImage and image.levels is not None and image.is_packable:
        height, width = image.shape[1:]
        side = patch_size * merge_size
        if (own, sizes) not in _cuts_like_ours:
            _cuts_like_ours[own, sizes] = _cuts_like_us(own, self, *sizes)
        if height % side == width % side == 0 and _cuts_like_ours[own, sizes]:
            return PendingPatches(image, *sizes), height // patch_size, width // patch_size
    patches: tuple[Any, int, int] = own(self, image, *sizes)
    return patches


_cuts_like_ours: dict[tuple[Callable, tuple[int, int, int]], bool] = {}  # by patchify and its sizes


def _cuts_like_us(own: Callable, self: Any, patch_size: int, merge_size: int, temporal_patch_size: int) -> bool:
    """Tried on an image of 2 x 3 blocks, all of whose pixels differ."""
    height, width = 2 * merge_size * patch_size, 3 * merge_size * patch_size
    image = np.arange(3 * height * width, dtype=np.float32).reshape(3, height, width)
    blocks = image.reshape(3, 2, merge_size, patch_size, 3, merge_size, patch_size).transpose(1, 4, 2, 5, 0, 3, 6)
    patches = blocks.reshape(-1, 3, 1, patch_size, patch_size).repeat(temporal_patch_size, 2)
    theirs = own(self, image, patch_size, merge_size, temporal_patch_size)
    grid = (height // patch_size, width // patch_size)
    return len(theirs) == 3 and theirs[1:] == grid and np.array_equal(theirs[0], patches.reshape(len(patches), -1))
