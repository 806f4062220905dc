"""What importing lynx_kernels costs, and what can be imported by its path."""

import importlib
import subprocess
import sys

import pytest

HEAVY = ("triton", "torch._dynamo", "torch._inductor", "transformers", "lynx")


def test_nothing_heavy_is_imported():
    code = f"""
import sys, torch
before = set(sys.modules)
import lynx_kernels
print([name for name in {HEAVY!r} if name in set(sys.modules) - before])
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "name",
    ["adapter", "cross_attention", "linear_cross_entropy", "pack_embeddings", "pack_frames", "prefix_attention"],
)
def test_an_operation_is_a_room_of_its_name(name):
    """The package has the function; the rooms, reference among them, lie under ops."""
    package = importlib.import_module("lynx_kernels")
    room = importlib.import_module(f"lynx_kernels.ops.{name}")
    assert getattr(package, name) is getattr(room, name)
    assert importlib.import_module(f"lynx_kernels.ops.{name}.reference").forward
    assert importlib.import_module(f"lynx_kernels.ops.{name}.call")
    namespace = {}
    exec(f"import lynx_kernels.ops.{name}.reference as found", namespace)
    assert namespace["found"].forward
