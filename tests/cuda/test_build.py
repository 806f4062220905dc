"""Building the CUDA kernels, with a program in the place of nvcc: what is missing, what fails, who builds."""

import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lynx_kernels.backends import cuda as cuda_backend
from lynx_kernels.backends import cuda_build
from lynx_kernels.backends.cuda_build import NAME, SOURCES, BuildError, MissingToolError, cached, find_tools

ROOT = Path(__file__).parents[2]
# Notes every compilation in $CALLS, and writes what it was asked for, slowly.
WORKING = """#!/bin/sh
[ "$1" = --version ] && echo 1.0 && exit
while [ "$1" != -o ]; do shift; done
echo "$2" >> "$CALLS"
sleep 0.2
echo library > "$2"
"""
FAILING = """#!/bin/sh
echo "rows.h(7): error: expected a ;"
exit 2
"""
needs_ninja = pytest.mark.skipif(shutil.which("ninja") is None, reason="there is no ninja on PATH")


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty CUDA_HOME, the only one, and a cache of its own."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setattr(cuda_build, "_DEFAULT_HOME", str(tmp_path))
    monkeypatch.setenv("LYNX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    monkeypatch.delenv("LYNX_CUDA", raising=False)
    monkeypatch.setattr(cuda_backend, "_PACKAGE", tmp_path)
    monkeypatch.setattr(cuda_backend, "_load", functools.cache(cuda_backend._load.__wrapped__))
    return tmp_path


def install_nvcc(home, script):
    program = home / "bin/nvcc"
    program.write_text(script)
    program.chmod(0o755)


def programs_without(name, tmp_path, monkeypatch):
    """A PATH on which everything is as it was, but for one program."""
    folder = tmp_path / "path"
    folder.mkdir()
    for directory in os.environ["PATH"].split(os.pathsep):
        for program in Path(directory).glob("*") if directory else ():
            if program.name != name and not (folder / program.name).exists():
                (folder / program.name).symlink_to(program)
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setattr(sys, "executable", str(folder / "python"))


def test_without_nvcc(home, monkeypatch):
    programs_without("nvcc", home, monkeypatch)
    with pytest.raises(MissingToolError, match=f"there is no nvcc in {home}.* install the CUDA toolkit"):
        find_tools()
    assert cuda_backend.library_missing_reason().startswith(
        "the CUDA kernels are not built, and cannot be here: there is no nvcc"
    )


def test_without_ninja(home, monkeypatch):
    install_nvcc(home, WORKING)
    programs_without("ninja", home, monkeypatch)
    with pytest.raises(MissingToolError, match="there is no ninja on PATH: pip install ninja"):
        find_tools()


def test_without_torch_or_sources(home, monkeypatch):
    install_nvcc(home, WORKING)
    monkeypatch.setattr(cuda_build, "__file__", str(home / "lynx_kernels/backends/cuda_build.py"))
    with pytest.raises(MissingToolError, match="there is no folder csrc in"):
        cuda_build.find_sources()
    monkeypatch.setattr(cuda_build.importlib.util, "find_spec", lambda name: None)
    if shutil.which("ninja"):
        with pytest.raises(MissingToolError, match="torch cannot be imported"):
            find_tools()


@needs_ninja
def test_a_compiler_that_fails(home):
    """The error has what the compiler said; asked through the dispatcher, it is a warning and the reason."""
    install_nvcc(home, FAILING)
    with pytest.raises(BuildError, match=r"(?s)ninja.* failed with exit status.*rows.h\(7\): error: expected a ;"):
        cached(find_tools())
    with pytest.warns(UserWarning, match="Other implementations run in their place"):
        why = cuda_backend.library_missing_reason()
    assert why.startswith("the CUDA kernels cannot be built:")
    assert "expected a ;" in why
    assert cuda_backend.library_missing_reason() == why  # tried once, and warned of once
    assert not list((home / "cache").rglob("*.so")) + list((home / "cache").rglob("*.o"))


@needs_ninja
def test_built_once_by_several_processes(home):
    install_nvcc(home, WORKING)
    command = [sys.executable, str(ROOT / "lynx_kernels/backends/cuda_build.py")]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    results = [process.communicate(timeout=60) for process in processes]
    paths = {Path(out.strip()) for out, _ in results}
    assert paths == {cached(find_tools())}
    assert paths.pop().read_text() == "library\n"
    assert sorted(Path(home, "calls").read_text().split()) == sorted(
        [NAME, *(f"{Path(source).stem}.o" for source in SOURCES)]
    )
    assert sum("building the CUDA kernels with" in error for _, error in results) == 1


@needs_ninja
def test_sources_and_compiler_are_part_of_the_key(home, tmp_path):
    install_nvcc(home, WORKING)
    tools = find_tools()
    first = cached(tools)
    csrc = Path(shutil.copytree(tools.csrc, tmp_path / "other/csrc"))
    (csrc / "common/numbers.h").write_text("// changed")
    others = {cached(SimpleNamespace(**{**vars(tools), "csrc": csrc}))}
    install_nvcc(home, WORKING.replace("1.0", "1.1"))
    others.add(cached(tools))
    assert len({first, *others}) == 3


@needs_ninja
def test_a_folder_that_cannot_be_written_to(home, monkeypatch):
    install_nvcc(home, WORKING)
    Path(home, "file").write_text("")
    monkeypatch.setenv("LYNX_CACHE", str(home / "file"))
    with pytest.raises(BuildError, match=r"cannot be written to .*: name another folder in LYNX_CACHE"):
        cached(find_tools())


def test_building_can_be_forbidden(home, monkeypatch):
    install_nvcc(home, WORKING)
    monkeypatch.setenv("LYNX_CUDA", "0")
    assert (
        cuda_backend.library_missing_reason()
        == "the CUDA kernels are not built, and LYNX_CUDA=0 forbids to build them on first use"
    )
    assert not Path(home, "calls").exists()


def test_a_library_in_the_package_comes_first(home):
    install_nvcc(home, WORKING)
    (home / "_cuda.abi3.so").write_text("no library")
    with pytest.warns(UserWarning, match="cannot be loaded"):
        assert str(home / "_cuda.abi3.so") in cuda_backend.library_missing_reason()
    assert not Path(home, "calls").exists()


def test_refusals(home, monkeypatch):
    tensor = SimpleNamespace(device=torch.device("cuda", 0))
    monkeypatch.setattr(cuda_backend, "_load", lambda: "not built")
    assert cuda_backend.unsupported_reason(torch.ones(1)) == "CUDA kernels need a GPU, and the tensors are on cpu"
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "not built for any" in cuda_backend.unsupported_reason(tensor)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "compute capability 8.0" in cuda_backend.unsupported_reason(tensor)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert cuda_backend.unsupported_reason(tensor) == "not built"
    monkeypatch.setattr(cuda_backend, "_load", lambda: None)
    assert cuda_backend.unsupported_reason(tensor) is None


@pytest.mark.parametrize("why", [None, "not built"])
def test_compiled_functions_may_ask(why, home, monkeypatch):
    """Whatever loading takes, torch.compile does not trace it."""

    def load():
        subprocess.run(["true"], check=True)
        return why

    monkeypatch.setattr(cuda_backend, "_load", load)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x: x + (cuda_backend.library_missing_reason() is None), backend="eager", fullgraph=True
    )
    assert compiled(torch.zeros(())) == (why is None)


