"""Build the CUDA C++ of csrc into one library that torch loads. This happens only on request.

There are three ways to request it: ``LYNX_CUDA=1`` when the package is installed, ``LYNX_CUDA=1`` when a program runs,
and ``python -m lynx_kernels.backends.cuda_build``, which builds into the cache that the second way uses.

The first line of every .cu file names the GPUs it is compiled for, for example ``// architectures: sm_80 sm_90``. Code
for sm_90 and sm_100 may use instructions that only these have (nvcc's sm_90a and sm_100a). If a file names sm_80, its
PTX is included too. The driver compiles the PTX on GPUs for which there is no code.

This file imports only the standard library, because setup.py uses it before torch and lynx_kernels can be imported.
The kernels use libtorch's stable ABI. One library works with every torch from 2.11 on, and with CPU builds of torch.
"""

import contextlib
import fcntl
import hashlib
import importlib.metadata
import importlib.util
import logging
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

NAME = "_cuda.so"
LOG = "build.log"  # the output of ninja, nvcc and ptxas, beside a library in the cache
_SOURCES = ("*/cuda/*.cu", "common/*.cu")  # in csrc
_FIRST_LINE = "// architectures:"
# The code that nvcc generates for each architecture. Code for 8.0 also runs on 8.6 to 8.9.
_CODE = {
    "sm_80": ("arch=compute_80,code=sm_80", "arch=compute_80,code=compute_80"),
    "sm_90": ("arch=compute_90a,code=sm_90a",),
    "sm_100": ("arch=compute_100a,code=sm_100a",),
}
_DEFAULT_HOME = "/usr/local/cuda"
_OLDEST_TORCH = "0x020b000000000000ULL"
_FLAGS = (
    "-O3", "-std=c++17", "--threads=0", "-Xptxas=-v", "-Xcompiler=-fPIC,-fvisibility=hidden",
    f"-DTORCH_TARGET_VERSION={_OLDEST_TORCH}",
)  # fmt: skip


class BuildError(RuntimeError):
    """The library was not built. The message says why, and what to do."""


class MissingToolError(BuildError):
    """A build tool is missing, so no build was tried."""


@dataclass(frozen=True)
class Tools:
    """What a build needs: two programs, torch's folder with headers and libraries, and csrc."""

    nvcc: Path
    ninja: Path
    torch: Path
    csrc: Path


def find_tools() -> Tools:
    """Find the build tools of this machine.

    Raises:
        MissingToolError: a tool is missing. The message says which one and where it was searched.
    """
    beside_python = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)] + [_DEFAULT_HOME]
    nvcc = shutil.which("nvcc", path=os.pathsep.join([*(f"{home}/bin" for home in homes), os.environ.get("PATH", "")]))
    if nvcc is None:
        raise MissingToolError(
            f"nvcc was not found in {', '.join(homes)} or on PATH: install the CUDA toolkit (12.8 or newer), or set "
            "CUDA_HOME to its folder"
        )
    ninja = shutil.which("ninja", path=beside_python)
    if ninja is None:
        raise MissingToolError("ninja was not found on PATH: run pip install ninja")
    torch = importlib.util.find_spec("torch")
    if torch is None or torch.origin is None:
        raise MissingToolError("torch was not found: install it first, then run pip with --no-build-isolation")
    return Tools(Path(nvcc), Path(ninja), Path(torch.origin).parent, find_csrc())


def find_csrc() -> Path:
    """Return the folder csrc: inside an installed package, or beside the package in a checkout.

    Raises:
        MissingToolError: it is in neither place.
    """
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "csrc", package.parent / "csrc"):
        if folder.is_dir():
            return folder
    raise MissingToolError(f"the folder csrc is neither in {package} nor beside it: install lynx-kernels again")


def sources(csrc: Path) -> list[Path]:
    """The .cu files of the library."""
    return sorted(path for pattern in _SOURCES for path in csrc.glob(pattern))


def architectures(source: Path) -> tuple[str, ...]:
    """The architectures in the first line of a .cu file: a subset of "sm_80", "sm_90" and "sm_100".

    Raises:
        BuildError: the first line names no architecture, or an unknown one.
    """
    with source.open() as file:
        line = file.readline().rstrip("\n")
    example = f"write `{_FIRST_LINE} ` and some of {', '.join(_CODE)}"
    if not line.startswith(_FIRST_LINE):
        raise BuildError(f"the first line of {source} does not name its architectures: {example} in front of it")
    names = tuple(line.removeprefix(_FIRST_LINE).split())
    if unknown := [name for name in names if name not in _CODE]:
        raise BuildError(f"the first line of {source} names an unknown architecture, {unknown[0]}: {example}")
    if not names:
        raise BuildError(f"the first line of {source} names no architecture: {example}")
    return names


