"""Builds lynx_kernels._host, the compiled code in csrc. Everything else is in pyproject.toml.

Kernels are compiled once per instruction set, and the processor decides when the module is loaded. Where there is no
C++ compiler, or it fails, the package is installed without the module and says so when it is asked to use it.

The CUDA kernels are built by lynx_kernels/backends/cuda_build.py when they are first used, from the copy of csrc that
the package carries; with LYNX_CUDA=1 (and --no-build-isolation, it needs torch) here and now, or installing fails.
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

# Best first; what each asks of the processor stands in csrc/common/instruction_sets.cpp.
_AVX512 = ["-mavx2", "-mfma", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
_X86 = {"avx512bf16": [*_AVX512, "-mavx512bf16", "-mavx512vnni"], "avx512": _AVX512, "avx2": ["-mavx2", "-mfma"]}
INSTRUCTION_SETS = {**(_X86 if platform.machine() == "x86_64" else {}), "plain": []}
KERNELS = {
    "attention": "csrc/attention_common/cpu/kernels.cpp",
    "decode": "csrc/prefix_attention_decode/cpu/kernels.cpp",
    "adapter": "csrc/adapter/cpu/kernels.cpp",
    "frames": "csrc/pack_frames/cpu/kernels.cpp",
}
BINDINGS = [  # all that knows Python
    "csrc/common/module.cpp",
    *(f"csrc/{each}/cpu/bindings.cpp" for each in ("adapter", "attention_common", "pack_embeddings", "pack_frames")),
]
SOURCES = [
    "csrc/common/instruction_sets.cpp",
    "csrc/common/threads.cpp",
    "csrc/adapter/cpu/adapter.cpp",
    "csrc/attention_common/cpu/attention.cpp",
    "csrc/prefix_attention_decode/cpu/decode.cpp",
    "csrc/attention_common/cpu/plan.cpp",
    "csrc/pack_embeddings/cpu/embeddings.cpp",
    "csrc/pack_frames/cpu/frames.cpp",
]
CUDA = "lynx_kernels._cuda"
FLAGS = ["-Icsrc", "-std=c++17", "-O3", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-Wall", "-Wextra"]
KERNEL_FLAGS = ["-ffp-contract=fast"]
SOURCE_FLAGS = ["-ffp-contract=off"]  # csrc/pack_frames/filter.h: doubles as Pillow computes them


def compiler(flags: list[str]) -> list[str]:
    """The compiler with all flags that compiling and linking share."""
    return [os.environ.get("CXX") or "c++", *FLAGS, *flags, *os.environ.get("CXXFLAGS", "").split()]


def compile_all(sources: list[str], folder: Path, flags: list[str]) -> list[str]:
    """Compile the kernels, once per instruction set, and ``sources`` into the folder; the objects' paths."""
    sets = " ".join(f"X({name.upper()},{name})" for name in INSTRUCTION_SETS)
    folder.mkdir(parents=True, exist_ok=True)
    commands, objects = [], []

    def compile_later(source: str, name: str, extra: list[str]) -> None:
        objects.append(str(folder / f"{name}.o"))
        commands.append([*compiler(flags), *extra, "-c", source, "-o", objects[-1]])

    for kernels, source in KERNELS.items():  # first: they take the longest
        for name, extra in INSTRUCTION_SETS.items():
            compile_later(source, f"{kernels}_{name}", [*KERNEL_FLAGS, *extra, f"-DLYNX_KERNELS={kernels}_{name}"])
    for source in sources:
        compile_later(
            source, "_".join(Path(source).with_suffix("").parts), [*SOURCE_FLAGS, f"-DLYNX_INSTRUCTION_SETS={sets}"]
        )
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(subprocess.check_call, commands))
    return objects


class Build(build_ext):
    """Compiles the host's kernels once per instruction set, and goes on without the module where that fails."""

    def build_extension(self, ext: Extension) -> None:
        if ext.name == CUDA:
            builder = _cuda_builder()
            builder.build(Path(self.get_ext_fullpath(ext.name)), builder.find_tools())
            return
        try:
            self._build(ext)
        except (OSError, subprocess.CalledProcessError) as error:
            self.warn(
                f"{ext.name} is not built, and its operations will run in plain PyTorch: {error}. "
                "It needs a C++17 compiler with OpenMP (GCC 12 or newer) as `c++`, or named by CXX."
            )

    def _build(self, ext: Extension) -> None:
        import pybind11

        includes = [f"-isystem{folder}" for folder in (pybind11.get_include(), *self.compiler.include_dirs)]
        objects = compile_all([*BINDINGS, *SOURCES], Path(self.build_temp), includes)
        result = Path(self.get_ext_fullpath(ext.name))
        result.parent.mkdir(parents=True, exist_ok=True)
        subprocess.check_call([*compiler([]), "-shared", *objects, "-o", str(result)])


class CarrySources(build_py):
    """Puts csrc into the package; a checkout that is installed as it stands has it beside the package."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            shutil.copytree("csrc", Path(self.build_lib, "lynx_kernels/csrc"), dirs_exist_ok=True)


def _cuda_builder():
    spec = importlib.util.spec_from_file_location("cuda_build", "lynx_kernels/backends/cuda_build.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


EXTENSIONS = [Extension("lynx_kernels._host", [*KERNELS.values(), *BINDINGS, *SOURCES])]
if os.environ.get("LYNX_CUDA") == "1":
    # No code of it depends on Python, and its name shall not either.
    EXTENSIONS.append(Extension(CUDA, [], py_limited_api=True))
if __name__ == "__main__":  # build backends run this file under that name; tests/csrc/fuzz.py imports it
    setup(ext_modules=EXTENSIONS, cmdclass={"build_ext": Build, "build_py": CarrySources})
