"""``accelerate_processor``: every output of transformers' Pillow image processors, and every bit of it, stays."""

import copy
import gc
import importlib
import logging
import pickle
import re
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers.image_processing_backends import PilBackend

from lynx_kernels.backends import cpu as cpu_backend
from lynx_kernels.integrations import logs
from lynx_kernels.integrations.processors import accelerate_processor
from lynx_kernels.integrations.processors import pending as pending_module
from lynx_kernels.integrations.processors.pillow import pixels_of

pytestmark = pytest.mark.skipif(bool(cpu_backend.MISSING), reason="not built")

SQUARE = {"size": {"height": 56, "width": 56}}
TILES = [[56, 112], [112, 56], [112, 112], [56, 168]]
# Models, and options with which each way through a processor is taken on small images.
FAMILIES = {
    "qwen2_vl": {"size": {"shortest_edge": 56 * 56, "longest_edge": 140 * 140}},
    "qwen2_vl merged by three": {
        "size": {"shortest_edge": 56 * 56, "longest_edge": 140 * 140}, "patch_size": 8, "merge_size": 3,
        "temporal_patch_size": 1,
    },
    "glm4v": {"size": {"shortest_edge": 2 * 56 * 56, "longest_edge": 2 * 140 * 140}},
    "siglip": SQUARE,
    "gemma3": SQUARE,
    "gemma3 pan and scan": {
        **SQUARE, "do_pan_and_scan": True, "pan_and_scan_min_crop_size": 20, "pan_and_scan_max_num_crops": 4,
        "pan_and_scan_min_ratio_to_activate": 1.2,
    },
    "llava_next": {**SQUARE, "crop_size": {"height": 56, "width": 56}, "image_grid_pinpoints": TILES},
    "llava_next by short sides": {
        "size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}, "image_grid_pinpoints": TILES,
    },
    "llava_onevision": {**SQUARE, "image_grid_pinpoints": TILES},
    "idefics3": {"size": {"longest_edge": 160}, "max_image_size": {"longest_edge": 56}, "return_row_col_info": True},
    "idefics3 whole": {
        "size": {"longest_edge": 160}, "max_image_size": {"longest_edge": 56}, "do_image_splitting": False,
    },
    "smolvlm": {"size": {"longest_edge": 160}, "max_image_size": {"longest_edge": 56}, "return_row_col_info": True},
    "pixtral": {"size": {"longest_edge": 112}},
    "got_ocr2": {**SQUARE, "crop_to_patches": True, "max_patches": 6},
    "mllama": SQUARE,
    "clip": {"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}},
    "clip padded": {"size": {"shortest_edge": 40}, "crop_size": {"height": 56, "width": 61}},
}  # fmt: skip


def processor_class(model):
    """Its Pillow image processor, or a skip by name."""
    try:
        module = importlib.import_module(f"transformers.models.{model}.image_processing_pil_{model}")
    except ImportError:
        pytest.skip(f"transformers {transformers.__version__} has no Pillow image processor of {model}")
    return next(
        each for each in vars(module).values()
        if isinstance(each, type) and issubclass(each, PilBackend) and each.__module__ == module.__name__
    )  # fmt: skip


def build(family):
    return processor_class(family.split()[0])(**FAMILIES[family])


def photo(generator, height, width, mode="RGB"):
    """Noise; half of it black and white, where filters overshoot."""
    noise = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
    if generator.random() < 0.5:
        noise = np.where(noise < 128, 0, 255).astype(np.uint8)
    if mode == "RGBA":
        return Image.fromarray(np.dstack([noise, noise[..., :1]]))
    return Image.fromarray(noise).convert(mode)


def random_sizes(generator, count):
    sizes = [(60, 90), (1, 1), (3, 150), (150, 2), (7, 5), (56, 56), (230, 40), (40, 230), (112, 56), (28, 300)]
    return sizes + [tuple(map(int, generator.integers(1, (30, 100, 300)[i % 3], 2))) for i in range(count)]


def assert_same(actual, expected, where="features"):
    """Types, names, shapes, dtypes and bits."""
    assert type(actual) is type(expected), where
    if isinstance(expected, np.ndarray | torch.Tensor):
        assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype), where
        np.testing.assert_array_equal(np.asarray(actual), np.asarray(expected), err_msg=where)
    elif hasattr(expected, "items"):
        assert list(actual) == list(expected)
        for name, value in expected.items():
            assert_same(actual[name], value, f"{where}.{name}")
    elif isinstance(expected, list | tuple):
        assert len(actual) == len(expected), where
        for index, (each, own) in enumerate(zip(actual, expected, strict=True)):
            assert_same(each, own, f"{where}[{index}]")
    else:
        assert actual == expected, where


