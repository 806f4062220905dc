"""Build the C++ of csrc, without Python, under AddressSanitizer and UBSan, and throw random calls at it.

``python tests/csrc/fuzz.py SECONDS [SEED]``; ``make fuzz`` does it for a minute.
"""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SANITIZERS = ["-Og", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


def main() -> None:
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    import setup

    program = Path(f"build/fuzz/fuzz-{_digest()}")
    if not program.exists():
        drivers = [str(path) for path in sorted(Path("tests/csrc").glob("*.cpp"))]
        objects = setup.compile_all([*setup.SOURCES, *drivers], program.parent, SANITIZERS)
        subprocess.check_call([*setup.compiler(SANITIZERS), *objects, "-o", str(program)])
    sys.exit(subprocess.call([str(program), *sys.argv[1:]]))


def _digest() -> str:
    """Of all that the program is compiled from."""
    sources = [path for folder in ("csrc", "tests/csrc") for path in sorted(Path(folder).rglob("*")) if path.is_file()]
    content = b"".join(path.read_bytes() for path in (Path("setup.py"), *sources) if path.suffix != ".pyc")
    return hashlib.sha256(content).hexdigest()[:16]


if __name__ == "__main__":
    main()
