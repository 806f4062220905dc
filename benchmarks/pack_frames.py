"""pack_frames against what people run today; the sizes of frames are fixed in ``workloads/pack_frames/``.

The truth is Pillow's: every provider is checked against its bytes, normalised in fp64. Those that do not resize as
Pillow does have a "~" behind their names and are held to a mean difference of some levels instead. Peers get frames as
they like them best (Pillow its images, PyTorch one stacked tensor), cold; the crop is transformers'. Transformers' own
processors stop at pixels and are not asked for patches.

Rates count the pixels that the centre crop leaves and the output, each once; the floor is a copy of as many bytes.
``out=`` fills the same tensor again and again: what is new memory for the others is not there.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.adapter import DTYPES
from benchmarks.checks import assert_near
from benchmarks.harness import Case, Setup
from benchmarks.pack_frames_peers import (
    MEAN,
    STD,
    Frames,
    Peer,
    Workload,
    make_images,
    numpy_patches,
    peers,
    pillow_squares,
    workload,
)
from benchmarks.rows import OURS
from benchmarks.timing import cold_copies
from lynx_kernels.backends.dispatch import explain
from lynx_kernels.ops.pack_frames import OPERATION, pack_frames

WORKLOADS = ("sized-420", "video-420", "video-224", "photos-420")
QUICK = ("sized-420", "video-420")
THREADS = {"cpu": (1, 2), "cuda": (1,)}


def cases(*, quick: bool, device: str) -> Iterator[Case]:
    """Every workload and dtype, on one thread and on two."""
    for name in ("fp32", "bf16"):
        for file in QUICK if quick else WORKLOADS:
            asked = workload(file)
            for threads in THREADS[device]:
                yield Case(
                    "pack_frames",
                    "forward",
                    f"{name} {file} N={len(asked.shapes)} threads={threads}",
                    partial(setup, asked, DTYPES[name], device, threads),
                    (*peers(asked, DTYPES[name], device, _uncompiled), *(OURS + each for each in _ours(device))),
                )


def _uncompiled(function: Callable, **options: object) -> Callable:
    return function


def _ours(device: str) -> list[str]:
    """Implementations, and the best again with ``out=``. Dense products for a check are not a way to pack frames."""
    names = [name for name in OPERATION.names if name != "reference"]
    frame = torch.zeros(1, 1, 3, dtype=torch.uint8, device=device)
    best = explain(pack_frames, [frame], size=1, patch_size=1, mean=MEAN, std=STD).name
    return names + ([f"{best} out="] if best in names else [])


def setup(asked: Workload, dtype: torch.dtype, device: str, threads: int, compiler: Callable = torch.compile) -> Setup:
    """The providers of one case, and a check of each against Pillow's bytes."""
    torch._dynamo.reset()
    tensors = make_images(asked.shapes, device)
    options: dict[str, Any] = {
        "size": asked.size, "patch_size": asked.patch_size, "mean": MEAN, "std": STD, "dtype": dtype,
        "crop_rounding": "floor",
    }  # fmt: skip
    refused = explain(pack_frames, tensors, **options).reasons
    found = peers(asked, dtype, device, compiler)
    out = pack_frames(tensors, **options)
    for name in _ours(device):
        impl = name.removesuffix(" out=")
        ours = partial(_ours_on, options | {"impl": impl} | ({} if name == impl else {"out": out}))
        found[OURS + name] = refused.get(impl) or Peer(ours)
    left_out = {name: peer for name, peer in found.items() if isinstance(peer, str)}
    timed = {name: peer for name, peer in found.items() if isinstance(peer, Peer)}
    copies = [Frames.of(each) for each in cold_copies(tensors, device)]
    exact = numpy_patches(asked, pillow_squares(asked, copies[0].images), torch.float64).to(device)

    def check(name: str) -> None:
        patches = _as_patches(timed[name].run(copies[0]), asked)
        tolerance = timed[name].tolerance
        if tolerance == 0:
            return assert_near([patches], [exact])
        levels = (patches.double() - exact).view(-1, 3, asked.patch_size**2) * 255
        mean = (levels * torch.tensor(STD, device=device)[:, None]).abs().mean().item()
        assert mean <= tolerance, f"differs by {mean:.2g} levels on average, more than {tolerance:g}"

    return Setup(
        providers={name: peer.run for name, peer in timed.items()},
        copies=copies,
        check=check,
        traffic=3 * sum(min(shape) ** 2 for shape in asked.shapes) + exact.numel() * dtype.itemsize,
        device=device,
        left_out=left_out,
        threads=threads if device == "cpu" else None,
        frames=len(tensors),
    )


def _ours_on(options: dict[str, Any], frames: Frames) -> Tensor:
    return pack_frames(frames.tensors, **options)


def _as_patches(values: Tensor, asked: Workload) -> Tensor:
    """Patches (N * patches, 3 * p * p) of these, or of pixels (N, 3, S, S)."""
    if values.dim() == 2:
        return values
    grid, side = asked.size // asked.patch_size, asked.patch_size
    return values.view(-1, 3, grid, side, grid, side).permute(0, 2, 4, 1, 3, 5).reshape(-1, 3 * side**2)
