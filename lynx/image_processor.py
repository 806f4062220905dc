"""Images to ``pixel_values``: the image processor of Lynx, on Pillow, numpy and torch alone."""

import os
from collections.abc import Sequence
from typing import TypedDict

import numpy as np
import torch
from PIL import Image
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor

from lynx.images import DEFAULT_MAX_PIXELS, ImageSource, load_image
from lynx_kernels.frames import pack_frames


class LynxImagesKwargs(TypedDict, total=False):
    """What a ``LynxImageProcessor`` saves, and what a single call may override."""

    size: int
    patch_size: int | None
    image_mean: Sequence[float]
    image_std: Sequence[float]
    resize: str
    crop_rounding: str
    output: str
    max_image_pixels: int


class LynxImageProcessor(BaseImageProcessor):
    """Decodes, resizes, crops and normalises images, and cuts them into patches.

    Args:
        size: side of the square that an image becomes, in pixels.
        patch_size: side of a patch; may be None with ``output="pixels"``.
        image_mean, image_std: of the three channels, for pixels in 0 ... 1; CLIP's by default.
        resize, crop_rounding, output: as for ``lynx_kernels.pack_frames``.
        max_image_pixels: larger images are refused before they are decoded.
    """

    model_input_names = ["pixel_values"]  # noqa: RUF012 as the base class has it
    valid_kwargs = LynxImagesKwargs  # type: ignore[assignment]  # not the do_... switches of the base class

    def __init__(
        self,
        size: int = 420,
        patch_size: int | None = 14,
        image_mean: Sequence[float] = (0.48145466, 0.4578275, 0.40821073),
        image_std: Sequence[float] = (0.26862954, 0.26130258, 0.27577711),
        resize: str = "short_side",
        crop_rounding: str = "round",
        output: str = "patches",
        max_image_pixels: int = DEFAULT_MAX_PIXELS,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.size = size
        self.patch_size = patch_size
        self.image_mean = list(image_mean)
        self.image_std = list(image_std)
        self.resize = resize
        self.crop_rounding = crop_rounding
        self.output = output
        self.max_image_pixels = max_image_pixels

    def preprocess(
        self,
        images: ImageSource | torch.Tensor | Sequence[ImageSource | torch.Tensor],
        *,
        crop_boxes: Sequence[Sequence[int]] | None = None,
        return_tensors: str | None = "pt",
        **overrides,
    ) -> BatchFeature:
        """Turn images into ``pixel_values``, as ``lynx_kernels.pack_frames`` lays them out.

        Args:
            images: one image or a flat list of them, each as ``lynx.images.load_image`` takes it or a (height, width,
                3) uint8 tensor; or frames stacked in one (N, height, width, 3) array or tensor.
            crop_boxes: for training, (top, left, height, width) in each upright image: it is cropped, and the box is
                resized to the square exactly.
            return_tensors: ``"pt"``, ``"np"``, or None for a torch tensor as well.
            overrides: attributes of the processor that this call sets otherwise.

        Raises:
            ImageError: an image cannot be decoded; the message names it.
            ValueError, TypeError: an option does not fit, or an array is no uint8 RGB frame.
        """
        names = LynxImagesKwargs.__annotations__
        if unknown := sorted(overrides.keys() - names.keys()):
            raise TypeError(f"LynxImageProcessor has no option {unknown}; there are {list(names)}")
        options = {name: getattr(self, name) for name in names} | overrides
        frames = [_frame(image, options["max_image_pixels"]) for image in _as_list(images)]
        pixel_values = pack_frames(
            frames,
            size=options["size"],
            patch_size=options["patch_size"],
            mean=options["image_mean"],
            std=options["image_std"],
            resize=options["resize"] if crop_boxes is None else "exact",
            crop_boxes=crop_boxes,
            crop_rounding=options["crop_rounding"],
            output=options["output"],
        )
        return BatchFeature({"pixel_values": pixel_values}, tensor_type=return_tensors)

    def to_dict(self) -> dict:
        """The attributes as JSON holds them, ``patch_size`` also where it is None."""
        return super().to_dict() | {"patch_size": self.patch_size}


def _as_list(images) -> Sequence:
    single = isinstance(images, str | os.PathLike | bytes | Image.Image)
    if single or (isinstance(images, np.ndarray | torch.Tensor) and images.ndim == 3):
        return [images]
    return images


def _frame(image, max_pixels: int) -> np.ndarray | torch.Tensor:
    if isinstance(image, np.ndarray | torch.Tensor):
        return image  # decoded already; pack_frames checks its shape and dtype
    return np.array(load_image(image, max_pixels=max_pixels))
