"""Builds lynx_kernels._host, the compiled code in csrc. Everything else is in pyproject.toml.

Kernels are compiled once per instruction set, and the processor decides when the module is loaded. Where there is no
C++ compiler, or it fails, the package is installed without the module and says so when it is asked to use it.
"""

import os
import platform
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

# Best first; what each asks of the processor stands in csrc/instruction_sets.cpp.
_AVX512 = ["-mavx2", "-mfma", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
_X86 = {"avx512bf16": [*_AVX512, "-mavx512bf16"], "avx512": _AVX512, "avx2": ["-mavx2", "-mfma"]}
INSTRUCTION_SETS = {**(_X86 if platform.machine() == "x86_64" else {}), "plain": []}
KERNELS = ["csrc/attention/kernels.cpp", "csrc/adapter/kernels.cpp"]
SOURCES = [
    "csrc/module.cpp",
    "csrc/instruction_sets.cpp",
    "csrc/threads.cpp",
    "csrc/adapter/adapter.cpp",
    "csrc/attention/attention.cpp",
    "csrc/attention/plan.cpp",
    "csrc/planner/planner.cpp",
    "csrc/planner/balance.cpp",
]
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-ffp-contract=fast", "-Wall", "-Wextra"]


class BuildHost(build_ext):
    """Compiles the kernels once per instruction set, and goes on without the module where that fails."""

    def build_extension(self, ext: Extension) -> None:
        try:
            self._build(ext)
        except (OSError, subprocess.CalledProcessError) as error:
            self.warn(
                f"{ext.name} is not built, and its operations will run in plain PyTorch: {error}. "
                "It needs a C++17 compiler with OpenMP (GCC 12 or newer) as `c++`, or named by CXX."
            )

    def _build(self, ext: Extension) -> None:
        import pybind11

        compiler = [os.environ.get("CXX") or "c++", *FLAGS, *os.environ.get("CXXFLAGS", "").split()]
        sets = " ".join(f"X({name.upper()},{name})" for name in INSTRUCTION_SETS)
        common = [f"-DLYNX_INSTRUCTION_SETS={sets}"]
        python = [f"-isystem{folder}" for folder in (pybind11.get_include(), *self.compiler.include_dirs)]
        Path(self.build_temp).mkdir(parents=True, exist_ok=True)
        commands, objects = [], []

        def compile_later(source: str, name: str, flags: list[str]) -> None:
            objects.append(str(Path(self.build_temp, f"{name}.o")))
            commands.append([*compiler, *flags, "-c", source, "-o", objects[-1]])

        for source in KERNELS:  # first: they take the longest
            operation = Path(source).parent.name
            for name, flags in INSTRUCTION_SETS.items():
                compile_later(source, f"{operation}_{name}", [*flags, f"-DLYNX_KERNELS={operation}_{name}"])
        for source in SOURCES:
            compile_later(source, Path(source).stem, [*common, *python])
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(subprocess.check_call, commands))
        result = Path(self.get_ext_fullpath(ext.name))
        result.parent.mkdir(parents=True, exist_ok=True)
        subprocess.check_call([*compiler, "-shared", *objects, "-o", str(result)])


setup(
    ext_modules=[Extension("lynx_kernels._host", [*KERNELS, *SOURCES])],
    cmdclass={"build_ext": BuildHost},
)
