"""The release's files: what is refused before memory is spent, how files are read, and ``lynx convert``."""

import json
import math
import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModel

from lynx import checkpoint, presets
from lynx.checkpoint import files
from lynx.cli import main
from tests.lynx.conftest import conversation, make_image
from tests.lynx.reference_helpers import HEADS, load, parts_of
from tests.lynx.reference_model import ReferenceModel

PREFIX = "vision_encoder.blocks.1.attn."


@pytest.fixture(scope="module")
def state():
    return ReferenceModel().state_dict()


@pytest.fixture
def weights(state):
    return {key: tensor.clone() for key, tensor in state.items()}


def test_all_that_does_not_fit_is_listed_at_once(weights):
    del weights["bridge.norm.bias"]
    del weights["LLM.model.embed_tokens.weight"]
    del weights["LLM.model.layers.2.output_adapter.scaling"]
    weights["LLM.model.layers.999999.stranger"] = torch.zeros(7)  # which makes the model no deeper
    weights[PREFIX + "proj.weight"] = torch.zeros(24, 25)
    weights["bridge.latents"] = weights["bridge.latents"].long()
    with pytest.raises(ValueError, match="the weights do not fit the configuration") as error:
        load(weights)
    for line in (
        "missing: bridge.norm.bias (32,)",
        "missing: LLM.model.embed_tokens.weight (50, 32)",
        "missing: LLM.model.layers.2.output_adapter.scaling (1,)",
        "unexpected: LLM.model.layers.999999.stranger (7,)",
        "of another shape: vision_encoder.blocks.1.attn.proj.weight is (24, 25), expected (24, 24)",
        "not floating-point: bridge.latents is torch.int64",
    ):
        assert f"\n  {line}" in str(error.value)
    assert str(error.value).count("\n") == 6


@pytest.mark.parametrize(
    "key",
    [
        "LLM.model.layers.1.mlp.gate_proj.weight", "LLM.model.embed_tokens.weight", "LLM.lm_head.weight",
        "LLM.model.layers.0.output_adapter.adapter_down.weight", "bridge.layers.0.0.to_kv.weight", "bridge.latents",
        "bridge.layers.1.1.1.weight", "vision_encoder.blocks.0.mlp.fc1.weight",
        "vision_encoder.patch_embed.proj.weight",
    ],
)  # fmt: skip
def test_a_transposed_weight_is_named_with_both_shapes(weights, key):
    weights[key] = weights[key].transpose(0, 1).contiguous()
    with pytest.raises(ValueError, match="the weights do not fit the configuration") as error:
        load(weights)
    assert f"of another shape: {key} is {tuple(weights[key].shape)}, expected " in str(error.value)
    assert "missing" not in str(error.value)


def test_a_wrong_weight_of_eva_s_layout_is_named(weights):
    rest, tower, language = parts_of(weights)
    tower["blocks.0.attn.qkv.weight"] = torch.zeros(72, 23)
    del tower["blocks.1.attn.v_bias"]
    with pytest.raises(ValueError, match="the weights do not fit the configuration") as error:
        load(rest, vision_state_dict=tower, llm_state_dict=language)
    assert "vision_encoder.blocks.0.attn.q_proj.weight is (24, 23), expected (24, 24)" in str(error.value)
    assert "missing: vision_encoder.blocks.1.attn.v_proj.bias (24,)" in str(error.value)


def test_a_missing_adapter_is_missed(weights):
    weights = {key: tensor for key, tensor in weights.items() if ".layers.2.output_adapter" not in key}
    with pytest.raises(ValueError, match=r"missing: LLM\.model\.layers\.2\.output_adapter\.adapter_up\.weight"):
        load(weights, config={**HEADS, "adapter_frequency": 2})


