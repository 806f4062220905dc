"""Prepare uint8 frames of any size for the vision tower: crop, resize, normalise, cut into patches."""

import warnings
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lynx_kernels.backends import cpu as cpu_backend
from lynx_kernels.backends import dispatch
from lynx_kernels.backends.registration import define
from lynx_kernels.ops.pack_frames import cpu, cuda, reference
from lynx_kernels.ops.pack_frames.call import PackFramesCall

_LEAST_STD = 2.0**-126  # fp32 has a finite reciprocal of it

OPERATION = dispatch.Operation(
    "pack_frames",
    PackFramesCall,
    None,
    dispatch.Implementation(
        "cuda",
        cuda.forward,
        architectures=dispatch.NVIDIA,
        unsupported_reason=cuda.unsupported_reason,
    ),
    dispatch.Implementation(
        "cpu", cpu.forward, architectures=("cpu",), unsupported_reason=lambda call: cpu_backend.MISSING
    ),
    dispatch.Implementation("reference", reference.forward),
)


def _call(
    frames: Any, size: Any, patch_size: int | None, mean: Sequence[float] | None, std: Sequence[float] | None,
    dtype: torch.dtype, resize: str, crop_boxes: Any, flip: Sequence[bool] | None, crop_rounding: str, output: str,
    resample: str, windows: Any, merge_size: int, temporal_patch_size: int, out: Tensor | None,
) -> PackFramesCall:  # fmt: skip
    mean, std = _levels(mean, std, dtype)
    tensors = _as_tensors(frames)
    has_sizes = windows is not None and isinstance(size, Sequence) and any(isinstance(each, Sequence) for each in size)
    sizes = [_sides(each) for each in size] if has_sizes else [_sides(size)] * max(len(tensors), 1)
    kept = _flat_windows(windows, len(tensors), sizes, resize)
    height, width = kept[2:4] or sizes[0]
    _check_options(height, width, patch_size, mean, std, dtype, resize, crop_rounding, output, resample)
    _check_patches(height, width, patch_size, merge_size, temporal_patch_size, output)
    device = next((each.device for each in (frames, *tensors, out) if isinstance(each, Tensor)), torch.device("cpu"))
    _check_frames(tensors, device)
    boxes = _flat_boxes(tensors, crop_boxes)
    if flip is not None and len(flip) != len(tensors):
        raise ValueError(f"pack_frames: flip has {len(flip)} entries for {len(tensors)} frames")
    flips = [False] * len(tensors) if flip is None else [bool(each) for each in flip]
    shape: tuple[int, ...] = (len(tensors), 3, height, width)
    if output == "pixels":
        patch_size = None
    elif patch_size is not None:
        patches = (height // patch_size) * (width // patch_size)
        shape = (len(tensors) * patches, 3 * temporal_patch_size * patch_size**2)
    if out is None:
        out = torch.empty(shape, dtype=dtype, device=device)
    else:
        _check_out(out, shape, dtype, device)
    return PackFramesCall(
        tensors, out, boxes, flips, [side for each in sizes for side in each], kept, patch_size, merge_size,
        temporal_patch_size, list(mean), list(std), resize, resample, crop_rounding,
    )  # fmt: skip


@OPERATION.explained_by(_call)
def pack_frames(
    frames: Sequence[Tensor | np.ndarray] | Tensor | np.ndarray,
    *,
    size: int | Sequence[int],
    patch_size: int | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    dtype: torch.dtype = torch.float32,
    resize: str = "short_side",
    crop_boxes: Sequence[Sequence[int]] | None = None,
    flip: Sequence[bool] | None = None,
    crop_rounding: str = "round",
    output: str = "patches",
    resample: str = "bicubic",
    windows: Sequence[Sequence[int]] | None = None,
    merge_size: int = 1,
    temporal_patch_size: int = 1,
    out: Tensor | None = None,
    impl: str | None = None,
) -> Tensor:
    """Resize RGB frames exactly like Pillow, normalise them, and cut them into patches.

    Before normalisation the result equals ``Image.crop`` and ``Image.resize`` of the installed Pillow byte for byte.
    Versions differ: from 12.2 on the rows of some tall frames are resized before the columns, and between the two
    Pillow rounds to bytes. Without Pillow the result is that of version 13. The operation has no gradient.

    Args:
        frames: N uint8 frames (height, width, 3) of any sizes and strides, tensors on one device or numpy arrays; or
            one stacked (N, height, width, 3). Read-only and reversed arrays are copied first.
        size: (height, width) H, W of the output in pixels; or one int, the side S of a square.
        patch_size: side p of a patch; must divide both sides. Ignored with ``output="pixels"``, and may then be None.
        mean, std: mean and standard deviation of the three channels, for pixels in 0 ... 1. All finite, std positive.
            None for bytes.
        dtype: dtype of the output: fp64, fp32, fp16 or bf16. Computed in fp32 (fp64 for fp64), then rounded. Or uint8:
            bytes, which are not normalised (not in the CUDA kernels).
        resize: ``"short_side"``: the short side becomes S and the long side int(S * long / short); the centre is kept
            (CLIP, Lynx); only for squares. ``"exact"``: the sides become H and W (SigLIP, and RandomResizedCrop of a
            box).
        crop_boxes: for every frame (top, left, height, width) in pixels. Frames are cropped before anything else, so
            the filter sees no pixel outside the box. None: no crop.
        flip: for every frame, whether the result is mirrored left to right. None: no frame is.
        crop_rounding: the start of the centre crop of n pixels. ``"round"``: round((n - S) / 2), halves to even
            (torchvision, Lynx). ``"floor"``: (n - S) // 2 (transformers).
        output: ``"patches"`` or ``"pixels"``.
        resample: Pillow's filter: ``"bicubic"``, ``"bilinear"`` or ``"lanczos"`` (not in the CUDA kernels).
        windows: for every frame (top, left, height, width) of what is kept after resizing, all of one height and width,
            which become H and W; ``size`` is then what frames are resized to, one for all or (height, width) for each.
            Only with ``resize="exact"``. Tiles of an image are windows of the same frame, passed once for each.
        merge_size: patches follow each other in blocks of so many rows and columns (Qwen-VL). The CUDA kernels have no
            blocks and no copies.
        temporal_patch_size: T: a patch has each of its channels so many times, as if T frames of a video were equal.
        out: a tensor of the result's shape and dtype on the frames' device, to be filled and returned. Contiguous; or,
            for pixels, a part of a larger contiguous one: ``canvas[2:5, :, :H, :W]``, say (not for the CUDA kernels).
        impl: the name of an implementation; None takes the best that can run.

    Returns:
        ``"patches"``: (N * (H / p) * (W / p), 3 * p * p): frames in order, patches row by row, and in each patch
        channel, row, column. This is the order of a convolution's weight reshaped to (out_channels, 3 * p * p). With
        ``temporal_patch_size`` (N * (H / p) * (W / p), 3 * T * p * p): channel, T times, row, column.
        ``"pixels"``: (N, 3, H, W).

    Raises:
        ValueError: a shape, a box, a length or an option is invalid; the message names the argument and the frame.
        TypeError: a frame is not a uint8 tensor or array, an option has the wrong type, or a tensor is a DTensor.
    """
    call = _call(
        frames, size, patch_size, mean, std, dtype, resize, crop_boxes, flip, crop_rounding, output, resample, windows,
        merge_size, temporal_patch_size, out,
    )  # fmt: skip
    chosen = OPERATION.choose(impl, call)
    if impl is None and chosen == "reference" and not torch.compiler.is_compiling():
        is_on_cpu = call.device.type == "cpu"
        _warn_of_reference(call.device, cpu_backend.MISSING if is_on_cpu else cuda.unsupported_reason(call))
    _PACK_FRAMES(*call, chosen)
    return call.out


@cache
def _warn_of_reference(device: torch.device, reason: str | None) -> None:
    """Warn once that frames are packed by the slow reference, which is unexpected on a GPU."""
    if reason is not None:
        warnings.warn(f"pack_frames runs in plain PyTorch on {device.type}: {reason}", stacklevel=3)


def _sides(size: Any) -> tuple[int, int]:
    if isinstance(size, int):
        return size, size
    if not isinstance(size, Sequence) or isinstance(size, str):
        raise TypeError(f"pack_frames: size must be an int or (height, width), got {size!r}")
    if len(size) != 2:
        raise ValueError(f"pack_frames: size={size!r}, expected an int or (height, width)")
    return size[0], size[1]


def _levels(
    mean: Sequence[float] | None, std: Sequence[float] | None, dtype: torch.dtype
) -> tuple[Sequence[float], Sequence[float]]:
    if dtype == torch.uint8:
        if mean is not None or std is not None:
            raise ValueError(
                f"pack_frames: bytes (dtype=torch.uint8) are not normalised, so mean and std must be None, got "
                f"{mean!r} and {std!r}"
            )
        return (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    if mean is None or std is None:
        raise ValueError(
            f"pack_frames: mean is {mean!r} and std {std!r}, expected three values each; None is for dtype=torch.uint8"
        )
    return mean, std


def _flat_windows(windows: Any, num_frames: int, sizes: list[tuple[int, int]], resize: str) -> list[int]:
    if windows is None:
        return []
    if resize != "exact":
        raise ValueError(f"pack_frames: windows with resize={resize!r}, which cuts out the centre itself; use 'exact'")
    if len(windows) != num_frames:
        raise ValueError(f"pack_frames: windows has {len(windows)} entries for {num_frames} frames")
    if len(sizes) != max(num_frames, 1):
        raise ValueError(f"pack_frames: size has {len(sizes)} entries for {num_frames} frames")
    kept: list[int] = []
    for index, (window, resized) in enumerate(zip(windows, sizes, strict=False)):
        if len(window) != 4:
            raise ValueError(f"pack_frames: windows[{index}] is {window!r}, expected (top, left, height, width)")
        if not all(isinstance(value, int | np.integer) for value in window):
            raise TypeError(f"pack_frames: windows[{index}] is {window!r}, expected ints")
        top, left, height, width = (value if isinstance(value, int) else int(value) for value in window)
        inside = top >= 0 and left >= 0 and top + height <= resized[0] and left + width <= resized[1]
        if not inside or height < 1 or width < 1:
            raise ValueError(
                f"pack_frames: windows[{index}] is top={top}, left={left}, height={height}, width={width}: it is "
                f"empty, or not inside what the frame is resized to, {resized}"
            )
        if kept and kept[2:4] != [height, width]:
            raise ValueError(
                f"pack_frames: windows[{index}] is of height {height} and width {width}, and windows[0] of {kept[2]} "
                f"and {kept[3]}; one call makes outputs of one size"
            )
        kept += [top, left, height, width]
    return kept


def _check_options(
    height: Any, width: Any, patch_size: Any, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype,
    resize: str, crop_rounding: str, output: str, resample: str,
) -> None:  # fmt: skip
    for name, value, allowed in (
        ("resize", resize, ("short_side", "exact")),
        ("crop_rounding", crop_rounding, ("round", "floor")),
        ("output", output, ("patches", "pixels")),
        ("resample", resample, ("bicubic", "bilinear", "lanczos")),
    ):
        if value not in allowed:
            raise ValueError(f"pack_frames: {name}={value!r}, expected one of {list(allowed)}")
    if resize == "short_side" and height != width:
        raise ValueError(
            f"pack_frames: size={(height, width)} is no square, and resize='short_side' makes squares; use "
            "resize='exact', with crop_boxes of the same shape if nothing may be stretched"
        )
    for name, channels in (("mean", mean), ("std", std)):
        if len(channels) != 3:
            raise ValueError(f"pack_frames: {name} must have one value for each of 3 channels, got {channels!r}")
        dispatch.require_finite("pack_frames", **{f"{name}[{place}]": each for place, each in enumerate(channels)})
    if min(std) < _LEAST_STD:
        raise ValueError(f"pack_frames: std={std!r}, expected positive values, at least {_LEAST_STD:.3g}")
    if dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.uint8):
        raise TypeError(f"pack_frames: dtype is {dtype}, expected fp64, fp32, fp16, bf16 or uint8")


def _check_patches(
    height: Any, width: Any, patch_size: Any, merge_size: Any, temporal_patch_size: Any, output: str
) -> None:
    for name, side in (
        ("size", height), ("size", width), ("patch_size", patch_size if output == "patches" else 1),
        ("merge_size", merge_size), ("temporal_patch_size", temporal_patch_size),
    ):  # fmt: skip
        if not isinstance(side, int):
            raise TypeError(f"pack_frames: {name} must be an int, got {side!r}")
        if side < 1:
            raise ValueError(f"pack_frames: {name}={side}, expected at least 1")
    if output == "pixels" and (merge_size, temporal_patch_size) != (1, 1):
        raise ValueError("pack_frames: merge_size and temporal_patch_size are of patches; use output='patches'")
    if output == "pixels" or height % (patch_size * merge_size) == width % (patch_size * merge_size) == 0:
        return
    size = height if height == width else (height, width)
    if merge_size != 1:
        raise ValueError(
            f"pack_frames: size={size} is not a multiple of patch_size={patch_size} times merge_size={merge_size}"
        )
    raise ValueError(
        f"pack_frames: size={size} is not a multiple of patch_size={patch_size}; choose a patch_size that divides size"
    )


def _as_tensors(frames: Any) -> list[Tensor]:
    if isinstance(frames, Tensor | np.ndarray):
        if frames.ndim != 4:
            raise ValueError(
                f"pack_frames: frames as one array must be (N, height, width, 3), got {tuple(frames.shape)}; "
                "put a single frame into a list"
            )
        return list(_as_tensor(frames, "frames").unbind(0))
    return [_as_tensor(frame, f"frames[{index}]") for index, frame in enumerate(frames)]


def _as_tensor(frame: Any, name: str) -> Tensor:
    if not isinstance(frame, Tensor | np.ndarray):
        raise TypeError(f"pack_frames: {name} is a {type(frame).__name__}, expected a tensor or a numpy array")
    if isinstance(frame, Tensor):
        dispatch.refuse_dtensors("pack_frames", **{name: frame})
    if frame.dtype not in (torch.uint8, np.uint8):
        raise TypeError(f"pack_frames: {name} has dtype {frame.dtype}, expected uint8")
    if isinstance(frame, Tensor):
        return frame
    can_be_shared = frame.flags.writeable and all(stride >= 0 for stride in frame.strides)
    return torch.from_numpy(frame if can_be_shared else frame.copy())


def _check_frames(frames: list[Tensor], device: torch.device) -> None:
    for index, frame in enumerate(frames):
        if frame.dim() != 3 or frame.shape[2] != 3:
            raise ValueError(
                f"pack_frames: frames[{index}] has shape {tuple(frame.shape)}, expected (height, width, 3)"
            )
        if frame.shape[0] == 0 or frame.shape[1] == 0:
            raise ValueError(f"pack_frames: frames[{index}] has shape {tuple(frame.shape)}: it has no pixels")
        dispatch.require_same_device("pack_frames", device, **{f"frames[{index}]": frame})


def _flat_boxes(frames: list[Tensor], crop_boxes: Any) -> list[int]:
    if crop_boxes is None:
        return [value for frame in frames for value in (0, 0, frame.shape[0], frame.shape[1])]
    if isinstance(crop_boxes, Tensor):
        raise TypeError(
            "pack_frames: crop_boxes is a tensor, expected ints (reading a tensor would synchronise its device); pass "
            "crop_boxes.tolist()"
        )
    if len(crop_boxes) != len(frames):
        raise ValueError(f"pack_frames: crop_boxes has {len(crop_boxes)} entries for {len(frames)} frames")
    boxes = []
    for index, (box, frame) in enumerate(zip(crop_boxes, frames, strict=True)):
        if len(box) != 4:
            raise ValueError(f"pack_frames: crop_boxes[{index}] is {box!r}, expected (top, left, height, width)")
        if not all(isinstance(value, int | np.integer) for value in box):
            raise TypeError(f"pack_frames: crop_boxes[{index}] is {box!r}, expected ints")
        # int() would turn a symbolic int into a constant, and torch.compile would recompile for every box.
        top, left, height, width = (value if isinstance(value, int) else int(value) for value in box)
        inside = top >= 0 and left >= 0 and top + height <= frame.shape[0] and left + width <= frame.shape[1]
        if not inside or height < 1 or width < 1:
            raise ValueError(
                f"pack_frames: crop_boxes[{index}] is top={top}, left={left}, height={height}, width={width}: "
                f"it is empty, or not inside frames[{index}] of shape {tuple(frame.shape)}"
            )
        boxes += [top, left, height, width]
    return boxes


def _check_out(out: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    dispatch.refuse_dtensors("pack_frames", out=out)
    dispatch.require_same_device("pack_frames", device, out=out)
    if tuple(out.shape) != shape:
        raise ValueError(f"pack_frames: out has shape {tuple(out.shape)}, expected {shape}")
    if out.dtype != dtype:
        raise TypeError(f"pack_frames: out is {out.dtype}, expected dtype={dtype}")
    if not (out.is_contiguous() or (len(shape) == 4 and _is_a_part(out))):
        raise ValueError(
            "pack_frames: out must be contiguous, or for pixels a part of a contiguous tensor, got strides "
            f"{out.stride()}"
        )
    if out.requires_grad:
        raise ValueError("pack_frames: out requires a gradient, and this operation has none")


def _is_a_part(pixels: Tensor) -> bool:
    """Whether rows follow rows, channels channels and frames frames without sharing memory."""
    frame, channel, row, column = pixels.stride()
    frames, channels, height, width = pixels.shape
    return column == 1 and row >= width and channel >= height * row and (frames <= 1 or frame >= channels * channel)


def _fake(call: PackFramesCall) -> None:
    """The operator returns nothing; it fills the argument ``out``."""


_PACK_FRAMES = define("pack_frames", PackFramesCall, "()", OPERATION.forward, fake=_fake, mutated="out")