def build(target: Path, tools: Tools) -> str:
    """Compile everything into the library ``target``, in a temporary folder. Return the output of the compilers.

    Raises:
        BuildError: the compiler failed, and the message ends with its output; or a source does not name its
            architectures.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".building-") as folder:
        Path(folder, "build.ninja").write_text(_ninja_file(tools))
        command = [str(tools.ninja), "-C", folder, "-v"]
        result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if result.returncode != 0:
            output = "\n".join(result.stdout.splitlines()[-40:])
            raise BuildError(f"{shlex.join(command)} failed with exit status {result.returncode}:\n{output}")
        os.replace(Path(folder, NAME), target)  # atomic: no process loads an incomplete library
    return result.stdout


def _ninja_file(tools: Tools) -> str:
    nvcc, csrc = shlex.quote(str(tools.nvcc)), shlex.quote(str(tools.csrc))
    include, libraries = (shlex.quote(str(tools.torch / folder)) for folder in ("include", "lib"))
    lines = [
        "rule compile",
        f"  command = {nvcc} {' '.join(_FLAGS)} $code -I{csrc} -isystem {include} -c $in -o $out",
        "rule link",
        f"  command = {nvcc} -shared --no-device-link --cudart=static $in -o $out -L{libraries} "
        "-Xlinker=--no-as-needed -ltorch_cpu -ltorch -ldl",
    ]
    objects = []
    for source in sources(tools.csrc):
        objects.append(object_name(tools.csrc, source))
        path = str(source).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")
        code = " ".join(f"-gencode={each}" for name in architectures(source) for each in _CODE[name])
        lines += [f"build {objects[-1]}: compile {path}", f"  code = {code}"]
    lines.append(f"build {NAME}: link {' '.join(objects)}")
    return "\n".join(lines) + "\n"


def object_name(csrc: Path, source: Path) -> str:
    """The name of a source's object file. No other source has the same."""
    return "_".join(source.relative_to(csrc).with_suffix(".o").parts)


def cached(tools: Tools) -> Path:
    """Return the library for exactly these sources, compiler and torch. Build it first if it is not in the cache.

    Of several processes one builds it and the others wait. The cache is ``cache_folder()``.

    Raises:
        BuildError: as in ``build``, or the folder cannot be written to.
    """
    folder = cache_folder() / f"cuda-{_key(tools)}"
    target = folder / NAME

    def make() -> None:
        logging.getLogger("lynx_kernels").warning(
            "building the CUDA kernels with %s into %s; this happens once and takes minutes", tools.nvcc, folder
        )
        (folder / LOG).write_text(build(target, tools))

    try:
        once(target, make)
    except OSError as error:
        raise BuildError(
            f"the library cannot be written to {folder} ({error}): set LYNX_CACHE to another folder"
        ) from None
    return target


def cache_folder() -> Path:
    """The folder for libraries and launch plans made at run time: ``$LYNX_CACHE``; by default ``lynx_kernels`` in
    ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    if folder := os.environ.get("LYNX_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lynx_kernels"


def once(target: Path, make: Callable[[], None]) -> None:
    """Run ``make`` unless ``target`` exists. Other processes that need ``target`` wait until it is made."""
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with _locked(target.with_suffix(".lock")):
        if not target.exists():
            make()


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # released when the file is closed, also if the process is killed
        yield


def _key(tools: Tools) -> str:
    version = subprocess.run([tools.nvcc, "--version"], capture_output=True, text=True).stdout
    commands = _ninja_file(tools).replace(str(tools.csrc), "csrc")  # wherever the sources lie
    digest = hashlib.sha256(f"{version}{importlib.metadata.version('torch')}{commands}".encode())
    for path in sorted(tools.csrc.rglob("*")):
        if path.suffix in (".h", ".cu"):
            digest.update(str(path.relative_to(tools.csrc)).encode() + path.read_bytes())
    return digest.hexdigest()[:16]


if __name__ == "__main__":
    try:
        print(cached(find_tools()))
    except BuildError as error:
        sys.exit(str(error))