def test_shapes_are_checked_before_memory_is_spent():
    """Of the full size, on the meta device: nothing can be read, and a fault is found all the same."""
    weights = checkpoint.export_reference(presets.on_meta(presets.lynx_7b(adapter_frequency=2)))
    weights["bridge.latents"] = torch.empty(4096, 32, device="meta")
    with pytest.raises(ValueError, match=r"bridge\.latents is \(4096, 32\), expected \(\d+, 4096\)"):
        checkpoint.load_reference(weights)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numbers_that_are_not_finite_are_named(weights, value):
    weights["bridge.latents"][2, 3] = value
    weights["LLM.lm_head.weight"][0, 0] = value
    with pytest.raises(ValueError, match=r"not finite.*: LLM\.lm_head\.weight, bridge\.latents$"):
        load(weights)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rest, tower, language: ({}, tower, language), "not weights of Lynx: there are no keys"),
        (lambda rest, tower, language: ({"conv1.weight": tower["cls_token"]}, tower, language), r"are conv1\.weight"),
        (lambda rest, tower, language: (tower, tower, language), "not weights of Lynx"),
        (lambda rest, tower, language: (rest, language, language), "not weights of an EVA vision tower"),
        (lambda rest, tower, language: (rest, tower, tower), "not weights of a Llama of transformers"),
        (lambda rest, tower, language: (rest, None, language), r"lack the vision tower: give EVA"),
        (lambda rest, tower, language: (rest, tower, None), r"lack the language model: give Vicuna's"),
        (
            lambda rest, tower, language: ({**rest, "step": 3}, tower, language),
            r"not tensors: step \(int\)",
        ),
        (lambda rest, tower, language: ({**rest, 7: tower}, tower, language), r"keys that are not strings: 7 \(int\)"),
    ],
)
def test_weights_of_another_model_are_refused(weights, change, message):
    rest, tower, language = change(*parts_of(weights))
    with pytest.raises(ValueError, match=message):
        load(rest, vision_state_dict=tower, llm_state_dict=language)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"adapter_frequency": 6}, "adapter_frequency is 6, but text_config has 5 layers"),
        ({"text_config": {"num_attention_heads": 5}}, r"num_attention_heads is 5, .* the 32 rows of LLM\.model"),
        ({"vision_config": {"num_attention_heads": 5}}, "must be a multiple of num_attention_heads, 5"),
        ({"resampler_heads": 5}, r"resampler_heads is 5, .* the 512 rows of bridge\.layers"),
        (
            {"text_config": {"num_attention_heads": 4, "pad_token_id": 50}},
            "50, must be below vocab_size, 50",
        ),
        ({"adapter_freq": 2}, "config overrides adapter_freq, but LynxConfig has no such"),
        ({"vision_config": {"num_heads": 4}}, "overrides num_heads, but Blip2VisionConfig has no such"),
        ({"text_config": {"n_head": 4}}, "overrides n_head, but LlamaConfig has no such"),
        ({"text_config": [4]}, "config's text_config is a list"),
        ({"text_config": {"tie_word_embeddings": True, "num_attention_heads": 4}}, "tie_word_embeddings is True"),
        ({"prefix_is_causal": False}, "the release's format cannot hold a model with prefix_is_causal=False"),
        ({"text_config": {"num_attention_heads": 5, "hidden_size": 32, "head_dim": 8}}, "config contradicts itself"),
        ({"text_config": {"num_attention_heads": "4"}}, "text_config: num_attention_heads is '4', must be an integer"),
        ({"text_config": {"num_attention_heads": 0}}, "num_attention_heads is 0, must be an integer of at least 1"),
        ({"text_config": {"hidden_size": 0}}, "text_config: hidden_size is 0, must be"),
        ({"text_config": {"vocab_size": "a"}}, "vocab_size is 'a', must be"),
        ({"resampler_head_dim": 0}, "resampler_head_dim is 0, must be"),
    ],
)
def test_contradicting_configurations_are_refused(weights, config, message):
    with pytest.raises(ValueError, match=message):
        load(weights, config={**HEADS, **config})


# ---- files


class Plain:
    pass


class Harmful:
    def __reduce__(self):
        return os.mkdir, (os.environ["LYNX_TEST_HARM"],)


