"""A recipe's run: its stages one after another, each from the model before, into a folder that a crash leaves usable.

output/recipe.yaml                   the recipe as it runs
output/log.jsonl                     the log of all stages
output/tensorboard/STAGE/            the same for TensorBoard, if asked for
output/broken.jsonl, broken-1.jsonl  the records that could not be used, as rank 0, rank 1, ... met them
output/checkpoints/STAGE/            of every stage, to go on from
output/stages/STAGE/                 the model after each stage but the last
output/config.json, ...              the model after the last
"""

import importlib.util
import logging
import shutil
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import PartialState
from transformers import TrainerCallback, TrainingArguments, set_seed

from lynx import checkpoint
from lynx.data.mixture import Mixture
from lynx.data.skipped import BrokenRecords
from lynx.model import LynxForConditionalGeneration
from lynx.processor import LynxProcessor
from lynx.train import build, param_groups
from lynx.train.callbacks import JsonLog, TensorBoardLog, Terminated
from lynx.train.recipe import Recipe, RecipeError, Stage
from lynx.train.resolution import set_resolution
from lynx.train.trainer import LynxTrainer

logger = logging.getLogger(__name__)

LOG, RECIPE, TENSORBOARD = "log.jsonl", "recipe.yaml", "tensorboard"
# What may change between a run and its resumption: nothing here touches a weight.
_FREE = ("output", "workers", "log_every", "save_every", "keep", "tensorboard", "max_broken")


def run(recipe: Recipe, *, fresh: bool = False) -> Path | None:
    """Train as a recipe says, going on where an earlier run into the same folder stopped.

    SIGTERM ends it after the step that is running, with a checkpoint.

    Args:
        recipe: from ``lynx.train.recipe.load``.
        fresh: start anew, and remove what an earlier run left in the output folder.

    Returns:
        The folder of the finished model; None after SIGTERM.

    Raises:
        RecipeError: the output folder holds a run of another recipe, or the recipe does not fit the model or the
            number of ranks.
        ValueError: the data cannot be used.
    """
    if recipe.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise RecipeError("tensorboard=true needs the package tensorboard: pip install tensorboard")
    output = Path(recipe.output)
    _claim(output, recipe, fresh)
    terminated = Terminated()
    with terminated.listening():
        for index, stage in enumerate(recipe.stages):
            if _is_done(recipe, index):
                continue
            data = cache(partial(build.mixture, recipe, stage))  # its files are read through when it is first wanted
            model, processor = _model(recipe, index, data)
            trainer = stage_trainer(recipe, stage, model, processor, data(), terminated)
            trainer.train(resume_from_checkpoint=True)
            if terminated.stopped:
                if _world().is_main_process:
                    logger.warning("stopped by SIGTERM in stage %s; the same command goes on", stage.name)
                return None
            _save(trainer, _folder(recipe, index), processor)
    return output


def stage_trainer(
    recipe: Recipe,
    stage: Stage,
    model: LynxForConditionalGeneration,
    processor: LynxProcessor,
    data: Mixture,
    terminated: Terminated | None = None,
) -> LynxTrainer:
    """The trainer of one stage, its model prepared: resolution, what trains, precision."""
    world = _world()
    output = Path(recipe.output)
    dtype = torch.bfloat16 if recipe.precision == "bf16" else None
    if stage.resolution is not None:
        set_resolution(model, processor, stage.resolution)
    counts = param_groups.choose(model, stage.trains, dtype or torch.float32)
    if world.is_main_process:
        trained = ", ".join(f"{part} ({count:,} parameters)" for part, count in counts.items())
        logger.info("stage %s trains %s", stage.name, trained)
    if recipe.gradient_checkpointing:
        _checkpoint_activations(model)
    set_seed(recipe.seed)
    sampler, dataset, collator = build.data(
        recipe, data, processor, ranks=world.num_processes, rank=world.process_index
    )
    arguments = TrainingArguments(
        output_dir=str(output / "checkpoints" / stage.name),
        max_steps=stage.steps,
        gradient_accumulation_steps=_accumulation(recipe, stage, world.num_processes),
        max_grad_norm=stage.max_grad_norm,
        logging_steps=max(1, min(recipe.log_every, stage.steps // 20)),  # twenty entries at least of a short stage
        logging_first_step=True,
        logging_nan_inf_filter=False,  # it would wait for the device at every step, and hide what it finds
        save_steps=recipe.save_every,
        report_to=[],  # logs of our own
        dataloader_num_workers=recipe.workers,
        dataloader_pin_memory=torch.cuda.is_available(),
        ddp_find_unused_parameters=False,  # every rank runs the same graph, pictures or not
        disable_tqdm=False,
        torch_compile=recipe.compile,
        use_cpu=not torch.cuda.is_available(),
        seed=recipe.seed,
    )
    return LynxTrainer(
        model,
        arguments,
        stage=stage,
        sampler=sampler,
        dtype=dtype,
        keep=recipe.keep,
        terminated=terminated,
        broken=BrokenRecords(output, world.process_index, limit=recipe.max_broken),
        train_dataset=dataset,
        data_collator=collator,
        processing_class=processor,
        callbacks=_logs(recipe, stage),
    )


def _logs(recipe: Recipe, stage: Stage) -> list[TrainerCallback]:
    output = Path(recipe.output)
    for_tensorboard = [TensorBoardLog(output / TENSORBOARD / stage.name)] if recipe.tensorboard else []
    return [JsonLog(output / LOG, stage.name), *for_tensorboard]


def _world() -> PartialState:
    """The ranks, as torchrun's variables tell them."""
    return PartialState(cpu=not torch.cuda.is_available())


def _accumulation(recipe: Recipe, stage: Stage, ranks: int) -> int:
    """Packs that a rank makes a step of."""
    at_once = ranks * recipe.token_budget
    if stage.tokens_per_step is None:
        return 1
    if stage.tokens_per_step % at_once:
        raise RecipeError(
            f"stage {stage.name}: tokens_per_step is {stage.tokens_per_step}, no multiple of {at_once}, the "
            f"token_budget of {recipe.token_budget} on {ranks} ranks"
        )
    return stage.tokens_per_step // at_once


def _checkpoint_activations(model: LynxForConditionalGeneration) -> None:
    options = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):  # the name from transformers 5.20 or so on
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)


