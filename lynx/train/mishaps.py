"""What happens to a run from outside, told in a sentence: a worker that is killed, a disk that is full."""

import errno
import multiprocessing
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from lynx.train import checkpoints

_WORKER = re.compile(r"DataLoader worker \(pid")  # not what a worker raises itself, which begins with "Caught"
_FULL = ("No space left on device", "Disk quota exceeded", "PytorchStreamWriter failed", "unexpected pos")
_FEW = 2**20  # bytes: torch and others do not say why a write failed


@contextmanager
def told(stage: str, folder: Path) -> Iterator[None]:
    """Turn the errors of libraries into one that says what to do, and end the workers.

    A worker that is killed while it sends holds the lock of the others' pipe. They then wait for it for ever, and
    ignore SIGTERM, so they are killed: the interpreter would wait for them at its end.

    Args:
        stage: the name of the stage.
        folder: where its checkpoints lie.

    Raises:
        ChildProcessError: a worker was killed.
        OSError: the disk is full.
    """
    before = set(multiprocessing.active_children())
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        for child in set(multiprocessing.active_children()) - before:
            child.kill()
        if isinstance(error, RuntimeError) and _WORKER.match(str(error)):
            raise ChildProcessError(
                f"stage {stage}: a process that loads data was killed, perhaps for want of memory ({_line(error)}); "
                f"{checkpoints.describe_latest(folder)}. The same command goes on from there; fewer workers need less "
                "memory"
            ) from error
        if _is_full(error, folder):
            raise OSError(
                f"stage {stage}: the disk is full or its quota is used up, so {folder} cannot be written "
                f"({_line(error)}); {checkpoints.describe_latest(folder)}. Make room; the same command goes on from "
                "there"
            ) from error
        raise


def _is_full(error: Exception, folder: Path) -> bool:
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    if not any(sign in str(error) for sign in _FULL):
        return False
    there = next((each for each in (folder, *folder.absolute().parents) if each.exists()), Path("/"))
    return any(sign in str(error) for sign in _FULL[:2]) or shutil.disk_usage(there).free < _FEW


def _line(error: Exception) -> str:
    return str(error).partition("\n")[0].strip().rstrip(".")
