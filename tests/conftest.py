"""What holds for the whole suite: it leaves no process behind."""

import gc
import os
import signal
import sys
from collections.abc import Iterator
from multiprocessing import forkserver, resource_tracker

import pytest

from tests import descendants

_PATIENCE = 20  # seconds; a DataLoader's worker looks every 5 whether its parent is still there


@pytest.fixture(scope="session", autouse=True)
def no_process_outlives_the_suite() -> Iterator[None]:
    """The first fixture that is made, so the last one that ends."""
    descendants.adopt_orphans()
    yield
    gc.collect()  # loaders that were left in the middle
    if (inductor := sys.modules.get("torch._inductor.async_compile")) is not None:
        inductor.shutdown_compile_workers()
    # Python's own two helpers end with this process, as soon as no other process holds their pipes.
    helpers = {forkserver._forkserver._forkserver_pid, resource_tracker._resource_tracker._pid}
    left = descendants.alive_after(_PATIENCE, except_for=helpers)
    for number in left:
        os.kill(number, signal.SIGKILL)
    commands = "".join(f"\n{number}: {command[:100]}" for number, command in left.items())
    assert not left, f"{len(left)} processes outlive the tests:{commands}"
