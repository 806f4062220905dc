"""What a recipe describes, built: the model and processor of a run, the data and the trainer of a stage.

A recipe's ``data`` is what ``lynx.data.source.open_source`` opens, such as a JSONL file; or groups of data sets by
weight, as ``lynx.data.description`` takes them; or the paper's mixture, ``{paper: finetuning, without: [Baize, text
tasks]}``, whose data sets are those of the recipe's ``datasets``. Of these, ``more: [NAME]`` takes in others. Each is a
group with the ``weight`` it has there; the paper's groups weigh 100 together. Paths are relative to the working
directory.
"""

import copy
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, TrainerCallback, TrainingArguments, set_seed

from lynx import checkpoint, presets, yaml_text
from lynx.config import LynxConfig
from lynx.data.collator import Collator
from lynx.data.conversation import PROMPT
from lynx.data.description import describe_paper, open_mixture
from lynx.data.mixture import Mixture
from lynx.data.prompts import Prompts
from lynx.data.records import RecordError, text_of
from lynx.data.skipped import SkippedRecords
from lynx.data.source import RecordSource
from lynx.data.stream import PackDataset, PackSampler
from lynx.data.tokenizer import train_tokenizer
from lynx.media.regular import refuse_other_than_file
from lynx.model import LynxForConditionalGeneration
from lynx.processor import LynxProcessor
from lynx.train import param_groups, pretrained
from lynx.train.callbacks import JsonLog, TensorBoardLog, Terminated
from lynx.train.fields import suggestion
from lynx.train.folder import RunFolder
from lynx.train.ranks import ranks
from lynx.train.recipe import Recipe, RecipeError, Stage
from lynx.train.resolution import set_resolution
from lynx.train.trainer import LynxTrainer

logger = logging.getLogger(__name__)

_TEXTS = 20000  # records that a tokenizer is learned from
_SMOLLM2 = "smollm2-135m"
_OPTIONS = tuple(name for name in LynxConfig.field_names() if name not in ("text_config", "vision_config"))


def model(
    recipe: Recipe, data: Callable[[], Mixture[RecordSource]]
) -> tuple[LynxForConditionalGeneration, LynxProcessor]:
    """The model that a recipe's first stage starts from, in fp32, and its processor.

    Args:
        recipe: says which model.
        data: gives the stage's mixture. It is called only where a tokenizer is to be learned from the data.

    Raises:
        RecipeError: the recipe's ``model`` is neither a folder nor a preset, an option is unknown, or a preset with
            pretrained parts is not told where these are, or cannot read them.
        OSError, ValueError: the folder ``model`` cannot be read.
    """
    if Path(recipe.model).is_dir():
        if recipe.model_options or recipe.language_model or recipe.vision_tower:
            raise RecipeError(
                f"model is the folder {recipe.model}, which has its own options, decoder and vision tower: leave out "
                "model_options, language_model and vision_tower, which are for presets"
            )
        return checkpoint.load(recipe.model, dtype=torch.float32)
    _check_options(recipe.model_options)
    if recipe.model == "tiny" and recipe.language_model is None:
        return _tiny(recipe, data())
    if recipe.model == _SMOLLM2 and recipe.language_model is None and recipe.vision_tower is None:
        return presets.build_smollm2_135m(**recipe.model_options)
    if recipe.model in ("tiny", _SMOLLM2):
        raise RecipeError(
            f"the preset {recipe.model} has its own decoder{' and vision tower' if recipe.model == _SMOLLM2 else ''}: "
            "leave out language_model and vision_tower, or take another preset"
        )
    if recipe.model not in presets.PRESETS:
        known = [*presets.PRESETS, "tiny"]
        raise RecipeError(
            f"model is {recipe.model!r}, neither a folder nor a preset{suggestion(recipe.model, known)}; the "
            f"presets are {', '.join(known)}"
        )
    if recipe.language_model is None or recipe.vision_tower is None:
        raise RecipeError(
            f"the preset {recipe.model} is built on a pretrained decoder and vision tower: give language_model=FOLDER "
            "and vision_tower=FOLDER, or model=FOLDER where a whole model is"
        )
    return _built(recipe, recipe.language_model, recipe.vision_tower)


