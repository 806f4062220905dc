"""The paper's presets on pretrained parts: folders of transformers, here with tiny models in them."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2VisionModel,
    CLIPConfig,
    CLIPModel,
    LlamaForCausalLM,
)

from lynx import checkpoint, cli
from lynx.train import build, param_groups, pretrained, recipe
from lynx.train.log import read_log
from lynx_kernels.integrations import transformers as attention_integration
from tests.lynx.conftest import VISION, conversation, make_config, make_image, make_tokenizer
from tests.lynx.small import write_records

OPTIONS = {"num_latents": 3, "resampler_depth": 1, "resampler_heads": 2, "resampler_head_dim": 8, "adapter_size": 8}
STAGES = ("pretrain-224", "pretrain-420", "finetune")
SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 50}


def save_tower(model, folder):
    with torch.no_grad():
        for parameter in model.parameters():  # the standard deviation of a fresh EVA is 1e-10
            parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A decoder and its tokenizer, which has no pad token; vision towers of each kind, alone and in whole models."""
    root = tmp_path_factory.mktemp("folders")
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    text = make_config(tokenizer).text_config
    tokenizer.pad_token = None
    for name, tied in (("decoder", False), ("tied", True)):
        text.tie_word_embeddings = tied
        LlamaForCausalLM(text).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    towers = {name: make_config(make_tokenizer(), name).vision_config for name in VISION}
    for name, config in towers.items():
        kind = Blip2VisionModel._from_config if name.startswith("blip") else AutoModel.from_config
        save_tower(kind(config), root / name)
    eva, clip = towers["blip_2_vision_model"].to_dict(), towers["clip_vision_model"].to_dict()
    save_tower(CLIPModel(CLIPConfig(text_config=SMALL, vision_config=clip, projection_dim=8)), root / "whole-clip")
    opt = {"model_type": "opt", "ffn_dim": 16, "word_embed_proj_dim": 16, **SMALL}
    whole = Blip2Config(vision_config=eva, qformer_config={**SMALL, "encoder_hidden_size": 24}, text_config=opt)
    save_tower(Blip2ForConditionalGeneration(whole), root / "whole-blip-2")
    return root


def paper(folders, data, *, decoder="decoder", tower="blip_2_vision_model", **changes):
    of_stages = {f"{name}.data": str(data) for name in STAGES}
    named = {"language_model": str(folders / decoder), "vision_tower": str(folders / tower)}
    return recipe.load("lynx", {**of_stages, **named, "model_options": OPTIONS, **changes})


@pytest.fixture
def data(tmp_path):
    return write_records(tmp_path, 12)


@pytest.mark.parametrize("decoder", ["decoder", "tied"])
@pytest.mark.parametrize("tower", [*VISION, "whole-clip", "whole-blip-2"])
def test_the_weights_are_those_of_the_folders(folders, data, decoder, tower):
    model, processor = build.model(paper(folders, data, decoder=decoder, tower=tower), pytest.fail)
    text = load_file(folders / decoder / "model.safetensors")
    of_vision = load_file(folders / tower / "model.safetensors")
    if tower.startswith("whole"):
        inside = "vision_model."
        of_vision = {name.removeprefix(inside): each for name, each in of_vision.items() if name.startswith(inside)}
    compared = {"language_model": 0, "vision_tower": 0}
    for name, parameter in model.named_parameters():
        part = param_groups.group_of(name)
        if part not in compared:
            continue
        folder = text if part == "language_model" else of_vision
        inner = name.removeprefix(f"{part}.")
        saved = folder[inner] if inner in folder else folder[inner.removeprefix("vision_model.")]
        assert torch.equal(parameter[: len(saved)], saved), name
        compared[part] += 1
    assert compared["language_model"] == len(text)
    assert compared["vision_tower"] >= len(of_vision) - 2  # EVA's last LayerNorm is not used
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.get_decoder().config._attn_implementation == attention_integration.NAME
    # [PAD] has a row that is the mean of all others, in both tables.
    tokens = len(processor.tokenizer)
    assert processor.tokenizer.pad_token == "[PAD]"
    assert model.config.text_config.pad_token_id == processor.tokenizer.pad_token_id == tokens - 1
    tables = [model.get_input_embeddings().weight, model.get_output_embeddings().weight]
    assert (tables[0] is tables[1]) == (decoder == "tied")
    for table in tables:
        assert table.shape[0] == model.config.text_config.vocab_size == tokens
        torch.testing.assert_close(table[-1], table[:-1].mean(0))
    assert model.config.image_token_id == tokens
    assert model(**processor.pack([processor.encode(conversation("What?", "seven", [make_image(0)]))])).loss > 0


def test_eva_runs_on_our_attention(folders):
    tower = pretrained.vision_tower(str(folders / "blip_2_vision_model"))
    assert tower.config._attn_implementation == attention_integration.NAME


