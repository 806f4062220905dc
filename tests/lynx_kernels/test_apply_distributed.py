"""``apply`` under DDP and FSDP2: two ranks with other rows get the gradients of the unpatched model in one process."""

import pytest
from torch import distributed
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from lynx_kernels.integrations.apply import apply
from lynx_kernels.integrations.collator import PackedCollator
from tests.lynx import processes
from tests.lynx_kernels import families, vlm_checks, vlms

ROWS = [(0, 1), (2,)]  # of each rank


def inputs_of(rank):
    return vlm_checks.labelled(vlms.FAMILIES["Qwen3VL"].batch(rows=ROWS[rank]))


def expected_gradients():
    """The mean of both ranks'."""
    model = vlms.build("Qwen3VL").train()
    found = [vlms.run(model, inputs_of(rank)).gradients for rank in range(2)]
    return {name: (found[0][name] + found[1][name]) / 2 for name in found[0]}


def assert_all_equal(results):
    expected = expected_gradients()
    for gradients in results:
        vlms.assert_close(vlms.Ran(None, None, gradients), vlms.Ran(None, None, expected))


def ddp_rank(rank):
    distributed.init_process_group("gloo")
    model = vlms.build("Qwen3VL").train()
    patch = apply(model)
    wrapped = DistributedDataParallel(model)
    with families.counted() as calls:
        out = wrapped(**inputs_of(rank), use_cache=False)
    assert out.logits is None
    assert calls["kernels"] == 4
    out.loss.backward()
    first = gradients_of(model)
    patch.undo()  # DDP holds on to parameters alone, which stay
    wrapped.zero_grad()
    out = wrapped(**inputs_of(rank), use_cache=False)
    assert out.logits is not None
    out.loss.backward()
    return first, gradients_of(model)


def gradients_of(model):
    return {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}


def test_ddp(tmp_path):
    results = processes.ranks(2, tmp_path, ddp_rank)
    assert_all_equal([gradients for of_rank in results for gradients in of_rank])


def fsdp_rank(rank):
    """The rows of a rank in a packed one."""
    distributed.init_process_group("gloo")
    model = vlms.build("Qwen3VL").train()
    patch = apply(model)
    samples = [vlm_checks.labelled(vlms.FAMILIES["Qwen3VL"].batch(rows=(row,))) for row in ROWS[rank]]
    batch = PackedCollator(model)(samples)
    mesh = distributed.init_device_mesh("cpu", (2,))
    for layer in (*model.model.language_model.layers, *model.model.visual.blocks):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    with families.counted() as calls:
        out = model(**batch, use_cache=False)
    assert out.logits is None
    assert calls == {"kernels": 4}
    out.loss.backward()
    with pytest.raises(RuntimeError, match=r"FSDP\S+ and was .*FSDP: keep the patch until the run ends"):
        patch.undo()
    return {name: each.grad.full_tensor() for name, each in model.named_parameters() if each.grad is not None}


def test_fsdp2(tmp_path):
    assert_all_equal(processes.ranks(2, tmp_path, fsdp_rank))
