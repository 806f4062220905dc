"""Checkpoints on disk: whole, or not there.

A checkpoint is written into a folder of another name, flushed to the disk, and renamed. What a crash leaves of one is
never taken for a checkpoint, and earlier ones stay until the new one is whole.
"""

import json
import logging
import os
import shutil
from pathlib import Path

logger = logging.getLogger(__name__)

_PREFIX = "checkpoint-"
_UNFINISHED = ".saving-"
_MANIFEST = "manifest.json"


def start(folder: Path) -> Path:
    """An empty folder inside ``folder`` to write a checkpoint into; what an earlier crash left is removed."""
    for left in folder.glob(f"{_UNFINISHED}*"):
        shutil.rmtree(left)
    unfinished = unfinished_of(folder)
    unfinished.mkdir(parents=True)
    return unfinished


def unfinished_of(folder: Path) -> Path:
    """The folder that ``start`` makes, the same for every rank."""
    return folder / f"{_UNFINISHED}{_PREFIX}"


def publish(written: Path, folder: Path, step: int, save_total_limit: int | None) -> Path:
    """Make a checkpoint of what was written, then remove old ones.

    Args:
        written: the folder that holds it, inside of what ``start`` made.
        folder: where checkpoints lie.
        step: the checkpoint's.
        save_total_limit: how many checkpoints are kept, the newest ones; None keeps all.

    Returns:
        Where it lies now.
    """
    sizes = {str(path.relative_to(written)): path.stat().st_size for path in _files(written)}
    (written / _MANIFEST).write_text(json.dumps(sizes, indent=1))
    for path in _files(written):
        _flush(path)
    for inner in (path for path in written.rglob("*") if path.is_dir()):
        _flush(inner)
    _flush(written)
    final = folder / f"{_PREFIX}{step}"
    if final.exists():  # of this step, but damaged: ``latest`` went further back
        shutil.rmtree(final)
    written.rename(final)
    _flush(folder)
    shutil.rmtree(unfinished_of(folder), ignore_errors=True)
    for old in _sorted(folder)[:-save_total_limit] if save_total_limit else ():
        # Renamed first: a crash in the middle of removing it leaves no half of a checkpoint under its name.
        doomed = old.rename(folder / f"{_UNFINISHED}removed-{old.name}")
        shutil.rmtree(doomed)
    return final


def latest(folder: Path) -> Path | None:
    """The newest checkpoint whose files are all there in full; None without one. Damaged ones are logged."""
    for checkpoint in reversed(_sorted(folder)):
        problem = _problem(checkpoint)
        if problem is None:
            return checkpoint
        logger.warning("%s is passed over: %s", checkpoint, problem)
    return None


def describe_latest(folder: Path) -> str:
    """Which checkpoint a run can go on from, for a message that tells why it stopped."""
    last = latest(folder)
    return f"the last good checkpoint is {last}" if last else "there is no checkpoint yet"


def step_of(checkpoint: Path) -> int:
    """How many optimizer steps had been made."""
    return int(checkpoint.name.removeprefix(_PREFIX))


def _sorted(folder: Path) -> list[Path]:
    found = [path for path in folder.glob(f"{_PREFIX}*") if path.name.removeprefix(_PREFIX).isdecimal()]
    return sorted(found, key=step_of)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _problem(checkpoint: Path) -> str | None:
    try:
        sizes = json.loads((checkpoint / _MANIFEST).read_text())
    except (OSError, ValueError) as error:
        return f"its {_MANIFEST} cannot be read ({error})"
    for name, size in sizes.items():
        path = checkpoint / name
        if not path.is_file():
            return f"it lacks {name}"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, not {size}"
    return None


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