def test_a_table_with_room_is_not_grown(folders, tmp_path):
    """Vocabularies are often padded to a round number: the next row becomes [PAD]'s."""
    shutil.copytree(folders / "decoder", tmp_path / "room")
    decoder = LlamaForCausalLM.from_pretrained(folders / "decoder")
    tokens = decoder.config.vocab_size
    decoder.resize_token_embeddings(tokens + 5)
    decoder.save_pretrained(tmp_path / "room")
    decoder, tokenizer = pretrained.language_model(str(tmp_path / "room"))
    table = decoder.get_input_embeddings().weight
    assert (len(tokenizer), len(table)) == (tokens + 1, tokens + 5)
    torch.testing.assert_close(table[tokens], table[:tokens].mean(0))


def test_the_papers_stages_on_pretrained_parts(folders, data, tmp_path, caplog):
    """By the command: 224 px, 420 px with the positions resized, finetuning, at a hundredth of the size."""
    changes = {
        "output": tmp_path / "out", "steps": 2, "token_budget": 150, "tokens_per_step": 300, "workers": 0,
        "pretrain-224.resolution": 8, "pretrain-420.resolution": 16, "finetune.resolution": 16,
        "language_model": folders / "decoder", "vision_tower": folders / "blip_2_vision_model",
        **{f"model_options.{name}": value for name, value in OPTIONS.items()},
        **{f"{name}.data": data for name in STAGES},
    }  # fmt: skip
    assert cli.main(["train", "lynx", *(f"{key}={value}" for key, value in changes.items())]) == 0
    assert "from nothing" not in caplog.text
    log = [entry for entry in read_log(tmp_path / "out" / "log.jsonl") if "loss" in entry]
    assert [(entry["stage"], entry["step"]) for entry in log] == [(name, step) for name in STAGES for step in (1, 2)]
    model, processor = checkpoint.load(tmp_path / "out")
    assert model.config.vision_config.image_size == processor.image_processor.size == 16
    positions = model.vision_tower.embeddings.position_embedding
    before = load_file(folders / "blip_2_vision_model/model.safetensors")["embeddings.position_embedding"]
    assert (positions.shape, before.shape) == ((1, 17, 24), (1, 5, 24))
    assert torch.equal(positions[:, 0], before[:, 0].bfloat16())
    text = load_file(folders / "decoder/model.safetensors")
    for name, saved in text.items():
        kept = model.language_model.get_parameter(name)[: len(saved)]
        assert torch.equal(kept, saved.bfloat16()), name
    trained = [
        each for name, each in model.named_parameters() if param_groups.group_of(name) in ("resampler", "adapters")
    ]
    assert {parameter.dtype for parameter in trained} == {torch.float32}


def lacking(folder, name, to):
    shutil.copytree(folder, to)
    weights = load_file(folder / "model.safetensors")
    del weights[name]
    save_file(weights, to / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decoder": "none"}, r"language_model=.*none: no such folder"),
        ({"tower": "none"}, r"vision_tower=.*none: no such folder"),
        ({"decoder": "siglip"}, r"language_model=.*siglip: the tokenizer cannot be read: "),
        ({"tower": "decoder"}, r"vision_tower=.*decoder holds a llama, which is not a vision model"),
        ({"decoder": "lacks"}, r"language_model=.*lacks: the weights do not fit .*; missing: model.norm.weight"),
        ({"tower": "lacks-too"}, r"vision_tower=.*: the weights do not fit .*; missing: embeddings.class_embedding"),
        ({"decoder": "cut"}, r"language_model=.*cut cannot be read: "),
        ({"model": "tiny"}, "the preset tiny has its own decoder: leave out language_model"),
        ({"model": "smollm2-135m"}, "the preset smollm2-135m has its own decoder and vision tower: leave out"),
        ({"model_options": {"adapter_frequency": 9}}, "adapter_frequency is 9, but text_config has 3 layers"),
    ],
)
def test_what_does_not_fit_is_said(folders, data, tmp_path, change, message):
    both = tmp_path / "both"
    both.mkdir()
    for path in folders.iterdir():
        (both / path.name).symlink_to(path)
    lacking(folders / "decoder", "model.norm.weight", both / "lacks")
    lacking(folders / "blip_2_vision_model", "embeddings.class_embedding", both / "lacks-too")
    shutil.copytree(folders / "decoder", both / "cut")
    with (both / "cut/model.safetensors").open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(ValueError, match=message):
        build.model(paper(both, data, **change), pytest.fail)


@pytest.mark.parametrize("tower", VISION)
def test_a_tiny_model_on_a_pretrained_tower(folders, data, tower):
    chosen = recipe.load("tiny", {"data": str(data), "vision_tower": str(folders / tower)})
    model, processor = build.model(chosen, lambda: build.mixture(chosen, chosen.stages[0]))
    assert model.config.vision_config.hidden_size == model.vision_tower.config.hidden_size == 24
    assert model(**processor.pack([processor.encode(conversation("What?", "red", [make_image(0)]))])).loss > 0
    assert build.untrained(chosen, model) == []