def test_every_source_is_compiled():
    csrc = cuda_build.find_sources()
    assert {str(path.relative_to(csrc)) for path in csrc.rglob("*.cu")} == set(SOURCES)


def run_setup(*arguments, **environment):
    command = [sys.executable, "setup.py", "--quiet", *arguments]
    environment = {**os.environ, "CXX": "false", **environment}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@needs_ninja
def test_installing(home):
    """The package carries csrc; with LYNX_CUDA=1 the library too, without it never (the host's compiler fails here)."""
    (home / "pybind11.py").write_text("def get_include(): return '.'")
    install_nvcc(home, WORKING)
    for wanted in ("1", "0"):
        target = home / f"package{wanted}"
        places = ["--build-lib", str(target), "--build-temp", str(home / "temporary")]
        result = run_setup("build", *places, PYTHONPATH=str(home), LYNX_CUDA=wanted)
        assert result.returncode == 0, result.stderr
        built = [path.name for path in (target / "lynx_kernels").glob("_*.so")]
        assert built == (["_cuda.abi3.so"] if wanted == "1" else [])
        assert (target / "lynx_kernels/csrc/pack_embeddings/cuda/embeddings.cu").exists()
    install_nvcc(home, FAILING)
    result = run_setup("build_ext", *places, PYTHONPATH=str(home), LYNX_CUDA="1")
    assert result.returncode != 0
    assert "expected a ;" in result.stderr
