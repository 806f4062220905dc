"""Model folders: bit for bit there and back, found by the Auto classes, and refused when they are not whole."""

import json
import resource
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from lynx import LynxConfig, LynxForConditionalGeneration, LynxImageProcessor, LynxProcessor, checkpoint
from lynx.train import param_groups
from tests.lynx.conftest import VISION, conversation, make_config, make_image, make_model


@pytest.fixture
def folder(model, processor, tmp_path):
    checkpoint.save(tmp_path / "model", model, processor)
    return tmp_path / "model"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vision", VISION)
@pytest.mark.parametrize("tied", [False, True])
def test_round_trip_is_bit_exact(tokenizer, tmp_path, vision, dtype, tied):
    config = make_config(tokenizer, vision)
    config.text_config.tie_word_embeddings = tied
    config = LynxConfig(**{**config.to_dict(), "tie_word_embeddings": tied})
    model = make_model(config)
    for parameter in model.parameters():  # .to() would round the rotary frequencies too, which are never saved
        parameter.data = parameter.data.to(dtype)
    processor = LynxProcessor.for_model(config, tokenizer)
    checkpoint.save(tmp_path, model, processor)
    loaded, loaded_processor = checkpoint.load(tmp_path)
    saved = model.state_dict()
    assert {name: tensor.dtype for name, tensor in loaded.state_dict().items()} == dict.fromkeys(saved, dtype)
    assert all(torch.equal(tensor, saved[name]) for name, tensor in loaded.state_dict().items())
    head, table = loaded.get_output_embeddings().weight, loaded.get_input_embeddings().weight
    assert (head is table) == tied
    messages = conversation("What?", images=[make_image(0)])
    batches = [each.pack([each.encode(messages)]) for each in (processor, loaded_processor)]
    assert torch.equal(batches[0]["pixel_values"], batches[1]["pixel_values"])
    for batch in batches:
        del batch["labels"]
    with torch.no_grad():
        assert torch.equal(model(**batches[0]).logits, loaded(**batches[1]).logits)


@pytest.mark.parametrize("fusion", ["prefix", "cross_attention"])
@pytest.mark.parametrize("vision", VISION)
def test_every_part_keeps_the_dtype_it_was_saved_in(tokenizer, tmp_path, vision, fusion):
    """As training in bf16 leaves a model: fp32 where it trained. One dtype for all is had by asking for it."""
    model = make_model(config := make_config(tokenizer, vision, fusion=fusion))
    param_groups.set_trainable(
        model, ["resampler", "adapters" if fusion == "prefix" else "cross_attention"], torch.bfloat16
    )
    processor = LynxProcessor.for_model(config, tokenizer)
    checkpoint.save(tmp_path, model, processor)
    loaded, _ = checkpoint.load(tmp_path)
    saved = dict(model.named_parameters())
    assert {parameter.dtype for parameter in saved.values()} == {torch.float32, torch.bfloat16}
    for name, parameter in loaded.named_parameters():
        assert parameter.dtype == saved[name].dtype, name
        assert torch.equal(parameter, saved[name]), name
    batch = processor.pack([processor.encode(conversation("What?", "seven", images=[make_image(0)]))])
    with torch.no_grad():
        assert torch.equal(model(**batch).loss, loaded(**batch).loss)
    low, _ = checkpoint.load(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in low.parameters()} == {torch.bfloat16}


def test_the_auto_classes_find_it(folder):
    assert isinstance(AutoConfig.from_pretrained(folder), LynxConfig)
    assert isinstance(AutoModel.from_pretrained(folder), LynxForConditionalGeneration)
    assert isinstance(AutoModelForImageTextToText.from_pretrained(folder), LynxForConditionalGeneration)
    assert isinstance(AutoProcessor.from_pretrained(folder), LynxProcessor)
    assert isinstance(AutoImageProcessor.from_pretrained(folder), LynxImageProcessor)


def test_configuration_survives(folder, config):
    loaded = LynxConfig.from_pretrained(folder)
    for name in ("image_token_id", "num_latents", "adapter_frequency", "adapter_size", "max_frames", "fusion"):
        assert getattr(loaded, name) == getattr(config, name)
    assert loaded.text_config.hidden_size == 32
    assert loaded.vision_config.image_size == 8


@pytest.mark.parametrize(
    "name", ["config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"]
)
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"not a complete model folder; it lacks {name}"):
        checkpoint.load(folder)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: no such model folder"):
        checkpoint.load(tmp_path / "nowhere")


def _lose(weights):
    del weights["resampler.latents"]


def _add(weights):
    weights["stranger"] = torch.zeros(1)


