"""Recipes: a training run as data, read from YAML, changed by ``key=value``.

A recipe says which model is trained on which data, in which stages, and what trains in each. A YAML file may start from
another with ``base: NAME`` and then says only what it changes. A key is one of

    output              a field of ``Recipe``
    steps               a field of ``Stage``: of every stage
    finetune.steps      the same of the stage of that name
    model_options.max_frames, data.digits.path     inside a mapping

``stages`` in a file with a base picks some of the base's stages by name.
"""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from lynx.train.param_groups import PARTS

SHIPPED = Path(__file__).parent / "recipes"


class RecipeError(ValueError):
    """A recipe cannot be used; the message says where and why."""


@dataclass(frozen=True)
class Stage:
    """One of the runs that follow each other; its model goes on from the stage before.

    Attributes:
        name: the stage's, and of its folder.
        trains: the parts of the model that train, of ``lynx.train.param_groups.PARTS``; all others are frozen.
        steps: optimizer steps.
        learning_rate: its peak.
        warmup_from: where the learning rate starts.
        warmup: part of the steps that it takes to its peak.
        schedule: how it then falls to 0 at the last step: ``"linear"`` or ``"cosine"``.
        resolution: side of the pictures in pixels, a position embedding of another size is resized; None leaves it.
        tokens_per_step: language model tokens of all ranks in one step, a multiple of the ranks' ``token_budget``;
            None for one pack a rank.
        data: what is trained on, instead of the recipe's.
        weight_decay, betas, epsilon: of AdamW; ``lynx.train.param_groups.decays`` says what does not decay.
        max_grad_norm: longer gradients are cut to it, 0 for none.
    """

    name: str
    trains: tuple[str, ...]
    steps: int
    learning_rate: float
    warmup_from: float = 0.0
    warmup: float = 0.05
    schedule: Literal["linear", "cosine"] = "linear"
    resolution: int | None = None
    tokens_per_step: int | None = None
    data: str | list[Any] | dict[str, Any] | None = None
    weight_decay: float = 0.01
    betas: tuple[float, ...] = (0.9, 0.999)
    epsilon: float = 1e-8
    max_grad_norm: float = 1.0


@dataclass(frozen=True)
class Recipe:
    """A training run.

    Attributes:
        section: where the paper describes it.
        model: a folder that ``lynx.checkpoint.save`` wrote, or the name of a preset: a shape with fresh weights.
        language_model, vision_tower: folders of transformers to take a preset's decoder and tower from.
        model_options: fields of ``LynxConfig`` that differ from the preset's.
        data: a file, or a mixture, as ``lynx.train.build`` says.
        datasets: files of the paper's data sets, a list as in ``lynx.data.description``, or a YAML file with one.
        root: of the pictures where ``data`` is a file: they may not leave it; the file's own folder by default.
        prompts: a file for ``lynx.data.prompts.Prompts``; ``"one"`` for the first ones only of the package's, all of
            those by default.
        output: the folder for checkpoints, the log and the model.
        stages: what happens, one after another.
        token_budget: language model tokens of one pack, the micro-batch of one rank.
        lookahead: packs that may wait to be filled, as of ``lynx_kernels.PackPlanner``.
        precision: ``"bf16"``: frozen parameters in bf16, autocast to it; ``"fp32"``: everything in fp32. Trainable
            parameters are fp32 in both.
        gradient_checkpointing, compile: spend time on memory; spend time at the start on speed.
        workers: processes that load data.
        seed: of everything that is drawn.
        save_every, keep: steps between checkpoints, and how many are kept.
        log_every: steps between entries of the log.
        tensorboard: write the log for TensorBoard, too.
        max_broken: the run stops when more records than this, of all ranks together, cannot be used.
    """

    model: str
    output: str
    stages: tuple[Stage, ...]
    section: str = ""
    language_model: str | None = None
    vision_tower: str | None = None
    model_options: dict[str, Any] = field(default_factory=dict)
    data: str | list[Any] | dict[str, Any] | None = None
    datasets: str | list[Any] | None = None
    root: str | None = None
    prompts: str | None = None
    token_budget: int = 4096
    lookahead: int = 16
    precision: Literal["bf16", "fp32"] = "bf16"
    gradient_checkpointing: bool = False
    compile: bool = False
    workers: int = 0
    seed: int = 0
    save_every: int = 1000
    keep: int = 2
    log_every: int = 10
    tensorboard: bool = False
    max_broken: int = 1000

    def as_dict(self) -> dict[str, Any]:
        """As YAML holds it."""
        return asdict(self, dict_factory=_plain)


def shipped() -> dict[str, str]:
    """The recipes that come with the package: their name and the place in the paper."""
    return {path.stem: _read(path).get("section", "") for path in sorted(SHIPPED.glob("*.yaml"))}


