"""The pixels of Pillow's images where they are: no copy of them is made."""

import ctypes
from functools import cache
from typing import Any

import numpy as np
from PIL import Image


class _ArrowArray(ctypes.Structure):
    """The first fields of Arrow's C data interface."""


_ArrowArray._fields_ = [
    *((name, ctypes.c_int64) for name in ("length", "null_count", "offset", "n_buffers", "n_children")),
    ("buffers", ctypes.POINTER(ctypes.c_void_p)),
    ("children", ctypes.POINTER(ctypes.POINTER(_ArrowArray))),
]


class _Memory:
    """What numpy makes an array of. It keeps the owner of the memory alive."""

    def __init__(
        self, owner: Any, address: int, shape: tuple[int, ...], strides: tuple[int, ...] | None = None
    ) -> None:
        self.owner = owner
        self.__array_interface__ = {
            "version": 3, "typestr": "|u1", "data": (address, False), "shape": shape, "strides": strides,
        }  # fmt: skip


def pixels_of(image: Image.Image) -> np.ndarray | None:
    """The (height, width, 3) bytes of an image of mode RGB, read-only: its memory, not a copy.

    None where Pillow does not give it away: before version 11.2, and for images of more than 16 MiB, 4 bytes a pixel.
    """
    if image.mode != "RGB" or not _is_readable():
        return None
    return _pixels_of(image)


def _pixels_of(image: Image.Image) -> np.ndarray | None:
    try:
        _, capsule = image.__arrow_c_array__()
    except (AttributeError, ValueError):
        return None
    address = ctypes.pythonapi.PyCapsule_GetPointer
    address.restype, address.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    pixels = _ArrowArray.from_address(address(capsule, b"arrow_array"))
    if pixels.length != image.width * image.height or pixels.n_children != 1 or pixels.offset != 0:
        return None
    channels = pixels.children[0].contents
    if channels.length != 4 * pixels.length or channels.n_buffers != 2 or channels.offset != 0:
        return None
    memory = np.asarray(_Memory(capsule, channels.buffers[1], (image.height, image.width, 4)))
    found = memory[..., :3]
    found.flags.writeable = False
    return found


@cache
def _is_readable() -> bool:
    """Whether an image read in this way has the pixels that it has."""
    array = np.arange(2 * 5 * 3, dtype=np.uint8).reshape(2, 5, 3)
    return np.array_equal(_pixels_of(Image.fromarray(array)), array)  # type: ignore[arg-type]


def lent(array: np.ndarray) -> np.ndarray:
    """The same bytes, writeable for numpy and for torch, which take no read-only ones. Only for reading."""
    if array.flags.writeable:
        return array
    return np.asarray(_Memory(array, array.ctypes.data, array.shape, array.strides))
