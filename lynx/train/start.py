"""What a stage starts from: a model and its processor, and the data.

A recipe's ``data`` is a JSONL file, a folder that ``datasets.Dataset.save_to_disk`` wrote, or a mixture of such, in
groups by weight:

    data:
      groups:
        - name: captions
          weight: 2
          datasets:
            cats: cats.jsonl
            dogs: {path: dogs.jsonl, root: /pictures, task: caption}

or the paper's, whose data sets are looked for in a folder, by their names (``CC3M.jsonl`` or ``CC3M/``):

    data: {paper: finetuning, folder: /data, without: [text tasks, Baize]}
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lynx import checkpoint, recipes
from lynx.data.collator import Collator
from lynx.data.columns import ColumnRecords
from lynx.data.jsonl import JsonlRecords
from lynx.data.mixture import Group, Mixture, paper_groups
from lynx.data.records import Record, RecordError, text_of
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
    return Mixture(list(_groups(recipe, stage)), seed=recipe.seed)


def _groups(recipe: Recipe, stage: Stage) -> Iterator[Group]:
    source = stage.data
    where = f"stage {stage.name}: data"
    if isinstance(source, str):
        yield Group("data", 1.0, {Path(source).stem: _records(source, recipe.root)})
    elif isinstance(source, dict) and "groups" in source:
        for group in _strict(source, where, groups=list)["groups"]:
            options = _strict(group, f"{where}: a group", name=str, weight=(int, float), datasets=dict)
            sets = {name: _described(each, recipe.root, f"{where}: {name}") for name, each in options["datasets"].items()}
            yield Group(options["name"], float(options["weight"]), sets)
    elif isinstance(source, dict) and "paper" in source:
        options = _strict({"without": [], **source}, where, paper=str, folder=str, without=list)
        yield from _paper(options["paper"], Path(options["folder"]), options["without"], recipe.root)
    else:
        raise RecipeError(f"{where} is {source!r}: a file, a folder, or a mapping with groups or paper was expected")


def _strict(options: Any, where: str, **expected: Any) -> dict[str, Any]:
    """A mapping with exactly these keys, of these types."""
    if not isinstance(options, Mapping) or options.keys() != expected.keys():
        found = sorted(options) if isinstance(options, Mapping) else options
        raise RecipeError(f"{where} has {found}, expected {sorted(expected)}")
    for key, kind in expected.items():
        if not isinstance(options[key], kind):
            raise RecipeError(f"{where}: {key} is {options[key]!r}")
    return dict(options)


def _described(description: Any, root: str | None, where: str) -> Any:
    if isinstance(description, str):
        return _records(description, root)
    known = ("path", "root", "task", "columns")
    if not isinstance(description, Mapping) or "path" not in description or description.keys() - set(known):
        raise RecipeError(f"{where} is {description!r}, expected a path or a mapping with {', '.join(known)}")
    return _records(**{"root": root, **description})


def _records(
    path: str, root: str | None, task: str | None = None, columns: Mapping[str, str] | None = None
) -> JsonlRecords | ColumnRecords:
    if Path(path).is_dir():
        return ColumnRecords.from_disk(path, columns=columns, root=root, task=task)
    if columns is not None:
        raise RecipeError(f"{path} is a JSONL file: its records have fields, not columns")
    return JsonlRecords(path, root, task=task)


def _paper(phase: str, folder: Path, without: list[str], root: str | None) -> Iterator[Group]:
    unknown = set(without)
    missing = []
    for group in paper_groups(phase):
        unknown -= {group.name, *group.datasets}
        names = [name for name in group.datasets if name not in without and group.name not in without]
        paths = {name: path for name in names for path in (folder / f"{name}.jsonl", folder / name) if path.exists()}
        missing += [name for name in names if name not in paths]
        if paths:
            yield Group(group.name, group.weight, {name: _records(str(path), root) for name, path in paths.items()})
    if unknown:
        raise RecipeError(f"data.without: the paper's {phase} has no {', '.join(sorted(unknown))}")
    if missing:
        raise FileNotFoundError(
            f"{folder} lacks {', '.join(missing)}: expected each as NAME.jsonl or a folder NAME of datasets; or list "
            "what to leave out in data.without"
        )


def _texts(mixture: Mixture) -> Iterator[str]:
    """Texts as the processor will render them, for a tokenizer to learn from: of every data set the first records."""
    for dataset in mixture.datasets:
        for index in range(min(len(dataset), _TEXTS // len(mixture.datasets))):
            try:
                record: Record = dataset[index]
            except RecordError:
                continue  # counted when it is drawn
            for messages in record.conversations:
                for question, reply in zip(messages[::2], messages[1::2], strict=True):
                    answer = text_of(reply) if "content" in reply else " ".join(reply["choices"])
                    yield f"{PROMPT.format(question=text_of(question).lower())} {answer.lower()}"
