"""Which implementation runs: by architecture, by reason, by name; and what ``explain`` reports."""

from functools import partial
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from lynx_kernels import adapter, explain, pack_frames, prefix_attention
from lynx_kernels.backends import dispatch
from lynx_kernels.backends.dispatch import Implementation, Operation
from tests.lynx_kernels.test_adapter import make


class Call(NamedTuple):
    x: Tensor

    @property
    def device(self):
        return self.x.device


def operation(**reasons):
    """An operation with three implementations: for sm_90 only, for CPUs only, for every device."""
    return Operation(
        "made_up",
        Call,
        None,
        Implementation("hopper", lambda call: "hopper", architectures=("sm_90",)),
        Implementation("cpu", lambda call: "cpu", architectures=("cpu",), **reasons),
        Implementation("plain", lambda call: "plain"),
    )


CALL = Call(torch.zeros(3))


@pytest.mark.parametrize(("found", "expected"), [("cpu", "cpu"), ("sm_90", "hopper"), ("sm_80", "plain")])
def test_first_implementation_of_the_architecture_runs(monkeypatch, found, expected):
    monkeypatch.setattr(dispatch, "architecture", lambda device: found)
    table = operation()
    assert table.choose(None, CALL) == table.explain(None, CALL).name == expected
    assert table.forward(*CALL, expected) == expected


def test_reasons():
    table = operation(not_preferred_reason=lambda call: "it is slow")
    assert str(table.explain(None, CALL)) == (
        "plain\n  not hopper: it is written for sm_90, and the tensors are on cpu\n  not cpu: it is slow"
    )
    assert table.choose("cpu", CALL) == table.explain("cpu", CALL).name == "cpu"  # runs when named
    table = operation(unsupported_reason=lambda call: "it cannot")
    assert table.explain("cpu", CALL).name is None
    with pytest.raises(RuntimeError, match="made_up: impl='cpu' cannot run this call: it cannot"):
        table.choose("cpu", CALL)
    for ask in (table.choose, table.explain):
        with pytest.raises(ValueError, match=r"impl='fast' is not an implementation; choose one of .*'hopper'"):
            ask("fast", CALL)


def test_no_implementation_can_run():
    table = Operation("made_up", Call, None, Implementation("hopper", print, architectures=("sm_90",)))
    assert table.explain(None, CALL).name is None
    with pytest.raises(RuntimeError, match=r"no implementation can run this call: .*sm_90"):
        table.choose(None, CALL)


def test_architectures(monkeypatch):
    def on(**gpu):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: gpu.get("capability"))
        properties = SimpleNamespace(gcnArchName=gpu.get("name"))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        monkeypatch.setattr(torch.version, "hip", "7.0" if "name" in gpu else None)
        return dispatch.architecture(torch.device("cuda"))

    assert dispatch.architecture(torch.device("cpu")) == "cpu"
    assert dispatch.architecture(torch.device("meta")) == "meta"
    found = {each: on(capability=each) for each in [(7, 5), (8, 0), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0)]}
    assert list(found.values()) == ["sm_75", "sm_80", "sm_80", "sm_90", "sm_100", "sm_100", "sm_80"]
    assert on(name="gfx942:sramecc+:xnack-") == "gfx942"
    assert on(name="gfx1100") not in dispatch.GPUS


def test_explain_runs_nothing():
    ran = []
    for other in (lambda: ran.append(1), print, torch.nn.Linear(1, 1), [], None, partial(ran.append, 1)):
        with pytest.raises(TypeError, match="expected an operation of lynx_kernels"):
            explain(other)
    assert not ran
    inputs, _ = make(dtype=torch.float32)
    assert explain(partial(adapter, *inputs[:3]), *inputs[3:]).name == explain(adapter, *inputs).name == "cpu"
    assert explain(adapter, *inputs, impl="triton").name is None
    with pytest.raises(ValueError, match="impl='fast' is not an implementation"):
        explain(adapter, *inputs, impl="fast")
    with pytest.raises(TypeError, match="missing"):
        explain(adapter, inputs[0])
    with pytest.raises(ValueError, match="down_weight has shape"):
        explain(adapter, *inputs[:3], torch.zeros(5, 12), *inputs[4:])
    with pytest.raises(TypeError, match="layout is a NoneType, expected a PackedLayout"):
        explain(prefix_attention, *torch.zeros(3, 5, 2, 4), None)


def test_pack_frames_on_a_gpu_without_cuda_kernels_warns_once(monkeypatch):
    from lynx_kernels.ops import pack_frames as module

    monkeypatch.setattr(dispatch, "architecture", lambda device: "sm_90")
    module._warn_of_reference.cache_clear()
    options = {"size": 4, "patch_size": 2, "mean": (0.5,) * 3, "std": (0.5,) * 3}
    monkeypatch.setattr(module.cpu_backend, "MISSING", "set LYNX_CUDA=1")
    frame = torch.zeros(4, 4, 3, dtype=torch.uint8)
    with pytest.warns(UserWarning, match="pack_frames runs in plain PyTorch .*set LYNX_CUDA=1"):
        pack_frames([frame], **options)
    pack_frames([frame], **options)  # filterwarnings would turn a second one into an error
    pack_frames([frame], **options, impl="reference")
    module._warn_of_reference.cache_clear()
