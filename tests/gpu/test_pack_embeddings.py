import subprocess
import sys

import pytest
import torch

from lynx_kernels.backends import dispatch
from lynx_kernels.ops.pack_embeddings import OPERATION, pack_embeddings
from tests.gpu import bench
from tests.lynx_kernels.helpers import check_results, count_compilations, run
from tests.lynx_kernels.test_pack_embeddings import (
    calls,
    check_conversions,
    check_equal,
    check_mixed,
    check_permuted,
    naive,
    runs,
)
from tests.lynx_kernels.test_pack_embeddings import make as make_on

BF16 = torch.bfloat16
CASES = [
    (impl, dtype)
    for impl in OPERATION.names
    for dtype in bench.DTYPES
    if bench.PRESENT and runs(impl, dtype, bench.DEVICE)
]
IMPLEMENTATIONS = list(dict.fromkeys(impl for impl, _ in CASES))
KERNELS = [impl for impl in IMPLEMENTATIONS if impl != "reference"]


def make(*args, **options):
    return make_on(*args, **options, device=bench.DEVICE)


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("dtype", bench.DTYPES)
def test_default_implementation(dtype):
    choice = dispatch.explain(pack_embeddings, *make(dtype=dtype)[0])
    assert choice.name == "cuda", choice


@pytest.mark.parametrize("width", [4096, 5120])
@pytest.mark.parametrize("rows", [1, 1000, 8192])
@pytest.mark.parametrize(("impl", "dtype"), CASES)
def test_real_sizes(impl, dtype, rows, width):
    check_equal(calls(impl), *make(rows, 1000, 600, width, dtype))


@pytest.mark.parametrize(("rows", "width"), [(0, 8), (1, 8), (37, 5), (37, 16), (130, 513), (9, 4104)])
@pytest.mark.parametrize(("impl", "dtype"), CASES)
def test_odd_sizes(impl, dtype, rows, width):
    inputs, grad = make(rows, width=width, dtype=dtype)
    check_equal(calls(impl), inputs, grad)
    check_equal(calls(impl), inputs)  # an expanded gradient


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_dtypes(impl):
    for width in (64, 3):
        check_mixed(calls(impl), *make(width=width))
    check_conversions(calls(impl), bench.DEVICE)


@pytest.mark.parametrize(("impl", "dtype"), CASES)
def test_strides(impl, dtype):
    (token_ids, embedding, vision, vision_index), grad = make(width=32, dtype=dtype)
    check_permuted(calls(impl), (token_ids, embedding, vision, vision_index), grad)
    grad = grad.to(dtype)  # otherwise its slices would be copied
    for columns in (slice(0, 16), slice(3, 19), slice(0, 15)):
        check_equal(calls(impl), (token_ids, embedding[:, columns], vision[:, columns], vision_index), grad[:, columns])


@pytest.mark.parametrize(("impl", "dtype"), CASES)
def test_uses_far_apart(impl, dtype):
    """Two vision rows that alternate, from the first row to the last."""
    (token_ids, embedding, vision, vision_index), grad = make(5000, width=24, dtype=dtype)
    vision_index[:] = torch.arange(5000, device=vision_index.device) % 2
    check_equal(calls(impl), (token_ids, embedding, vision, vision_index), grad)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_compiled(impl):
    inputs, grad = make(width=64, dtype=BF16)
    torch._dynamo.reset()
    check_results(run(torch.compile(calls(impl), fullgraph=True), inputs, grad), naive, inputs, grad)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_compiles_twice_at_most(impl):
    def leaves(rows, num_vision):
        (token_ids, embedding, vision, vision_index), _ = make(rows, num_vision=num_vision, dtype=BF16)
        return token_ids, embedding, vision.requires_grad_(), vision_index

    sizes = [(37, 7), (50, 9), (61, 4), (20, 30), (77, 5)]
    counts = count_compilations(calls(impl), [leaves(*each) for each in sizes], "inductor")
    assert counts[-1] == counts[2] <= 3


@pytest.mark.parametrize(("impl", "dtype"), CASES)
def test_deterministic(impl, dtype):
    bench.check_deterministic(calls(impl), *make(8192, 100, 600, 256, dtype))


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_never_synchronises(impl):
    inputs, grad = make(1000, 100, 600, 256, BF16)
    bench.check_never_synchronises(calls(impl), inputs, grad.to(BF16))


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("impl", KERNELS)
def test_graph_replays_with_new_inputs(impl):
    inputs, grad = make(1000, 100, 600, 256, BF16)
    new_inputs, new_grad = [inputs[0].flip(0), -inputs[1], inputs[2] * 0.5, inputs[3].flip(0)], -grad
    actual = bench.replayed(calls(impl), [*inputs, grad.to(BF16)], [*new_inputs, new_grad.to(BF16)])
    check_results(actual, naive, new_inputs, new_grad)


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("impl", KERNELS)
def test_more_than_2_to_the_31_elements(impl):
    """In the vision rows, the output, and the gradients of both. Vision rows are used in reverse order."""
    bench.need_free(24)
    rows, width = 2**19 + 100, 4096
    vision = torch.zeros(rows, width, device="cuda", dtype=BF16)
    vision[:, 0] = torch.arange(rows, device="cuda") % 251
    vision.requires_grad_()
    index = torch.arange(rows - 1, -1, -1, dtype=torch.int32, device="cuda")
    table = torch.zeros(1, width, device="cuda", dtype=BF16)
    out = pack_embeddings(torch.zeros(rows, dtype=torch.int64, device="cuda"), table, vision, index, impl=impl)
    assert torch.equal(out[:, 0], vision[:, 0].detach().flip(0))
    [grad] = torch.autograd.grad(out, vision, out.detach())
    assert torch.equal(grad, vision.detach())


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("name", ["token_ids", "vision_index"])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_indices_out_of_range(impl, name):
    """Runs in a separate process, because a device assertion makes CUDA unusable."""
    code = f"""
import torch
from lynx_kernels import pack_embeddings
token_ids, vision_index = torch.zeros(3).long().cuda(), torch.tensor([0, -1, -1], dtype=torch.int32).cuda()
pack_embeddings(token_ids, torch.ones(4, 8).cuda(), torch.ones(2, 8).cuda(), vision_index, impl={impl!r})
torch.cuda.synchronize()
print("in range")
({name} if {name!r} == "token_ids" else vision_index)[:] = 7
pack_embeddings(token_ids, torch.ones(4, 8).cuda(), torch.ones(2, 8).cuda(), vision_index, impl={impl!r})
torch.cuda.synchronize()
print("out of range")
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout == "in range\n", result.stderr
    assert "assert" in result.stderr
