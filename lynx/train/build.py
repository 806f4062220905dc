"""What a stage starts from: a model and its processor, and the data.

A recipe's ``data`` is a JSONL file or a folder that ``datasets.Dataset.save_to_disk`` wrote; groups of such by weight,
as ``lynx.data.description`` takes them; or the paper's mixture, ``{paper: finetuning, without: [Baize, text tasks]}``,
whose data sets are those of the recipe's ``datasets``. Of these, ``more: [NAME]`` takes others in, each a group with
the ``weight`` it has there; the paper's groups weigh 100 together. Paths are relative to the working directory.
"""

import copy
import difflib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import PreTrainedConfig

from lynx import checkpoint, presets
from lynx.config import LynxConfig
from lynx.data.collator import Collator
from lynx.data.conversation import PROMPT
from lynx.data.description import open_mixture
from lynx.data.mixture import Mixture, paper_groups
from lynx.data.prompts import Prompts
from lynx.data.records import RecordError, text_of
from lynx.data.stream import PackDataset, PackSampler
from lynx.data.tokenizer import train_tokenizer
from lynx.model import LynxForConditionalGeneration
from lynx.processor import LynxProcessor
from lynx.train import param_groups, pretrained
from lynx.train.recipe import Recipe, RecipeError, Stage

_TEXTS = 20000  # records that a tokenizer is learned from
_SMOLLM2 = "smollm2-135m"
_OPTIONS = tuple(name for name in LynxConfig.field_names() if name not in ("text_config", "vision_config"))


def model(recipe: Recipe, data: Callable[[], Mixture]) -> tuple[LynxForConditionalGeneration, LynxProcessor]:
    """The model that a recipe's first stage starts from, and its processor.

    Args:
        recipe: says which model.
        data: gives the stage's mixture; asked only where a tokenizer is to be learned from it.

    Raises:
        RecipeError: the recipe's ``model`` is neither a folder nor a preset, an option is unknown, or a preset with
            pretrained parts is not told where they are, or cannot read them.
        OSError, ValueError: the folder ``model`` cannot be read.
    """
    if Path(recipe.model).is_dir():
        if recipe.model_options or recipe.language_model or recipe.vision_tower:
            raise RecipeError(
                f"model is the folder {recipe.model}, which has its own options, decoder and vision tower; "
                "model_options, language_model and vision_tower are for presets"
            )
        return checkpoint.load(recipe.model, dtype=torch.float32)
    _check_options(recipe.model_options)
    if recipe.model == "tiny" and recipe.language_model is None:
        return _tiny(recipe, data())
    if recipe.model == _SMOLLM2 and recipe.language_model is None and recipe.vision_tower is None:
        return presets.build_smollm2_135m(**recipe.model_options)
    if recipe.model in ("tiny", _SMOLLM2):
        raise RecipeError(
            f"the preset {recipe.model} has its own decoder{' and vision tower' if recipe.model == _SMOLLM2 else ''}: "
            "leave out language_model and vision_tower, or take another preset"
        )
    if recipe.model not in presets.PRESETS:
        near = difflib.get_close_matches(recipe.model, [*presets.PRESETS, "tiny"])
        raise RecipeError(
            f"model is {recipe.model!r}, neither a folder nor a preset{f'; did you mean {near[0]}?' if near else ''}; "
            f"there are {', '.join([*presets.PRESETS, 'tiny'])}"
        )
    if recipe.language_model is None or recipe.vision_tower is None:
        raise RecipeError(
            f"the preset {recipe.model} is built on a pretrained decoder and vision tower: give language_model=FOLDER "
            "and vision_tower=FOLDER, or model=FOLDER where a whole model is"
        )
    return _built(recipe, recipe.language_model, recipe.vision_tower)


def _tiny(recipe: Recipe, data: Mixture) -> tuple[LynxForConditionalGeneration, LynxProcessor]:
    """The preset ``tiny``, its tokenizer learned from the data, its vision tower fresh or one that is there."""
    tokenizer = train_tokenizer(_texts(data))
    preset = presets.tiny(tokenizer)
    tower = None if recipe.vision_tower is None else pretrained.vision_tower(recipe.vision_tower)
    config = _config(preset, preset.text_config, tower.config if tower else preset.vision_config, recipe.model_options)
    return LynxForConditionalGeneration(config, vision_tower=tower), LynxProcessor.for_model(config, tokenizer)


def _built(
    recipe: Recipe, language_model: str, vision_tower: str
) -> tuple[LynxForConditionalGeneration, LynxProcessor]:
    """A preset on a decoder and a vision tower that are there."""
    decoder, tokenizer = pretrained.language_model(language_model)
    tower = pretrained.vision_tower(vision_tower)
    preset = presets.PRESETS[recipe.model]()
    preset.image_token_id = max(len(tokenizer), decoder.config.vocab_size)
    config = _config(preset, decoder.config, tower.config, recipe.model_options)
    model = LynxForConditionalGeneration(config, language_model=decoder, vision_tower=tower)
    return model, LynxProcessor.for_model(config, tokenizer)


