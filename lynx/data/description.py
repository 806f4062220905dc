"""A mixture from the part of a recipe that describes data: plain dicts and lists, as YAML or JSON holds them.

Groups with their weights, data sets with their files:

    - name: questions
      weight: 3
      datasets:
        - {name: VQAv2, path: vqav2.jsonl, root: images, task: vqa}
        - {name: GQA, path: gqa, columns: {image: photo, question: query, answer: label}, task: vqa}

Or the paper's groups and weights, Table 9, and the files of its data sets:

    paper: finetuning
    datasets:
      - {name: VQAv2, path: vqav2.jsonl, root: images, task: vqa}

``path`` is what ``lynx.data.source.open_source`` opens, relative to the recipe, and ``root`` the folder of the images;
``columns`` is for tables: Parquet, and folders of the ``datasets`` library. Where ``partial`` is true, data sets of the
paper may be missing: the others of a group share its weight, and groups without any are left out. ``more`` are groups
as above beside the paper's, which weigh 100 together.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lynx.data.mixture import Group, Mixture, paper_groups
from lynx.data.source import RecordSource, open_source

_DATASET = {"name", "path", "root", "task", "columns"}


def open_mixture(
    description: Mapping[str, Any] | Sequence[Mapping[str, Any]], folder: str | Path, *, seed: int
) -> Mixture[RecordSource]:
    """The mixture of a description as above.

    Args:
        description: a list of groups, or a mapping that names the paper's.
        folder: what paths are relative to.
        seed: as of ``Mixture``.

    Raises:
        ValueError: the description is not as above; the message says where.
        OSError: a file cannot be read.
        ModuleNotFoundError: a data set needs pyarrow or the ``datasets`` library, which is not installed.
    """
    if isinstance(description, Mapping):
        return Mixture(_of_paper(description, Path(folder)), seed=seed)
    if not isinstance(description, Sequence) or isinstance(description, str):
        raise ValueError(f"mixture must be a list of groups or the paper's mapping, got {type(description).__name__}")
    return Mixture(_groups(description, Path(folder), "mixture"), seed=seed)


def describe_paper(choice: Mapping[str, Any], files: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A description of the paper's mixture, for ``open_mixture``.

    Args:
        choice: ``paper``, the phase; ``without``, groups or data sets of the paper to leave out; ``more``, names in
            ``files`` to take in beside the paper's. Each of these becomes a group with the ``weight`` it has there.
        files: of each data set its description, as in a group above.

    Raises:
        ValueError: ``without`` names what the paper does not have, or ``files`` lacks a data set or a weight.
    """
    _check_keys(choice, "the paper's mixture", {"paper", "without", "more"}, {"paper"})
    phase, without, more = choice["paper"], choice.get("without", ()), choice.get("more", ())
    groups = paper_groups(phase)
    known = {name: group.name for group in groups for name in group.datasets}
    if unknown := sorted(set(without) - {*known, *known.values()}):
        raise ValueError(f"without: the paper's {phase} has no {', '.join(unknown)}")
    wanted = [name for name, group in known.items() if name not in without and group not in without]
    for number, each in enumerate(files):
        _check_keys(each, f"datasets[{number}]", _DATASET | {"weight"}, {"name", "path"})
    found = {each["name"]: each for each in files}
    if missing := [name for name in wanted if name not in found]:
        raise ValueError(f"datasets lacks {', '.join(missing)}; give their files, or name them in data.without")
    if unweighted := [name for name in more if "weight" not in found.get(name, ())]:
        raise ValueError(
            f"datasets lacks {', '.join(unweighted)} with a weight; the paper's groups together weigh 100 beside it"
        )
    return {
        "paper": phase,
        "datasets": [found[name] for name in wanted],
        "partial": bool(without),
        "more": [_alone(**found[name]) for name in more],
    }


def _alone(weight: float, **dataset: Any) -> dict[str, Any]:
    """A group of one data set."""
    return {"name": dataset["name"], "weight": weight, "datasets": [dataset]}


def _groups(descriptions: Sequence[Mapping[str, Any]], folder: Path, where: str) -> list[Group[RecordSource]]:
    groups = []
    for number, group in enumerate(descriptions):
        _check_keys(group, f"{where}[{number}]", {"name", "weight", "datasets"}, {"name", "weight", "datasets"})
        if not isinstance(group["weight"], int | float):
            raise ValueError(f"{where}[{number}].weight is {group['weight']!r}, expected a number")
        opened = _opened(group["datasets"], folder, f"{where}[{number}].datasets")
        groups.append(Group(str(group["name"]), group["weight"], opened))
    return groups


def _of_paper(description: Mapping[str, Any], folder: Path) -> list[Group[RecordSource]]:
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


def _opened(descriptions: Any, folder: Path, where: str) -> dict[str, RecordSource]:
    if not isinstance(descriptions, Sequence) or isinstance(descriptions, str):
        raise ValueError(f"{where} is {descriptions!r}, expected a list")
    opened: dict[str, RecordSource] = {}
    for number, each in enumerate(descriptions):
        _check_keys(each, f"{where}[{number}]", _DATASET, {"name", "path"})
        if each["name"] in opened:
            raise ValueError(f"{where}[{number}]: a data set before it has the name {each['name']!r} already")
        root = None if each.get("root") is None else folder / each["root"]
        try:
            opened[each["name"]] = open_source(
                folder / each["path"], root=root, task=each.get("task"), columns=each.get("columns")
            )
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where}[{number}]: {error}") from error
    return opened


def _check_keys(value: Any, where: str, known: set[str], needed: set[str]) -> None:
    if not isinstance(value, Mapping):
        raise ValueError(f"{where} is {value!r}, expected a mapping with {sorted(needed)}")
    if unknown := sorted(value.keys() - known):
        raise ValueError(f"{where} has the unknown keys {unknown}; known are {sorted(known)}")
    if missing := sorted(needed - value.keys()):
        raise ValueError(f"{where} lacks {missing}")
