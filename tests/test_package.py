"""The package as a stranger gets it: built, and installed where nothing is but its base dependencies.

Nothing is downloaded: torch, triton and numpy are links to those of the environment that runs the tests.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

import lynx_kernels

ROOT = Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
SOURCES = (
    "csrc", "lynx", "lynx_kernels", "pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md",
    "CONTRIBUTING.md", "constraints.txt",
)  # fmt: skip
USE = """
import json
import torch
import lynx_kernels
from lynx_kernels import PackedLayout, explain, prefix_attention

layout = PackedLayout.from_prefixes([5, 3], [4, 2])
q, k, v = torch.randn(3, layout.num_tokens, 4, 16).requires_grad_()
out = prefix_attention(q, k, v, layout)
torch.testing.assert_close(out, prefix_attention(q, k, v, layout, impl="reference"))
out.sum().backward()
try:
    import lynx
except ImportError as error:
    refused = str(error)
explained = str(explain(prefix_attention, q, k, v, layout))
print(json.dumps({"file": lynx_kernels.__file__, "explained": explained, "refused": refused}))
"""


def closure(requirements):
    """The distributions that these requirements need here, themselves included, by name."""
    found, waiting = {}, list(requirements)
    while waiting:
        requirement = Requirement(waiting.pop())
        if requirement.name in found or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        try:
            found[requirement.name] = distribution(requirement.name)
        except PackageNotFoundError:
            continue  # of no use here, or pip will say so
        waiting += found[requirement.name].requires or []
    return found.values()


def environment(folder, requirements):
    """The Python of a new virtual environment that has what the requirements need, and nothing else; not even pip."""
    venv.create(folder, symlinks=True)
    [target] = (folder / "lib").glob("python*/site-packages")
    for each in closure(requirements):
        for name in {path.parts[0] for path in each.files or ()} - {"..", "__pycache__"}:
            if not (target / name).exists():
                (target / name).symlink_to(each.locate_file(name))
    return folder / "bin/python"


def run(*command, cwd=None, **variables):
    """The output; only these variables and those that no build or import depends on."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR", "LD_LIBRARY_PATH") if name in os.environ}
    result = subprocess.run(command, cwd=cwd, env={**kept, **variables}, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


def pip(*arguments, python=sys.executable, **variables):
    command = [sys.executable, "-m", "pip", "--python", str(python), *arguments]
    return run(*command, PIP_NO_INDEX="1", PIP_DISABLE_PIP_VERSION_CHECK="1", **variables)


def used(python, folder):
    """What an operation said that ran there, where no compiler is on PATH."""
    output = run(str(python), "-I", "-c", USE, cwd=folder, PATH="", CXX="false")
    [said] = [line for line in output.splitlines() if line.startswith("{")]  # warnings stand beside it
    return json.loads(said)


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """An archive of the sources, from a copy that has no compiled module and no build folder."""
    checkout = tmp_path_factory.mktemp("checkout")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        else:
            shutil.copy(ROOT / name, checkout)
    run(sys.executable, "-c", "from setuptools import build_meta; build_meta.build_sdist('dist')", cwd=checkout)
    [path] = (checkout / "dist").iterdir()
    return path


def test_a_wheel_runs_where_there_is_no_compiler(sdist, tmp_path):
    """Built from the archive, so that this is known to be complete."""
    arguments = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path), str(sdist)]
    pip(*arguments, CXXFLAGS="-O0")  # optimizing takes minutes
    [wheel] = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"lynx", "lynx_kernels"}
    compiled = [name for name in names if name.endswith(".so")]
    assert [Path(name).name.split(".")[0] for name in compiled] == ["_host"], "the C++ did not compile"
    expected = {"lynx/py.typed", "lynx_kernels/py.typed", "lynx/data/prompts.yaml", "lynx/train/recipes/tiny.yaml"}
    assert expected < {*names}
    assert any(name.startswith("lynx_kernels/csrc/") and name.endswith(".cu") for name in names)

    python = environment(tmp_path / "environment", PROJECT["dependencies"])
    pip("install", str(wheel), python=python, CXX="false")
    found = used(python, tmp_path)
    assert found["file"].startswith(str(tmp_path))
    assert found["explained"].splitlines()[0] == "cpu"
    assert "pip install 'lynx-kernels[lynx]'" in found["refused"]
    assert "transformers" in found["refused"]


def test_without_a_compiler_an_archive_is_plain_python(sdist, tmp_path):
    """It installs, an operation runs, and both say what is lacking."""
    python = environment(tmp_path / "environment", [*PROJECT["dependencies"], *PYPROJECT["build-system"]["requires"]])
    said = pip("install", "--verbose", "--no-build-isolation", str(sdist), python=python, CXX="false")
    assert "lynx_kernels._host is not built" in said
    assert "needs a C++17 compiler" in said
    explained = used(python, tmp_path)["explained"]
    assert explained.splitlines()[0] == "reference"
    failed = r"not cpu: the compiled module is missing: its build failed \(false ended with status 1: it said nothing\)"
    assert re.search(rf"{failed}; install a C\+\+17 compiler", explained)


def test_the_version_stands_in_one_place():
    assert PROJECT["dynamic"] == ["version"]
    assert PYPROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "lynx_kernels.__version__"}
    assert re.fullmatch(r"\d+\.\d+\.\d+", lynx_kernels.__version__)


def test_extras_that_texts_name_exist():
    files = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("lynx*/**/*.py")]
    named = {extra for path in files for extra in re.findall(r"(?:lynx-kernels|'\.)\[([\w,]+)\]", path.read_text())}
    assert {"lynx", "all", "demo", "video"} <= named
    assert {each for extra in named for each in extra.split(",")} <= PROJECT["optional-dependencies"].keys()


def test_workflows_cover_the_pythons_that_we_claim():
    claimed = [each.rpartition(" ")[2] for each in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", each)]
    assert f">={claimed[0]}" == PROJECT["requires-python"]
    built = PYPROJECT["tool"]["cibuildwheel"]["build"].split()
    assert built == [f"cp{each.replace('.', '')}-manylinux_x86_64" for each in claimed]
    workflows = {path.stem: yaml.safe_load(path.read_text()) for path in ROOT.glob(".github/workflows/*.yml")}
    assert workflows.keys() == {"tests", "wheels"}
    assert workflows["tests"]["jobs"]["tests"]["strategy"]["matrix"]["python"] == claimed
    for workflow in workflows.values():
        for job in workflow["jobs"].values():
            for step in job["steps"]:
                assert "uses" not in step or re.search(r"@v\d+(\.\d+)?$", step["uses"]), step
