"""``python -m tests.compilation.table`` writes docs/kernels.md: what the compiler makes of every shipped launch.

Compiling everything takes minutes, so what the table says is not asked again: beside each case stands a digest of what
the compiler was given. Where it is the same, and Triton too, so is what comes of it.
"""

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Self

import triton

from tests.compilation import offline
from tests.compilation.cases import CASES, Case
from tests.compilation.offline import GFX942, SHARED_MEMORY, Arch, Compiled

PATH = Path(__file__).parents[2] / "docs/kernels.md"
ARCHS: list[Arch] = [*SHARED_MEMORY, GFX942]
LIMITS = {**SHARED_MEMORY, GFX942: offline.GFX942_SHARED_MEMORY}
SERIALIZED = "serialized"
# Products, and copies of 16 bytes that nobody waits for.
_INSTRUCTIONS = (*offline.TENSOR_CORES.values(), offline.GFX942_MATRIX_CORES, "cp.async.cg")
_COLUMNS = ("GPU", "kernel", "launch", "registers", "shared", "spilled", "instructions")


@dataclass(frozen=True)
class Row:
    """What became of one launch on one GPU; a line of the table."""

    gpu: str
    kernel: str
    launch: str
    registers: int
    shared: int
    spilled: int
    instructions: tuple[str, ...]

    @classmethod
    def of(cls, compiled: Compiled) -> Self:
        launch = ", ".join(f"{name}={value}" for name, value in compiled.launch.items())
        found = [each for each in _INSTRUCTIONS if compiled.has(each)]
        return cls(
            offline.name_of(compiled.arch), compiled.name, launch, compiled.registers, compiled.shared,
            compiled.spilled, (*found, *([SERIALIZED] if compiled.serialized else [])),
        )  # fmt: skip

    @classmethod
    def parse(cls, line: str) -> Self:
        gpu, kernel, launch, *numbers, instructions = line.strip("| ").split(" | ")
        registers, shared, spilled = (int(re.findall(r"\d+", each)[0]) for each in numbers)
        found = () if instructions == "none" else tuple(instructions.split(", "))
        return cls(gpu, kernel, launch, registers, shared, spilled, found)

    def __str__(self) -> str:
        limit = next(LIMITS[arch] for arch in ARCHS if offline.name_of(arch) == self.gpu)
        shared = f"{self.shared}" if self.shared <= limit else f"**{self.shared}: does not fit {limit}**"
        spilled = f"**{self.spilled}**" if self.spilled else "0"
        instructions = ", ".join(self.instructions) or "none"
        cells = (self.gpu, self.kernel, self.launch, self.registers, shared, spilled, instructions)
        return f"| {' | '.join(map(str, cells))} |"


def compile_case(case: Case, arch: Arch) -> list[Row]:
    """Every launch of the case, in order, compiled now."""
    with offline.compiling_for(arch) as compiled:
        case.launch()
    return [Row.of(each) for each in compiled]


@cache
def results(case: Case, arch: Arch) -> list[Row]:
    """The same as the table says it, if this Triton wrote it. That it still holds is a test of its own."""
    text = PATH.read_text()
    return written(text, case, arch) if version_line() in text else compile_case(case, arch)


def heading(case: Case) -> str:
    return f"## {case}"


def digest_line(case: Case) -> str:
    return f"Compiled from `{offline.digest_of(case.launch)}`."


def _section(text: str, case: Case) -> list[str]:
    _, _, rest = text.partition(f"{heading(case)}\n")
    section, _, _ = rest.partition("\n## ")
    return section.splitlines()


def written(text: str, case: Case, arch: Arch) -> list[Row]:
    """The rows that a written table has for a case on one GPU."""
    return [Row.parse(each) for each in _section(text, case) if each.startswith(f"| {offline.name_of(arch)} |")]


def is_written(text: str, case: Case) -> bool:
    """Whether a written table's section of a case is of what its launches give this Triton to compile."""
    return version_line() in text and digest_line(case) in _section(text, case)


def version_line() -> str:
    return f"Triton {triton.__version__}."


def write() -> Path:
    """Compile for every GPU what the table does not know yet, and write the table."""
    before = PATH.read_text() if PATH.exists() else ""
    lines = [
        "# Kernels as compiled",
        "",
        "Written by `make kernel-table` from the launches that `tests/compilation` compiles; nothing ran on a GPU.",
        "Registers of a thread; bytes of shared memory of a block; bytes that a thread spills, stored and loaded",
        "(gfx942: 4 for each spilled register). sm_80 gives a block 163 KiB, sm_90 and sm_100 227, gfx942 64.",
        "`H=8/4` is 8 heads of queries that share 4 of keys.",
        version_line(),
    ]
    for case in CASES:
        known = is_written(before, case)
        lines += ["", heading(case), "", digest_line(case), "", f"| {' | '.join(_COLUMNS)} |"]
        lines += ["|" + "---|" * len(_COLUMNS)]
        lines += [
            str(row) for arch in ARCHS for row in (written(before, case, arch) if known else compile_case(case, arch))
        ]
    PATH.write_text("\n".join(lines) + "\n")
    return PATH


if __name__ == "__main__":
    print(f"Wrote {write()}")
