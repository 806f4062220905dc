"""What a stage starts from: a model and its processor, and the data.

A recipe's ``data`` is a JSONL file or a folder that ``datasets.Dataset.save_to_disk`` wrote; groups of such by weight,
as ``lynx.data.sources`` takes them; or the paper's mixture, ``{paper: finetuning, without: [Baize, text tasks]}``,
whose data sets are those of the recipe's ``datasets``. Of these, ``more: [NAME]`` takes others in, each a group with
the ``weight`` it has there; the paper's groups weigh 100 together. Paths are relative to the working directory.
"""

import difflib
import inspect
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    Blip2VisionConfig,
    Blip2VisionModel,
    PreTrainedModel,
)

from lynx import checkpoint, presets
from lynx.config import LynxConfig
from lynx.conversation import PROMPT
from lynx.data.collator import Collator
from lynx.data.mixture import Mixture, paper_groups
from lynx.data.prompts import Prompts
from lynx.data.records import RecordError, text_of
from lynx.data.sources import open_mixture
from lynx.data.stream import PackDataset, PackSampler
from lynx.data.tokenizer import train_tokenizer
from lynx.model import LynxForConditionalGeneration
from lynx.processor import LynxProcessor
from lynx.train import parts
from lynx.train.recipe import Recipe, RecipeError, Stage
from lynx_kernels.integrations import transformers as attention_integration

_TEXTS = 20000  # records that a tokenizer is learned from


def model(recipe: Recipe, data: Callable[[], Mixture]) -> tuple[LynxForConditionalGeneration, LynxProcessor]:
    """The model that a recipe's first stage starts from, and its processor.

    Args:
        recipe: says which model.
        data: gives the stage's mixture; asked only where a tokenizer is to be learned from it.

    Raises:
        RecipeError: the recipe's ``model`` is neither a folder nor a preset, an option is unknown, or a preset with
            pretrained parts is not told where they are.
        OSError: a folder cannot be read.
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
        tokenizer = train_tokenizer(_texts(data()))
        config = _with_options(presets.tiny(tokenizer), recipe.model_options)
        fresh = LynxForConditionalGeneration(config, vision_tower=_tower(recipe))
        return fresh, LynxProcessor.for_model(config, tokenizer)
    if recipe.model == "smollm2-135m":
        return presets.build_smollm2_135m(**recipe.model_options)
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
    return _built(recipe)


def _built(recipe: Recipe) -> tuple[LynxForConditionalGeneration, LynxProcessor]:
    """A preset on a decoder and a vision tower that are there."""
    source = {"local_files_only": True, "dtype": torch.float32}
    tokenizer = AutoTokenizer.from_pretrained(recipe.language_model, local_files_only=True)
    decoder = AutoModelForCausalLM.from_pretrained(
        recipe.language_model, use_safetensors=True, attn_implementation=attention_integration.NAME, **source
    )
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    rows = decoder.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:  # new tokens start as the mean of the others, as in the release
        decoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        with torch.no_grad():
            for table in {decoder.get_input_embeddings().weight, decoder.get_output_embeddings().weight}:
                table[rows:] = table[:rows].mean(0)
    tower = _tower(recipe)
    assert tower is not None  # the caller has seen to it
    config = presets.PRESETS[recipe.model](
        **{"image_token_id": max(len(tokenizer), decoder.config.vocab_size), **recipe.model_options}
    )
    config.text_config, config.vision_config = decoder.config, tower.config
    model = LynxForConditionalGeneration(config, language_model=decoder, vision_tower=tower)
    return model, LynxProcessor.for_model(config, tokenizer)


def _tower(recipe: Recipe) -> PreTrainedModel | None:
    if recipe.vision_tower is None:
        return None
    config = AutoConfig.from_pretrained(recipe.vision_tower, local_files_only=True)
    is_eva = config.model_type in ("blip-2", Blip2VisionConfig.model_type)  # which AutoModel does not know alone
    loader = Blip2VisionModel if is_eva else AutoModel
    return loader.from_pretrained(recipe.vision_tower, use_safetensors=True, local_files_only=True, dtype=torch.float32)


def _check_options(options: dict[str, Any]) -> None:
    known = [name for name in inspect.signature(LynxConfig).parameters if name not in ("kwargs", "args")]
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, known)
            raise RecipeError(
                f"model_options: LynxConfig has no {name!r}{f'; did you mean {near[0]}?' if near else ''}"
            )


def _with_options(config: LynxConfig, options: dict[str, Any]) -> LynxConfig:
    return LynxConfig.from_dict({**config.to_dict(), **options})


def untrained(recipe: Recipe, model: LynxForConditionalGeneration) -> list[str]:
    """The parts of a preset's model that start from nothing and that no stage trains: they would stay noise."""
    if Path(recipe.model).is_dir():
        return []
    present = {parts.part_of(name) for name, _ in model.named_parameters()}
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
