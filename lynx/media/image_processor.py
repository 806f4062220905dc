"""Images to ``pixel_values``: the image processor of Lynx, which needs no image library but Pillow and numpy."""

from collections.abc import Sequence
from typing import Any, TypedDict

import numpy as np
import torch
from PIL import Image
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor

from lynx.media.images import DEFAULT_MAX_PIXELS, ImageSource, load_image
from lynx_kernels.ops.pack_frames import pack_frames


class LynxImagesKwargs(TypedDict, total=False):
    """The options that ``LynxImageProcessor`` saves, and that a single call may override."""

    size: int
    patch_size: int | None
    image_mean: Sequence[float]
    image_std: Sequence[float]
    resize: str
    crop_rounding: str
    output: str
    max_image_pixels: int


_OPTIONAL = ("patch_size", "max_image_pixels")  # of a configuration: it may be None, or changes no image


class LynxImageProcessor(BaseImageProcessor):
    """Decodes, resizes, crops and normalises images, and cuts them into patches.

    ``from_pretrained`` and ``from_dict`` also take the configurations of transformers' processors that do the same,
    those of CLIP, SigLIP and BLIP among them. The numbers are then those of their Pillow backends, bit for bit. There
    are two differences. Images are turned as their EXIF orientation says. Transparent images are laid on white.

    Args:
        size: side of the square that an image becomes, in pixels.
        patch_size: side of a patch in pixels; may be None with ``output="pixels"``.
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
        **kwargs: Any,
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
        images: ImageSource | torch.Tensor | Sequence[Any],
        *,
        crop_boxes: Sequence[Sequence[int]] | None = None,
        return_tensors: str | None = "pt",
        **overrides: Any,
    ) -> BatchFeature:
        """Turn images into ``pixel_values``, as ``lynx_kernels.pack_frames`` lays them out.

        Args:
            images: one image or a list of images. An image is what ``lynx.media.images.load_image`` takes, or a uint8
                array or tensor (height, width, 3) or (3, height, width). Or an array or tensor of stacked frames, (N,
                height, width, 3) or (N, 3, height, width). Nested lists are flattened.
            crop_boxes: for training, (top, left, height, width) in each upright image; the box is cut out and resized
                to the square exactly.
            return_tensors: ``"np"`` for numpy arrays; ``"pt"`` or None for torch tensors.
            overrides: options of the processor that are different in this call.

        Raises:
            ImageError: an image cannot be decoded; the message names it.
            ValueError, TypeError: an option does not fit, or an array is not a uint8 RGB frame.
        """
        names = LynxImagesKwargs.__annotations__
        if unknown := sorted(overrides.keys() - names.keys()):
            raise TypeError(f"LynxImageProcessor has no options {unknown}; there are {list(names)}")
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
        """The options as JSON holds them, with ``patch_size`` even where it is None."""
        return super().to_dict() | {"patch_size": self.patch_size}

    @classmethod
    def from_dict(cls, image_processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The processor of a configuration of this class, or of one of transformers' image processors.

        Raises:
            ValueError: the configuration asks for what this processor does not do, or lacks an option; the message says
                which.
        """
        return super().from_dict(_translated(image_processor_dict), **kwargs)


def _translated(theirs: dict[str, Any]) -> dict[str, Any]:
    """A configuration of transformers' CLIP or SigLIP processor as one of this class; one of this class unchanged."""
    if "do_resize" not in theirs:
        names = LynxImagesKwargs.__annotations__
        if missing := [name for name in names if theirs.get(name) is None and name not in _OPTIONAL]:
            raise ValueError(
                f"the image processor's configuration lacks {', '.join(missing)}: the model was trained with some "
                "values of them, and others would make other images"
            )
        return theirs
    crops = bool(theirs.get("do_center_crop"))
    size, crop_size = theirs.get("size"), theirs.get("crop_size")
    if isinstance(size, int):  # as the configurations of old checkpoints have it
        size = {"shortest_edge": size} if crops else {"height": size, "width": size}
    if isinstance(crop_size, int):
        crop_size = {"height": crop_size, "width": crop_size}
    side = (size or {}).get("shortest_edge" if crops else "height")
    square = {"height": side, "width": side}
    expected = {
        "do_resize": True, "resample": Image.Resampling.BICUBIC, "do_rescale": True, "rescale_factor": 1 / 255,
        "do_normalize": True, "do_pad": False,
    }  # fmt: skip
    wrong = [f"{name}={theirs[name]}" for name, value in expected.items() if theirs.get(name, value) != value]
    wrong += [f"no {name}" for name in ("resample", "image_mean", "image_std") if name not in theirs]
    if size != ({"shortest_edge": side} if crops else square) or (crops and crop_size != square):
        wrong.append(f"size={size}" + (f" with crop_size={crop_size}" if crops else ""))
    if wrong:
        raise ValueError(
            f"LynxImageProcessor does not support this configuration: {', '.join(wrong)}. It resizes by bicubic "
            "interpolation, either both sides to a square or the short side to that of the crop, and normalises"
        )
    return {
        "size": side,
        "patch_size": None,
        "image_mean": theirs["image_mean"],
        "image_std": theirs["image_std"],
        "resize": "short_side" if crops else "exact",
        "crop_rounding": "floor",
        "output": "pixels",
    }


def _as_list(images: Any) -> list[Any]:
    is_array = isinstance(images, np.ndarray | torch.Tensor)
    if is_array and images.ndim == 4:
        return list(images)
    if is_array or isinstance(images, str | bytes) or not isinstance(images, Sequence):
        return [images]
    return [image for each in images for image in _as_list(each)]


def _frame(image: Any, max_pixels: int) -> np.ndarray | torch.Tensor:
    if not isinstance(image, np.ndarray | torch.Tensor):
        return np.array(load_image(image, max_pixels=max_pixels))
    if image.ndim == 3 and image.shape[0] == 3 and image.shape[2] != 3:
        return image.permute(1, 2, 0) if isinstance(image, torch.Tensor) else image.transpose(1, 2, 0)
    return image  # pack_frames checks its shape and dtype