def load(source: str | Path | Mapping[str, Any], overrides: Mapping[str, Any] | Iterable[str] = ()) -> Recipe:
    """Read a recipe.

    Args:
        source: the name of a shipped recipe, the path of a YAML file, or what such a file would hold.
        overrides: ``key=value`` texts, values in YAML; or a mapping of keys to values.

    Raises:
        FileNotFoundError: there is no such file, nor a shipped recipe of that name.
        RecipeError: a key is unknown, a value has another type or is out of range, or a required key is missing.
    """
    values = _with_base(source, ())
    if not isinstance(overrides, Mapping):
        overrides = dict(_parse(text) for text in overrides)
    values = _changed(values, overrides, "the command" if isinstance(source, str | Path) else "overrides")
    return _checked(values)


def _plain(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    def plain(value: Any) -> Any:
        return [plain(each) for each in value] if isinstance(value, tuple) else value

    return {key: plain(value) for key, value in pairs}


def _parse(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise RecipeError(f"{text!r} is no key=value")
    try:
        return key, yaml.safe_load(value)
    except yaml.YAMLError:
        return key, value  # a path with a colon, say


def _read(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is not YAML: {error}") from error
    if not isinstance(content, dict):
        raise RecipeError(f"{path} holds a {type(content).__name__}, expected keys and values")
    return content


def _with_base(source: str | Path | Mapping[str, Any], seen: tuple[Path, ...]) -> dict[str, Any]:
    """The content of a recipe, laid over its base; stages as a dict of dicts."""
    if isinstance(source, Mapping):
        where, content, folder = "the recipe", dict(source), Path()
    else:
        path = _find(source, seen[-1].parent if seen else Path())
        if path in seen:
            raise RecipeError(f"{seen[-1]}: its bases come back to {path}")
        seen, where, content, folder = (*seen, path), str(path), _read(path), path.parent
    base = content.pop("base", None)
    if base is None:
        stages = content.get("stages", [])
        named = isinstance(stages, list) and all(isinstance(each, dict) and "name" in each for each in stages)
        if not named or not stages:
            raise RecipeError(f"{where}: stages must be a list of mappings, each with a name")
        content["stages"] = {each["name"]: each for each in stages}
        if len(content["stages"]) < len(stages):
            raise RecipeError(f"{where}: two stages have the same name")
        above: dict[str, Any] = {"stages": content.pop("stages")}
    else:
        above = _with_base(base, seen) if seen else _with_base(_find(base, folder), ())
    return _changed(above, content, where)


def _find(source: str | Path, folder: Path) -> Path:
    named = SHIPPED / f"{source}.yaml"
    if isinstance(source, str) and "/" not in source and named.is_file():
        return named
    path = folder / source
    if path.is_file():
        return path
    near = difflib.get_close_matches(str(source), [each.stem for each in SHIPPED.glob("*.yaml")])
    raise FileNotFoundError(
        f"{source}: no such recipe file, nor a shipped recipe{_suggestion(near)}; there are "
        f"{', '.join(sorted(each.stem for each in SHIPPED.glob('*.yaml')))}"
    )


def _changed(values: dict[str, Any], changes: Mapping[str, Any], where: str) -> dict[str, Any]:
    values = {**values, "stages": {name: dict(stage) for name, stage in values["stages"].items()}}
    stages = values["stages"]
    for key, value in changes.items():
        first, _, rest = key.partition(".")
        if key == "stages":
            missing = [name for name in value if name not in stages] if isinstance(value, list) else [value]
            if missing:
                raise RecipeError(f"{where}: stages: no stage {missing[0]!r} to pick from {list(stages)}")
            stages = values["stages"] = {name: stages[name] for name in value}
        elif rest and first in stages and rest.partition(".")[0] in _STAGE and rest != "name":
            _set(stages[first], rest, value, where)
        elif first in _RECIPE:
            _set(values, key, value, where)
        elif first in _STAGE and first != "name":
            for stage in stages.values():
                _set(stage, key, value, where)
        else:
            known = [*_RECIPE, *_STAGE, *(f"{stage}.{name}" for stage in stages for name in _STAGE)]
            near = _suggestion(difflib.get_close_matches(key, known))
            raise RecipeError(f"{where}: there is no key {key!r}{near}")
    return values


def _set(values: dict[str, Any], key: str, value: Any, where: str) -> None:
    first, _, rest = key.partition(".")
    if not rest:
        values[key] = value
        return
    inner = values.get(first)
    if not isinstance(inner, dict):
        if inner is not None or first not in ("data", "model_options"):
            raise RecipeError(f"{where}: {key}: {first} is no mapping")
        inner = {}
    values[first] = dict(inner)
    _set(values[first], rest, value, where)


def _suggestion(near: list[str]) -> str:
    return f"; did you mean {' or '.join(dict.fromkeys(near))}?" if near else ""


def _checked(values: dict[str, Any]) -> Recipe:
    stages = []
    for name, stage in values["stages"].items():
        stages.append(_built(Stage, stage, f"stage {name}: "))
        _check_stage(stages[-1])
    recipe = _built(Recipe, {**values, "stages": tuple(stages)}, "")
    for key in ("token_budget", "lookahead", "save_every", "keep", "log_every"):
        if getattr(recipe, key) < 1:
            raise RecipeError(f"{key} is {getattr(recipe, key)}, must be at least 1")
    for key in ("workers", "seed", "max_broken"):
        if getattr(recipe, key) < 0:
            raise RecipeError(f"{key} is {getattr(recipe, key)}, must be at least 0")
    for stage in recipe.stages:
        if stage.data is None and recipe.data is None:
            raise RecipeError(f"stage {stage.name} has nothing to train on: give data=FILE")
    # With its own data in every stage, nobody has to ask twice.
    return replace(
        recipe, stages=tuple(replace(each, data=recipe.data if each.data is None else each.data) for each in stages)
    )


def _check_stage(stage: Stage) -> None:
    where = f"stage {stage.name}: "
    if "/" in stage.name or stage.name.startswith("."):
        raise RecipeError(f"{where}the name becomes a folder's: no '/', and no '.' in front")
    if not stage.trains:
        raise RecipeError(f"{where}trains names no part of the model; there are {', '.join(PARTS)}")
    for part in stage.trains:
        if part not in PARTS:
            near = _suggestion(difflib.get_close_matches(part, PARTS))
            raise RecipeError(f"{where}trains: there is no part {part!r}{near}; there are {', '.join(PARTS)}")
    ranges = {
        "steps": stage.steps >= 1,
        "learning_rate": stage.learning_rate > 0,
        "warmup_from": 0 <= stage.warmup_from <= stage.learning_rate,
        "warmup": 0 <= stage.warmup <= 1,
        "resolution": stage.resolution is None or stage.resolution >= 1,
        "tokens_per_step": stage.tokens_per_step is None or stage.tokens_per_step >= 1,
        "weight_decay": stage.weight_decay >= 0,
        "betas": len(stage.betas) == 2 and all(0 <= beta < 1 for beta in stage.betas),
        "epsilon": stage.epsilon > 0,
        "max_grad_norm": stage.max_grad_norm >= 0,
    }
    for key, fits in ranges.items():
        if not fits:
            raise RecipeError(f"{where}{key} is {getattr(stage, key)}, out of range")


def _built(kind: type, values: Mapping[str, Any], where: str) -> Any:
    known = {each.name: each for each in fields(kind)}
    for key in values:
        if key not in known:
            near = _suggestion(difflib.get_close_matches(key, known))
            raise RecipeError(f"{where}there is no key {key!r}{near}")
    hints = get_type_hints(kind)
    typed = {}
    for key, value in values.items():
        try:
            typed[key] = value if key == "stages" else _typed(value, hints[key])
        except (TypeError, ValueError):
            raise RecipeError(f"{where}{key} is {value!r}, expected {_described(hints[key])}") from None
    try:
        return kind(**typed)
    except TypeError:  # fields without a default that nobody gave
        missing = sorted(_required(kind) - typed.keys())
        raise RecipeError(f"{where}{', '.join(missing)} must be given") from None


def _typed(value: Any, hint: Any) -> Any:
    """``value`` as the annotated type, or ValueError."""
    origin = get_origin(hint)
    if origin in (Union, UnionType):
        for each in get_args(hint):
            try:
                return _typed(value, each)
            except (TypeError, ValueError):
                continue
    elif origin is Literal:
        if value in get_args(hint):
            return value
    elif origin is tuple:
        if isinstance(value, list | tuple):
            return tuple(_typed(each, get_args(hint)[0]) for each in value)
    elif origin in (dict, list):
        if isinstance(value, origin):
            return value
    elif hint is NoneType:
        if value is None:
            return None
    elif hint is float:  # YAML reads 1e-4, without a dot, as text
        if not isinstance(value, bool):
            return float(value)
    elif isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        return value
    raise ValueError


def _described(hint: Any) -> str:
    origin = get_origin(hint)
    if origin in (Union, UnionType):
        return " or ".join(_described(each) for each in get_args(hint))
    if origin is Literal:
        return " or ".join(map(repr, get_args(hint)))
    if origin is tuple:
        return f"a list of {_described(get_args(hint)[0])}"
    names = {
        dict: "a mapping",
        NoneType: "null",
        str: "text",
        int: "an integer",
        float: "a number",
        bool: "true or false",
    }
    return names[origin or hint]


def _required(kind: type) -> set[str]:
    return {each.name for each in fields(kind) if each.default is MISSING and each.default_factory is MISSING}


_RECIPE = tuple(each.name for each in fields(Recipe) if each.name != "stages")
_STAGE = tuple(each.name for each in fields(Stage))