def test_code_in_a_pickle_is_not_run(weights, tmp_path, monkeypatch):
    monkeypatch.setenv("LYNX_TEST_HARM", str(tmp_path / "harm"))
    torch.save({"model": weights, "args": Harmful()}, tmp_path / "bad.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Harmful(), protocol=2))
    for name in ("bad.pt", "plain.pt"):
        with pytest.raises(ValueError, match=f"{name} is refused.*could run code") as refused:
            files.read(tmp_path / name)
        assert "weights_only" not in str(refused.value), "torch's advice is to read it unsafely"
    torch.save({"model": weights, "args": Plain()}, tmp_path / "bad.pt")
    with pytest.raises(ValueError, match=r"It asks for tests\.lynx\.checkpoint\.test_reference_refused\.Plain\.\)"):
        files.read(tmp_path / "bad.pt")
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("legacy", [False, True])
def test_truncated_files_are_refused(weights, tmp_path, legacy):
    path = tmp_path / "lynx.pt"
    torch.save(weights, path, _use_new_zipfile_serialization=not legacy)
    assert zipfile.is_zipfile(path) != legacy
    whole = path.read_bytes()
    assert set(files.read(path)) == set(weights)
    for length in (0, 1, 2, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"lynx\.pt (cannot be read|is refused)"):
            files.read(path)


def test_files_are_mapped_not_read(weights, tmp_path):
    torch.save({"model": weights}, tmp_path / "lynx.pt")
    content = files.read(tmp_path / "lynx.pt")
    assert str(tmp_path / "lynx.pt") in Path("/proc/self/maps").read_text()
    model = load(content, copy=False)
    table = model.get_input_embeddings().weight
    assert table.data_ptr() == content["model"]["LLM.model.embed_tokens.weight"].data_ptr()
    with torch.no_grad():
        table.zero_()  # ours alone: the file stays as it is
    assert torch.equal(files.read(tmp_path / "lynx.pt")["model"]["bridge.latents"], weights["bridge.latents"])
    again = files.read(tmp_path / "lynx.pt")["model"]["LLM.model.embed_tokens.weight"]
    assert torch.equal(again, weights["LLM.model.embed_tokens.weight"])


@pytest.mark.parametrize("safe", [False, True])
def test_folders_of_shards(weights, tmp_path, safe):
    language = parts_of(weights)[2]
    halves = [dict(list(language.items())[::2]), dict(list(language.items())[1::2])]
    suffix, index = ("safetensors", "model.safetensors") if safe else ("bin", "pytorch_model.bin")
    for number, half in enumerate(halves):
        (save_file if safe else torch.save)(half, str(tmp_path / f"part{number}.{suffix}"))
    shards = {key: f"part{number}.{suffix}" for number, half in enumerate(halves) for key in half}
    (tmp_path / f"{index}.index.json").write_text(json.dumps({"weight_map": shards}))
    content = files.read(tmp_path)
    assert set(content) == set(language)
    assert all(torch.equal(content[key], language[key]) for key in language)
    (tmp_path / f"part1.{suffix}").rename(tmp_path.parent / f"outside.{suffix}")
    for wrong in (f"part1.{suffix}", f"../outside.{suffix}"):
        shards.update(dict.fromkeys(halves[1], wrong))
        (tmp_path / f"{index}.index.json").write_text(json.dumps({"weight_map": shards}))
        with pytest.raises(FileNotFoundError, match="not a file in the folder"):
            files.read(tmp_path)
    for wrong in ("{", "[]", "{}", '{"weight_map": ["a"]}', '{"weight_map": {"a": 3}}', '{"weight_map": {"a": null}}'):
        (tmp_path / f"{index}.index.json").write_text(wrong)
        with pytest.raises(ValueError, match=rf"{index}\.index\.json is not an index of shards"):
            files.read(tmp_path)


def test_other_files_are_refused(tmp_path):
    torch.save([torch.zeros(1)], tmp_path / "list.pt")
    (tmp_path / "cut.safetensors").write_bytes(b"\x10")
    for name, message in (("list.pt", "holds a list"), ("cut.safetensors", r"cut\.safetensors cannot be read")):
        with pytest.raises(ValueError, match=message):
            files.read(tmp_path / name)
    for path, message in ((tmp_path / "no.pt", "no such file"), (tmp_path, "has no weights")):
        with pytest.raises(FileNotFoundError, match=message):
            files.read(path)


# ---- the command


@pytest.fixture
def release(weights, tokenizer, tmp_path):
    """Three files and a tokenizer's folder, as a user of the release has them."""
    weights = ReferenceModel(rows=len(tokenizer)).state_dict()
    rest, tower, language = parts_of({key: tensor.float() for key, tensor in weights.items()})
    torch.save({"model": rest}, tmp_path / "lynx.pt")
    torch.save(tower, tmp_path / "eva.pth")
    (tmp_path / "vicuna").mkdir()
    torch.save(language, tmp_path / "vicuna" / "pytorch_model.bin")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "heads.json").write_text(json.dumps(HEADS))
    return tmp_path


