"""What holds for a model of either fusion."""

import torch


def inputs(batch):
    """A batch without its labels."""
    return {name: value for name, value in batch.items() if name != "labels"}


def check_packed_is_padded(model, processor, samples):
    """Packed and padded, samples have the same logits and the same loss."""
    packed, padded = processor.pack(samples), processor.pad(samples)
    packed_logits = model(**inputs(packed)).logits[0]
    padded_logits = model(**inputs(padded)).logits[padded["attention_mask"].bool()]
    assert packed_logits.abs().max() > 0.1
    torch.testing.assert_close(packed_logits, padded_logits, rtol=0, atol=1e-4)
    torch.testing.assert_close(model(**packed).loss, model(**padded).loss, rtol=1e-5, atol=1e-6)


def check_checkpointing_changes_nothing(model, batch, watched=None):
    """Gradients are the same; the module to be watched, if any, runs again."""
    model.train()
    model(**batch).loss.backward()
    plain = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    calls = []
    if watched is not None:
        watched.register_forward_hook(lambda *args: calls.append(1))
    model(**batch).loss.backward()
    if watched is not None:
        assert len(calls) == 2, "it is part of what is computed again"
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, plain[name], msg=name)
