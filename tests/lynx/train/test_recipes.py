"""Recipes: what they say, how they are changed, and what is wrong with wrong ones."""

import dataclasses
import re

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser

from lynx.data.mixture import paper_groups
from lynx.train import build, param_groups, recipe, renamed, schedule
from lynx.train.folder import RunFolder, recipe_differences
from tests.lynx import packs
from tests.lynx.conftest import make_model
from tests.lynx.small import write_records

MINIMAL = {
    "model": "tiny", "output": "out", "data": "some.jsonl",
    "stages": [
        {"name": "first", "trainable": ["resampler"], "steps": 10, "learning_rate": 1e-3},
        {"name": "second", "trainable": ["adapters"], "steps": 20, "learning_rate": "1e-4"},
    ],
}  # fmt: skip


def test_table_5():
    """The paper's three stages, number by number; its facts, not the file's words."""
    lynx = recipe.load("lynx")
    numbers = [
        (
            s.resolution,
            s.steps,
            s.learning_rate,
            s.warmup_from,
            s.warmup,
            s.schedule,
            s.weight_decay,
            s.betas,
            s.epsilon,
        )
        for s in lynx.stages
    ]
    common = (0.05, "linear", 0.01, (0.9, 0.999), 1e-8)
    assert numbers == [
        (224, 100_000, 1e-4, 1e-5, *common),
        (420, 10_000, 1e-5, 1e-6, *common),
        (420, 20_000, 2e-5, 2e-6, *common),
    ]
    pretraining = sum(stage.steps * stage.tokens_per_step for stage in lynx.stages[:2])
    assert 13.5e9 < pretraining < 14.5e9
    assert 2.8e9 < lynx.stages[2].steps * lynx.stages[2].tokens_per_step < 3.2e9
    # On the paper's numbers of GPUs, a whole number of packs each.
    assert [
        s.tokens_per_step % (gpus * lynx.token_budget) for s, gpus in zip(lynx.stages, (32, 32, 24), strict=True)
    ] == [0] * 3
    assert lynx.precision == "bf16"


@pytest.mark.parametrize("name", recipe.shipped())
def test_shipped_recipes_load(name):
    loaded = recipe.load(name, {} if name.startswith("lynx") else {"data": "my.jsonl"})
    assert loaded.section.startswith("arXiv 2307.02469, section") == name.startswith("lynx")
    assert recipe.load(yaml.safe_load(yaml.safe_dump(loaded.as_dict()))) == loaded, "what a run writes down is a recipe"


def test_the_papers_variants():
    frozen, trained = recipe.load("lynx-cross-frozen"), recipe.load("lynx-cross-trained")
    for stage in frozen.stages:
        assert set(stage.trainable) == {"resampler", "cross_attention", "frame_positions"}
    assert all("language_model" in stage.trainable for stage in trained.stages)
    assert "without" not in trained.stages[2].data
    assert set(frozen.stages[2].data["without"]) == {"text tasks", "text instructions", "text dialogs"}
    small = recipe.load("lynx-224")
    assert [(stage.name, stage.resolution) for stage in small.stages] == [("pretrain-224", 224), ("finetune", 224)]
    assert recipe.load("lynx-one-prompt").prompts == "one"


def test_overrides():
    changes = [
        "steps=7",
        "second.steps=8",
        "learning_rate=1e-4",
        "first.betas=[0.8, 0.9]",
        "model_options.max_frames=3",
    ]
    loaded = recipe.load(MINIMAL, [*changes, "data=other: file.jsonl", "workers=2", "second.resolution=null"])
    assert [stage.steps for stage in loaded.stages] == [7, 8]
    assert [stage.learning_rate for stage in loaded.stages] == [1e-4, 1e-4]
    assert loaded.stages[0].betas == (0.8, 0.9)
    assert loaded.model_options == {"max_frames": 3}
    assert loaded.workers == 2
    assert loaded.stages[0].trainable == ("resampler",)


