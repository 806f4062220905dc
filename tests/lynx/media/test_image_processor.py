"""The image processor: the numbers of transformers' processors, their configurations and what they take."""

import json
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from lynx.media.image_processor import LynxImageProcessor
from lynx.media.images import ImageError
from lynx_kernels.ops.pack_frames import pack_frames


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def clip(size: int, **options):
    return CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size}, **options)


def siglip(size: int):
    return SiglipImageProcessorPil(size={"height": size, "width": size})


def blip(size: int):
    return BlipImageProcessorPil(size={"height": size, "width": size})


@pytest.mark.parametrize("make", [clip, siglip, blip])
@pytest.mark.parametrize("size", [1, 28, 224, 336, 384, 420])
def test_bit_for_bit_what_transformers_gives(make, size):
    theirs = make(size)
    ours = LynxImageProcessor.from_dict(theirs.to_dict())
    sides = (1, 2, 7, 29, 100, 333) if size < 200 else (1, 33, 200, 640)
    shapes = [(height, width) for height in sides for width in sides if max(height, width) <= 100 * min(height, width)]
    shapes += [(size, size), (size, size + 1), (size + 1, size), (10 * size // 4, size // 4 or 1)]
    images = [Image.fromarray(noise(*shape, seed)) for seed, shape in enumerate(shapes)]
    expected = theirs(images, return_tensors="np")["pixel_values"]
    actual = ours(images, return_tensors="np")["pixel_values"]
    assert actual.dtype == expected.dtype
    for shape, mine, other in zip(shapes, actual, expected, strict=True):
        np.testing.assert_array_equal(mine, other, err_msg=f"{shape}")


@pytest.mark.parametrize("make", [clip, siglip])
def test_every_level_is_normalised_alike(make):
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)
    theirs = make(16)
    actual = LynxImageProcessor.from_dict(theirs.to_dict())(levels).pixel_values
    assert torch.equal(actual, theirs(levels, return_tensors="pt").pixel_values)


def test_configurations_of_transformers_are_read_from_files(tmp_path):
    clip(28).save_pretrained(tmp_path)
    image = noise(40, 60)
    ours = LynxImageProcessor.from_pretrained(tmp_path)
    assert torch.equal(ours(image).pixel_values, clip(28)(image, return_tensors="pt").pixel_values)
    patches = LynxImageProcessor.from_pretrained(tmp_path, patch_size=14, output="patches")
    assert patches(image).pixel_values.shape == (4, 588)
    ours.save_pretrained(tmp_path)
    assert LynxImageProcessor.from_pretrained(tmp_path).to_dict() == ours.to_dict()
    # As checkpoints have it that are older than the sizes by name.
    old = {
        "crop_size": 28, "do_center_crop": True, "do_normalize": True, "do_resize": True, "resample": 3, "size": 28,
        "feature_extractor_type": "CLIPFeatureExtractor", "image_mean": ours.image_mean, "image_std": ours.image_std,
    }  # fmt: skip
    assert LynxImageProcessor.from_dict(old).to_dict() == ours.to_dict()
    assert LynxImageProcessor.from_dict(old | {"do_center_crop": False}).resize == "exact"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"resample": 2}, "resample=2"),
        ({"do_resize": False}, "do_resize=False"),
        ({"do_normalize": False}, "do_normalize=False"),
        ({"do_rescale": False}, "do_rescale=False"),
        ({"rescale_factor": 1.0}, "rescale_factor=1.0"),
        ({"do_pad": True}, "do_pad=True"),
        ({"crop_size": {"height": 24, "width": 24}}, "size={'shortest_edge': 28} with crop_size={'height': 24"),
        ({"size": {"height": 28, "width": 28}}, "size={'height': 28"),
        ({"do_center_crop": False}, "size={'shortest_edge': 28}"),
        ({"do_center_crop": False, "size": {"height": 28, "width": 29}}, "'width': 29"),
        ({"size": None}, "size=None"),
    ],
)
def test_what_it_cannot_do_is_refused(changed, message):
    with pytest.raises(ValueError, match=f"does not support this configuration: .*{message}"):
        LynxImageProcessor.from_dict(clip(28).to_dict() | changed)
    for name in ("resample", "image_mean", "image_std"):
        config = clip(28).to_dict()
        del config[name]
        with pytest.raises(ValueError, match=f"no {name}"):
            LynxImageProcessor.from_dict(config)


def test_everything_that_holds_images():
    processor = LynxImageProcessor(size=28)
    first, second = noise(40, 60), noise(40, 60, 1)
    expected = processor([first, second]).pixel_values
    planes = [each.transpose(2, 0, 1) for each in (first, second)]
    for images in (
        (first, second), [[first], [second]], [[first, second]], [first, [Image.fromarray(second)]],
        np.stack([first, second]), torch.from_numpy(np.stack([first, second])), [np.stack([first, second])],
        planes, np.stack(planes), [torch.from_numpy(planes[0]), torch.from_numpy(second)],
    ):  # fmt: skip
        assert torch.equal(processor(images).pixel_values, expected)
    assert torch.equal(processor.preprocess(first).pixel_values, expected[:4])
    assert torch.equal(processor(planes[0]).pixel_values, expected[:4])
    three = noise(3, 3)
    assert torch.equal(processor(three).pixel_values, processor(Image.fromarray(three)).pixel_values)
    assert processor([]).pixel_values.shape == (0, 588)


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        (noise(40, 60)[..., 0], ValueError, r"frames\[0\] has shape \(40, 60\)"),
        (noise(40, 60) / 255, TypeError, "dtype float64, expected uint8"),
        (np.zeros((40, 60, 4), np.uint8), ValueError, r"shape \(40, 60, 4\)"),
        ([None], TypeError, "got NoneType"),
    ],
)
def test_what_is_no_image(image, error, message):
    with pytest.raises(error, match=message):
        LynxImageProcessor(size=28)(image)


