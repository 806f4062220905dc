"""A lock on the output folder of a run: two runs in one folder would write over each other's checkpoints."""

import fcntl
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from accelerate.utils import broadcast_object_list

from lynx.train.ranks import ranks
from lynx.train.recipe import RecipeError

logger = logging.getLogger(__name__)

_NAME = ".lock"
_held = set[int]()  # descriptors


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder for this run, and make it if need be; every rank comes to the same verdict.

    The system gives the lock back when the process ends, however it ends. Afterwards nothing is left of the lock, nor
    of a folder that was made for it and is still empty.

    Raises:
        RecipeError: another run holds it; the message says which.
        OSError: the folder cannot be made or written into.
    """
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    descriptor, error = None, None
    if ranks().is_main_process:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = _taken(folder / _NAME)
        except (OSError, RecipeError) as caught:
            error = caught
    if ranks().num_processes > 1:
        [error] = broadcast_object_list([error])
    try:
        if error is not None:
            raise error
        yield
    finally:
        if descriptor is not None:
            (folder / _NAME).unlink(missing_ok=True)  # while it is held: see _taken
            _held.discard(descriptor)
            os.close(descriptor)
        if ranks().is_main_process:
            for each in made:
                with suppress(OSError):  # it is not empty
                    each.rmdir()


def _taken(path: Path) -> int:
    """A descriptor of the locked file."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 200, 0).decode(errors="replace") or "unknown"
            os.close(descriptor)
            raise RecipeError(
                f"{path.parent}: another run trains into this folder, process {holder}. Wait until it ends, end it "
                "with kill and its number, which lets it save a checkpoint first, or choose another output"
            ) from None
        except OSError as error:  # some file systems have no locks
            logger.warning("%s cannot be locked (%s): start no second run into this folder", path, error)
        with suppress(OSError):
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                break
        os.close(descriptor)  # its last holder removed it in this moment
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{os.getpid()} on {socket.gethostname()}".encode(), 0)
    _held.add(descriptor)
    return descriptor


def _let_go_in_child() -> None:
    """Workers are forks: one that outlives its run for a moment must not hold the folder against the next."""
    for descriptor in _held:
        with suppress(OSError):
            os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_let_go_in_child)
