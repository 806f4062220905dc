"""Recipes: a training run as data, read from YAML, changed by ``key=value``.

A recipe says which model is trained on which data, in which stages, and what trains in each. A YAML file may start from
another with ``base: NAME`` and then says only what it changes. A key is one of

    output              a field of ``Recipe``
    steps               a field of ``Stage``: of every stage
    finetune.steps      the same of the stage of that name
    model_options.max_frames, data.digits.path     inside a mapping

``stages`` in a file with a base picks some of the base's stages by name.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from lynx import yaml_text
from lynx.media.images import MAX_SIDE
from lynx.train.fields import RecipeError, from_values, suggestion, unknown_key
from lynx.train.param_groups import PARAM_GROUPS

__all__ = ["SHIPPED", "Recipe", "RecipeError", "Stage", "load", "shipped"]

SHIPPED = Path(__file__).parent / "recipes"

_INT32 = 2**31 - 1  # what tokens and steps are counted in
_RANGES = {  # the least and the most of a recipe's integers
    "token_budget": (1, _INT32),
    "lookahead": (1, _INT32),
    "save_every": (1, _INT32),
    "save_total_limit": (1, _INT32),
    "log_every": (1, _INT32),
    "workers": (0, 1024),
    "seed": (0, 2**32 - 1),  # as NumPy takes it
    "max_skipped": (0, 2**63 - 1),
}


@dataclass(frozen=True)
class Stage:
    """One of the runs that follow each other; its model goes on from the stage before.

    Attributes:
        name: of the stage, and of its folder.
        trainable: what trains, names in ``lynx.train.param_groups.PARAM_GROUPS``; all else is frozen.
        steps: optimizer steps.
        learning_rate: its peak.
        warmup_from: where the learning rate starts.
        warmup: the part of the steps in which it rises to its peak.
        schedule: how it then falls to 0 at the last step: ``"linear"`` or ``"cosine"``.
        resolution: side of the images in pixels; a position embedding of another size is resized. None leaves it.
        tokens_per_step: tokens of the language model in one step of all ranks, a multiple of the ranks'
            ``token_budget``; None for one pack a rank.
        data: what is trained on, instead of the recipe's.
        weight_decay, betas, epsilon: of AdamW; ``lynx.train.param_groups.decays`` says what does not decay.
        max_grad_norm: longer gradients are scaled down to it; 0 leaves all as they are.
    """

    name: str
    trainable: tuple[str, ...]
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
        model_options: fields of ``LynxConfig`` to be other than the preset's.
        data: a file, or a mixture, as ``lynx.train.build`` says.
        datasets: files of the paper's data sets, a list as in ``lynx.data.description``, or a YAML file with one.
        root: the folder of the images where ``data`` is a file: their paths may not leave it. The file's own folder by
            default.
        prompts: a file for ``lynx.data.prompts.Prompts``, or ``"one"`` for only the first prompt of each task that
            comes with the package; all of these by default.
        output: the folder for checkpoints, the log and the model.
        stages: what happens, one after another.
        token_budget: tokens of the language model in one pack, the micro-batch of one rank.
        lookahead: packs that may wait to be filled, as of ``lynx_kernels.PackPlanner``.
        precision: ``"bf16"``: frozen parameters in bf16, and autocast to it; ``"fp32"``: everything in fp32. Trainable
            parameters are fp32 in both.
        gradient_checkpointing: spend time to save memory.
        compile: spend time at the start to be faster later.
        workers: processes that load data.
        seed: of everything that is drawn.
        save_every: steps between checkpoints.
        save_total_limit: how many checkpoints of a stage are kept, the newest ones.
        log_every: steps between entries of the log.
        tensorboard: write the log for TensorBoard, too.
        answer_weights: ``"tokens"``: every supervised token counts the same; ``"sqrt"``: one of n tokens of an answer
            counts ``1 / sqrt(n)``, Molmo's rule.
        max_skipped: the run stops when more records than this cannot be used, of all ranks together.
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
    save_total_limit: int = 2
    log_every: int = 10
    tensorboard: bool = False
    answer_weights: Literal["tokens", "sqrt"] = "tokens"
    max_skipped: int = 1000

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
        RecipeError: a key is unknown or has another name by now, a value has another type or is out of range, or a
            required key is missing.
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
        raise RecipeError(f"{text!r} is not of the form key=value")
    try:
        return key, yaml_text.read(value)
    except yaml_text.YamlError:
        return key, value  # a path with a colon, say
    except yaml_text.YamlBombError as error:
        raise RecipeError(f"{key}: the value cannot be used: {error}") from error


def _read(path: Path) -> dict[str, Any]:
    try:
        content = yaml_text.read(path.read_text())
    except (yaml_text.YamlError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is not YAML: {error}") from error
    except yaml_text.YamlBombError as error:
        raise RecipeError(f"{path} cannot be used: {error}") from error
    if not isinstance(content, dict):
        raise RecipeError(f"{path} must hold a mapping of keys to values, got {type(content).__name__}")
    return content


def _with_base(source: str | Path | Mapping[str, Any], seen: tuple[Path, ...]) -> dict[str, Any]:
    """The content of a recipe, laid over its base; stages as a dict of dicts."""
    if isinstance(source, Mapping):
        where, content, folder = "the recipe", dict(source), Path()
    else:
        path = _find(source, seen[-1].parent if seen else Path())
        if path in seen:
            raise RecipeError(f"{seen[-1]}: its base leads back to {path}")
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
    known = list(shipped())
    raise FileNotFoundError(
        f"{source}: there is neither a file nor a shipped recipe of this name{suggestion(str(source), known)}; the "
        f"shipped recipes are {', '.join(known)}"
    )


def _changed(values: dict[str, Any], changes: Mapping[str, Any], where: str) -> dict[str, Any]:
    values = {**values, "stages": {name: dict(stage) for name, stage in values["stages"].items()}}
    stages = values["stages"]
    for key, value in changes.items():
        first, _, rest = key.partition(".")
        if key == "stages":
            missing = [name for name in value if name not in stages] if isinstance(value, list) else [value]
            if missing:
                raise RecipeError(
                    f"{where}: stages: there is no stage {missing[0]!r} to pick; there are {list(stages)}"
                )
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
            raise unknown_key(key, known, f"{where}: ")
    return values


def _set(values: dict[str, Any], key: str, value: Any, where: str) -> None:
    first, _, rest = key.partition(".")
    if not rest:
        values[key] = value
        return
    inner = values.get(first)
    if not isinstance(inner, dict):
        if inner is not None or first not in ("data", "model_options"):
            raise RecipeError(f"{where}: {key}: {first} is not a mapping")
        inner = {}
    values[first] = dict(inner)
    _set(values[first], rest, value, where)


def _checked(values: dict[str, Any]) -> Recipe:
    stages = []
    for name, stage in values["stages"].items():
        stages.append(from_values(Stage, stage, f"stage {name}: "))
        _check_stage(stages[-1])
    recipe = from_values(Recipe, {**values, "stages": tuple(stages)}, "", as_they_are=("stages",))
    for key, (least, most) in _RANGES.items():
        if not least <= getattr(recipe, key) <= most:
            raise RecipeError(f"{key} is {getattr(recipe, key)}, must be at least {least} and at most {most}")
    for stage in recipe.stages:
        if stage.data is None and recipe.data is None:
            raise RecipeError(f"stage {stage.name} has nothing to train on: give data=FILE")
    # Every stage gets the data it uses, so that nobody has to look in two places.
    return replace(
        recipe, stages=tuple(replace(each, data=recipe.data if each.data is None else each.data) for each in stages)
    )


def _check_stage(stage: Stage) -> None:
    where = f"stage {stage.name}: "
    if "/" in stage.name or stage.name.startswith("."):
        raise RecipeError(f"{where}the name is also that of a folder, so it may not have '/' in it or begin with '.'")
    if not stage.trainable:
        raise RecipeError(f"{where}trainable is empty; there are {', '.join(PARAM_GROUPS)}")
    for group in stage.trainable:
        if group not in PARAM_GROUPS:
            raise RecipeError(
                f"{where}trainable: there is no {group!r}{suggestion(group, PARAM_GROUPS)}; there are "
                f"{', '.join(PARAM_GROUPS)}"
            )
    ranges = {
        "steps": 1 <= stage.steps <= _INT32,
        "learning_rate": stage.learning_rate > 0,
        "warmup_from": 0 <= stage.warmup_from <= stage.learning_rate,
        "warmup": 0 <= stage.warmup <= 1,
        "resolution": stage.resolution is None or 1 <= stage.resolution <= MAX_SIDE,
        "tokens_per_step": stage.tokens_per_step is None or 1 <= stage.tokens_per_step <= _INT32,
        "weight_decay": stage.weight_decay >= 0,
        "betas": len(stage.betas) == 2 and all(0 <= beta < 1 for beta in stage.betas),
        "epsilon": stage.epsilon > 0,
        "max_grad_norm": stage.max_grad_norm >= 0,
    }
    for key, fits in ranges.items():
        if not fits:
            raise RecipeError(f"{where}{key} is {getattr(stage, key)}, out of range")


_RECIPE = tuple(each.name for each in fields(Recipe) if each.name != "stages")
_STAGE = tuple(each.name for each in fields(Stage))
