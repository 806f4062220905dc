"""Building the CUDA kernels, with a program in the place of nvcc: when, for which GPUs, and what can fail."""

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from lynx_kernels.backends import cuda_build
from lynx_kernels.backends.cuda_build import NAME, BuildError, MissingToolError, cached, find_tools

ROOT = Path(__file__).parents[2]
# Notes every compilation and its flags in $CALLS, and writes something, slowly.
WORKING = """#!/bin/sh
[ "$1" = --version ] && echo 1.0 && exit
echo "$@" >> "$CALLS"
while [ "$1" != -o ]; do shift; done
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
    return tmp_path


def install_nvcc(home, script):
    program = home / "bin/nvcc"
    program.write_text(script)
    program.chmod(0o755)


def calls(home):
    """What nvcc was called with, a call a line."""
    return Path(home, "calls").read_text().splitlines() if Path(home, "calls").exists() else []


def copied_csrc(home):
    return Path(shutil.copytree(cuda_build.find_csrc(), home / "copy/csrc"))


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
    with pytest.raises(MissingToolError, match=f"nvcc was not found in {home}.* install the CUDA toolkit"):
        find_tools()


def test_without_ninja(home, monkeypatch):
    install_nvcc(home, WORKING)
    programs_without("ninja", home, monkeypatch)
    with pytest.raises(MissingToolError, match="ninja was not found on PATH: run pip install ninja"):
        find_tools()


def test_without_torch_or_sources(home, monkeypatch):
    install_nvcc(home, WORKING)
    monkeypatch.setattr(cuda_build, "__file__", str(home / "lynx_kernels/backends/cuda_build.py"))
    with pytest.raises(MissingToolError, match="the folder csrc is neither in"):
        cuda_build.find_csrc()
    monkeypatch.setattr(cuda_build.importlib.util, "find_spec", lambda name: None)
    if shutil.which("ninja"):
        with pytest.raises(MissingToolError, match="torch was not found: install it first"):
            find_tools()


@needs_ninja
def test_a_compiler_that_fails(home):
    """The error has what the compiler said, and nothing is left behind."""
    install_nvcc(home, FAILING)
    with pytest.raises(BuildError, match=r"(?s)ninja.* failed with exit status.*rows.h\(7\): error: expected a ;"):
        cached(find_tools())
    assert not [*Path(home, "cache").rglob("*.so"), *Path(home, "cache").rglob("*.o")]


@needs_ninja
def test_built_once_by_several_processes(home):
    install_nvcc(home, WORKING)
    command = [sys.executable, str(ROOT / "lynx_kernels/backends/cuda_build.py")]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    results = [process.communicate(timeout=60) for process in processes]
    paths = {Path(out.strip()) for out, _ in results}
    assert paths == {cached(find_tools())}
    assert paths.pop().read_text() == "library\n"
    csrc = cuda_build.find_csrc()
    assert len(calls(home)) == len(cuda_build.sources(csrc)) + 1  # and a link
    assert sum("building the CUDA kernels with" in error for _, error in results) == 1


@needs_ninja
def test_sources_and_compiler_are_part_of_the_key(home):
    """Where the sources lie is not."""
    install_nvcc(home, WORKING)
    tools = find_tools()
    copy = replace(tools, csrc=copied_csrc(home))
    first = cached(tools)
    assert cached(copy) == first
    (copy.csrc / "common/numbers.h").write_text("// changed")
    second = cached(copy)
    install_nvcc(home, WORKING.replace("1.0", "1.1"))
    assert len({first, second, cached(tools)}) == 3


@needs_ninja
def test_a_folder_that_cannot_be_written_to(home, monkeypatch):
    install_nvcc(home, WORKING)
    Path(home, "file").write_text("")
    monkeypatch.setenv("LYNX_CACHE", str(home / "file"))
    with pytest.raises(BuildError, match=r"cannot be written to .*: set LYNX_CACHE to another folder"):
        cached(find_tools())


@needs_ninja
def test_files_are_compiled_for_the_architectures_they_name(home):
    """A file of one operation has the name of another's, and an architecture of its own."""
    install_nvcc(home, WORKING)
    csrc = copied_csrc(home)
    added = csrc / "new_operation/cuda/small_m.cu"
    added.parent.mkdir(parents=True)
    added.write_text("// architectures: sm_90\n")
    cuda_build.build(home / NAME, replace(find_tools(), csrc=csrc))
    *compiled, link = calls(home)
    codes = {
        call.split()[call.split().index("-c") + 1]: [word for word in call.split() if word.startswith("-gencode")]
        for call in compiled
    }
    assert codes.pop(str(added)) == ["-gencode=arch=compute_90a,code=sm_90a"]
    everything = ["80,code=sm_80", "80,code=compute_80", "90a,code=sm_90a", "100a,code=sm_100a"]
    assert set(codes) == {str(path) for path in csrc.rglob("*.cu") if path != added}
    assert all(code == [f"-gencode=arch=compute_{each}" for each in everything] for code in codes.values())
    assert {"new_operation_cuda_small_m.o", "adapter_cuda_small_m.o"} <= set(link.split())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("#pragma once", "does not name its architectures: write `// architectures: ` and some of sm_80, sm_90, sm_1"),
        ("", "does not name its architectures"),
        ("// architectures:", "names no architecture"),
        ("// architectures: sm_80 sm_70", "names an unknown architecture, sm_70: write"),
        ("// architectures: sm_80, sm_90", "names an unknown architecture, sm_80,: write"),
    ],
)
def test_files_without_known_architectures(line, message, home):
    install_nvcc(home, WORKING)
    csrc = copied_csrc(home)
    source = csrc / "pack_frames/cuda/frames.cu"
    source.write_text(f"{line}\n{source.read_text()}" if line else "")
    with pytest.raises(BuildError, match=f"the first line of {source} {message}"):
        cuda_build.architectures(source)
    if shutil.which("ninja"):
        with pytest.raises(BuildError, match=f"the first line of {source}"):
            cuda_build.build(home / NAME, replace(find_tools(), csrc=csrc))
    assert not calls(home)


def run_python(code, **environment):
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True)


@needs_ninja
def test_importing_builds_only_when_it_is_asked_to(home):
    """Whatever the tools: not without LYNX_CUDA=1, and with it once."""
    install_nvcc(home, WORKING)
    code = "import lynx_kernels.backends.cuda as cuda; print(cuda.MISSING)"
    for environment in ({}, {"LYNX_CUDA": "0"}):
        result = run_python(code, **environment)
        assert "LYNX_CUDA=1" in result.stdout, result.stderr
        assert not calls(home)
    for _ in range(2):
        result = run_python(code, LYNX_CUDA="1")
        assert "cannot be loaded" in result.stdout, result.stderr  # what the program writes is no library
        assert len(calls(home)) == len(cuda_build.sources(cuda_build.find_csrc())) + 1


@needs_ninja
def test_importing_says_why_a_build_failed(home):
    install_nvcc(home, FAILING)
    result = run_python("import lynx_kernels", LYNX_CUDA="1")
    assert result.returncode != 0
    assert "expected a ;" in result.stderr


def test_collecting_these_tests_builds_nothing(home):
    install_nvcc(home, WORKING)
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", "tests/cuda"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "test_library" in result.stdout
    assert not calls(home)


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
