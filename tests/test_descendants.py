"""The check that the suite leaves no process behind sees what it must."""

import os
import signal
import subprocess
import time

import pytest

from tests import descendants


@pytest.fixture
def orphan():
    """A process whose parent, a child of ours, has ended."""
    shell = subprocess.run(
        ["sh", "-c", "sleep 300 >/dev/null 2>&1 & echo $!"], capture_output=True, text=True, check=True
    )
    number = int(shell.stdout)
    yield number
    os.kill(number, signal.SIGKILL)
    os.waitpid(number, 0)


def test_a_grandchild_without_its_parent_is_seen(orphan):
    assert descendants.alive()[orphan] == "sleep 300"
    assert orphan in descendants.alive_after(0.1)
    assert orphan not in descendants.alive_after(0.1, except_for={orphan})


def test_what_has_ended_is_not_seen():
    child = subprocess.Popen(["sleep", "0.2"])
    assert child.pid in descendants.alive()
    time.sleep(0.5)  # it is a zombie, for nobody has waited for it
    assert child.pid not in descendants.alive()
    child.wait()
    assert descendants.alive_after(0, except_for=descendants.alive()) == {}
