"""The tables of docs/use-it-in-your-model.md are those of tests/families.json, which ``make test-families`` writes."""

import json

from tests import families


def test_the_page_is_up_to_date():
    text = families.PAGE.read_text()
    assert families.page(json.loads(families.DATA.read_text()), text) == text, "make test-families writes it again"


def test_nothing_is_wrong():
    data = json.loads(families.DATA.read_text())
    verdicts = {verdict for row in data["families"] for verdict, _ in row["checks"].values()}
    assert verdicts <= {"right", "refused", "not there"}
    assert not {"wrong", "error"} & data["sweep"].keys()
    assert len(data["families"]) == len(families.more_vlms.ALL)


def test_cells_say_what_happened():
    checks = {name: ["right", ""] for checks in families.COLUMNS.values() for name in checks}
    checks |= {"packed": ["refused", "no"], "static cache": ["not there", "nor itself"], "lora": ["wrong", "3e-2"]}
    data = {"date": "2026-01-01", "commit": "abc", "transformers": "5", "torch": "2", "families": [
        {"family": "New", "runs": ["decoder", "loss"], "checks": checks},
        {"family": "Newer", "runs": ["lacks"], "checks": {}},
    ]}  # fmt: skip
    table = families.table(data)
    assert "| New | decoder, loss | right | refused (1) | right | right, not there (2) | wrong (3) | right |" in table
    assert "| Newer | lacks | - | - | - | - | - | - |" in table
    assert "1. refused: no\n2. not there (static cache): nor itself\n3. wrong: 3e-2\n" in table
