"""A changed child is called. The weights of an unchanged child are passed to the kernel."""

import logging
import re
from contextlib import contextmanager

import peft
import pytest
import torch
from torch import nn as torch_nn
from torch.nn.utils import parametrizations, parametrize, prune, weight_norm

from lynx_kernels import SpanLayout, adapter, children, explain, nn

BRANCHES = {
    "adapter": ("norm", "down", "up"),
    "gated": ("feed_forward_norm", "feed_forward_in", "feed_forward_out"),
}
EVERY_CHILD = [(kind, name) for kind, names in BRANCHES.items() for name in names]
PROJECTIONS = [(kind, name) for kind, name in EVERY_CHILD if "norm" not in name]


def make(kind):
    """A module and a function that runs it on x. Parameters are random: 0 and 1 could hide that one is not used."""
    torch.manual_seed(0)
    if kind == "adapter":
        module = nn.Adapter(12, 5)
        inputs = ()
    else:
        module = nn.GatedCrossAttention(12, num_heads=2, head_dim=4, expansion=2)
        inputs = torch.randn(5, 12), SpanLayout.from_spans([2, 4], [(0, 3), (1, 5)], 5)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return module, lambda x: module(x, *inputs)


@pytest.fixture
def x():
    return torch.randn(6, 12, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def kernel_calls(monkeypatch):
    """The calls of the adapter's kernel."""
    calls = []
    monkeypatch.setattr(nn, "adapter", lambda *args, **kwargs: calls.append(1) or adapter(*args, **kwargs))
    return calls


@pytest.mark.parametrize("kind", BRANCHES)
def test_kernels_use_the_weights_of_unchanged_children(kind, x, kernel_calls):
    module, run = make(kind)
    run(x)
    assert kernel_calls
    assert str(explain(module)) == str(explain(module, x)) == "kernels"
    for parameter in module.parameters():  # attributes that optimizers and DDP add do not change a call
        parameter.register_hook(lambda grad: None)
        parameter.register_post_accumulate_grad_hook(lambda parameter: None)
    module.register_forward_hook(lambda *args: None)  # allowed, because the module itself is called
    run(x)
    assert len(kernel_calls) == 2
    assert not explain(module).reasons


@pytest.mark.parametrize(("kind", "name"), EVERY_CHILD)
def test_hooks_of_a_child_fire(kind, name, x, kernel_calls):
    module, run = make(kind)
    x.requires_grad_()
    before = run(x)
    grads = torch.autograd.grad(before.sum(), [x, *module.parameters()], allow_unused=True)
    child, fired, kernel_calls[:] = module.get_submodule(name), [], []
    for kind_of_hook in ("forward_pre", "forward", "full_backward_pre", "full_backward"):
        register = getattr(child, f"register_{kind_of_hook}_hook")
        handle = register(lambda *args, kind_of_hook=kind_of_hook: fired.append(kind_of_hook))
        after = run(x)
        now = torch.autograd.grad(after.sum(), [x, *module.parameters()], allow_unused=True)
        torch.testing.assert_close((after, now), (before, grads), rtol=1e-4, atol=1e-5)
        assert explain(module).reasons == {f"kernels for {name}": "it has hooks"}
        handle.remove()
    assert fired == ["forward_pre", "forward", "full_backward_pre", "full_backward"]
    assert not kernel_calls
    run(x)
    assert kernel_calls


@pytest.mark.parametrize("kind", BRANCHES)
def test_hooks_on_all_modules_fire_for_every_child(kind, x):
    module, run = make(kind)
    seen = []
    handle = torch_nn.modules.module.register_module_forward_hook(lambda each, *args: seen.append(each))
    try:
        run(x)
    finally:
        handle.remove()
    assert {id(each) for each in module.children()} <= set(map(id, seen))


@pytest.mark.parametrize(("kind", "name"), PROJECTIONS)
@pytest.mark.parametrize(
    "change", [parametrizations.orthogonal, parametrizations.weight_norm, parametrizations.spectral_norm, weight_norm]
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_parametrized_weights(kind, name, change, x):
    module, run = make(kind)
    change(module.get_submodule(name))
    assert list(explain(module).reasons) == [f"kernels for {name}"]
    run(x).sum().backward()
    trained = list(module.get_submodule(name).parameters())
    assert trained
    assert all(each.grad is not None for each in trained)


def test_a_parametrization_shows_in_the_output(x):
    class Zero(torch_nn.Module):
        def forward(self, weight):
            return 0 * weight

    module, run = make("adapter")
    parametrize.register_parametrization(module.up, "weight", Zero())
    torch.testing.assert_close(run(x), x + module.scale * module.up.bias)
    parametrize.remove_parametrizations(module.up, "weight")
    assert explain(module).name == "kernels"


def test_pruned_weights_stay_pruned(x):
    """After an optimizer's step too: the mask is applied in a hook."""
    module, run = make("adapter")
    prune.l1_unstructured(module.up, "weight", amount=0.9)
    with torch.no_grad():
        module.up.weight_orig += 1
    kept = module.up.weight_orig * module.up.weight_mask
    expected = x + module.scale * torch_nn.functional.linear(
        torch_nn.functional.silu(module.down(module.norm(x))), kept, module.up.bias
    )
    torch.testing.assert_close(run(x), expected)


def another_forward(child):
    child.forward = lambda x: 2 * type(child).forward(child, x)


def another_class(child):
    child.__class__ = type(
        "Doubled", (type(child),), {"forward": lambda self, x: 2 * super(type(self), self).forward(x)}
    )


class Doubled(torch.Tensor):
    """A tensor with doubled products. Like a quantised tensor, it changes the result of a product."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        out = super().__torch_function__(func, types, args, kwargs)
        return 2 * out.as_subclass(torch.Tensor) if func is torch_nn.functional.linear else out


def another_tensor(child):
    child.weight = torch_nn.Parameter(child.weight.detach().as_subclass(Doubled))


@pytest.mark.parametrize(
    ("change", "reason", "kind", "name"),
    [
        *((another_forward, "its forward was replaced", *each) for each in EVERY_CHILD),
        *((another_class, "Doubled, not a", *each) for each in EVERY_CHILD),
        *((another_tensor, "its weight is a ", *each) for each in PROJECTIONS),
    ],
)
def test_changed_children_are_called(change, reason, kind, name, x):
    module, run = make(kind)
    before, child = run(x), module.get_submodule(name)
    expected_module, expected_run = make(kind)
    with torch.no_grad():
        for parameter in expected_module.get_submodule(name).parameters():
            parameter *= 2
    change(child)
    assert not torch.allclose(run(x), before)
    torch.testing.assert_close(run(x), expected_run(x), rtol=1e-4, atol=1e-5)
    assert reason in explain(module).reasons[f"kernels for {name}"]


@pytest.mark.parametrize(("kind", "name"), EVERY_CHILD)
def test_weights_gathered_only_during_a_call(kind, name, x):
    """With ZeRO-3 they have shape (0,) between calls; with offload they are on meta."""
    for placeholder in (torch.empty(0), torch.empty_like(make(kind)[0].get_submodule(name).weight, device="meta")):
        module, run = make(kind)
        expected, child = run(x).detach(), module.get_submodule(name)
        kept, child.weight = child.weight, torch_nn.Parameter(placeholder)

        def called(y, child=child, kept=kept, placeholder=placeholder):
            child.weight = kept
            try:
                return type(child).forward(child, y)
            finally:
                child.weight = torch_nn.Parameter(placeholder)

        assert "kept elsewhere" in str(explain(module)) or "on meta" in str(explain(module))
        child.forward = called
        torch.testing.assert_close(run(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", BRANCHES)
@pytest.mark.parametrize("use_dora", [False, True])
def test_lora(kind, use_dora, x):
    module, run = make(kind)
    before = run(x)
    targets = [name for name in BRANCHES[kind] if "norm" not in name]
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=targets, r=2, use_dora=use_dora), module)
    torch.testing.assert_close(run(x), before, rtol=1e-4, atol=1e-5)
    reason = "it is a peft.tuners.lora.layer.Linear, not a torch.nn.Linear"
    assert explain(module, x).name == "plain composition"
    assert explain(module, x).reasons == {f"kernels for {name}": reason for name in targets}
    run(x).square().sum().backward()
    lora = {name: each for name, each in module.named_parameters() if "lora_B" in name}
    assert len(lora) == 2
    assert all(each.grad.abs().max() > 0 for each in lora.values())


@pytest.mark.parametrize("kind", BRANCHES)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_dynamic_quantization(kind, x):
    module, run = make(kind)
    before = run(x)
    torch.ao.quantization.quantize_dynamic(module, {torch_nn.Linear}, dtype=torch.qint8, inplace=True)
    with torch.no_grad():
        after = run(x)
    assert 0 < (after - before).abs().max() < 0.1 * before.abs().max()
    assert "quantized.dynamic" in str(explain(module))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("parameters", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", BRANCHES)
def test_dtypes_of_the_composition_are_the_kernels(kind, dtype, parameters, x):
    module, run = make(kind)
    module.to(parameters)
    x = x.to(dtype)
    with torch.no_grad():
        ours = run(x)
        module.get_submodule(BRANCHES[kind][1]).register_forward_hook(lambda *args: None)
        called = run(x)
        with torch.autocast("cpu", torch.bfloat16):
            assert run(x).dtype == dtype
    assert called.dtype == ours.dtype == dtype
    torch.testing.assert_close(called, ours, rtol=0.04, atol=0.04)


@pytest.mark.parametrize("options", [{"norm": "post"}, {"norm": None}, {"bias": False}, {"activation": "gelu_tanh"}])
def test_variants_of_the_adapter(options, x):
    torch.manual_seed(0)
    module = nn.Adapter(12, 5, **options)
    before, fired = module(x), []
    for child in module.children():
        child.register_forward_hook(lambda each, *args: fired.append(each))
    torch.testing.assert_close(module(x), before, rtol=1e-5, atol=1e-5)
    assert sorted(map(id, fired)) == sorted(map(id, module.children()))


@pytest.mark.parametrize("changed", [False, True])
def test_compiled_in_one_graph(changed, x):
    module, run = make("adapter")
    if changed:
        peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["down"], r=2), module)
    graphs = []

    def backend(graph, inputs):
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return graph

    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(module, backend=backend, fullgraph=True)(x), run(x))
    assert len(graphs) == 1
    assert any("lynx_kernels.adapter" in each for each in graphs[0]) is not changed


@pytest.mark.parametrize("strict", [False, True])
def test_export_contains_the_operator(strict, x):
    module, _ = make("adapter")
    program = torch.export.export(module, (x,), strict=strict)
    assert "lynx_kernels.adapter.default" in {str(node.target) for node in program.graph.nodes}


def as_attribute(name):
    """The parameter becomes an attribute, as in a replica of DataParallel."""

    def change(child):
        value = getattr(child, name).detach()
        delattr(child, name)
        setattr(child, name, value)

    return change


def as_parameter(name, function):
    def change(child):
        value = torch_nn.Parameter(function(getattr(child, name).detach()), requires_grad=False)
        child._parameters[name] = value

    return change


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (as_attribute("weight"), "its weight is not a parameter of its own"),
        (as_attribute("bias"), "its bias is not a parameter of its own"),
        (as_parameter("weight", torch.flatten), r"its weight has shape \(60,\): it is kept elsewhere"),
        (as_parameter("weight", lambda weight: weight[:0]), "its weight is empty: it is kept elsewhere"),
        (as_parameter("weight", lambda weight: weight.to(torch.int8)), "its weight is torch.int8"),
        (as_parameter("weight", torch.Tensor.to_sparse_csr), "its weight is torch.sparse_csr"),
        (as_parameter("weight", lambda weight: weight.to("meta")), "its weight is offloaded, on meta"),
        (as_parameter("bias", lambda bias: bias.to("meta")), "its bias is offloaded, on meta"),
    ],
)
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
def test_parameters_that_kernels_do_not_support(change, reason):
    module, _ = make("adapter")
    change(module.down)
    assert re.fullmatch(reason, explain(module).reasons["kernels for down"])


@contextmanager
def replaced(owner, name, value):
    old = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, old)


def test_a_class_whose_forward_was_replaced(x):
    module, run = make("adapter")
    forward = torch_nn.Linear.forward
    with replaced(torch_nn.Linear, "forward", lambda self, x: 0 * forward(self, x)):
        assert torch.equal(run(x), x)
        assert "the forward of every torch.nn.Linear was replaced" in str(explain(module))


def test_embeddings_with_options_are_called():
    def reason(trains=True, **options):
        table = torch_nn.Embedding(5, 3, **options).requires_grad_(trains)
        return children.changed_embedding_reason(table, torch.device("cpu"))

    assert reason() is None
    assert "max_norm=1" in reason(trains=False, max_norm=1)
    for option in ({"padding_idx": 1}, {"sparse": True}, {"scale_grad_by_freq": True}):
        assert next(iter(option)) in reason(**option)
        assert reason(trains=False, **option) is None, "the option changes only gradients"


def test_log_has_one_line_per_class_and_reasons(x, caplog):
    caplog.set_level(logging.INFO, logger="lynx_kernels")
    children._logged.clear()
    for _ in range(2):
        module, run = make("adapter")
        module.down.register_forward_hook(lambda *args: None)
        run(x)
        run(x)
    assert [record.getMessage() for record in caplog.records] == [
        "Adapter runs as a plain composition: down: it has hooks"
    ]


def test_explain_of_modules():
    with pytest.raises(TypeError, match="expected an operation of lynx_kernels or a module that has one"):
        explain(torch_nn.Linear(2, 3))
    model = torch_nn.Sequential(torch_nn.Linear(12, 12), make("adapter")[0])
    assert explain(model).name == "kernels"
    model[1].up.register_forward_hook(lambda *args: None)
    assert str(explain(model)) == "plain composition\n  not kernels for 1.up: it has hooks"
    assert "on cpu, the input on meta" in str(explain(model, torch.empty(2, 12, device="meta")))