def outcome(processor, images, **options):
    """What it returns, or its error."""
    try:
        return processor(images, **options)
    except Exception as error:
        return type(error).__name__, str(error)


def assert_nothing_changes(processor, *calls, **options):
    """Of the results and errors of some calls; returns the report."""
    expected = [outcome(processor, images, **options) for images in calls]
    with accelerate_processor(processor) as acceleration:
        for images, own in zip(calls, expected, strict=True):
            assert_same(outcome(processor, images, **options), own)
        return acceleration.report()


@pytest.mark.parametrize("family", FAMILIES)
def test_images_of_all_sizes(family):
    """One by one. Few errors are alike: strips that are too long for smart_resize, say."""
    generator = np.random.default_rng(0)
    images = [photo(generator, *size) for size in random_sizes(generator, 20)]
    report = assert_nothing_changes(build(family), *images, return_tensors="pt")
    assert re.fullmatch(r"\w+: [1-9]\d+ images by pack_frames", report), report


@pytest.mark.parametrize("family", FAMILIES)
def test_batches(family):
    generator = np.random.default_rng(1)
    images = [photo(generator, *size) for size in ((60, 90), (200, 150), (60, 90), (33, 140))]
    for return_tensors in ("pt", "np", None):
        calls = (images, images[:1], [images[:2], images[2:]], [[images[0]], images[1:]])
        report = assert_nothing_changes(build(family), *calls, return_tensors=return_tensors)
        assert "own way" not in report, report


@pytest.mark.parametrize("family", ["qwen2_vl", "siglip", "llava_next", "idefics3", "pixtral", "mllama"])
def test_images_of_all_kinds(family):
    """Modes of Pillow; arrays and tensors, channels first and last, of bytes and of floats, strided and read-only."""
    generator = np.random.default_rng(2)
    kinds = [photo(generator, 70, 110, mode) for mode in ("L", "RGBA", "P", "CMYK", "1", "LA", "YCbCr", "I;16")]
    palette = photo(generator, 70, 110, "P")
    palette.info["transparency"] = 3
    see_through = photo(generator, 70, 110)
    see_through.info["transparency"] = see_through.getpixel((3, 4))
    array = np.asarray(photo(generator, 70, 110))  # read-only
    tensor = torch.from_numpy(array.copy())
    kinds += [
        palette, see_through, array, array.transpose(2, 0, 1), array[::-1, ::2], array[..., :1].copy(), array / 255,
        array.astype(np.float32), array.astype(np.int64), np.dstack([array, array[..., :1]]), np.stack([array, array]),
        tensor, tensor.permute(2, 0, 1), tensor.permute(2, 0, 1).contiguous(), tensor / 255, torch.stack([tensor] * 2),
    ]  # fmt: skip
    assert_nothing_changes(build(family), *kinds, return_tensors="pt")


OPTIONS = [
    {"do_resize": False}, {"do_rescale": False}, {"do_normalize": False}, {"do_rescale": False, "do_normalize": False},
    {"do_convert_rgb": False}, {"do_pad": False}, {"do_center_crop": False}, {"do_center_crop": True}, {"do_pad": True},
    {"rescale_factor": 1 / 127.5}, {"image_mean": 0.5, "image_std": 0.25}, {"image_mean": [0.1, 0.2, 0.3]},
    {"image_std": [0.0, 1.0, 2.0]}, {"image_mean": [0.1, 0.2]}, {"size": {"height": 42, "width": 84}},
    {"size": {"shortest_edge": 84}}, {"size": {"shortest_edge": 40, "longest_edge": 70}},
    {"size": {"longest_edge": 84}}, {"size": {"max_height": 60, "max_width": 50}}, {"size": 50},
    {"crop_size": {"height": 30, "width": 29}},
    *({"resample": each} for each in range(6)),
]  # fmt: skip


