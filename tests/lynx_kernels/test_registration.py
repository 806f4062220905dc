"""A call bypasses the dispatcher only where nothing needs to see the operator."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from lynx_kernels import adapter
from tests.lynx_kernels.test_adapter import make


class Operators(TorchDispatchMode):
    """Records the operators that run inside."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.fixture
def direct(monkeypatch):
    """A function that runs ``call`` and returns whether it bypassed the operator."""
    operator = torch.ops.lynx_kernels.adapter.default
    calls = []
    monkeypatch.setattr(type(operator), "__call__", _counting(type(operator).__call__, operator, calls))

    def ask(call):
        calls.clear()
        call()
        return not calls

    return ask


def _counting(original, operator, calls):
    def call(self, *args, **kwargs):
        if self is operator:
            calls.append(self)
        return original(self, *args, **kwargs)

    return call


def test_inference_bypasses_the_operator(direct):
    inputs, _ = make(dtype=torch.float32)
    assert direct(lambda: adapter(*inputs))
    inputs[0].requires_grad_()
    assert not direct(lambda: adapter(*inputs))
    with torch.no_grad():
        assert direct(lambda: adapter(*inputs))


def test_dispatch_modes_and_autocast_see_the_operator(direct):
    inputs, _ = make(dtype=torch.float32)
    with Operators() as seen:
        adapter(*inputs)
    assert "lynx_kernels::adapter" in seen.names
    with torch.autocast("cpu", torch.bfloat16):
        assert not direct(lambda: adapter(*inputs))
    with FakeTensorMode() as fake:
        fakes = [fake.from_tensor(each) for each in inputs]
    assert not direct(lambda: adapter(*fakes, impl="reference"))


def test_bypassing_gives_the_same_result():
    inputs, _ = make(dtype=torch.float32)
    expected = adapter(*inputs[:-1], inputs[-1].clone().requires_grad_())
    torch.testing.assert_close(adapter(*inputs), expected, rtol=0, atol=0)


def test_a_profiler_sees_the_operator(direct):
    inputs, _ = make(dtype=torch.float32)
    with torch.no_grad(), torch.profiler.profile() as profile:
        adapter(*inputs)
    assert "lynx_kernels::adapter" in {event.key for event in profile.key_averages()}
    assert direct(lambda: adapter(*inputs))  # the profiler has stopped
