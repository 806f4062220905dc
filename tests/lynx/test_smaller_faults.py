"""Odd files and values around models, each refused in a sentence that names it.

- YAML that is nested thousands of levels deep, or whose aliases stand for a billion values: one sentence, in a recipe,
  in an override, in prompts and in files of data sets; deep JSON too.
- Weights of integers in a model's folder, or in that of a decoder or a tower: refused by name and dtype.
- A processor's file without `image_std` or another option that changes images: refused, no default is put there.
- `LynxConfig(tie_word_embeddings=...)` against `text_config`: refused. Token ids that are given are kept.
- An error that every rank meets: printed once.
- A judge that fails: the answers are kept, in `--answers` or in a file that the error names.
- A CLIP or SigLIP tower that trains: what it never uses is frozen, so DDP does not wait for its gradient.
"""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import distributed

from lynx import LynxConfig, checkpoint, cli, yaml_text
from lynx.data.prompts import Prompts
from lynx.eval import accuracy, judge
from lynx.media.image_processor import LynxImageProcessor
from lynx.processor import LynxProcessor
from lynx.train import param_groups, pretrained, recipe
from lynx.train.recipe import RecipeError
from tests.lynx.conftest import VISION, conversation, make_config, make_image, make_model
from tests.lynx.eval.test_evaluation import annotation, write

DEEP = "[" * 5000 + "]" * 5000
ALIASES = "a: &a [0, 0, 0, 0, 0, 0, 0, 0, 0]\n" + "".join(
    f"{here}: &{here} [{', '.join([f'*{above}'] * 9)}]\n" for above, here in zip("abcdefgh", "bcdefghi", strict=True)
)
BOMBS = {"deep": DEEP, "deep mapping": "{a: " * 5000 + "0" + "}" * 5000, "aliases": ALIASES, "inside": "&a [*a]"}


@pytest.mark.parametrize("name", BOMBS)
def test_yaml_bombs_are_refused_in_a_sentence(name, tmp_path):
    path = tmp_path / "bomb.yaml"
    path.write_text(BOMBS[name])
    for read in (lambda: recipe.load(path), lambda: Prompts.read(path), lambda: yaml_text.read(BOMBS[name])):
        with pytest.raises(
            ValueError, match=r"nested more than 64 levels|aliases stand for more|an alias stands"
        ) as caught:
            read()
        assert "\n" not in str(caught.value)
    if name != "aliases":  # several lines
        with pytest.raises(RecipeError, match="data: the value cannot be used"):
            recipe.load("tiny", [f"data={BOMBS[name]}"])


def test_yaml_that_people_write_is_read():
    text = "base: &b {x: 1, y: [a, b]}\nother: {<<: *b, x: 2}\nlast: [*b, *b]\n"
    both = {"x": 1, "y": ["a", "b"]}
    assert yaml_text.read(text) == {"base": both, "other": both | {"x": 2}, "last": [both, both]}
    assert yaml_text.read("") is None
    with pytest.raises(yaml_text.YamlError) as caught:
        yaml_text.read("a: [1,\nb: }")
    assert "\n" not in str(caught.value)
    with pytest.raises(yaml_text.YamlError):
        yaml_text.read("!!python/object/apply:os.system [ls]")


@pytest.fixture
def folder(model, processor, tmp_path):
    checkpoint.save(tmp_path / "model", model, processor)
    return tmp_path / "model"


def changed_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.endswith("weight"))
    weights[name] = change(weights[name])
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return name


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool])
def test_integer_weights_are_refused(folder, dtype):
    name = changed_weights(folder, lambda weight: weight.to(dtype))
    with pytest.raises(ValueError, match=f"not floating point.*{name}.*quantised"):
        checkpoint.load(folder)
    for read in (pretrained.language_model, pretrained.vision_tower):
        with pytest.raises(RecipeError, match="not floating point"):
            pretrained._require_floating(f"{read.__name__}={folder}", folder)
    (folder / "config.json").write_text(DEEP)
    with pytest.raises(ValueError, match=r"config.json is not valid JSON"):
        checkpoint.load(folder)