@pytest.mark.parametrize("family", ["qwen2_vl", "siglip", "llava_next", "idefics3", "pixtral", "clip"])
def test_options(family):
    """Those that pack_frames has not go the processor's own way; those that are wrong have the same error."""
    generator = np.random.default_rng(3)
    images = [photo(generator, 70, 110), photo(generator, 84, 84)]
    processor = build(family)
    for options in OPTIONS:
        report = assert_nothing_changes(processor, images, return_tensors="np", **options)
        if options.get("resample") in (0, 4, 5):
            name = Image.Resampling(options["resample"]).name
            assert f"times: resample={name}: we have bilinear, bicubic and Lanczos" in report


def pillow_models():
    folder = Path(transformers.__file__).parent / "models"
    return sorted(each.parent.name for each in folder.glob("*/image_processing_pil_*.py"))


def test_all_other_models():
    """With their own options, as far as they take an image alone."""
    generator = np.random.default_rng(4)
    image = photo(generator, 45, 33)
    tried = 0
    for model in pillow_models():
        try:
            processor = processor_class(model)()
        except (ImportError, ValueError, TypeError):  # a library that is not there, arguments that have no default
            continue
        tried += " 1 images by pack_frames" in assert_nothing_changes(processor, image)
    assert tried > 60, tried


def test_report_and_log(caplog, monkeypatch):
    monkeypatch.setattr(logs, "_said", set())
    caplog.set_level(logging.INFO, "lynx_kernels")
    processor = build("siglip")
    acceleration = accelerate_processor(processor)
    assert acceleration.report() == "SiglipImageProcessorPil: 0 images by pack_frames"
    image = photo(np.random.default_rng(5), 20, 30)
    for _ in range(2):
        processor([image, image])
        processor(np.asarray(image) / 255)
    assert acceleration.report() == (
        "SiglipImageProcessorPil: 4 images by pack_frames\n"
        "in its own way, 2 times: an image of float64, not of bytes"
    )  # fmt: skip
    assert [each.message for each in caplog.records if each.name == "lynx_kernels"] == [
        "SiglipImageProcessorPil: in its own way: an image of float64, not of bytes"
    ]


def test_undo_is_exact():
    processor = build("qwen2_vl")
    before, own = dict(vars(processor)), type(processor)
    acceleration = accelerate_processor(processor)
    assert acceleration.processor is processor
    assert isinstance(processor, own)
    assert type(processor) is not own
    with pytest.raises(RuntimeError, match="Qwen2VLImageProcessorPil is accelerated already"):
        accelerate_processor(processor)
    acceleration.undo()
    acceleration.undo()
    assert type(processor) is own
    assert vars(processor) == before
    with accelerate_processor(processor):
        pass
    assert type(processor) is own


def test_undo_under_something_later_is_refused():
    processor = build("siglip")
    acceleration = accelerate_processor(processor)
    processor.__class__ = type("Later", (type(processor),), {})
    with pytest.raises(RuntimeError, match="Later by now"):
        acceleration.undo()


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, lambda each: pickle.loads(pickle.dumps(each))])
def test_copies_are_accelerated(copied):
    processor = build("qwen2_vl")
    image = photo(np.random.default_rng(6), 60, 90)
    expected = processor(image, return_tensors="pt")
    acceleration = accelerate_processor(processor)
    other = copied(processor)
    assert type(other) is type(processor)
    assert vars(other) == vars(processor)
    acceleration.undo()
    assert_same(other(image, return_tensors="pt"), expected)
    with pytest.raises(RuntimeError, match="already"):
        accelerate_processor(other)


def test_saved_as_before(tmp_path):
    processor = build("qwen2_vl")
    processor.save_pretrained(tmp_path / "before")
    shown = repr(processor), processor.to_dict()
    with accelerate_processor(processor):
        processor.save_pretrained(tmp_path / "after")
        assert (repr(processor), processor.to_dict()) == shown
    before, after = (
        {path.name: path.read_text() for path in (tmp_path / name).iterdir()} for name in ("before", "after")
    )
    assert before == after


