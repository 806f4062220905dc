"""A mixture from the part of a recipe that describes data: plain dicts and lists, as YAML or JSON holds them.

Groups with their weights, data sets with their files:

    - name: questions
      weight: 3
      datasets:
        - {name: VQAv2, path: vqav2.jsonl, root: pictures, task: vqa}
        - {name: GQA, path: gqa, columns: {image: picture, question: query, answer: label}, task: vqa}

Or the paper's groups and weights, Table 9, and the files of its data sets:

    paper: finetuning
    datasets:
      - {name: VQAv2, path: vqav2.jsonl, root: pictures, task: vqa}

``path`` is a JSONL file or a folder that ``datasets.Dataset.save_to_disk`` wrote, relative to the recipe; ``root`` is
the folder of the pictures, for JSONL the file's own by default; ``columns`` is for the latter kind. Where ``partial``
is true, data sets of the paper may be missing: the others of a group share its weight, and groups of none are left out.
``more`` are groups as above beside the paper's, which weigh 100 together.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lynx.data.columns import ColumnRecords
from lynx.data.jsonl import JsonlRecords
from lynx.data.mixture import Group, Mixture, paper_groups

_DATASET = {"name", "path", "root", "task", "columns"}


def open_mixture(
    description: Mapping[str, Any] | Sequence[Mapping[str, Any]], folder: str | Path, *, seed: int
) -> Mixture:
    """The mixture of a description as above.

    Args:
        description: a list of groups, or a mapping that names the paper's.
        folder: what paths are relative to.
        seed: as of ``Mixture``.

    Raises:
        ValueError: the description is not as above; the message says where.
        OSError: a file cannot be read.
        ModuleNotFoundError: a data set needs the ``datasets`` library, which is not installed.
    """
    if isinstance(description, Mapping):
        return Mixture(_of_paper(description, Path(folder)), seed=seed)
    if not isinstance(description, Sequence) or isinstance(description, str):
        raise ValueError(f"mixture is a {type(description).__name__}, expected a list of groups or the paper's")
    return Mixture(_groups(description, Path(folder), "mixture"), seed=seed)


def _groups(descriptions: Sequence[Mapping[str, Any]], folder: Path, where: str) -> list[Group]:
    groups = []
    for number, group in enumerate(descriptions):
        _check_keys(group, f"{where}[{number}]", {"name", "weight", "datasets"}, {"name", "weight", "datasets"})
        if not isinstance(group["weight"], int | float):
            raise ValueError(f"{where}[{number}].weight is {group['weight']!r}, expected a number")
        opened = _opened(group["datasets"], folder, f"{where}[{number}].datasets")
        groups.append(Group(str(group["name"]), group["weight"], opened))
    return groups


def _of_paper(description: Mapping[str, Any], folder: Path) -> list[Group]:
    _check_keys(description, "mixture", {"paper", "datasets", "partial", "more"}, {"paper", "datasets"})
    groups = paper_groups(description["paper"])
    names = [name for group in groups for name in group.datasets]
    opened = _opened(description["datasets"], folder, "mixture.datasets")
    if unknown := [name for name in opened if name not in names]:
        raise ValueError(f"mixture.datasets: the paper's {description['paper']} has no {unknown}; it has {names}")
    missing = [name for name in names if name not in opened]
    if missing and not description.get("partial", False):
        raise ValueError(f"mixture.datasets lacks {missing}; give their files, or say 'partial: true' to do without")
    kept = [Group(g.name, g.weight, {name: opened[name] for name in g.datasets if name in opened}) for g in groups]
    return [group for group in kept if group.datasets] + _groups(description.get("more", []), folder, "mixture.more")


def _opened(descriptions: Any, folder: Path, where: str) -> dict[str, JsonlRecords | ColumnRecords]:
    if not isinstance(descriptions, Sequence) or isinstance(descriptions, str):
        raise ValueError(f"{where} is {descriptions!r}, expected a list")
    opened: dict[str, JsonlRecords | ColumnRecords] = {}
    for number, each in enumerate(descriptions):
        _check_keys(each, f"{where}[{number}]", _DATASET, {"name", "path"})
        if each["name"] in opened:
            raise ValueError(f"{where}[{number}]: a second data set is called {each['name']!r}")
        path, root = folder / each["path"], each.get("root")
        options = {"root": None if root is None else folder / root, "task": each.get("task")}
        if path.is_dir():
            opened[each["name"]] = ColumnRecords.from_disk(path, columns=each.get("columns"), **options)
        elif "columns" in each:
            raise ValueError(f"{where}[{number}]: columns are for a folder of the datasets library, {path} is none")
        else:
            opened[each["name"]] = JsonlRecords(path, **options)
    return opened


def _check_keys(value: Any, where: str, known: set[str], needed: set[str]) -> None:
    if not isinstance(value, Mapping):
        raise ValueError(f"{where} is {value!r}, expected a mapping with {sorted(needed)}")
    if unknown := sorted(value.keys() - known):
        raise ValueError(f"{where} has {unknown}, which mean nothing here; known are {sorted(known)}")
    if missing := sorted(needed - value.keys()):
        raise ValueError(f"{where} lacks {missing}")
