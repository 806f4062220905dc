"""Build the C++ of csrc, without Python, under AddressSanitizer and UBSan, and throw random calls at it.

``python tests/csrc/fuzz.py SECONDS [SEED]``; ``make fuzz`` does it for a minute.
"""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SANITIZERS = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


def main() -> None:
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    import setup

    program = Path("build/fuzz/fuzz")
    drivers = [str(path) for path in sorted(Path("tests/csrc").glob("*.cpp"))]
    objects = setup.compile_all([*setup.SOURCES, *drivers], program.parent, SANITIZERS)
    subprocess.check_call([*setup.compiler(SANITIZERS), *objects, "-o", str(program)])
    sys.exit(subprocess.call([str(program), *sys.argv[1:]]))


if __name__ == "__main__":
    main()
