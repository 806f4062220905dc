"""Every family of transformers' models under our attention, tried; and the tables in docs that say what happened.

``python -m tests.families`` tries them, writes tests/families.json and docs/use-it-in-your-model.md from it, and fails
where something is wrong or fails without a sentence of ours. It takes some minutes.
"""

import datetime
import json
import logging
import re
import subprocess
import sys
import warnings
from pathlib import Path

import torch
import transformers

from lynx_kernels.integrations.apply import apply
from tests.lynx_kernels import families, more_vlms, vlm_checks, vlms

ROOT = Path(__file__).parents[1]
DATA = ROOT / "tests/families.json"
PAGE = ROOT / "docs/use-it-in-your-model.md"
COLUMNS = {
    "padded": ["padded", "losses"], "packed": ["packed"], "shared": ["shared"],
    "generate": ["greedy", "beams", "static cache"], "LoRA": ["lora"], "checkpointing": ["checkpointing"],
}  # fmt: skip


def tried(family: vlms.Family) -> dict:
    """What happened to a family of vision-language models."""
    if (reason := vlm_checks.why_not_there(family)) is not None:
        return {"family": family.title, "runs": [reason], "checks": {}}
    found = {name: vlm_checks.outcome(check, family) for name, check in vlm_checks.CHECKS.items()}
    return {
        "family": family.title,
        "runs": runs(family),
        "checks": {name: [each.verdict, each.why] for name, each in found.items()},
    }


def runs(family: vlms.Family) -> list[str]:
    """What runs on the kernels in a padded batch with labels."""
    model = vlms.build(family).train()
    decoder = {id(each) for each in model.get_decoder().modules()}
    layers = dict(model.named_modules())
    with apply(model) as patch:
        model(**vlm_checks.labelled(family.batch()), use_cache=False)
        parts = [part for part in patch.parts() if part.runs == "lynx"]
    places = {"decoder": False, "tower": False, "cross-attention": False, "loss": False}
    for part in parts:
        is_cross = part.why.startswith("cross_attention")
        is_decoder = id(layers.get(part.name)) in decoder
        place = (
            "loss" if part.name == "loss" else "cross-attention" if is_cross else "decoder" if is_decoder else "tower"
        )
        places[place] = True
    return [place for place, is_there in places.items() if is_there]


def table(data: dict) -> str:
    """The support table, in Markdown."""
    notes: list[str] = []
    lines = [f"| family | on the kernels | {' | '.join(COLUMNS)} |", "|---" * (2 + len(COLUMNS)) + "|"]
    for row in data["families"]:
        cells = [_cell(row, checks, notes) for checks in COLUMNS.values()]
        lines.append(f"| {row['family']} | {', '.join(row['runs'])} | {' | '.join(cells)} |")
    said = "\n".join(f"{number}. {note}" for number, note in enumerate(notes, 1))
    head = (
        f"Tried on {data['date']} at commit {data['commit']} with transformers {data['transformers']} and torch "
        f"{data['torch']}, in fp32 on a CPU:"
    )
    return f"{head}\n\n" + "\n".join(lines) + f"\n\nWhere there is a number:\n\n{said}\n"


def _cell(row: dict, checks: list[str], notes: list[str]) -> str:
    if not row["checks"]:
        return "-"
    found = {}
    for check in checks:
        verdict, why = row["checks"][check]
        if verdict != "right":
            note = f"{verdict}{f' ({check})' if len(checks) > 1 else ''}: {why}"
            if note not in notes:
                notes.append(note)
            found[verdict] = notes.index(note) + 1
    if not found:
        return "right"
    is_part = len(found) < len(checks) and set(found) == {"not there"}
    return ", ".join(["right"] * is_part + [f"{verdict} ({number})" for verdict, number in found.items()])


def page(data: dict, text: str) -> str:
    """The page with the table of ``data`` in it, and the numbers of families of the sweep."""
    text = re.sub(
        r"(<!-- make test-families writes this -->\n).*?(<!-- to here -->)",
        lambda found: f"{found[1]}{table(data)}{found[2]}",
        text,
        flags=re.DOTALL,
    )
    for kind, number in data["sweep"].items():
        text = re.sub(rf"(\| {re.escape(kind)} \| )\d+", rf"\g<1>{number}", text)
    count = sum(number for kind, number in data["sweep"].items() if ":" not in kind)
    return re.sub(
        r"\d+ families of\ntransformers \S+ were",
        f"{count} families of\ntransformers {data['transformers']} were",
        text,
    )


def swept() -> dict[str, list[str]]:
    """The families of the sweep by what happens to them, but those that a small configuration cannot build."""
    kinds = families.sweep()
    for kind in [each for each in kinds if each.endswith("not tried")]:
        del kinds[kind]
    return kinds


def main() -> None:
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    commit = subprocess.run(["git", "rev-parse", "--short=10", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    rows = []
    for family in more_vlms.ALL.values():
        rows.append(tried(family))
        print(rows[-1], flush=True)
    kinds = swept()
    data = {
        "date": datetime.date.today().isoformat(),
        "commit": commit.stdout.strip() or "unknown",
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "families": rows,
        "sweep": {kind: len(found) for kind, found in sorted(kinds.items())},
    }
    DATA.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n")
    PAGE.write_text(page(data, PAGE.read_text()))
    faults = [f"{row['family']}, {check}: {why}" for row in rows for check, (verdict, why) in row["checks"].items()
              if verdict in ("wrong", "failed")]  # fmt: skip
    faults += [f"{name}: {kind}" for kind in ("wrong", "error") for name in kinds.get(kind, [])]
    sys.exit("\n".join(faults) or None)


if __name__ == "__main__":
    main()