def command(release, *more):
    paths = {"--vision": "eva.pth", "--llm": "vicuna", "--config": "heads.json"}
    options = [part for name, path in paths.items() for part in (name, str(release / path))]
    return ["convert", str(release / "lynx.pt"), str(release / "model"), *options, *more]


def test_convert_makes_a_folder_that_answers(release, tokenizer, capsys):
    more = ("--tokenizer", str(release / "tokenizer"), "--image-size", "20", "--dtype", "float32")
    assert main(command(release, *more)) == 0
    assert str(release / "model") in capsys.readouterr().out
    model, processor = checkpoint.load(release / "model")
    assert model.config.vision_config.image_size == processor.image_processor.size == 20
    assert model.config.pad_token_id == tokenizer.pad_token_id == 0
    batch = processor.pad([processor.encode(conversation("What?", images=[make_image(0)]))])
    del batch["labels"]
    assert model.generate(**batch, max_new_tokens=2).shape[1] == batch["input_ids"].shape[1] + 2


def test_convert_without_a_tokenizer_says_what_is_lacking(release, caplog):
    """Also where a model with a processor was before: its processor goes with it."""
    assert main(command(release, "--tokenizer", str(release / "tokenizer"))) == 0
    assert main(command(release)) == 0
    assert "not the processor and the tokenizer" in caplog.text
    assert AutoModel.from_pretrained(release / "model").config.max_frames == 3
    with pytest.raises(FileNotFoundError, match=r"it lacks processor_config\.json .*tokenizer\.json"):
        checkpoint.load(release / "model")


def test_a_tokenizer_without_a_pad_token_gets_one(release, tokenizer):
    settings = release / "tokenizer" / "tokenizer_config.json"
    options = {key: value for key, value in json.loads(settings.read_text()).items() if key != "pad_token"}
    settings.write_text(json.dumps(options))
    assert main(command(release, "--tokenizer", str(release / "tokenizer"))) == 0
    model, processor = checkpoint.load(release / "model")
    assert processor.tokenizer.pad_token == "[PAD]"
    assert processor.tokenizer.pad_token_id == model.config.pad_token_id == len(tokenizer)
    table = model.get_input_embeddings().weight
    torch.testing.assert_close(table[-1], table[:-1].mean(0))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--tokenizer", "nowhere"), "no such tokenizer folder"),
        (("--tokenizer", "vicuna"), "vicuna has no tokenizer that transformers can read"),
        (("--tokenizer", "broken"), "broken has no tokenizer that transformers can read: Expecting"),
        (("--vision", "nowhere"), "no such file"),
        (("--config", "lynx.pt"), ""),
        (("--image-size", "-4"), "is not at least 1"),
        (("--image-size", "21"), "image_size, 21, must be a multiple of patch_size, 4"),
    ],
)
def test_convert_says_what_is_wrong(release, capsys, monkeypatch, more, message):
    monkeypatch.chdir(release)
    (release / "broken").mkdir()
    (release / "broken" / "tokenizer.json").write_text("{")
    try:
        status = main(command(release, *more))
    except SystemExit as stop:  # argparse's own
        status = stop.code
    assert status == 2
    assert message in capsys.readouterr().err
    assert not (release / "model").exists()


def test_convert_spares_another_model(release, capsys):
    """Vicuna's own folder, given as the output by mistake."""
    vicuna = release / "vicuna"
    (vicuna / "config.json").write_text('{"model_type": "llama"}')
    (vicuna / "pytorch_model.bin").rename(vicuna / "model.safetensors")
    before = {path: path.read_bytes() for path in vicuna.iterdir()}
    for output in (vicuna, release / "heads.json"):
        assert main(["convert", str(release / "no.pt"), str(output)]) == 2
    assert "vicuna holds a model of model_type 'llama', which would be lost" in (err := capsys.readouterr().err)
    assert "heads.json is a file; give a folder" in err
    assert {path: path.read_bytes() for path in vicuna.iterdir()} == before