def _reshape(weights):
    weights["resampler.latents"] = torch.zeros(2, 2)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_lose, "missing: resampler.latents"),
        (_add, "unexpected: stranger"),
        (_reshape, r"another shape .*resampler\.latents.*\[2, 2\].*\[3, 32\]"),
    ],
)
def test_weights_that_do_not_fit_are_refused(folder, damage, message):
    weights = load_file(folder / "model.safetensors")
    damage(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=message):
        checkpoint.load(folder)


def test_shapes_are_checked_before_memory_is_spent(folder):
    """A configuration that lost its text_config, for one, is that of a 7B model; here some GiB are enough."""
    options = json.loads((folder / "config.json").read_text())
    options["text_config"]["intermediate_size"] = 2**21
    (folder / "config.json").write_text(json.dumps(options))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=r"of another shape .*down_proj\.weight \[32, 48\], \[32, 2097152\]"):
        checkpoint.load(folder)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20, "a GiB"


def test_truncated_weights_are_refused(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        checkpoint.load(folder)


def test_a_new_model_replaces_the_old_one_whole(folder, model, processor, monkeypatch):
    """Also where the new weights come in shards and the old ones did not; and a cut-off save leaves no mixture."""
    with torch.no_grad():
        model.resampler.latents += 1
    save = model.save_pretrained
    monkeypatch.setattr(model, "save_pretrained", lambda path, **options: save(path, max_shard_size="20KB", **options))
    checkpoint.save(folder, model, processor)
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    assert torch.equal(checkpoint.load(folder)[0].resampler.latents, model.resampler.latents)
    assert not list(folder.glob(".saving-*"))

    moved = iter(range(3))
    move = Path.replace
    monkeypatch.setattr(Path, "replace", lambda *args: (next(moved), move(*args)))
    with pytest.raises(StopIteration):
        checkpoint.save(folder, model, processor)
    monkeypatch.undo()
    with pytest.raises(FileNotFoundError, match=r"lacks config\.json"):
        checkpoint.load(folder)


def test_what_a_killed_save_left_is_removed(folder, model, processor):
    (folder / ".saving-killed").mkdir()
    (folder / ".saving-killed" / "model.safetensors").write_bytes(b"half")
    checkpoint.save(folder, model, processor)
    assert not list(folder.glob(".saving-*"))


def test_another_model_is_spared(folder, model, processor):
    (folder / "config.json").write_text("{")  # cut off: no model that could be lost
    checkpoint.save(folder, model, processor)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(FileExistsError, match="model_type 'llama', which would be lost"):
        checkpoint.save(folder, model, processor)
    assert (folder / "config.json").read_text() == '{"model_type": "llama"}'


@pytest.mark.parametrize("name", ["num_latents", "image_token_id", "max_frames", "tokens_per_frame"])
def test_a_processor_of_another_model_is_refused(folder, name):
    path = folder / "processor_config.json"
    options = json.loads(path.read_text())
    path.write_text(json.dumps({**options, name: options[name] + 1}))
    with pytest.raises(ValueError, match=f"the processor has {name}="):
        checkpoint.load(folder)


def test_weights_outside_the_folder_are_refused(folder, tmp_path):
    (folder / "model.safetensors").rename(tmp_path / "outside.safetensors")
    index = {"metadata": {}, "weight_map": {"resampler.latents": "../outside.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FileNotFoundError, match="not a file in the folder"):
        checkpoint.load(folder)
    for wrong in ({"weight_map": ["a"]}, {"weight_map": {"resampler.latents": 3}}, {}):
        (folder / "model.safetensors.index.json").write_text(json.dumps(wrong))
        with pytest.raises(ValueError, match="is not an index of shards"):
            checkpoint.load(folder)


@pytest.mark.parametrize("name", ["config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", ["{", "", "[]"])
def test_a_damaged_file_is_named(folder, name, content):
    (folder / name).write_text(content)
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        checkpoint.load(folder)


@pytest.mark.parametrize(
    ("name", "key", "value", "message"),
    [
        ("processor_config.json", "image_token_id", "many", r"processor_config\.json or the tokenizer cannot be used"),
        ("processor_config.json", "image_processor", 7, r"processor_config\.json or the tokenizer cannot be used"),
        ("config.json", "dtype", "float7", r"config\.json cannot be used: AttributeError.*float7"),
        ("config.json", "num_latents", "many", "num_latents is 'many', must be an integer"),
    ],
)
def test_values_of_no_use_are_refused(folder, name, key, value, message):
    options = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps({**options, key: value}))
    with pytest.raises(ValueError, match=message):
        checkpoint.load(folder)


def test_a_configuration_of_another_model_is_refused(folder):
    options = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**options, "model_type": "llama"}))
    with pytest.raises(ValueError, match="model_type 'llama'"):
        checkpoint.load(folder)
