"""Builds lynx_kernels._host, the CPU code of csrc, and with LYNX_CUDA=1 also lynx_kernels._cuda, its CUDA kernels.

Everything else is in pyproject.toml. The sources are found by their names: csrc/<operation>/cpu/kernels.cpp is compiled
once per instruction set, and the CPU decides at run time which one runs; bindings.cpp is what Python calls.
Without a C++ compiler, or where it fails, the package is installed without _host, and operations run in plain PyTorch.
A warning says so, and host_build_failure.txt in the package, which lynx_kernels/backends/cpu.py reads, says it at use.

The CUDA kernels are built only where LYNX_CUDA=1 asks for it. Here that needs nvcc, ninja and torch, so pip needs
--no-build-isolation, and installing fails where the build fails. Without it nothing is compiled by nvcc; the package
carries csrc, so LYNX_CUDA=1 can also be set later, when a program runs (lynx_kernels/backends/cuda_build.py).
"""

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

# Best first. What each needs of the CPU stands in csrc/common/instruction_sets.cpp.
_AVX512 = ["-mavx2", "-mfma", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
_X86 = {"avx512bf16": [*_AVX512, "-mavx512bf16", "-mavx512vnni"], "avx512": _AVX512, "avx2": ["-mavx2", "-mfma"]}
INSTRUCTION_SETS = {**(_X86 if platform.machine() == "x86_64" else {}), "plain": []}
_CPP = sorted(Path("csrc").rglob("*.cpp"))
KERNELS = {path.parts[1]: str(path) for path in _CPP if path.name == "kernels.cpp"}  # by operation
BINDINGS = [str(path) for path in _CPP if path.name in ("module.cpp", "bindings.cpp")]  # all that knows Python
SOURCES = [str(path) for path in _CPP if path.name not in ("kernels.cpp", "module.cpp", "bindings.cpp")]
CUDA = "lynx_kernels._cuda"
FAILURE = "host_build_failure.txt"  # beside _host
FLAGS = ["-Icsrc", "-std=c++17", "-O3", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-Wall", "-Wextra"]
KERNEL_FLAGS = ["-ffp-contract=fast"]
SOURCE_FLAGS = ["-ffp-contract=off"]  # csrc/pack_frames/filter.h: doubles as Pillow computes them


def compiler(flags: list[str]) -> list[str]:
    """The compiler with all flags that compiling and linking share."""
    return [os.environ.get("CXX") or "c++", *FLAGS, *flags, *os.environ.get("CXXFLAGS", "").split()]


def compile_all(sources: list[str], folder: Path, flags: list[str]) -> list[str]:
    """Compile the kernels, once per instruction set, and ``sources`` into ``folder``; return the objects' paths."""
    sets = " ".join(f"X({name},__VA_ARGS__)" for name in INSTRUCTION_SETS)
    folder.mkdir(parents=True, exist_ok=True)
    commands, objects = [], []

    def compile_later(source: str, name: str, extra: list[str]) -> None:
        objects.append(str(folder / f"{name}.o"))
        commands.append([*compiler(flags), *extra, "-c", source, "-o", objects[-1]])

    for kernels, source in KERNELS.items():  # first: they take the longest
        for name, extra in INSTRUCTION_SETS.items():
            compile_later(source, f"{kernels}_{name}", [*KERNEL_FLAGS, *extra, f"-DLYNX_KERNELS={kernels}_{name}"])
    for source in sources:
        name = "_".join(Path(source).with_suffix("").parts)
        compile_later(source, name, [*SOURCE_FLAGS, f"-DLYNX_INSTRUCTION_SETS(X,...)={sets}"])
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(check_call, commands))
    return objects


class BuildError(Exception):
    """A compiler failed."""


def check_call(command: list[str]) -> None:
    """As ``subprocess.check_call``, but the error tells the first one of the compiler's."""
    result = subprocess.run(command, stderr=subprocess.PIPE, text=True, errors="replace")
    sys.stderr.write(result.stderr)
    if result.returncode:
        said = result.stderr.splitlines()
        first = next((line for line in said if "error" in line), said[0] if said else "it said nothing")
        raise BuildError(f"{command[0]} ended with status {result.returncode}: {first}")


class Build(build_ext):
    """Builds _host, or installs without it where that fails; builds _cuda, or fails."""

    def build_extension(self, ext: Extension) -> None:
        if ext.name == CUDA:
            builder = _cuda_builder()
            builder.build(Path(self.get_ext_fullpath(ext.name)), builder.find_tools())
            return
        failure = Path(self.get_ext_fullpath(ext.name)).with_name(FAILURE)
        failure.unlink(missing_ok=True)
        try:
            self._build(ext)
        except (OSError, BuildError) as error:
            failure.parent.mkdir(parents=True, exist_ok=True)
            failure.write_text(f"{error}\n")
            self.warn(
                f"{ext.name} is not built, so operations on a CPU run in plain PyTorch: {error}. It needs a C++17 "
                "compiler with OpenMP (GCC 12 or newer), as `c++` or named by CXX: install one, then this again."
            )

    def copy_extensions_to_source(self) -> None:
        """For an editable install: what was built, or why it was not."""
        super().copy_extensions_to_source()
        there, here = (Path(folder, "lynx_kernels", FAILURE) for folder in (self.build_lib, "."))
        here.unlink(missing_ok=True)
        if there.is_file():
            shutil.copy(there, here)

    def _build(self, ext: Extension) -> None:
        import pybind11

        includes = [f"-isystem{folder}" for folder in (pybind11.get_include(), *self.compiler.include_dirs)]
        objects = compile_all([*BINDINGS, *SOURCES], Path(self.build_temp), includes)
        result = Path(self.get_ext_fullpath(ext.name))
        result.parent.mkdir(parents=True, exist_ok=True)
        check_call([*compiler([]), "-shared", *objects, "-o", str(result)])


class CarrySources(build_py):
    """Copies csrc into the package. An editable install has it beside the package."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            shutil.copytree("csrc", Path(self.build_lib, "lynx_kernels/csrc"), dirs_exist_ok=True)


def _cuda_builder():
    spec = importlib.util.spec_from_file_location("cuda_build", "lynx_kernels/backends/cuda_build.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


EXTENSIONS = [Extension("lynx_kernels._host", [*KERNELS.values(), *BINDINGS, *SOURCES], optional=True)]
if os.environ.get("LYNX_CUDA") == "1":
    # It does not use Python's ABI, so its name carries no Python version.
    EXTENSIONS.append(Extension(CUDA, [], py_limited_api=True))
if __name__ == "__main__":  # build backends run this file under that name; tests/csrc/fuzz.py imports it
    setup(ext_modules=EXTENSIONS, cmdclass={"build_ext": Build, "build_py": CarrySources})
