"""Builds the CUDA C++ of csrc into one library that torch loads.

``python -m lynx_kernels.backends.cuda_build`` does it here.

Only the standard library is needed: setup.py uses this file too, where neither torch nor lynx_kernels can be imported.
The code keeps to libtorch's stable ABI, so a library serves every torch from 2.11 on, a CPU build of it too.
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
LOG = "build.log"  # beside a library in the cache: what ninja, nvcc and ptxas said
SOURCES = (
    "common/torch_library.cu", "adapter/cuda/small_m.cu", "prefix_attention_decode/cuda/decode.cu",
    "pack_embeddings/cuda/embeddings.cu", "pack_frames/cuda/frames.cu",
)  # fmt: skip
# What 9.0 and 10.0 have beyond the common instructions needs the "a"; the code of 8.0 also runs on 8.6 to 8.9.
_ARCHS = ("80", "90a", "100a")
_OTHERS = "compute_80"  # what the driver of any other GPU compiles for itself
_DEFAULT_HOME = "/usr/local/cuda"
_OLDEST_TORCH = "0x020b000000000000ULL"
_FLAGS = (
    "-O3", "-std=c++17", "--threads=0", "-Xptxas=-v", "-Xcompiler=-fPIC,-fvisibility=hidden",
    f"-DTORCH_TARGET_VERSION={_OLDEST_TORCH}",
    *(f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in _ARCHS),
    f"-gencode=arch={_OTHERS},code={_OTHERS}",
)  # fmt: skip


class BuildError(RuntimeError):
    """There is no library, and the message says why."""


class MissingToolError(BuildError):
    """Nothing was tried: something to build with is not there."""


@dataclass(frozen=True)
class Tools:
    """What a build takes: two programs, torch's folder (headers, libraries), and csrc."""

    nvcc: Path
    ninja: Path
    torch: Path
    csrc: Path


def find_tools() -> Tools:
    """The tools of this machine.

    Raises:
        MissingToolError: one of them is missing; the message says which, and where it was looked for.
    """
    beside_python = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)] + [_DEFAULT_HOME]
    nvcc = shutil.which("nvcc", path=os.pathsep.join([*(f"{home}/bin" for home in homes), os.environ.get("PATH", "")]))
    if nvcc is None:
        raise MissingToolError(
            f"there is no nvcc in {', '.join(homes)} or on PATH: install the CUDA toolkit (12.8 or newer), or name its "
            "folder in CUDA_HOME"
        )
    ninja = shutil.which("ninja", path=beside_python)
    if ninja is None:
        raise MissingToolError("there is no ninja on PATH: pip install ninja")
    torch = importlib.util.find_spec("torch")
    if torch is None or torch.origin is None:
        raise MissingToolError("torch cannot be imported: install it first, and pip with --no-build-isolation")
    return Tools(Path(nvcc), Path(ninja), Path(torch.origin).parent, find_sources())


def find_sources() -> Path:
    """The folder csrc: inside an installed package, or beside the package in a checkout."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "csrc", package.parent / "csrc"):
        if folder.is_dir():
            return folder
    raise MissingToolError(f"there is no folder csrc in {package} or beside it: install lynx-kernels again")


def build(target: Path, tools: Tools) -> str:
    """Compile everything into the library ``target``, in a folder of its own, and return what the compilers said.

    Raises:
        BuildError: the compiler failed; the message ends with what it said.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".building-") as folder:
        Path(folder, "build.ninja").write_text(_ninja_file(tools))
        command = [str(tools.ninja), "-C", folder, "-v"]
        result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if result.returncode != 0:
            said = "\n".join(result.stdout.splitlines()[-40:])
            raise BuildError(f"{shlex.join(command)} failed with exit status {result.returncode}:\n{said}")
        os.replace(Path(folder, NAME), target)  # at once: nobody finds half a library
    return result.stdout


def _ninja_file(tools: Tools) -> str:
    nvcc, csrc = shlex.quote(str(tools.nvcc)), shlex.quote(str(tools.csrc))
    include, libraries = (shlex.quote(str(tools.torch / folder)) for folder in ("include", "lib"))
    lines = [
        "rule compile",
        f"  command = {nvcc} {' '.join(_FLAGS)} -I{csrc} -isystem {include} -c $in -o $out",
        "rule link",
        f"  command = {nvcc} -shared --cudart=static $in -o $out -L{libraries} "
        "-Xlinker=--no-as-needed -ltorch_cpu -ltorch -ldl",
    ]
    objects = []
    for source in SOURCES:
        objects.append(f"{Path(source).stem}.o")
        path = str(tools.csrc / source).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")
        lines.append(f"build {objects[-1]}: compile {path}")
    lines.append(f"build {NAME}: link {' '.join(objects)}")
    return "\n".join(lines) + "\n"


def cached(tools: Tools) -> Path:
    """The library of these very sources, compiler and torch, built now if it was not yet.

    Of several processes one builds it. It lies in ``$LYNX_CACHE``, by default ``lynx_kernels`` in ``$XDG_CACHE_HOME``
    or ``~/.cache``.

    Raises:
        BuildError: the compiler failed, or the folder cannot be written to.
    """
    folder = cache_folder() / f"cuda-{_key(tools)}"
    target = folder / NAME

    def make() -> None:
        logging.getLogger("lynx_kernels").warning(
            "building the CUDA kernels with %s into %s: once, in about a minute", tools.nvcc, folder
        )
        said = build(target, tools)
        (folder / LOG).write_text(said)

    try:
        once(target, make)
    except OSError as error:
        raise BuildError(
            f"the library cannot be written to {folder} ({error}): name another folder in LYNX_CACHE"
        ) from None
    return target


def cache_folder() -> Path:
    """Where libraries built on first use are kept."""
    if named := os.environ.get("LYNX_CACHE"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lynx_kernels"


def once(target: Path, make: Callable[[], None]) -> None:
    """Run ``make`` unless ``target`` exists; other processes that want it meanwhile wait, and find it."""
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with _locked(target.with_suffix(".lock")):
        if not target.exists():
            make()


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # released with the file, also by a process that is killed
        yield


def _key(tools: Tools) -> str:
    version = subprocess.run([tools.nvcc, "--version"], capture_output=True, text=True).stdout
    digest = hashlib.sha256(f"{version}{importlib.metadata.version('torch')}{_ninja_file(tools)}".encode())
    for path in sorted(tools.csrc.rglob("*")):
        if path.suffix in (".h", ".cu"):
            digest.update(str(path.relative_to(tools.csrc)).encode() + path.read_bytes())
    return digest.hexdigest()[:16]


if __name__ == "__main__":
    try:
        print(cached(find_tools()))
    except BuildError as error:
        sys.exit(str(error))
