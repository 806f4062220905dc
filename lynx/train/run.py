"""A recipe's run: its stages one after another, each from the model before, into a folder that a crash leaves usable.

``lynx.train.folder`` says what lies where in the output folder.
"""

import importlib.util
import logging
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import torch
from transformers import set_seed

from lynx import checkpoint
from lynx.data.mixture import Mixture
from lynx.data.source import RecordSource
from lynx.model import LynxForConditionalGeneration
from lynx.processor import LynxProcessor
from lynx.train import build
from lynx.train.callbacks import Terminated
from lynx.train.folder import RunFolder
from lynx.train.lock import locked
from lynx.train.mishaps import told
from lynx.train.ranks import ranks
from lynx.train.recipe import Recipe, RecipeError
from lynx.train.trainer import LynxTrainer

logger = logging.getLogger(__name__)


def run(recipe: Recipe, *, fresh: bool = False) -> Path | None:
    """Train as a recipe says. If an earlier run into the same folder stopped, go on from there.

    SIGTERM ends it after the step that is running, with a checkpoint.

    Args:
        recipe: from ``lynx.train.recipe.load``.
        fresh: start anew, and remove what an earlier run left in the output folder.

    Returns:
        The folder of the finished model; None after SIGTERM.

    Raises:
        RecipeError: the output folder holds a run of another recipe, or one that is still running; or the recipe does
            not fit the model or the number of ranks.
        ValueError: the data cannot be used, or the run came to a number that is not finite.
        OSError: the disk is full, or a process that loads data was killed.
    """
    if recipe.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise RecipeError("tensorboard=true needs the package tensorboard: pip install tensorboard")
    folder = RunFolder(recipe.output)
    terminated = Terminated()
    with locked(folder.path), terminated.listening():
        folder.check(recipe, fresh=fresh)
        left = [number for number in range(len(recipe.stages)) if fresh or not folder.is_done(recipe, number)]
        # The folder is claimed, and a fresh start removes what is there, when the first stage is known to fit.
        claims = iter([partial(folder.claim, recipe, fresh=fresh)])
        for number in left:
            stage = recipe.stages[number]
            data = cache(partial(build.mixture, recipe, stage))  # its files are read through when it is first wanted
            model, processor = _starting_model(recipe, number, folder, data)
            claim = next(claims, lambda: None)
            trainer = build.trainer(recipe, stage, model, processor, data(), terminated, claim=claim)
            with told(stage.name, folder.checkpoints(stage.name)):
                trainer.train(resume_from_checkpoint=True)
            if terminated.stopped:
                if ranks().is_main_process:
                    logger.warning("stopped by SIGTERM in stage %s; the same command goes on", stage.name)
                return None
            with told(stage.name, folder.checkpoints(stage.name)):
                _save(trainer, folder.model(recipe, number), processor)
        if not left:
            folder.claim(recipe, fresh=fresh)
    return folder.path


def _starting_model(
    recipe: Recipe, number: int, folder: RunFolder, data: Callable[[], Mixture[RecordSource]]
) -> tuple[LynxForConditionalGeneration, LynxProcessor]:
    """What the stage of this number starts from, all of it in fp32."""
    if number:
        return checkpoint.load(folder.model(recipe, number - 1), dtype=torch.float32)
    set_seed(recipe.seed)
    model, processor = build.model(recipe, data)
    if (noise := build.untrained(recipe, model)) and ranks().is_main_process:
        logger.warning("%s: starts from nothing, and no stage trains it", ", ".join(noise))
    return model, processor


def _save(trainer: LynxTrainer, folder: Path, processor: LynxProcessor) -> None:
    state = trainer.accelerator.get_state_dict(trainer.model) if trainer.is_sharded else None  # from all ranks
    if ranks().is_main_process:
        model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
        checkpoint.save(folder, model, processor, state_dict=state)
    ranks().wait_for_everyone()
