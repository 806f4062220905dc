"""``accelerate_processor`` against the image processors that it changes, and against those of the torchvision backend.

One call takes Pillow's images, of sizes as photos and screens have them, to what a model reads, with the options of
released models. The Pillow backend is the truth, bit for bit; torchvision resizes in its own way, has a "~" behind its
name, and is held to a mean difference of some levels. The floor is a copy of as many bytes as the images and the pixel
values have.
"""

import importlib
import math
from collections.abc import Iterator
from functools import partial
from itertools import cycle
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.harness import Case, Setup
from benchmarks.pack_frames_peers import make_images
from benchmarks.rows import OURS
from benchmarks.timing import cold_copies, copying

PHOTOS = ((768, 1024), (1024, 683), (1080, 1920), (427, 640))
# By name: what transformers calls the model, and the options of a released one.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen2.5-VL": ("qwen2_vl", {}),
    "SigLIP-384": ("siglip", {"size": {"height": 384, "width": 384}}),
    "Gemma-3": ("gemma3", {"size": {"height": 896, "width": 896}}),
    "LLaVA-Next": (
        "llava_next", {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}},
    ),
    "Idefics3": ("idefics3", {"size": {"longest_edge": 1456}, "max_image_size": {"longest_edge": 364}}),
    "SmolVLM2": ("smolvlm", {"size": {"longest_edge": 2048}, "max_image_size": {"longest_edge": 512}}),
    "Pixtral": ("pixtral", {}),
    "InternVL": ("got_ocr2", {"size": {"height": 448, "width": 448}, "crop_to_patches": True}),
    "Mllama": ("mllama", {"size": {"height": 560, "width": 560}}),
    "CLIP-336": ("clip", {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}),
}  # fmt: skip
QUICK = ("Qwen2.5-VL", "SigLIP-384")
THREADS = (1, 2)
_PILLOW, _TORCHVISION, _FLOOR = "transformers pillow", "transformers torchvision ~", "copy"
_LEVELS = 2.0  # by which the torchvision backend may differ on average


def cases(*, quick: bool, device: str) -> Iterator[Case]:
    """Every family, on one thread and on two. The host prepares images, whatever the device."""
    for family in QUICK if quick else FAMILIES:
        for threads in THREADS:
            yield Case(
                "processors",
                "forward",
                f"{family} N={len(PHOTOS)} threads={threads}",
                partial(setup, family, PHOTOS, threads),
                (_PILLOW, _TORCHVISION, OURS + "cpu", _FLOOR),
            )


def setup(family: str, shapes: tuple[tuple[int, int], ...], threads: int) -> Setup:
    """The providers of one case; each must give what the Pillow backend gives."""
    from lynx_kernels.integrations.processors import accelerate_processor

    model, options = FAMILIES[family]
    providers = {_PILLOW: pillow_class(model)(**options), OURS + "cpu": pillow_class(model)(**options)}
    accelerate_processor(providers[OURS + "cpu"])
    left_out = {}
    try:
        providers[_TORCHVISION] = torchvision_class(model)(**options)
    except (ImportError, RuntimeError) as error:  # its operators fail to register beside another build of torch
        left_out[_TORCHVISION] = f"torchvision cannot be imported: {str(error).splitlines()[0]}"
    copies = [
        [Image.fromarray(each.numpy()) for each in copy] for copy in cold_copies(make_images(shapes, "cpu"), "cpu")
    ]
    exact = providers[_PILLOW](copies[0], return_tensors="pt")
    copy, pairs = copying(3 * sum(map(math.prod, shapes)) + exact["pixel_values"].nbytes, "cpu")
    turns = cycle(pairs)

    def check(name: str) -> None:
        if name == _FLOOR:
            return
        found = providers[name](copies[0], return_tensors="pt")
        assert list(found) == list(exact), f"it has {list(found)}, not {list(exact)}"
        for key, truth in exact.items():
            values = found[key]
            if not isinstance(truth, torch.Tensor) or not truth.is_floating_point():
                assert _as_list(values) == _as_list(truth), f"{key} is another"
                continue
            assert values.shape == truth.shape, f"{key}: {tuple(values.shape)}, not {tuple(truth.shape)}"
            differ = (values.double() - truth.double()).abs().mean().item() * 255 * min(providers[_PILLOW].image_std)
            allowed = _LEVELS if name == _TORCHVISION else 0.0
            assert differ <= allowed, f"{key}: differs by {differ:.2g} levels on average, more than {allowed:g}"

    return Setup(
        providers={
            **{name: partial(_run, processor) for name, processor in providers.items()},
            _FLOOR: lambda images: copy(next(turns)),
        },
        copies=copies,
        check=check,
        floors=(_FLOOR,),
        device="host",  # most of their memory is numpy's, of which PyTorch does not know
        left_out=left_out,
        threads=threads,
        frames=len(shapes),
    )


def _run(processor: Any, images: list[Image.Image]) -> Any:
    return processor(images, return_tensors="pt")


def _as_list(values: Any) -> Any:
    return np.asarray(values).tolist()


def pillow_class(model: str) -> Any:
    return _class_of(f"transformers.models.{model}.image_processing_pil_{model}", "ImageProcessorPil")


def torchvision_class(model: str) -> Any:
    import torchvision  # noqa: F401

    return _class_of(f"transformers.models.{model}.image_processing_{model}", "ImageProcessor")


def _class_of(module: str, ending: str) -> Any:
    found = vars(importlib.import_module(module))
    return next(each for name, each in found.items() if name.endswith(ending) and each.__module__ == module)
