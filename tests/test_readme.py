"""What the README and docs show, runs."""

import re
import shlex
from pathlib import Path

import pytest
from PIL import Image

from lynx.cli import _options
from lynx.eval import questions

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
IN_ORDER = {
    ROOT / "docs/forest.md",
    ROOT / "docs/post-training.md",
    ROOT / "docs/use-it-in-your-model.md",
}  # whose blocks go on from each other: tests/test_docs.py runs them


def blocks(language, documents=DOCUMENTS):
    text = "".join(each.read_text() for each in documents)
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize(
    "code", blocks("python", [each for each in DOCUMENTS if each not in IN_ORDER]), ids=lambda code: code.split("\n")[0]
)
def test_python(code):
    exec(compile(code, "document", "exec"), {})


def test_commands_are_known():
    lines = [line for block in blocks("bash") for line in block.replace("\\\n", "").splitlines()]
    commands = [line for line in lines if line.startswith(".venv/bin/lynx ")]
    assert len(commands) == 9
    for command in commands:
        _options(shlex.split(command, comments=True)[1:])


def test_records_are_readable(tmp_path):
    """Those of docs/data.md are read in tests/lynx/data/test_formats_people_have.py."""
    [lines] = blocks("json", DOCUMENTS[:1])
    (tmp_path / "my.jsonl").write_text(lines)
    for name in ("cat.png", "1.png", "2.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    asked, skipped = questions.read(tmp_path / "my.jsonl")
    assert (len(asked), skipped) == (3, [])


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", (ROOT / "README.md").read_text(), re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_links_lead_somewhere():
    for document in DOCUMENTS:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name}: {target}"
