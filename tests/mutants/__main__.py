"""Run mutants: see ``tests.mutants``."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.mutants import MUTANTS, Mutant

ROOT = Path(__file__).parents[2]
COPIED = ("lynx_kernels", "lynx", "tests", "benchmarks", "csrc", "docs", "pyproject.toml", "README.md", "setup.py")


def main(words: list[str]) -> int:
    """Print what becomes of each mutant. Returns how many survive."""
    chosen = [each for each in MUTANTS if not words or any(word in f"{each.file} {each.old}" for word in words)]
    survivors = 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in COPIED:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, copy / name)
        for number, mutant in enumerate(chosen, 1):
            is_killed = dies(mutant, copy)
            survivors += not is_killed
            change = f"{mutant.old.strip()!r} -> {mutant.new.strip()!r}"
            print(
                f"[{number}/{len(chosen)}] {'killed' if is_killed else 'SURVIVES'}  {mutant.file}: {change}", flush=True
            )
    print(f"{survivors} of {len(chosen)} survive")
    return survivors


def dies(mutant: Mutant, copy: Path) -> bool:
    """Whether its tests fail with it: with failed tests, not for want of tests."""
    path = copy / mutant.file
    text = path.read_text()
    path.write_text(text.replace(mutant.old, mutant.new))
    try:
        command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", *mutant.tests.split()]
        environment = {**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
        return subprocess.run(command, cwd=copy, env=environment, capture_output=True).returncode == 1
    finally:
        path.write_text(text)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]) > 0)
