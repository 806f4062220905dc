"""Measure and store: ``python -m benchmarks adapter``, or ``all``. Write it up: ``python -m benchmarks report``."""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from benchmarks import (
    adapter,
    attention,
    dropin,
    end_to_end,
    forest,
    generation,
    linear_cross_entropy,
    pack_embeddings,
    pack_frames,
    planner,
    posttraining,
    processors,
    report,
    token_log_probs,
)
from benchmarks.harness import Case, measure
from benchmarks.rows import RESULTS, append
from benchmarks.tables import as_text

OPERATIONS: dict[str, Callable[..., Iterator[Case]]] = {
    "adapter": adapter.cases,
    "attention": attention.cases,
    "dropin": dropin.cases,
    "end_to_end": end_to_end.cases,
    "forest": forest.cases,
    "generation": generation.cases,
    "linear_cross_entropy": linear_cross_entropy.cases,
    "pack_embeddings": pack_embeddings.cases,
    "pack_frames": pack_frames.cases,
    "planner": planner.cases,
    "posttraining": posttraining.cases,
    "processors": processors.cases,
    "token_log_probs": token_log_probs.cases,
}


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("what", choices=[*OPERATIONS, "all", "report"])
    parser.add_argument("--quick", action="store_true", help="few shapes, few rounds, no max-autotune")
    parser.add_argument("--rounds", type=int, help="how often each provider is timed (11; quick: 7)")
    parser.add_argument("--only", default="", metavar="TEXT", help="only cases in whose name TEXT stands: 'train bf16'")
    parser.add_argument(
        "--results",
        type=Path,
        default=RESULTS,
        metavar="FOLDER",
        help="where rows are appended to and read from; a report is written beside it, and docs/benchmarks.md and the "
        f"README's table only from {RESULTS.relative_to(RESULTS.parents[1])}",
    )
    options = parser.parse_args(arguments)
    if options.rounds is not None and options.rounds < 2:
        parser.error("--rounds must be at least 2: there is no spread in one")
    if options.what == "report":
        for path in report.write(options.results):
            print(f"Wrote {path}")
        return
    try:
        for name in OPERATIONS if options.what == "all" else [options.what]:
            _run(name, options)
    except KeyboardInterrupt:
        sys.exit(f"Stopped; the cases measured so far are in {options.results}")


def _run(name: str, options: argparse.Namespace) -> None:
    cases = [case for case in OPERATIONS[name](quick=options.quick, device=device()) if options.only in str(case)]
    start = time.monotonic()
    for number, case in enumerate(cases, 1):
        progress = f"[{number}/{len(cases)}, {time.monotonic() - start:.0f} s] {case}"
        if case.left_out:
            print(f"{progress}: left out: {case.left_out}", flush=True)
            continue
        print(progress, flush=True)
        try:
            rows = measure(case, rounds=options.rounds or (7 if options.quick else 11))
        except torch.OutOfMemoryError as error:
            print(f"left out: {str(error).splitlines()[0]}", flush=True)
            continue
        append(rows, options.results / f"{name}.csv")
        print(as_text(rows), flush=True)


if __name__ == "__main__":
    main()
