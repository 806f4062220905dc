"""The output folder of a run: what lies where in it, and which run it belongs to.

output/recipe.yaml                     the recipe as it runs
output/log.jsonl                       the log of all stages
output/tensorboard/STAGE/              the same for TensorBoard, if asked for
output/skipped.jsonl, skipped-1.jsonl  the records that could not be used, as rank 0, rank 1, ... met them
output/checkpoints/STAGE/              of every stage, to go on from
output/stages/STAGE/                   the model after each stage but the last
output/config.json, ...                the model after the last
"""

import shutil
from pathlib import Path
from typing import Any

import yaml

from lynx import yaml_text
from lynx.data import skipped
from lynx.train.ranks import ranks
from lynx.train.recipe import Recipe, RecipeError
from lynx.train.renamed import renamed_recipe

# What may change between a run and its resumption: nothing here touches a weight.
_FREE = ("output", "workers", "log_every", "save_every", "save_total_limit", "tensorboard", "max_skipped")


class RunFolder:
    """The output folder of a run.

    Attributes:
        path: the folder; it may be made later.
        log, recipe: files in it.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.log = self.path / "log.jsonl"
        self.recipe = self.path / "recipe.yaml"

    def checkpoints(self, stage: str) -> Path:
        """Where the checkpoints of a stage lie."""
        return self.path / "checkpoints" / stage

    def tensorboard(self, stage: str) -> Path:
        """Where TensorBoard finds a stage."""
        return self.path / "tensorboard" / stage

    def model(self, recipe: Recipe, stage: int) -> Path:
        """Where the model after the stage of this number lies."""
        is_last = stage == len(recipe.stages) - 1
        return self.path if is_last else self.path / "stages" / recipe.stages[stage].name

    def is_done(self, recipe: Recipe, stage: int) -> bool:
        """Whether the stage of this number is finished."""
        return (self.model(recipe, stage) / "config.json").is_file()  # which checkpoint.save writes last

    def check(self, recipe: Recipe, *, fresh: bool) -> None:
        """Whether this can be the folder of a run of ``recipe``; nothing is changed.

        Args:
            recipe: what will run, or go on.
            fresh: what an earlier run left is going to be removed.

        Raises:
            RecipeError: the folder holds a run of another recipe, or a model that no run left.
        """
        if not fresh and self.recipe.is_file():
            try:
                old = renamed_recipe(yaml_text.read(self.recipe.read_text()))
            except ValueError as error:
                raise RecipeError(f"{self.recipe} cannot be read: {error}; start anew with --fresh") from error
            old = {"answer_weights": "tokens", **old}  # runs before this key was there
            differences = recipe_differences(old, recipe.as_dict())
            if differences:
                raise RecipeError(
                    f"{self.path} holds a run of another recipe, different in {', '.join(differences)}. Choose another "
                    "output, or start anew with --fresh, which removes that run"
                )
        elif not fresh and (self.path / "config.json").exists():
            raise RecipeError(
                f"{self.path} holds a model already. Choose another output, or start anew with --fresh, which replaces "
                "it"
            )

    def claim(self, recipe: Recipe, *, fresh: bool) -> None:
        """Make this the folder of a run of ``recipe``; arguments and errors as of ``check``.

        Every rank comes to the same verdict. With ``fresh``, what an earlier run left is removed.
        """
        self.check(recipe, fresh=fresh)
        ranks().wait_for_everyone()
        if ranks().is_main_process:
            if fresh:
                self._clear()
            self.path.mkdir(parents=True, exist_ok=True)
            unfinished = self.path / f".{self.recipe.name}"
            unfinished.write_text(yaml.safe_dump(recipe.as_dict(), sort_keys=False))
            unfinished.replace(self.recipe)
        ranks().wait_for_everyone()

    def _clear(self) -> None:
        for name in ("checkpoints", "stages", "tensorboard"):
            shutil.rmtree(self.path / name, ignore_errors=True)
        lists = [path for pattern in skipped.FILES for path in self.path.glob(pattern)]
        for left in (self.path / "config.json", self.log, self.recipe, *lists):
            left.unlink(missing_ok=True)


def recipe_differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """The keys that differ and matter, as the command would change them, with their values where these are short."""
    old, new = _flat(_without_places(old)), _flat(_without_places(new))
    differences = []
    for key in sorted({*old, *new}):
        before, after = old.get(key), new.get(key)
        if key not in _FREE and before != after:
            is_short = not isinstance(before, dict | list) and not isinstance(after, dict | list)
            differences.append(f"{key} (was {before}, now {after})" if is_short else key)
    return differences


def _flat(recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe's keys, and those of its stages, which hold its data too."""
    of_stages = {f"{stage['name']}.{key}": value for stage in recipe["stages"] for key, value in stage.items()}
    of_run = {key: value for key, value in recipe.items() if key != "data"}
    return {**of_run, "stages": [stage["name"] for stage in recipe["stages"]], **of_stages}


def _without_places(value: Any, key: str = "") -> Any:
    """A recipe without the folders that its data and prompts lie in: checkpoints know their content."""
    if isinstance(value, dict):
        return {name: _without_places(each, name) for name, each in value.items() if name != "root"}
    if isinstance(value, list):
        return [_without_places(each) for each in value]
    return Path(value).name if key in ("data", "datasets", "path", "prompts") and isinstance(value, str) else value