def test_a_file_on_a_base(tmp_path):
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(MINIMAL))
    (tmp_path / "mine.yaml").write_text("base: base.yaml\nstages: [second]\nsteps: 3\nsecond.warmup: 0.5\n")
    loaded = recipe.load(tmp_path / "mine.yaml")
    assert [(stage.name, stage.steps, stage.warmup) for stage in loaded.stages] == [("second", 3, 0.5)]
    (tmp_path / "base.yaml").write_text("base: mine.yaml\n")
    with pytest.raises(recipe.RecipeError, match="its base leads back to"):
        recipe.load(tmp_path / "mine.yaml")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("step=3", "no key 'step'; did you mean .*steps"),
        ("lerning_rate=3", "did you mean learning_rate"),
        ("second.lerning_rate=3", "did you mean second.learning_rate"),
        ("third.steps=3", "no key 'third.steps'"),
        ("steps=many", "stage first: steps is 'many', expected an integer"),
        ("steps=2.5", "steps is 2.5, expected an integer"),
        ("steps=true", "steps is True, expected an integer"),
        ("steps=0", "stage first: steps is 0, out of range"),
        ("learning_rate=-1", "learning_rate is -1.0, out of range"),
        ("warmup_from=1", "warmup_from is 1.0, out of range"),
        ("schedule=step", "expected 'linear' or 'cosine'"),
        ("trainable=adapters", "trainable is 'adapters', expected a list of text"),
        ("trainable=[adapter]", "no 'adapter'; did you mean adapters.*; there are resampler"),
        ("trainable=[]", "stage first: trainable is empty; there are resampler"),
        ("trains=[adapters]", "overrides: trains is now called trainable"),
        ("second.trains=[adapters]", "trains is now called trainable"),
        ("keep=3", "keep is now called save_total_limit"),
        ("max_broken=3", "max_broken is now called max_skipped"),
        ("workers=-1", "workers is -1, must be at least 0"),
        ("token_budget=0", "token_budget is 0, must be at least 1"),
        ("precision=fp16", "precision is 'fp16', expected 'bf16' or 'fp32'"),
        ("compile=1", "compile is 1, expected true or false"),
        ("output=3", "output is 3, expected text"),
        ("stages=[third]", "no stage 'third' to pick"),
        ("steps", "'steps' is not of the form key=value"),
        ("output.x=1", "output is not a mapping"),
        ("data=null", "stage first has nothing to train on: give data=FILE"),
    ],
)
def test_wrong_changes_say_what_is_wrong(change, message):
    with pytest.raises(recipe.RecipeError, match=message):
        recipe.load(MINIMAL, [change])


def test_wrong_recipes_say_what_is_wrong(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"neither a file nor a shipped recipe of this name; did you .*lynx"):
        recipe.load("lynxx")
    with pytest.raises(recipe.RecipeError, match="output must be given"):
        recipe.load({key: value for key, value in MINIMAL.items() if key != "output"})
    with pytest.raises(recipe.RecipeError, match="stages must be a list of mappings, each with a name"):
        recipe.load({**MINIMAL, "stages": [{"steps": 3}]})
    with pytest.raises(recipe.RecipeError, match="two stages have the same name"):
        recipe.load({**MINIMAL, "stages": [MINIMAL["stages"][0]] * 2})
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(recipe.RecipeError, match=r"list\.yaml must hold a mapping of keys to values, got list"):
        recipe.load(tmp_path / "list.yaml")
    (tmp_path / "tag.yaml").write_text("model: !!python/object/apply:os.getcwd []")
    with pytest.raises(recipe.RecipeError, match="is not YAML"):
        recipe.load(tmp_path / "tag.yaml")


def test_files_with_old_keys_say_the_new_ones(tmp_path):
    """In a stage, at the top, in a base; what a run of earlier code wrote down is no recipe either."""
    old = {**MINIMAL, "stages": [{**MINIMAL["stages"][0], "trains": ["resampler"]}]}
    (tmp_path / "old.yaml").write_text(yaml.safe_dump(old))
    (tmp_path / "mine.yaml").write_text("base: old.yaml\nsteps: 3\n")
    for source in (old, tmp_path / "old.yaml", tmp_path / "mine.yaml"):
        with pytest.raises(recipe.RecipeError, match="stage first: trains is now called trainable"):
            recipe.load(source)
    with pytest.raises(recipe.RecipeError, match="keep is now called save_total_limit"):
        recipe.load({**MINIMAL, "keep": 3})
    assert not {*renamed.RECIPE_KEYS} & {*recipe.load(MINIMAL).as_dict()}