@pytest.mark.parametrize("name", ["image_std", "image_mean", "size", "resize", "crop_rounding", "output"])
def test_options_missing_from_a_processor_file_are_refused(folder, name):
    path = folder / "processor_config.json"
    for absent in (True, False):
        content = json.loads(path.read_text())
        content["image_processor"][name] = None
        if absent:
            del content["image_processor"][name]
        path.write_text(json.dumps(content))
        for read in (checkpoint.load, LynxProcessor.from_pretrained, LynxImageProcessor.from_pretrained):
            with pytest.raises(ValueError, match=f"image processor's configuration lacks {name}"):
                read(folder)


def test_text_config_overrides_nothing_in_silence(tokenizer):
    with pytest.raises(ValueError, match=r"tie_word_embeddings is True, but text_config, .* has False"):
        make_config(tokenizer, tie_word_embeddings=True)
    given = {"bos_token_id": 5, "eos_token_id": [6, 7], "pad_token_id": 8}
    config = make_config(tokenizer, **given)
    assert {name: getattr(config, name) for name in given} == given
    again = LynxConfig.from_dict(config.to_dict())
    assert {name: getattr(again, name) for name in given} == given
    plain = make_config(tokenizer)
    assert {name: getattr(plain, name) for name in given} == {name: getattr(plain.text_config, name) for name in given}


@pytest.mark.parametrize("vision", VISION)
def test_all_that_trains_of_a_tower_gets_a_gradient(tokenizer, vision):
    """Or DDP fails at the second step."""
    config = make_config(tokenizer, vision)
    model, processor = make_model(config), LynxProcessor.for_model(config, tokenizer)
    trained = param_groups.set_trainable(model, ["vision_tower", "resampler"])
    batch = processor.pack([processor.encode(conversation("?", "red", images=[make_image(0)]))])
    model.train()
    model(**batch).loss.backward()
    without = [name for name, each in model.named_parameters() if each.requires_grad and each.grad is None]
    assert without == ["resampler.frame_position"] or without == []
    frozen = [name for name, each in model.vision_tower.named_parameters() if not each.requires_grad]
    assert all(any(part in name for part in ("post_layernorm", "head.")) for name in frozen)
    assert bool(frozen) == (vision != "blip_2_vision_model")
    assert trained["vision_tower"] > 0


def test_an_error_that_all_ranks_meet_is_printed_once(monkeypatch, capsys):
    """Three ranks under torchrun, whose store is here."""
    store = distributed.TCPStore("localhost", 0, is_master=True)
    variables = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    for name, value in {**variables, "WORLD_SIZE": "3"}.items():
        monkeypatch.setenv(name, value)
    for recipe_name in ("no-such", "no-such", "no-such", "other"):
        assert cli.main(["train", recipe_name]) == 2
    said = [line.partition(":")[2].split(":")[0].strip() for line in capsys.readouterr().err.splitlines()]
    assert said == ["no-such", "other"]
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert cli.main(["train", "no-such"]) == 2
    assert "no-such" in capsys.readouterr().err


@pytest.mark.parametrize("named", [True, False])
def test_answers_outlive_a_judge_that_fails(named, folder, tmp_path, monkeypatch, capsys):
    class Judge:
        def __init__(self, folder):
            pass

        def __call__(self, cases):
            raise RuntimeError("out of memory")

    monkeypatch.setattr(judge, "LanguageModelJudge", Judge)
    data = write(tmp_path, annotation(1), annotation(2, question="Who?"))
    path = tmp_path / "answers.jsonl"
    arguments = ["evaluate", str(folder), str(data), "--judge", str(tmp_path)]
    with pytest.raises(RuntimeError, match="out of memory"):
        cli.main(arguments + (["--answers", str(path)] if named else []))
    [said] = [line for line in capsys.readouterr().err.splitlines() if "the answers so far, not judged, are in" in line]
    kept = said.rpartition(" ")[2]
    assert not named or kept == str(path)
    with open(kept, encoding="utf-8") as file:
        lines = [json.loads(line) for line in file]
    assert [(line["question"], line["right"]) for line in lines] == [("What is in the image?", None), ("Who?", None)]
    assert all(isinstance(line["prediction"], str) for line in lines)
    os.unlink(kept)
    with pytest.raises(RuntimeError):
        accuracy.answer_questions(*checkpoint.load(folder), [], judge=Judge(None))