def _config(preset: LynxConfig, text: PreTrainedConfig, tower: PreTrainedConfig, options: dict[str, Any]) -> LynxConfig:
    """A preset's options, but for those of the recipe, around other parts: checked as they stand together."""
    text, tower = copy.deepcopy((text, tower))  # a whole model takes the choice of attention out of those it gets
    return LynxConfig(text, tower, **{**{name: getattr(preset, name) for name in _OPTIONS}, **options})


def _check_options(options: dict[str, Any]) -> None:
    for name in options:
        if name not in _OPTIONS:
            near = difflib.get_close_matches(name, _OPTIONS)
            raise RecipeError(f"model_options: there is no {name!r}{f'; did you mean {near[0]}?' if near else ''}")


def untrained(recipe: Recipe, model: LynxForConditionalGeneration) -> list[str]:
    """The parts of a preset's model that start from nothing and that no stage trains: they would stay noise."""
    if Path(recipe.model).is_dir():
        return []
    present = {param_groups.part_of(name) for name, _ in model.named_parameters()}
    given = set() if recipe.model == "tiny" else {"language_model"}
    if recipe.vision_tower is not None:
        given.add("vision_tower")
    return sorted(present - given - {part for stage in recipe.stages for part in stage.trains})


def data(
    recipe: Recipe, mixture: Mixture, processor: LynxProcessor, *, ranks: int, rank: int
) -> tuple[PackSampler, PackDataset, Collator]:
    """What a rank trains on in a stage: the sampler of its packs, the data set that reads them, the collator.

    Raises:
        ValueError: a data set is of a task that has no prompts.
        OSError: the recipe's ``prompts`` cannot be read.
    """
    sampler = PackSampler(
        mixture,
        processor,
        token_budget=recipe.token_budget,
        prompts=_prompts(recipe.prompts),
        ranks=ranks,
        rank=rank,
        lookahead=recipe.lookahead,
        seed=recipe.seed,
    )
    return (
        sampler,
        sampler.dataset,
        Collator(processor, recipe.token_budget, always_vision=True),
    )


def _prompts(source: str | None) -> Prompts:
    if source is not None and source != "one":
        return Prompts.read(source)
    prompts = Prompts.default()
    if source is None:
        return prompts
    first: dict[str, list[str]] = {}
    for task, texts in prompts.tasks.items():  # one that puts a question, one that asks where a record does not
        found = {"{question}" in text: text for text in reversed(texts)}
        first[task] = list(found.values())
    return Prompts(first)


def mixture(recipe: Recipe, stage: Stage) -> Mixture:
    """The mixture of a stage, its data sets' files read through once.

    Raises:
        RecipeError: the stage's ``data`` is no file, folder or mixture, or cannot be drawn from.
        FileNotFoundError: a data set is not there.
        ModuleNotFoundError: one of them needs the ``datasets`` library, which is not installed.
    """
    source: Any = stage.data
    try:
        if isinstance(source, str):
            only = {"name": Path(source).stem, "path": source, "root": recipe.root}
            source = [{"name": "data", "weight": 1, "datasets": [only]}]
        elif isinstance(source, dict) and "datasets" not in source:
            source = _of_paper(recipe, **source)
        return open_mixture(source, Path(), seed=recipe.seed)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"stage {stage.name}: data: {error}") from error


def _of_paper(recipe: Recipe, paper: str, without: Sequence[str] = (), more: Sequence[str] = ()) -> dict[str, Any]:
    """The paper's mixture of a phase without some of its groups or data sets, with others, the recipe's files in it."""
    groups = paper_groups(paper)
    known = {name: group.name for group in groups for name in group.datasets}
    if unknown := sorted(set(without) - {*known, *known.values()}):
        raise ValueError(f"without: the paper's {paper} has no {', '.join(unknown)}")
    wanted = [name for name, group in known.items() if name not in without and group not in without]
    files = recipe.datasets
    if isinstance(files, str):
        files = yaml.safe_load(Path(files).read_text())
    found = {each["name"]: each for each in files or []}
    if missing := [name for name in wanted if name not in found]:
        raise ValueError(f"datasets lacks {', '.join(missing)}; give their files, or name them in data.without")
    if unweighted := [name for name in more if "weight" not in found.get(name, ())]:
        raise ValueError(
            f"datasets lacks {', '.join(unweighted)} with a weight, beside the paper's groups' 100 together"
        )
    return {
        "paper": paper,
        "datasets": [found[name] for name in wanted],
        "partial": bool(without),
        "more": [_alone(**found[name]) for name in more],
    }


def _alone(weight: float, **dataset: Any) -> dict[str, Any]:
    """A group of one data set."""
    return {"name": dataset["name"], "weight": weight, "datasets": [dataset]}


def _texts(mixture: Mixture) -> Iterator[str]:
    """Texts as the processor will render them, for a tokenizer to learn from: of every data set the first records."""
    for dataset in mixture.datasets:
        for index in range(min(len(dataset), _TEXTS // len(mixture.datasets))):
            try:
                record = dataset[index]
            except RecordError:
                continue  # counted when it is drawn
            for messages in record.conversations:
                for question, reply in zip(messages[::2], messages[1::2], strict=True):
                    answer = text_of(reply) if "content" in reply else " ".join(reply["choices"])
                    yield f"{PROMPT.format(question=text_of(question).lower())} {answer.lower()}"