def test_a_run_goes_on_under_the_new_names(tmp_path):
    """What it wrote down under the old ones is the same recipe, unless another thing differs."""
    today = recipe.load(MINIMAL).as_dict()
    old_names = {new: old for old, new in renamed.RECIPE_KEYS.items()}

    def old(values):
        return {old_names.get(key, key): value for key, value in values.items()}

    written = {**old(today), "stages": [old(stage) for stage in today["stages"]]}
    assert {"keep", "max_broken"} <= written.keys()
    assert recipe_differences(renamed.renamed_recipe(written), today) == []
    written["stages"][0]["trains"] = ["adapters"]
    assert recipe_differences(renamed.renamed_recipe(written), today) == ["first.trainable"]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(written))
    with pytest.raises(recipe.RecipeError, match=r"different in first\.trainable\."):
        RunFolder(tmp_path).claim(recipe.load(MINIMAL), fresh=False)


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "deepspeed"])
def test_launch_files_say_what_accelerate_knows(name):
    """A key that it does not know would be refused at the top of the file, and passed over inside it."""
    config = load_config_from_file(str(recipe.SHIPPED.parent / "launch" / f"{name}.yaml"))
    options = {action.dest for action in launch_command_parser()._actions}
    assert options >= {*config.fsdp_config, *config.deepspeed_config}
    assert bool(config.fsdp_config) == (name == "fsdp2")
    assert bool(config.deepspeed_config) == (name == "deepspeed")
    assert config.distributed_type in ("MULTI_GPU", "FSDP", "DEEPSPEED"), "of MULTI_CPU it would start one process"
    assert (config.num_processes, config.mixed_precision) == (8, "no"), "the trainer casts by itself"


@pytest.mark.parametrize("shape", ["linear", "cosine"])
def test_the_learning_rate(shape):
    """Of 100 steps 5 warm up from a tenth of the peak; the last step but none is just above 0."""
    chosen = packs.stage(steps=100, learning_rate=1e-4, warmup_from=1e-5, warmup=0.05, schedule=shape)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=chosen.learning_rate)
    scheduler = schedule.scheduler(optimizer, chosen)
    rates = []
    for _ in range(100):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert rates[:6] == pytest.approx([1e-5, 2.8e-5, 4.6e-5, 6.4e-5, 8.2e-5, 1e-4])
    quarter, half = (round(5 + 95 * part) for part in (0.2, 0.4))
    expected = {"linear": (0.8, 0.6), "cosine": (0.904508, 0.654508)}[shape]
    assert [rates[quarter] / 1e-4, rates[half] / 1e-4] == pytest.approx(expected, rel=1e-5)
    assert 0 < rates[99] < 2e-6
    assert scheduler.get_last_lr()[0] == pytest.approx(0, abs=1e-12)


def test_what_trains_is_fp32_and_the_rest_frozen(config):
    model = make_model(config)
    counts = param_groups.set_trainable(model, ["adapters", "frame_positions"], torch.bfloat16)
    for name, parameter in model.named_parameters():
        trains = "output_adapter" in name or name == "resampler.frame_position"
        assert parameter.requires_grad == trains, name
        assert parameter.dtype == (torch.float32 if trains else torch.bfloat16), name
    assert counts["frame_positions"] == model.resampler.frame_position.numel()
    param_groups.set_trainable(model, list(param_groups.PARAM_GROUPS.keys() - {"cross_attention"}))
    assert all(parameter.requires_grad and parameter.dtype == torch.float32 for parameter in model.parameters())
    with pytest.raises(ValueError, match="trainable: the model has no cross_attention; it has adapters"):
        param_groups.set_trainable(model, ["adapters", "cross_attention"])


def test_what_decays(config):
    model = make_model(config)
    param_groups.set_trainable(model, ["adapters", "resampler", "frame_positions", "vision_tower"])
    decayed, free = param_groups.optimizer_groups(model, 0.01)
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.01, 0.0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, free = ({names[id(parameter)] for parameter in group["params"]} for group in (decayed, free))
    assert decayed | free == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert not decayed & free
    adapter = "language_model.model.layers.0.output_adapter."
    assert {adapter + "down.weight", adapter + "up.weight", "resampler.layers.0.attention.to_kv.weight"} <= decayed
    undecayed = ("norm.weight", "norm.bias", "down.bias", "scale")
    assert {"resampler.latents", "resampler.frame_position", *(adapter + name for name in undecayed)} <= free
    assert {f"vision_tower.embeddings.{name}_embedding" for name in ("class", "position")} <= free
    assert not [name for name in decayed if "bias" in name or "norm" in name]


