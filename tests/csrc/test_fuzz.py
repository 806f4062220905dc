"""Random calls of the C++ under sanitizers, for a while: an access beside a tensor fails them."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SECONDS = 20


@pytest.mark.skipif(shutil.which(os.environ.get("CXX") or "c++") is None, reason="there is no C++ compiler")
def test_random_calls():
    command = [sys.executable, ROOT / "tests/csrc/fuzz.py", str(SECONDS)]
    result = subprocess.run(command, capture_output=True, text=True, errors="replace")
    output = f"{result.stdout[-300:]}\n{result.stderr[-6000:]}"
    assert result.returncode == 0, output
    assert "nothing found" in result.stdout, output