def test_channels_are_normalised_as_clips_by_default():
    """In the order red, green, blue: each by its own mean and standard deviation."""
    processor = LynxImageProcessor(size=14)
    assert (processor.image_mean, processor.image_std) == (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)
    pixels = processor(np.full((14, 14, 3), (255, 51, 0), np.uint8), output="pixels").pixel_values[0]
    for channel, level in enumerate((1.0, 0.2, 0.0)):
        expected = (level - OPENAI_CLIP_MEAN[channel]) / OPENAI_CLIP_STD[channel]
        torch.testing.assert_close(pixels[channel], torch.full((14, 14), expected))


def test_kinds_of_results():
    processor = LynxImageProcessor(size=28)
    image = noise(40, 60)
    for kind, expected in (
        ({}, torch.Tensor),
        ({"return_tensors": "pt"}, torch.Tensor),
        ({"return_tensors": "np"}, np.ndarray),
        ({"return_tensors": None}, torch.Tensor),
    ):
        result = processor(image, **kind)
        assert list(result) == processor.model_input_names == ["pixel_values"]
        assert type(result["pixel_values"]) is expected


def test_of_image_libraries_pillow_is_enough():
    """Neither torchvision nor OpenCV nor the compiled module: the same numbers."""
    array = noise(40, 60)
    expected = LynxImageProcessor(size=28)(array).pixel_values.numpy()
    code = """
import sys
for name in ("torchvision", "cv2", "skimage", "av", "lynx_kernels._host"):
    sys.modules[name] = None
import numpy as np
from lynx.media.image_processor import LynxImageProcessor
array = np.frombuffer(sys.stdin.buffer.read(), np.uint8).reshape(40, 60, 3)
sys.stdout.buffer.write(LynxImageProcessor(size=28)(array, return_tensors="np").pixel_values.tobytes())
"""
    result = subprocess.run([sys.executable, "-c", code], input=array.tobytes(), capture_output=True)
    assert result.returncode == 0, result.stderr.decode()
    assert result.stdout == expected.tobytes()


def test_processor_equals_pack_frames(tmp_path):
    arrays = [noise(40, 60), noise(70, 33)]
    path = tmp_path / "image.png"
    Image.fromarray(arrays[0]).save(path)
    processor = LynxImageProcessor(size=28)
    expected = pack_frames(arrays, size=28, patch_size=14, mean=processor.image_mean, std=processor.image_std)
    assert torch.equal(processor([path, Image.fromarray(arrays[1])], return_tensors="pt").pixel_values, expected)
    assert torch.equal(processor([arrays[0], torch.from_numpy(arrays[1])]).pixel_values, expected)
    assert torch.equal(processor(str(path)).pixel_values, expected[:4])
    assert torch.equal(processor(np.stack([arrays[0]] * 2)).pixel_values, torch.cat([expected[:4]] * 2))
    as_numpy = processor(arrays, return_tensors="np").pixel_values
    np.testing.assert_array_equal(as_numpy, expected.numpy())


def test_processor_crops_to_boxes():
    processor = LynxImageProcessor(size=28)
    images = [noise(60, 50), noise(44, 44)]
    boxes = [(3, 2, 50, 40), (0, 4, 44, 33)]
    options = {"size": 28, "patch_size": 14, "mean": processor.image_mean, "std": processor.image_std}
    expected = pack_frames(images, **options, resize="exact", crop_boxes=boxes)
    assert torch.equal(processor(images, crop_boxes=boxes).pixel_values, expected)


def test_a_call_overrides_attributes_but_only_known_ones():
    processor = LynxImageProcessor(size=28)
    assert processor([noise(30, 30)], size=42, output="pixels").pixel_values.shape == (1, 3, 42, 42)
    assert processor.size == 28
    with pytest.raises(TypeError, match="do_resize"):
        processor([noise(30, 30)], do_resize=False)
    with pytest.raises(ImageError, match="more than the limit of 10"):
        processor(Image.new("RGB", (5, 5)), max_image_pixels=10)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {
            "size": 56, "patch_size": None, "image_mean": (0.5, 0.5, 0.5), "image_std": (0.5, 0.5, 0.25),
            "resize": "exact", "crop_rounding": "floor", "output": "pixels", "max_image_pixels": 10_000,
        },
    ],
)  # fmt: skip
def test_save_and_load(options, tmp_path):
    processor = LynxImageProcessor(**options)
    processor.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert saved["image_processor_type"] == "LynxImageProcessor"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = LynxImageProcessor.from_pretrained(tmp_path)
    assert loaded.to_dict() == processor.to_dict()
    for name in LynxImageProcessor.valid_kwargs.__annotations__:
        assert getattr(loaded, name) == getattr(processor, name)
        assert name in saved
    image = noise(60, 70)
    assert torch.equal(loaded(image).pixel_values, processor(image).pixel_values)
    assert LynxImageProcessor.from_pretrained(tmp_path, size=14, output="pixels").size == 14
