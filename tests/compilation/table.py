"""The compiler's results for every shipped launch, stored in compiled.csv. ``make kernel-table`` updates the file.

Compiling everything takes minutes, so stored results are reused. Each launch is stored with a digest of the compiler's
input. If the digest and Triton's version are the same, so are the results, even if the kernel or its constants have new
names. build/kernels.md has the same table for people.
"""

import csv
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from multiprocessing import get_context
from pathlib import Path

import triton

from tests.compilation import offline
from tests.compilation.cases import CASES, Case
from tests.compilation.offline import GFX942, SHARED_MEMORY, Arch, Compiled

PATH = Path(__file__).parent / "compiled.csv"
REPORT = Path(__file__).parents[2] / "build/kernels.md"
ARCHS: list[Arch] = [*SHARED_MEMORY, GFX942]
LIMITS = {**SHARED_MEMORY, GFX942: offline.GFX942_SHARED_MEMORY}
SERIALIZED = "serialized"
# Products, and asynchronous copies of 16 bytes.
_INSTRUCTIONS = (*offline.TENSOR_CORES.values(), offline.GFX942_MATRIX_CORES, "cp.async.cg")
_KEYS = ("case", "kernel", "launch", "digest")
_REPORT = """# Kernels as compiled

Written by `make kernel-table`; nothing ran on a GPU. Registers per thread; bytes of shared memory per block; bytes
that a thread spills, stored and loaded (gfx942: 4 for each spilled register). A block has at most 163 KiB on sm_80, 227
on sm_90 and sm_100, 64 on gfx942. `H=8/4` is 8 query heads that share 4 key heads."""


@dataclass(frozen=True)
class Row:
    """The compiler's results for one launch on one GPU."""

    gpu: str
    kernel: str
    launch: str
    registers: int
    shared: int
    spilled: int
    instructions: tuple[str, ...]


@dataclass
class Launch:
    """One launch of one case: a line of the file.

    Attributes:
        launch: constants, ``num_warps`` and ``num_stages``, as text.
        digest: the digest of the compiler's input.
        results: GPU -> registers, shared memory, spilled bytes and instructions, as text. Only GPUs with this launch.
    """

    case: str
    kernel: str
    launch: str
    digest: str
    results: dict[str, str] = field(default_factory=dict)

    def on(self, gpu: str) -> Row:
        registers, shared, spilled, *instructions = self.results[gpu].split()
        return Row(gpu, self.kernel, self.launch, int(registers), int(shared), int(spilled), tuple(instructions))


@cache
def stored() -> list[Launch]:
    """The lines of the file; none if it was written with another version of Triton."""
    if not PATH.exists():
        return []
    with PATH.open(newline="") as file:
        if file.readline() != version_line():
            return []
        lines = list(csv.DictReader(file))
    return [
        Launch(*(each.pop(key) for key in _KEYS), {gpu: text for gpu, text in each.items() if text}) for each in lines
    ]


def version_line() -> str:
    return f"# Triton {triton.__version__}\n"


def launches(case: Case) -> list[Launch]:
    """The current launches of the case, in order, with empty results. GPUs with equal launches share lines."""
    found: dict[tuple, list[Arch]] = {}
    for arch in ARCHS:
        found.setdefault(tuple(offline.launches_of(case.launch, arch)), []).append(arch)
    return [
        Launch(str(case), kernel, launch, digest, {offline.name_of(arch): "" for arch in archs})
        for same, archs in found.items()
        for (kernel, launch), digest in zip(same, offline.digests_of(case.launch, archs[0]), strict=True)
    ]


def is_stored(case: Case) -> bool:
    """Whether the file has the current launches of the case."""

    def keys(found: list[Launch]) -> list[tuple]:
        return [(each.kernel, each.launch, each.digest, each.results.keys()) for each in found]

    return keys([each for each in stored() if each.case == str(case)]) == keys(launches(case))


def stored_rows(case: Case, arch: Arch) -> list[Row]:
    gpu = offline.name_of(arch)
    return [each.on(gpu) for each in stored() if each.case == str(case) and gpu in each.results]


def compile_case(case: Case, arch: Arch) -> list[Row]:
    """Every launch of the case, in order, compiled now."""
    with offline.compiling_for(arch) as compiled:
        case.launch()
    return [_row(each) for each in compiled]


def _row(compiled: Compiled) -> Row:
    found = [each for each in _INSTRUCTIONS if compiled.has(each)]
    return Row(
        offline.name_of(compiled.arch), compiled.name, offline.launch_text(compiled.launch), compiled.registers,
        compiled.shared, compiled.spilled, (*found, *([SERIALIZED] if compiled.serialized else [])),
    )  # fmt: skip


@cache
def results(case: Case, arch: Arch) -> list[Row]:
    """The stored results, if this version of Triton wrote them; otherwise compiled now. Another test checks them."""
    return stored_rows(case, arch) or compile_case(case, arch)


def renew() -> int:
    """Compile the cases that are not stored. Write file and report. Return GPU -> number of compiled cases."""
    known = {(each.digest, gpu): text for each in stored() for gpu, text in each.results.items()}
    found = {str(case): launches(case) for case in CASES}
    missing = [
        (case, arch)
        for case, mine in found.items()
        for arch in ARCHS
        if any((each.digest, gpu) not in known for each in mine for gpu in each.results if gpu == offline.name_of(arch))
    ]
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
        for (case, arch), rows in zip(missing, pool.map(_compile_named, missing), strict=True):
            print(f"compiled {case} for {offline.name_of(arch)}", flush=True)
            mine = [each for each in found[case] if offline.name_of(arch) in each.results]
            for launch, row in zip(mine, rows, strict=True):
                numbers = row.registers, row.shared, row.spilled
                known[launch.digest, row.gpu] = " ".join(map(str, (*numbers, *row.instructions)))
    lines = [each for mine in found.values() for each in mine]
    for each in lines:
        each.results = {gpu: known[each.digest, gpu] for gpu in each.results}
    _write(lines)
    return len(missing)


def _compile_named(name_and_arch: tuple[str, Arch]) -> list[Row]:
    """Runs in a separate process, so its arguments must be picklable."""
    name, arch = name_and_arch
    return compile_case({str(case): case for case in CASES}[name], arch)


def _write(lines: list[Launch]) -> None:
    with PATH.open("w", newline="") as file:
        file.write(version_line())
        writer = csv.DictWriter(file, [*_KEYS, *map(offline.name_of, ARCHS)], lineterminator="\n", restval="")
        writer.writeheader()
        for each in lines:
            writer.writerow({**{key: getattr(each, key) for key in _KEYS}, **each.results})
    report, head = [_REPORT, "", f"Triton {triton.__version__}."], list(Row.__dataclass_fields__)
    for case in dict.fromkeys(each.case for each in lines):
        report += ["", f"## {case}", "", f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
        for gpu in map(offline.name_of, ARCHS):
            rows = [each.on(gpu) for each in lines if each.case == case and gpu in each.results]
            cells = [[*map(str, list(vars(row).values())[:-1]), ", ".join(row.instructions)] for row in rows]
            report += [f"| {' | '.join(each)} |" for each in cells]
    REPORT.parent.mkdir(exist_ok=True)
    REPORT.write_text("\n".join(report) + "\n")


if __name__ == "__main__":
    print(f"{renew()} compiled; wrote {PATH} and {REPORT}")
