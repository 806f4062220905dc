"""``python -m tests.compilation.table`` writes docs/kernels.md: what the compiler makes of every shipped launch."""

from pathlib import Path

import triton

from tests.compilation import offline
from tests.compilation.cases import CASES, Case
from tests.compilation.offline import GFX942, SHARED_MEMORY, Arch, Compiled

PATH = Path(__file__).parents[2] / "docs/kernels.md"
ARCHS: list[Arch] = [*SHARED_MEMORY, GFX942]
_LIMITS = {**SHARED_MEMORY, GFX942: offline.GFX942_SHARED_MEMORY}
_MATRIX_INSTRUCTIONS = (*offline.TENSOR_CORES.values(), offline.GFX942_MATRIX_CORES)
_COLUMNS = ("GPU", "kernel", "launch", "registers", "shared", "spilled", "matrix instruction")


def compile_case(case: Case, arch: Arch) -> list[Compiled]:
    """Every launch of the case, in order."""
    with offline.compiling_for(arch) as compiled:
        case.launch()
    return compiled


def row(kernel: Compiled) -> str:
    """One line of the table."""
    launch = ", ".join(f"{name}={value}" for name, value in kernel.launch.items())
    fits = kernel.shared <= _LIMITS[kernel.arch]
    shared = f"{kernel.shared}" if fits else f"**{kernel.shared}: does not fit {_LIMITS[kernel.arch]}**"
    spilled = f"**{kernel.spilled}**" if kernel.spilled else "0"
    instructions = ", ".join(each for each in _MATRIX_INSTRUCTIONS if kernel.has(each)) or "none"
    cells = (offline.name_of(kernel.arch), kernel.name, launch, kernel.registers, shared, spilled, instructions)
    return f"| {' | '.join(map(str, cells))} |"


def heading(case: Case) -> str:
    return f"## {case}"


def rows_in(text: str, case: Case, arch: Arch) -> list[str]:
    """The lines that a written table has for a case on one GPU."""
    _, _, rest = text.partition(f"{heading(case)}\n")
    section, _, _ = rest.partition("\n## ")
    return [line for line in section.splitlines() if line.startswith(f"| {offline.name_of(arch)} |")]


def version_line() -> str:
    return f"Triton {triton.__version__}."


def write() -> Path:
    """Compile everything for every GPU and write the table."""
    lines = [
        "# Kernels as compiled",
        "",
        "Written by `make kernel-table` from the launches that `tests/compilation` compiles; nothing ran on a GPU.",
        "Registers of a thread; bytes of shared memory of a block; bytes that a thread spills, stored and loaded",
        "(gfx942: 4 for each spilled register). sm_80 gives a block 163 KiB, sm_90 and sm_100 227, gfx942 64.",
        version_line(),
    ]
    for case in CASES:
        lines += ["", heading(case), "", f"| {' | '.join(_COLUMNS)} |", "|" + "---|" * len(_COLUMNS)]
        lines += [row(kernel) for arch in ARCHS for kernel in compile_case(case, arch)]
    PATH.write_text("\n".join(lines) + "\n")
    return PATH


if __name__ == "__main__":
    print(f"Wrote {write()}")