def test_whole_processors():
    """One with an image processor; others have none with the Pillow backend."""

    class Whole:
        image_processor = build("siglip")

    with accelerate_processor(Whole()) as acceleration:
        assert acceleration.processor is Whole.image_processor
    for wrong in (object(), torch.nn.Linear(1, 1)):
        with pytest.raises(TypeError, match=r'Pillow backend, got a .*backend="pil"'):
            accelerate_processor(wrong)


def test_without_kernels(monkeypatch):
    monkeypatch.setattr(cpu_backend, "MISSING", "they are not built")
    with pytest.raises(RuntimeError, match="would be slow: they are not built"):
        accelerate_processor(build("siglip"))


class Stranger(PilBackend):
    """Its code does to images what only arrays can, here and there."""

    do_resize, resample, size = True, Image.Resampling.BICUBIC, {"height": 20, "width": 30}
    rescale_factor, image_mean, image_std = 1 / 255, (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)

    def _preprocess(self, images, size, resample, **kwargs):
        found = []
        for image in images:
            small = self.resize(image, size, resample)
            zeros, same = ((0, 0), (1, 2), (3, 4)), image.shape == small.shape
            normalized = self.normalize(self.rescale(small, 1 / 255), self.image_mean, self.image_std)
            found += [
                image.astype(np.int16) - 3, image.T, np.transpose(image, (1, 2, 0)), -image, image + image, image[0],
                image[:, 3], image[..., 2:9, 4:70], image[:, 40:2, :], image[:, ::2, ::3], image.mean(), list(image),
                image[1:], image[:, -5:, :-5], image.tobytes(), len(image), small, normalized, 2 * normalized - 1,
                np.pad(image, ((0, 0), (1, 2), (3, 4))), np.pad(image, ((1, 0), (1, 2), (3, 4))),
                np.pad(image, ((0, 0), (1, 2), (3, 4)), constant_values=7), np.pad(image, 2), np.pad(image, 2, "edge"),
                np.pad(normalized, ((0, 0), (1, 2), (3, 4))), np.pad(image, ((0, 0), (9, 9), (9, 9)))[:, 4:-4, 4:],
                np.pad(image[:, 5:, 3:-3], ((0, 0), (1, 2), (3, 4))), np.pad(small[:, 5:9], ((0, 0), (1, 2), (3, 4))),
                np.pad(normalized[:, 5:9], ((0, 0), (1, 2), (3, 4))), np.pad(np.pad(image, zeros), zeros),
                np.pad(np.pad(normalized, zeros), zeros)[:, 1:-1, 2:], self.normalize(np.pad(normalized, zeros), 1, 2),
                np.pad(self.normalize(self.rescale(np.pad(small, zeros), 1 / 255), 0.5, 0.5), zeros),
                np.array([normalized, np.pad(normalized, zeros)[:, 1:-2, 3:-4]]), np.array([[small], [small]]),
                np.pad(np.array([small] * 2), ((0, 2), (0, 0), (0, 0), (0, 0))),
                np.asarray([small, image] if same else 1),
                np.pad(np.array([small, small]), ((1, 2), (0, 0), (0, 0), (0, 0))), np.stack([small, small], axis=-1),
                np.array([np.pad(np.array([normalized] * 2), ((0, 1), (0, 0), (0, 0), (0, 0)))] * 2) / 2,
                np.array([normalized, self.normalize(self.rescale(small, 1 / 255), 0.25, 0.5), normalized]),
                np.array([small, self.resize(image, size, Image.Resampling.BILINEAR)]), np.pad(small[:, :9, :], zeros),
                np.stack([normalized, normalized]), np.concatenate([small, image[:, :20, :30]], axis=2),
                self.resize(np.pad(small, ((0, 0), (5, 0), (0, 5))), size, resample),
                self.resize(image[:, 4:44, 5:60], size, resample)[:, 3:9, 4:30], self.resize(small, size, resample),
                self.resize(small[:, :9], size, resample), self.normalize(image, 0.5, 0.5),
                self.rescale(image, 2)[:, 5:7], self.rescale(self.rescale(image, 2), 3), np.array([small, small]),
                self.normalize(normalized, 0.5, 0.5), np.asarray(image, dtype=np.float32),
            ]  # fmt: skip
        return transformers.BatchFeature({"found": found})