def _tiny(recipe: Recipe, data: Mixture[RecordSource]) -> tuple[LynxForConditionalGeneration, LynxProcessor]:
    """The preset ``tiny``: its tokenizer is learned from the data, its vision tower is fresh or the recipe's."""
    tokenizer = train_tokenizer(_texts(data))
    preset = presets.tiny(tokenizer)
    tower = None if recipe.vision_tower is None else pretrained.vision_tower(recipe.vision_tower)
    config = _config(preset, preset.text_config, tower.config if tower else preset.vision_config, recipe.model_options)
    return LynxForConditionalGeneration(config, vision_tower=tower), LynxProcessor.for_model(config, tokenizer)


def _built(
    recipe: Recipe, language_model: str, vision_tower: str
) -> tuple[LynxForConditionalGeneration, LynxProcessor]:
    """A preset on a pretrained decoder and vision tower."""
    decoder, tokenizer = pretrained.language_model(language_model)
    tower = pretrained.vision_tower(vision_tower)
    preset = presets.PRESETS[recipe.model]()
    preset.image_token_id = max(len(tokenizer), decoder.config.vocab_size)
    config = _config(preset, decoder.config, tower.config, recipe.model_options)
    model = LynxForConditionalGeneration(config, language_model=decoder, vision_tower=tower)
    return model, LynxProcessor.for_model(config, tokenizer)


def _config(preset: LynxConfig, text: PreTrainedConfig, tower: PreTrainedConfig, options: dict[str, Any]) -> LynxConfig:
    """A preset's options, and the recipe's before them, around other parts: checked as they stand together."""
    text, tower = copy.deepcopy((text, tower))  # a whole model takes the choice of attention out of the parts it gets
    return LynxConfig(text, tower, **{**{name: getattr(preset, name) for name in _OPTIONS}, **options})


def _check_options(options: dict[str, Any]) -> None:
    for name in options:
        if name not in _OPTIONS:
            raise RecipeError(f"model_options: there is no option {name!r}{suggestion(name, _OPTIONS)}")


def untrained(recipe: Recipe, model: LynxForConditionalGeneration) -> list[str]:
    """The groups of a preset's parameters that start from nothing and that no stage trains: they would stay noise."""
    if Path(recipe.model).is_dir():
        return []
    present = {param_groups.group_of(name) for name, _ in model.named_parameters()}
    given = set() if recipe.model == "tiny" else {"language_model"}
    if recipe.vision_tower is not None:
        given.add("vision_tower")
    return sorted(present - given - {group for stage in recipe.stages for group in stage.trainable})


def mixture(recipe: Recipe, stage: Stage) -> Mixture[RecordSource]:
    """The mixture of a stage; the files of its data sets are read through once.

    Raises:
        RecipeError: the stage's ``data`` is not as above, or cannot be drawn from.
        FileNotFoundError: a data set is not there.
        ModuleNotFoundError: one of them needs the ``datasets`` library, which is not installed.
    """
    source: Any = stage.data
    try:
        if isinstance(source, str):
            only = {"name": Path(source).stem, "path": source, "root": recipe.root}
            source = [{"name": "data", "weight": 1, "datasets": [only]}]
        elif isinstance(source, dict) and "datasets" not in source:
            files = recipe.datasets
            if isinstance(files, str):
                refuse_other_than_file(files)
                files = yaml_text.read(Path(files).read_text())
            source = describe_paper(source, files or [])
        return open_mixture(source, Path(), seed=recipe.seed)
    except (TypeError, ValueError, OverflowError) as error:
        raise RecipeError(f"stage {stage.name}: data: {error}") from error


