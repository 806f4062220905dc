"""``python -m benchmarks OPERATION [--quick]`` measures and stores, ``python -m benchmarks report`` writes it up."""

import argparse
from collections.abc import Callable, Iterator

import torch

from benchmarks import adapter, report
from benchmarks.harness import RESULTS, Case, append, measure, table

OPERATIONS: dict[str, Callable[..., Iterator[Case]]] = {"adapter": adapter.cases}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("what", choices=[*OPERATIONS, "all", "report"])
    parser.add_argument("--quick", action="store_true", help="few shapes, few rounds")
    parser.add_argument("--max-autotune", action="store_true", help="torch.compile's slow mode as one more peer")
    parser.add_argument("--rounds", type=int, help="how often each provider is timed (21; quick: 7)")
    options = parser.parse_args(arguments)
    if options.rounds is not None and options.rounds < 2:
        parser.error("--rounds must be at least 2: there is no spread in one")
    if options.what == "report":
        print(f"Wrote {report.write()}")
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rounds = options.rounds or (7 if options.quick else 21)
    for name in OPERATIONS if options.what == "all" else [options.what]:
        for case in OPERATIONS[name](quick=options.quick, max_autotune=options.max_autotune, device=device):
            rows = measure(case, rounds=rounds)
            append(rows, RESULTS / f"{name}.csv")
            print(table(rows), flush=True)


if __name__ == "__main__":
    main()