def test_the_papers_mixture_from_files(tmp_path):
    known = paper_groups("finetuning")
    names = [name for group in known for name in group.datasets]
    path = write_records(tmp_path, 4)
    files = [{"name": name, "path": str(path)} for name in (*names, "CC3M")]
    (tmp_path / "files.yaml").write_text(yaml.safe_dump(files))
    paper = recipe.load("lynx-cross-frozen", {"datasets": str(tmp_path / "files.yaml")})
    drawn = build.mixture(paper, paper.stages[2])
    left_out = {"Flan V2", "LAION OIG Small", "Alpaca GPT4", "Unnatural Instruction", "Baize"}
    assert set(drawn.names) == set(names) - left_out
    whole = dataclasses.replace(paper, datasets=[each for each in files if each["name"] != "Baize"])
    stage = dataclasses.replace(paper.stages[2], data={"paper": "finetuning"})
    with pytest.raises(recipe.RecipeError, match=r"stage finetune: data: datasets lacks Baize"):
        build.mixture(whole, stage)
    with pytest.raises(recipe.RecipeError, match=re.escape("the paper's finetuning has no Bayze")):
        build.mixture(whole, dataclasses.replace(stage, data={"paper": "finetuning", "without": ["Bayze"]}))


def test_noisy_pairs_beside_the_papers_mixture(tmp_path):
    """Of 125 parts 25 are theirs, in both stages of pretraining; without a weight there is no such mixture."""
    pairs = {"name": "noisy", "path": str(write_records(tmp_path, 4)), "task": "caption"}
    files = [{**pairs, "name": name} for group in paper_groups("pretraining") for name in group.datasets]
    noisy = recipe.load("lynx-noisy", {"datasets": [*files, {**pairs, "weight": 25}]})
    for stage in noisy.stages[:2]:
        drawn = build.mixture(noisy, stage)
        assert drawn.shares["noisy"] == pytest.approx(0.2)
        assert drawn.shares["CC3M"] / drawn.shares["CC12M"] == pytest.approx(14.116 / 9 / (32.99 / 2)), (
            "of 4 records each"
        )
    assert noisy.stages[2] == recipe.load("lynx").stages[2]
    for others in ([], [pairs]):
        with pytest.raises(recipe.RecipeError, match="pretrain-224: data: datasets lacks noisy with a weight"):
            build.mixture(dataclasses.replace(noisy, datasets=[*files, *others]), noisy.stages[0])


def test_a_run_goes_on_with_data_that_moved():
    def described(folder, weight=1):
        datasets = [{"name": "a", "path": f"{folder}/a.jsonl", "root": folder}]
        data = [{"name": "group", "weight": weight, "datasets": datasets}]
        changes = {"data": data, "datasets": datasets, "root": folder, "prompts": f"{folder}/prompts.yaml"}
        return recipe.load("tiny", changes).as_dict()

    assert recipe_differences(described("old"), described("new")) == []
    assert recipe_differences(described("old"), described("new", weight=2))


def test_every_pack_of_a_run_goes_through_the_vision_tower(tmp_path, processor):
    """Those of texts alone, too."""
    (tmp_path / "texts.jsonl").write_text('{"question": "2?", "answer": "two"}\n')
    chosen = recipe.load("tiny", {"data": str(tmp_path / "texts.jsonl"), "token_budget": 60})
    mixture = build.mixture(chosen, chosen.stages[0])
    sampler, dataset, collator = build.data(chosen, mixture, processor, ranks=2, rank=1)
    batch = collator([dataset[reference] for reference in next(iter(sampler))])
    assert batch["report"].samples["texts"] > 0
    assert "pixel_values" in batch


def test_one_prompt_a_task():
    prompts, one = build._prompts(None), build._prompts("one")
    assert one.tasks.keys() == prompts.tasks.keys()
    for task, texts in one.tasks.items():
        kinds = ["{question}" in text for text in texts]
        assert len(set(kinds)) == len(kinds)
        assert set(kinds) == {"{question}" in text for text in prompts.tasks[task]}
        assert set(texts) <= set(prompts.tasks[task])


def test_models_that_are_not_there(tmp_path, data):
    for name, changes, message in (
        ("tiny", {"model": "tinny"}, "neither a folder nor a preset"),
        ("tiny", {"model_options.adapter_sice": 3}, "no option 'adapter_sice'; did you mean adapter_size"),
        ("lynx", {}, "give language_model=FOLDER and vision_tower=FOLDER"),
    ):
        with pytest.raises(recipe.RecipeError, match=message):
            build.model(recipe.load(name, {"data": str(data), **changes}), pytest.fail)  # none learns a tokenizer


@pytest.fixture
def data(tmp_path):
    return write_records(tmp_path, 8)
