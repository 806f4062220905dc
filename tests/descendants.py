"""The processes that the tests started, and what they started in turn, as /proc has them."""

import ctypes
import os
import time
from collections.abc import Collection, Iterator
from pathlib import Path

_PR_SET_CHILD_SUBREAPER = 36  # of linux/prctl.h


def adopt_orphans() -> None:
    """From now on a process whose parent dies becomes a child of this one, instead of init's, and can be found."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def alive(root: int | None = None) -> dict[int, str]:
    """The command line of every living descendant of a process, this one by default; zombies do not count."""
    children: dict[int, list[int]] = {}
    for number in _numbers():
        if (parent := _living_parent(number)) is not None:
            children.setdefault(parent, []).append(number)
    found: list[int] = []
    waiting = [os.getpid() if root is None else root]
    while waiting:
        born = children.get(waiting.pop(), [])
        found += born
        waiting += born
    return {number: _command(number) for number in found}


def alive_after(seconds: float, except_for: Collection[int | None] = ()) -> dict[int, str]:
    """The descendants that are alive after so long, some left out; the answer comes at once when there are none."""
    end = time.monotonic() + seconds
    while True:
        left = {number: command for number, command in alive().items() if number not in except_for}
        if not left or time.monotonic() > end:
            return left
        time.sleep(0.05)


def _numbers() -> Iterator[int]:
    return (int(path.name) for path in Path("/proc").iterdir() if path.name.isdecimal())


def _living_parent(number: int) -> int | None:
    try:
        text = Path(f"/proc/{number}/stat").read_text()
    except OSError:  # it has ended
        return None
    state, parent, *_ = text.rpartition(")")[2].split()  # the name before it may hold anything
    return None if state in "ZX" else int(parent)


def _command(number: int) -> str:
    try:
        return Path(f"/proc/{number}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""