def data(
    recipe: Recipe, mixture: Mixture[RecordSource], processor: LynxProcessor, *, ranks: int, rank: int
) -> tuple[PackSampler, PackDataset, Collator]:
    """What a rank trains on in a stage: the sampler of its packs, the data set that reads them, and the collator.

    Raises:
        ValueError: a data set has a task for which there are no prompts.
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
        Collator(processor, recipe.token_budget, always_vision=True, weighs_answers=recipe.answer_weights == "sqrt"),
    )


def _prompts(source: str | None) -> Prompts:
    if source is not None and source != "one":
        return Prompts.read(source)
    prompts = Prompts.default()
    if source is None:
        return prompts
    first: dict[str, list[str]] = {}
    for task, texts in prompts.tasks.items():  # one that puts a question, one for records without
        found = {"{question}" in text: text for text in reversed(texts)}
        first[task] = list(found.values())
    return Prompts(first)


def _texts(mixture: Mixture[RecordSource]) -> Iterator[str]:
    """Texts as the processor will make them, for a tokenizer to learn from: the first records of every data set."""
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


def trainer(
    recipe: Recipe,
    stage: Stage,
    model: LynxForConditionalGeneration,
    processor: LynxProcessor,
    mixture: Mixture[RecordSource],
    terminated: Terminated | None = None,
    *,
    claim: Callable[[], None] = lambda: None,
) -> LynxTrainer:
    """The trainer of a stage; it makes the model ready: resolution, what trains, precision.

    Args:
        recipe: the run.
        stage: one of its stages.
        model, processor: what the stage starts from; both are changed.
        mixture: what it is trained on.
        terminated: ends training after SIGTERM.
        claim: called when all is known to fit, before the output folder is read or written.

    Raises:
        RecipeError: the stage does not fit the number of ranks.
        ValueError: it does not fit the model or the data.
    """
    folder = RunFolder(recipe.output)
    dtype = torch.bfloat16 if recipe.precision == "bf16" else None
    accumulation = _accumulation(recipe, stage, ranks().num_processes)
    if stage.resolution is not None:
        set_resolution(model, processor, stage.resolution)
    counts = param_groups.set_trainable(model, stage.trainable, dtype or torch.float32)
    if ranks().is_main_process:
        trained = ", ".join(f"{group} ({count:,} parameters)" for group, count in counts.items())
        logger.info("stage %s trains %s", stage.name, trained)
    if recipe.gradient_checkpointing:
        _checkpoint_activations(model)
    set_seed(recipe.seed)
    rank, num_ranks = ranks().process_index, ranks().num_processes
    sampler, dataset, collator = data(recipe, mixture, processor, ranks=num_ranks, rank=rank)
    claim()
    arguments = TrainingArguments(
        output_dir=str(folder.checkpoints(stage.name)),
        max_steps=stage.steps,
        gradient_accumulation_steps=accumulation,
        max_grad_norm=stage.max_grad_norm,
        logging_steps=max(1, min(recipe.log_every, stage.steps // 20)),  # at least twenty entries of a short stage
        logging_first_step=True,
        logging_nan_inf_filter=False,  # it would wait for the device at every step, and hide what it finds
        save_steps=recipe.save_every,
        save_total_limit=recipe.save_total_limit,
        report_to=[],  # the logs are callbacks of our own
        dataloader_num_workers=recipe.workers,
        dataloader_pin_memory=torch.cuda.is_available(),
        ddp_find_unused_parameters=False,  # every rank runs the same graph, images or not
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
        terminated=terminated,
        skipped=SkippedRecords(folder.path, rank, limit=recipe.max_skipped),
        train_dataset=dataset,
        data_collator=collator,
        processing_class=processor,
        callbacks=_logs(recipe, stage, folder),
    )


def _logs(recipe: Recipe, stage: Stage, folder: RunFolder) -> list[TrainerCallback]:
    for_tensorboard = [TensorBoardLog(folder.tensorboard(stage.name))] if recipe.tensorboard else []
    return [JsonLog(folder.log, stage.name), *for_tensorboard]


def _accumulation(recipe: Recipe, stage: Stage, num_ranks: int) -> int:
    """How many packs a rank makes a step of."""
    at_once = num_ranks * recipe.token_budget
    if stage.tokens_per_step is None:
        return 1
    if stage.tokens_per_step % at_once:
        raise RecipeError(
            f"stage {stage.name}: tokens_per_step is {stage.tokens_per_step}, which is not a multiple of {at_once}, "
            f"the token_budget of {recipe.token_budget} on {num_ranks} ranks"
        )
    return stage.tokens_per_step // at_once


def _checkpoint_activations(model: LynxForConditionalGeneration) -> None:
    options = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):  # the name from transformers 5.20 or so on
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
