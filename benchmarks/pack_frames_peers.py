"""What people run today to bring frames to a vision tower: peers of pack_frames, and the images they are given.

Peers whose names end in "~" resize in their own way, not as Pillow: they are checked to some byte levels only.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

FOLDER = Path(__file__).parent / "workloads" / "pack_frames"
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
_BICUBIC = Image.Resampling.BICUBIC


@dataclass(frozen=True)
class Workload:
    """Frames of given (height, width), of which squares of ``size`` are cut into patches of ``patch_size``."""

    name: str
    size: int
    patch_size: int
    shapes: tuple[tuple[int, int], ...]

    @property
    def is_sized(self) -> bool:
        """Whether nothing is to be resized."""
        return all(min(shape) == self.size for shape in self.shapes)

    def short_side_shape(self, height: int, width: int) -> tuple[int, int]:
        return int(self.size * height / min(height, width)), int(self.size * width / min(height, width))

    def centre(self, frame: Any) -> Any:
        """The middle of a resized frame (..., height, width, 3), as transformers cuts it out."""
        top, left = ((side - self.size) // 2 for side in frame.shape[-3:-1])
        return frame[..., top : top + self.size, left : left + self.size, :]


def workload(name: str) -> Workload:
    said = json.loads((FOLDER / f"{name}.json").read_text())
    return Workload(name, said["size"], said["patch_size"], tuple((height, width) for height, width in said["frames"]))


@dataclass(frozen=True)
class Frames:
    """One batch in the forms that peers like best; making them is not timed.

    Attributes:
        tensors: (height, width, 3) uint8.
        stack: (N, height, width, 3) where all are of one size, else None.
        images: Pillow's.
    """

    tensors: Sequence[Tensor]
    stack: Tensor | None
    images: Sequence[Image.Image]

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> "Frames":
        is_one_size = len({each.shape for each in tensors}) == 1
        images = [Image.fromarray(each.cpu().numpy()) for each in tensors]
        return cls(tensors, torch.stack(list(tensors)) if is_one_size else None, images)


def make_images(shapes: Sequence[tuple[int, int]], device: str) -> list[Tensor]:
    """Smooth random colours under a little noise: what differs between ways to resize stays as small as in photos."""
    generator = np.random.default_rng(0)
    found = []
    for height, width in shapes:
        coarse = Image.fromarray(generator.integers(0, 256, (9, 9, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((width, height), _BICUBIC)).astype(np.int16)
        noisy = smooth + generator.integers(-4, 5, smooth.shape, dtype=np.int16)
        found.append(torch.from_numpy(noisy.clip(0, 255).astype(np.uint8)).to(device))
    return found


@dataclass(frozen=True)
class Peer:
    """One way to do it.

    Attributes:
        run: from frames to patches (N * patches, 3 * p * p), or to pixels (N, 3, S, S).
        tolerance: mean difference from Pillow's bytes that it may have, in levels; 0 for peers that are exact.
    """

    run: Callable[[Frames], Tensor]
    tolerance: float = 0.0


Peers = dict[str, Peer | str]  # by name; a string says why a peer is left out


def peers(workload: Workload, dtype: torch.dtype, device: str, compiler: Callable = torch.compile) -> Peers:
    """All peers, the baseline first."""
    inexact, tolerance = ("", 0.0) if workload.is_sized else (" ~", 1.0)
    textbook, lean = (torch_peer(workload, dtype, device, each) for each in (normalised, normalised_lean))
    compiled = torch_peer(workload, dtype, device, compiler(normalised, dynamic=False))
    in_torch: Peers = {
        f"eager{inexact}": Peer(textbook, tolerance),
        f"eager lean{inexact}": Peer(lean, tolerance),
        f"compile{inexact}": Peer(compiled, tolerance),
    }
    if device != "cpu":
        return in_torch
    return {
        "pillow + numpy": Peer(lambda frames: numpy_patches(workload, pillow_squares(workload, frames.images), dtype)),
        **in_torch,
        "transformers pillow": _transformers_pillow(workload, dtype),
        "transformers torchvision ~": _transformers_torchvision(workload, dtype),
        "opencv + numpy ~": _opencv(workload, dtype),
    }


def pillow_squares(workload: Workload, images: Sequence[Image.Image]) -> np.ndarray:
    """Resized and cropped, (N, S, S, 3) uint8."""
    squares = []
    for image in images:
        height, width = workload.short_side_shape(image.height, image.width)
        squares.append(workload.centre(np.asarray(image.resize((width, height), _BICUBIC))))
    return np.stack(squares)


def numpy_patches(workload: Workload, squares: np.ndarray, dtype: torch.dtype) -> Tensor:
    """Normalised and cut into patches, (N * patches, 3 * p * p)."""
    levels: Any = squares.astype(np.float64 if dtype == torch.float64 else np.float32)
    levels *= 1 / 255
    levels -= np.asarray(MEAN, levels.dtype)
    levels /= np.asarray(STD, levels.dtype)
    grid, side = workload.size // workload.patch_size, workload.patch_size
    patches = levels.reshape(-1, grid, side, grid, side, 3).transpose(0, 1, 3, 5, 2, 4)
    return torch.from_numpy(patches.reshape(-1, 3 * side**2)).to(dtype)


def normalised(squares: Tensor, patch_size: int, mean: Tensor, std: Tensor, dtype: torch.dtype) -> Tensor:
    """As a textbook has it, from (N, S, S, 3)."""
    return patched(((squares.float() / 255 - mean) / std).to(dtype), patch_size)


def normalised_lean(squares: Tensor, patch_size: int, mean: Tensor, std: Tensor, dtype: torch.dtype) -> Tensor:
    """What takes eager PyTorch the least: bytes into the order of the output, then one product and sum."""
    rows = patched(squares, patch_size).view(-1, 3, patch_size**2).to(dtype)
    scale, bias = (1 / (255 * std)).to(dtype), (-mean / std).to(dtype)
    return torch.addcmul(bias[:, None], rows, scale[:, None]).view(-1, 3 * patch_size**2)


def patched(squares: Tensor, patch_size: int) -> Tensor:
    grid = squares.shape[1] // patch_size
    patches = squares.view(-1, grid, patch_size, grid, patch_size, 3).permute(0, 1, 3, 5, 2, 4)
    return patches.reshape(-1, 3 * patch_size**2)


def torch_peer(workload: Workload, dtype: torch.dtype, device: str, normalise: Callable) -> Callable[[Frames], Tensor]:
    mean, std = (torch.tensor(each, device=device) for each in (MEAN, STD))

    def resized(frames: Tensor) -> Tensor:  # (N, height, width, 3) to (N, S, S, 3)
        if workload.is_sized:
            return workload.centre(frames)
        planes = frames.permute(0, 3, 1, 2)
        shape = workload.short_side_shape(*frames.shape[1:3])
        if device == "cpu":  # bytes in, bytes out
            levels = interpolate(planes, shape, mode="bicubic", antialias=True)
        else:
            floats = interpolate(planes.float(), shape, mode="bicubic", antialias=True)
            levels = floats.round_().clamp_(0, 255).to(torch.uint8)
        return workload.centre(levels.permute(0, 2, 3, 1))

    def run(frames: Frames) -> Tensor:
        squares = (
            resized(frames.stack)
            if frames.stack is not None
            else torch.cat([resized(frame[None]) for frame in frames.tensors])
        )
        return normalise(squares.contiguous(), workload.patch_size, mean, std, dtype)

    return run


def _processor(kind: type, workload: Workload, dtype: torch.dtype) -> Callable[[Frames], Tensor]:
    processor = kind(
        size={"shortest_edge": workload.size}, crop_size={"height": workload.size, "width": workload.size},
        image_mean=MEAN, image_std=STD,
    )  # fmt: skip
    return lambda frames: processor(frames.images, return_tensors="pt").pixel_values.to(dtype)


def _transformers_pillow(workload: Workload, dtype: torch.dtype) -> Peer:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    return Peer(_processor(CLIPImageProcessorPil, workload, dtype))


def _transformers_torchvision(workload: Workload, dtype: torch.dtype) -> Peer | str:
    try:
        import torchvision  # noqa: F401
        from transformers import CLIPImageProcessor
    except (ImportError, RuntimeError) as error:  # its operators fail to register beside another build of torch
        return f"torchvision cannot be imported: {str(error).splitlines()[0]}"
    return Peer(_processor(CLIPImageProcessor, workload, dtype), tolerance=1.0)


def _opencv(workload: Workload, dtype: torch.dtype) -> Peer | str:
    if workload.is_sized:
        return "nothing is resized: it would be pillow + numpy"
    try:
        import cv2
    except ImportError as error:
        return f"opencv cannot be imported: {error}"

    def resized(frame: np.ndarray) -> np.ndarray:
        height, width = workload.short_side_shape(*frame.shape[:2])
        # Its cubic filter does not widen when it shrinks: areas are what it has against aliasing.
        interpolation = cv2.INTER_AREA if height < frame.shape[0] else cv2.INTER_CUBIC
        return workload.centre(cv2.resize(frame, (width, height), interpolation=interpolation))

    def run(frames: Frames) -> Tensor:
        cv2.setNumThreads(torch.get_num_threads())
        squares = np.stack([resized(frame.numpy()) for frame in frames.tensors])
        return numpy_patches(workload, squares, dtype)

    return Peer(run, tolerance=3.0)
