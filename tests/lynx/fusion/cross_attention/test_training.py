"""What learns, in which dtypes, and that checkpointing and compilation change nothing."""

import torch

from tests.lynx.conftest import make_model
from tests.lynx.model_checks import check_checkpointing_changes_nothing, inputs


def test_every_parameter_learns(model, processor, samples):
    model(**processor.pack(samples)).loss.backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    assert [name for name, parameter in model.named_parameters() if not parameter.grad.any()] == []


def test_a_frozen_language_model_in_bf16(model, processor, samples):
    """Blocks and resampler train in fp32 inside a decoder in bf16, and only they have gradients."""
    batch = processor.pack(samples)
    expected = model(**batch).loss
    model.requires_grad_(False)
    model.language_model.bfloat16()
    trained = [model.resampler, *(layer.cross_attention for layer in model.get_decoder().layers)]
    for module in trained:
        module.float().requires_grad_(True)
    loss = model(**batch).loss
    torch.testing.assert_close(loss.float(), expected, rtol=0, atol=0.1)
    loss.backward()
    with_gradient = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert with_gradient == {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(p.grad.dtype == torch.float32 for module in trained for p in module.parameters())


def test_gradient_checkpointing_changes_nothing(model, processor, samples):
    block = model.get_decoder().layers[0].cross_attention
    check_checkpointing_changes_nothing(model, processor.pack(samples), block)


def test_compiles_into_one_graph(config, processor, samples):
    config.text_config.num_hidden_layers = 2
    config.vision_config.num_hidden_layers = config.resampler_depth = 1
    model = make_model(config)
    batch = processor.pack(samples)
    model(**batch).loss.backward()
    plain = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    compiled(**batch).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, plain[name], rtol=1e-4, atol=1e-5, msg=name)
    with torch.no_grad():
        padded = inputs(processor.pad(samples))
        torch.testing.assert_close(compiled(**padded).logits, model(**padded).logits, rtol=0, atol=1e-5)
