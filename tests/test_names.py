"""No old name is left: what was renamed has only its new name. CHANGELOG.md lists all renames for users."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
SUFFIXES = (".py", ".h", ".cpp", ".cu", ".yaml")
ALL = ("lynx", "lynx_kernels", "csrc", "benchmarks", "tests")
KERNELS = ("lynx_kernels", "csrc", "tests/lynx_kernels", "tests/interpreter", "tests/compilation", "tests/gpu")
MODEL = ("lynx", "benchmarks", "tests/lynx", "tests/gpu", "tests/benchmarks")
TRAINING = ("lynx", "tests/lynx/train", "tests/gpu")

# File or folder -> why it may have old names.
EXEMPT = {
    "tests/fixtures": "files that earlier code wrote",
    "tests/test_fixtures.py": "compares with files that earlier code wrote",
    "tests/test_names.py": "this file",
    "benchmarks/rows.py": "translates rows that earlier code stored",
    "tests/benchmarks/test_report.py": "tests that translation",
    "lynx/train/renamed.py": "translates recipes and logs that earlier code wrote",
    "tests/lynx/train/test_recipes.py": "tests the errors for old recipe keys",
}
PROMPTS = {
    "lynx/data/prompts.yaml": "prompts for a model",
    "lynx/data/digits.py": "prompts for a model",
    "lynx/data/paper_mixture.yaml": "the paper's name of a group of data",
}
OLD_LOG = {"tests/lynx/train/test_training.py": "tests that logs with old keys are still read"}


class Rename(NamedTuple):
    """A name that changed.

    Attributes:
        old: a regular expression for the old name.
        new: what to use instead.
        folders: where the old name must not be.
        exempt: further files that may have it -> why.
    """

    old: str
    new: str
    folders: tuple[str, ...] = ALL
    exempt: Mapping[str, str] = MappingProxyType({})


RENAMES = [
    # Dispatch
    Rename(r"(?<!shutil\.)\bwhich\(", "explain()"),
    Rename(r"_refusal\b|\brefusal\(|\brefusal=|\.refusal\b", "unsupported_reason()"),
    Rename(r"\breluctance\b", "not_preferred_reason()"),
    Rename(r"\bunsuited\(", "Implementation.architectures"),
    Rename(r"\b_IMPLEMENTATIONS\b", "OPERATION"),
    Rename(r"(?<!\.)\blower\(", "autocast_to()", KERNELS),
    Rename(r"(?<!\.)\bwide\(", "acc_dtype()", KERNELS),
    # Modules
    Rename(r"lynx_kernels\.(attention|embeddings|frames|loss|planner)\b", "lynx_kernels.ops.<operation>, .packing"),
    Rename(
        r"(from|import) lynx_kernels\.(adapter|dispatch|registration|onednn|dtypes|host)\b", "lynx_kernels.backends"
    ),
    Rename(r"\b(cuda|triton)_runtime\b(?!\.h)", "lynx_kernels.backends.cuda, .triton"),
    Rename(r"\btriton_(prefix|cross|blocks|launches|few|tune)\b", "lynx_kernels.ops.<operation>.triton"),
    Rename(r"\blynx\.(images|videos|image_processor|resampler|projection|vision|calls)\b", "lynx.media"),
    Rename(r"\blynx\.(cache|sharing|streaming)\b", "lynx.generation"),
    Rename(r"\blynx\.conversation\b", "lynx.data.conversation"),
    Rename(r"\blynx\.train(\.| import (.*\b)?)(start|parts|watch)\b", "lynx.train.build, .param_groups, .callbacks"),
    Rename(r"\blynx\.data(\.| import (.*\b)?)(broken|sources)\b", "lynx.data.skipped, .description"),
    Rename(r"\blynx\.eval(\.| import (.*\b)?)pictures\b", "lynx.eval.sheet"),
    # Kernels
    Rename(r"\b(query|key)_gradient_kernel", "<operation>_bwd_dq_kernel, <operation>_bwd_dkdv_kernel"),
    Rename(r"\bstatistics_kernel", "<operation>_fwd_stats_kernel, <operation>_bwd_preprocess_kernel"),
    Rename(r"\b(forward|down|up|fused|part|decode|pack)_kernel", "<operation>_fwd_..._kernel"),
    Rename(r"\b(merge|join)_kernel", "<operation>_combine_kernel"),
    Rename(r"\bB(ROWS|COLUMNS|INNER|Q|K)\b", "BLOCK_M, BLOCK_N, BLOCK_K", KERNELS),
    Rename(r"\bblock_(queries|keys|rows|columns|inner)\b", "block_m, block_n, block_k", KERNELS),
    Rename(r"\bn(um)?_parts\b", "num_splits", KERNELS),
    Rename(r"\bslope\b", "act_grad()", KERNELS),
    Rename(r"\binverse_deviations?\b", "rstd"),
    Rename(r"\bone_pass\b", "chunked"),
    Rename(r"\bshare_out\w*", "parallel_for"),
    Rename(r"\bweigh[(<]|weigh\.h", "online_softmax"),
    Rename(r"\bcutter\.h|\bpacks\.h", "workspace.h, loads.h"),
    Rename(
        r"\badapter_few|\bfew_(plan|tokens|driver)|\bFEW_(TOKENS|IEEE|UNALIGNED)|\bis_few\b|\bfew\.(cu|h)\b", "small_m"
    ),
    Rename(
        r"\bshift_labels\b[=:]|\blinear_cross_entropy_sum\b|\bLoss(es)?(Backward|Sum)?Call\b",
        "labels, LinearCrossEntropyCall",
        exempt={"lynx_kernels/integrations/head_loss.py": "a keyword of transformers' losses"},
    ),
    # The model
    Rename(r"\bSETTINGS\b|\bcheck_settings\b|\bsettings=|--settings", "GENERATION_PRESETS, preset=", MODEL),
    Rename(r"\badd_adapters\b|\badd_blocks\b", "PrefixFusion.install, CrossAttentionFusion.install", MODEL),
    # Data and training
    Rename(r"\bJsonlDataset\b", "JsonlRecords"),
    Rename(r"\bBroken\w*|\bTooManyBroken\w*", "Skipped, SkippedRecords, TooManySkippedError", TRAINING),
    Rename(r"\bmax_broken\b|\bbroken_records\b", "max_skipped, skipped_records"),
    Rename(r"^[\s-]*trains:|[\"']trains[\"']|\.trains\b|\btrains=", "trainable", TRAINING),
    Rename(r"^[\s-]*keep:|[\"']keep[\"']|\bkeep=", "save_total_limit", TRAINING),
    Rename(r"[\"']fill[\"']", "pack_utilization", MODEL, OLD_LOG),
    Rename(r"\bPARTS\b|\bpart_of\(", "PARAM_GROUPS, group_of()", TRAINING),
    # Words
    Rename(r"(?i)(\b|_)pictures?(\b|_)", "image", exempt=PROMPTS),
    Rename(r"(?i)\bon (a|this) processor\b|\bthis processor has\b", "CPU"),
]


def sources(folders: tuple[str, ...], exempt: Mapping[str, str]) -> Iterator[Path]:
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*")):
            name = path.relative_to(ROOT)
            if path.suffix in SUFFIXES and not any(name.is_relative_to(each) for each in (*EXEMPT, *exempt)):
                yield path


@pytest.mark.parametrize("rename", RENAMES, ids=lambda rename: rename.new)
def test_no_old_name_is_left(rename):
    found = []
    for path in sources(rename.folders, rename.exempt):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if re.search(rename.old, line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()}")
    assert not found, f"the name is now {rename.new}:\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("line", "new"),
    [
        ("reason = which(adapter, x)", "explain()"),
        ("def _cuda_refusal(x):", "unsupported_reason()"),
        ("y = lower(x, dtype)", "autocast_to()"),
        ("from lynx.train import checkpoints, watch", "lynx.train.build, .param_groups, .callbacks"),
        ("    BQ: tl.constexpr,", "BLOCK_M, BLOCK_N, BLOCK_K"),
        ("  - trains: [adapters]", "trainable"),
        ("def read_picture(path):", "image"),
    ],
)
def test_an_old_name_would_be_found(line, new):
    (rename,) = (each for each in RENAMES if each.new == new)
    assert re.search(rename.old, line)


@pytest.mark.parametrize(
    "line", ["which = shutil.which('ninja')", "text.lower()", "max_keep: int", "trains_scale=True"]
)
def test_other_names_are_not_found(line):
    assert [rename.new for rename in RENAMES if re.search(rename.old, line)] == []


def test_exemptions_are_needed():
    for exempt, renames in ((EXEMPT, RENAMES), *((each.exempt, [each]) for each in RENAMES)):
        for name in exempt:
            paths = [ROOT / name] if (ROOT / name).is_file() else (ROOT / name).rglob("*")
            texts = [path.read_text() for path in paths if path.suffix in (*SUFFIXES, ".csv", ".json", ".jsonl")]
            assert any(re.search(rename.old, text, re.MULTILINE) for rename in renames for text in texts), name
