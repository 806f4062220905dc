"""Recipe, build, run: each knows those before it, and none those behind it."""

import ast
from pathlib import Path

import lynx.train

PACKAGE = "lynx.train"


def imported_by(path):
    """The modules of the package that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == PACKAGE:
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith(f"{PACKAGE}."):
            found.add(node.module.removeprefix(f"{PACKAGE}.").partition(".")[0])
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.startswith(f"{PACKAGE}.")]
            found |= {name.removeprefix(f"{PACKAGE}.").partition(".")[0] for name in names}
    return found


MODULES = {path.stem: imported_by(path) for path in Path(lynx.train.__file__).parent.glob("*.py")}


def reached(name, seen=frozenset()):
    """All that a module imports, and they in turn."""
    assert name not in seen, f"{name} imports itself through others"
    return MODULES[name].union(*(reached(each, seen | {name}) for each in MODULES[name]))


def test_each_knows_only_those_before_it():
    assert MODULES["build"] >= {"recipe", "trainer"}
    assert "build" in MODULES["run"]
    assert not reached("recipe") & {"folder", "trainer", "build", "run"}
    assert not reached("trainer") & {"build", "run"}
    assert "run" not in reached("build")


def test_no_two_import_each_other():
    for name in MODULES:
        assert name not in reached(name)
