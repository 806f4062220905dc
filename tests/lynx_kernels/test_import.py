"""Importing lynx_kernels loads nothing slow, and every operation can be imported by its path."""

import importlib
import subprocess
import sys

import pytest

SLOW = ("triton", "torch._dynamo", "torch._inductor", "transformers", "lynx")


def test_import_loads_no_slow_module():
    code = f"""
import sys, torch
before = set(sys.modules)
import lynx_kernels
print([name for name in {SLOW!r} if name in set(sys.modules) - before])
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "name",
    [
        "adapter", "cross_attention", "linear_cross_entropy", "pack_embeddings", "pack_frames", "prefix_attention",
        "token_log_probs",
    ],
)  # fmt: skip
def test_operation_has_a_folder_of_its_name(name):
    """``lynx_kernels`` exports the function. Its folder, with reference and call, is under ``ops``."""
    package = importlib.import_module("lynx_kernels")
    folder = importlib.import_module(f"lynx_kernels.ops.{name}")
    assert getattr(package, name) is getattr(folder, name)
    assert importlib.import_module(f"lynx_kernels.ops.{name}.reference").forward
    assert importlib.import_module(f"lynx_kernels.ops.{name}.call")
    namespace = {}
    exec(f"import lynx_kernels.ops.{name}.reference as found", namespace)
    assert namespace["found"].forward