def _claim(output: Path, recipe: Recipe, fresh: bool) -> None:
    """Make the output folder this run's, or raise RecipeError; every rank comes to the same verdict."""
    world, path = _world(), output / RECIPE
    if not fresh and path.is_file():
        differences = _differences(yaml.safe_load(path.read_text()), recipe.as_dict())
        if differences:
            raise RecipeError(
                f"{output} holds a run of another recipe, different in {', '.join(differences)}: choose another "
                "output, or start anew with --fresh, which removes it"
            )
    elif not fresh and (output / "config.json").exists():
        raise RecipeError(f"{output} holds a model already: choose another output, or --fresh, which replaces it")
    world.wait_for_everyone()
    if world.is_main_process:
        if fresh:
            for name in ("checkpoints", "stages", TENSORBOARD):
                shutil.rmtree(output / name, ignore_errors=True)
            for left in (output / "config.json", output / LOG, path, *output.glob("broken*.jsonl")):
                left.unlink(missing_ok=True)
        output.mkdir(parents=True, exist_ok=True)
        unfinished = output / f".{RECIPE}"
        unfinished.write_text(yaml.safe_dump(recipe.as_dict(), sort_keys=False))
        unfinished.replace(path)
    world.wait_for_everyone()


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """The keys that differ, as the command would change them, with their values where these are short."""
    old, new = _flat(_without_places(old)), _flat(_without_places(new))
    differences = []
    for key in sorted({*old, *new}):
        before, after = old.get(key), new.get(key)
        if key not in _FREE and before != after:
            is_short = not isinstance(before, dict | list) and not isinstance(after, dict | list)
            differences.append(f"{key} (was {before}, now {after})" if is_short else key)
    return differences


def _flat(recipe: dict[str, Any]) -> dict[str, Any]:
    """Its keys and those of its stages, which hold its data, too."""
    of_stages = {f"{stage['name']}.{key}": value for stage in recipe["stages"] for key, value in stage.items()}
    of_run = {key: value for key, value in recipe.items() if key != "data"}
    return {**of_run, "stages": [stage["name"] for stage in recipe["stages"]], **of_stages}


def _without_places(value: Any, key: str = "") -> Any:
    """A recipe without the folders that its data and prompts lie in: checkpoints know the content of these."""
    if isinstance(value, dict):
        return {name: _without_places(each, name) for name, each in value.items() if name != "root"}
    if isinstance(value, list):
        return [_without_places(each) for each in value]
    return Path(value).name if key in ("data", "datasets", "path", "prompts") and isinstance(value, str) else value


def _folder(recipe: Recipe, index: int) -> Path:
    output = Path(recipe.output)
    return output if index == len(recipe.stages) - 1 else output / "stages" / recipe.stages[index].name


def _is_done(recipe: Recipe, index: int) -> bool:
    return (_folder(recipe, index) / "config.json").is_file()  # which checkpoint.save writes last


def _model(
    recipe: Recipe, index: int, data: Callable[[], Mixture]
) -> tuple[LynxForConditionalGeneration, LynxProcessor]:
    """What stage ``index`` starts from, all of it in fp32."""
    if index:
        return checkpoint.load(_folder(recipe, index - 1), dtype=torch.float32)
    set_seed(recipe.seed)
    model, processor = build.model(recipe, data)
    if (noise := build.untrained(recipe, model)) and _world().is_main_process:
        logger.warning("%s: from nothing, and no stage trains it", ", ".join(noise))
    return model, processor


def _save(trainer: LynxTrainer, folder: Path, processor: LynxProcessor) -> None:
    world = _world()
    state = trainer.accelerator.get_state_dict(trainer.model) if trainer.is_sharded else None  # from all ranks
    if world.is_main_process:
        model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
        checkpoint.save(folder, model, processor, state_dict=state)
    world.wait_for_everyone()
