"""docs/robustness.md: what was tried on Lynx beside what it is made for, and what happens, as the tests say it.

``python -m tests.robustness`` writes it again.
"""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/robustness.md"
KINDS = {
    "Other people's tools on a model's modules": ("tests/lynx_kernels/test_children.py", "tests/lynx/test_children.py"),
    "Every option of `generate`": ("tests/lynx/generation/test_generate_options.py",),
    "Every option of the stock `Trainer`": ("tests/lynx/train/test_trainer_options.py",),
    "Models outside of the attention interface": (
        "tests/lynx_kernels/test_transformers_outsiders.py",
        "tests/lynx_kernels/test_transformers_strangers.py",
    ),
    "Odd images": ("tests/lynx/media/test_odd_images.py",),
    "Data as people have it": ("tests/lynx/data/test_formats_people_have.py",),
    "`torch.func`": ("tests/lynx_kernels/test_torch_func.py",),
    "Runs that should stop": ("tests/lynx/train/test_runs_that_stop.py", "tests/lynx/data/test_odd_files.py"),
    "Smaller faults": ("tests/lynx_kernels/test_smaller_faults.py", "tests/lynx/test_smaller_faults.py"),
}
_HEAD = """# Robustness

What was tried beside ordinary use, and what happens. A line is a test, and CI runs them all. This page is made of them:
`python -m tests.robustness` writes it again.
"""


def page() -> str:
    """The text of the page."""
    return _HEAD + "".join(f"\n## {kind}\n{''.join(map(_section, paths))}" for kind, paths in KINDS.items())


def _section(path: str) -> str:
    tree = ast.parse((ROOT / path).read_text())
    functions = [each for each in tree.body if isinstance(each, ast.FunctionDef) and each.name.startswith("test_")]
    lines = "\n".join(f"- {_line(each)}" for each in functions)
    return f"\n{_markdown(ast.get_docstring(tree))}\n\n[{path}](../{path}):\n\n{lines}\n"


def _line(test: ast.FunctionDef) -> str:
    said = test.name.removeprefix("test_").replace("_", " ")
    more = _markdown(ast.get_docstring(test))
    return f"{said}: {' '.join(more.split())}" if more else said


def _markdown(docstring: str | None) -> str:
    return (docstring or "").replace("``", "`")


if __name__ == "__main__":
    PAGE.write_text(page())
