"""Names that have changed: what earlier code called the keys of a recipe and those of the log.

A recipe with an old key is an error that tells the new one. The files of a run that earlier code began are read under
the new names, so that the run can go on.
"""

from collections.abc import Mapping
from typing import Any

RECIPE_KEYS = {"trains": "trainable", "keep": "save_total_limit", "max_broken": "max_skipped"}
LOG_KEYS = {"fill": "pack_utilization", "broken_records": "skipped_records"}


def renamed_recipe(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """What a run's ``recipe.yaml`` holds, under the keys of today, those of its stages included."""
    renamed = _renamed(recipe, RECIPE_KEYS)
    return {**renamed, "stages": [_renamed(stage, RECIPE_KEYS) for stage in renamed["stages"]]}


def renamed_entry(entry: Mapping[str, Any]) -> dict[str, Any]:
    """An entry of a log, under the keys of today."""
    return _renamed(entry, LOG_KEYS)


def _renamed(values: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    return {names.get(key, key): value for key, value in values.items()}
