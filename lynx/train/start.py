"""What a stage starts from: a model and its processor, and the data.

A recipe's ``data`` is a JSONL file or a folder that ``datasets.Dataset.save_to_disk`` wrote; groups of such by weight, as
``lynx.data.sources`` takes them; or the paper's mixture, ``{paper: finetuning, without: [Baize, text tasks]}``, whose
data sets are those of the recipe's ``datasets``. Paths are relative to the working directory.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from lynx import checkpoint, recipes
from lynx.data.collator import Collator
from lynx.data.mixture import Mixture, paper_groups
from lynx.data.records import RecordError, text_of
from lynx.data.sources import open_mixture
from lynx.data.stream import PackDataset, PackSampler
from lynx.data.tokenizer import train_tokenizer
from lynx.model import LynxForConditionalGeneration
from lynx.processor import PROMPT, LynxProcessor
from lynx.train.recipe import Recipe, RecipeError, Stage

_TEXTS = 20000  # records that a tokenizer is learned from


def model(recipe: Recipe) -> tuple[LynxForConditionalGeneration, LynxProcessor]:
    """The model that a recipe's first stage starts from, and its processor.

    Raises:
        RecipeError: the recipe's ``model`` is neither a folder nor a preset.
    """
    if Path(recipe.model).is_dir():
        return checkpoint.load(recipe.model)
    if recipe.model != "tiny":
        raise RecipeError(f"model is {recipe.model!r}, neither a folder nor a preset")
    tokenizer = train_tokenizer(_texts(mixture(recipe, recipe.stages[0])))
    config = recipes.tiny(tokenizer)
    return LynxForConditionalGeneration(config), LynxProcessor.for_model(config, tokenizer)


def data(
    recipe: Recipe, stage: Stage, processor: LynxProcessor, *, ranks: int, rank: int
) -> tuple[PackSampler, PackDataset, Collator]:
    """What a rank trains on in a stage: the sampler of its packs, the data set that reads them, the collator.

    Raises:
        RecipeError: the stage's ``data`` is no file, folder or mixture.
        FileNotFoundError: a data set is not there.
        ValueError: the mixture cannot be drawn from.
    """
    sampler = PackSampler(
        mixture(recipe, stage),
        processor,
        token_budget=recipe.token_budget,
        ranks=ranks,
        rank=rank,
        lookahead=recipe.lookahead,
        seed=recipe.seed,
    )
    return sampler, sampler.dataset, Collator(processor, recipe.token_budget, always_vision=True)


def mixture(recipe: Recipe, stage: Stage) -> Mixture:
    """The mixture of a stage; errors as ``data`` has them."""
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


def _of_paper(recipe: Recipe, paper: str, without: list[str] | tuple[str, ...] = ()) -> dict[str, Any]:
    """The paper's mixture of a phase without some of its groups or data sets, the recipe's files in it."""
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
    return {"paper": paper, "datasets": [found[name] for name in wanted], "partial": bool(without)}


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
