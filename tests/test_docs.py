"""The code in the documentation runs, and the drawings that it draws are those that are committed.

``python -m tests.test_docs`` draws them again.
"""

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
PAGES = ["forest", "post-training", "use-it-in-your-model"]


def blocks(page: str) -> list[str]:
    """The Python code of a page, block by block."""
    return re.findall(r"^```python\n(.*?)^```", (DOCS / f"{page}.md").read_text(), re.DOTALL | re.MULTILINE)


def run(page: str) -> None:
    """Run a page's blocks one after another, as a reader would."""
    names: dict = {}
    for number, block in enumerate(blocks(page), 1):
        exec(compile(block, f"{page}.md, block {number}", "exec"), names)


@pytest.mark.parametrize("page", PAGES)
def test_code_runs_and_draws_the_committed_drawings(page, tmp_path, monkeypatch):
    (tmp_path / page).mkdir()
    monkeypatch.chdir(tmp_path)
    run(page)
    drawn, committed = (
        {path.name: path.read_text() for path in folder.glob(f"{page}/*")} for folder in (tmp_path, DOCS)
    )
    assert drawn == committed
    assert set(re.findall(rf"\]\({page}/([^)]*)\)", (DOCS / f"{page}.md").read_text())) == set(drawn)


if __name__ == "__main__":
    import os

    os.chdir(DOCS)
    for each in PAGES:
        run(each)