def test_whatever_is_done_to_images():
    generator = np.random.default_rng(7)
    images = [photo(generator, 61, 90), photo(generator, 20, 30)]
    report = assert_nothing_changes(Stranger(), images[:1], images)
    assert "own way" not in report, report


class Impossible(Stranger):
    """``torch.from_numpy`` takes nothing but arrays."""

    def _preprocess(self, images, **kwargs):
        return transformers.BatchFeature({"found": [torch.from_numpy(each.copy()) for each in images] + [
            torch.from_numpy(np.ascontiguousarray(images[0]) if type(images[0]) is np.ndarray else images[0])
        ]})  # fmt: skip


def test_a_call_that_needs_arrays_goes_its_own_way():
    report = assert_nothing_changes(Impossible(), photo(np.random.default_rng(8), 20, 30))
    assert report.startswith(
        "Impossible: 0 images by pack_frames\nin its own way, 1 times: a whole call, after TypeError:"
    )


def test_images_outside_a_call_are_arrays():
    processor = build("siglip")
    with accelerate_processor(processor):
        assert type(processor.process_image(photo(np.random.default_rng(9), 20, 30))) is np.ndarray


def test_images_of_a_batch_and_their_tiles_are_one_call(monkeypatch):
    """Nothing is resized twice, and what is put together is written in place."""
    calls = []
    own = pending_module.pack_frames
    monkeypatch.setattr(pending_module, "pack_frames", lambda *a, **k: calls.append(k) or own(*a, **k))
    images = [photo(np.random.default_rng(10), 112, 112)] * 2
    for family, expected in (("qwen2_vl", 2), ("siglip", 1), ("gemma3", 1), ("pixtral", 1), ("llava_next", 1)):
        calls.clear()
        with accelerate_processor(build(family)) as acceleration:
            acceleration.processor(images, return_tensors="pt")
        assert len(calls) == expected, family
        assert all(each["mean"] is not None for each in calls), family


def test_pillow_is_read_where_it_is():
    generator = np.random.default_rng(11)
    image = photo(generator, 37, 53)
    pixels = pixels_of(image)
    np.testing.assert_array_equal(pixels, np.asarray(image))
    assert not pixels.flags.writeable
    image.putpixel((5, 7), (1, 2, 3))
    assert pixels[7, 5].tolist() == [1, 2, 3]
    shown = pixels.copy()
    del image
    gc.collect()
    np.testing.assert_array_equal(pixels, shown)
    assert pixels_of(photo(generator, 5, 6, "RGBA")) is None
    assert pixels_of(Image.new("RGB", (2100, 2100))) is None  # in several blocks of memory
    report = assert_nothing_changes(build("siglip"), Image.new("RGB", (2100, 2100), (1, 2, 3)), return_tensors="pt")
    assert "own way" not in report


def test_images_are_left_as_they_are():
    """Where nothing is computed, what comes back is a copy of Pillow's memory."""
    image = photo(np.random.default_rng(12), 20, 30)
    before = image.copy()
    with accelerate_processor(build("siglip")) as acceleration:
        [values] = acceleration.processor(image, do_resize=False, do_rescale=False, do_normalize=False).pixel_values
    values[...] = 0
    assert image == before


def test_memory_is_given_back_at_once():
    image = photo(np.random.default_rng(13), 60, 90)
    with accelerate_processor(build("idefics3")) as acceleration:
        seen = []
        own = acceleration.processor.process_image
        acceleration.processor.process_image = lambda *a, **k: seen.append(weakref.ref(each := own(*a, **k))) or each
        gc.disable()
        try:
            acceleration.processor(image, return_tensors="pt")
            assert [each() for each in seen] == [None]
        finally:
            gc.enable()


def test_threads_do_not_meet():
    """Of two processors in two threads each counts its own."""
    images = [photo(np.random.default_rng(seed), 60, 90) for seed in range(8)]
    one, two = build("siglip"), build("qwen2_vl")
    expected = [[each(image, return_tensors="pt") for image in images] for each in (one, two)]
    with accelerate_processor(one) as first, accelerate_processor(two) as second, ThreadPoolExecutor(4) as pool:
        found = [
            list(pool.map(lambda image, each=each: each(image, return_tensors="pt"), images)) for each in (one, two)
        ]
        assert_same(found, expected)
        assert "8 images" in first.report()
        assert "8 images" in second.report()
