"""Functions in processes of their own: several ranks of gloo, or one that is to be killed."""

import multiprocessing
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

# One server imports what takes seconds; every process is a fork of it, before any thread or generator is used.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["lynx.train.run"])
_PATIENCE = 240  # seconds


def exit_code(function: Callable, *args: Any) -> int:
    """Run a function in a process; what it ended with, -9 after SIGKILL."""
    process = _CONTEXT.Process(target=_alone, args=(function, *args))
    process.start()
    process.join(_PATIENCE)
    if process.is_alive():
        process.kill()
        raise TimeoutError(f"{function.__name__} did not end")
    assert process.exitcode is not None
    return process.exitcode


def ranks(number: int, folder: Path, function: Callable, *args: Any) -> list[Any]:
    """What ``function(rank, *args)`` returns in each of ``number`` ranks; anything that torch saves as data."""
    codes = exit_codes(number, folder, function, *args)
    assert codes == [0] * number, f"the ranks ended with {codes}"
    return [torch.load(folder / f"result-{rank}.pt", weights_only=True) for rank in range(number)]


def exit_codes(number: int, folder: Path, function: Callable, *args: Any) -> list[int | None]:
    """What each of ``number`` ranks ended with, None where it did not end."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    processes = [
        _CONTEXT.Process(target=_rank, args=(rank, number, port, folder, function, *args)) for rank in range(number)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(_PATIENCE)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    return codes


def _alone(function: Callable, *args: Any) -> None:
    torch.set_num_threads(1)
    function(*args)


def _rank(rank: int, number: int, port: int, folder: Path, function: Callable, *args: Any) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(number), MASTER_ADDR="localhost", MASTER_PORT=str(port)
    )
    torch.set_num_threads(1)
    torch.save(function(rank, *args), folder / f"result-{rank}.pt")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
