"""The model: a new one is its language model, packed equals padded, nothing leaks, and it is saved whole."""

import copy

import pytest
import torch
from transformers import LlamaForCausalLM

from lynx import LynxForConditionalGeneration, LynxProcessor, checkpoint
from tests.lynx.conftest import conversation, make_image, make_model
from tests.lynx.fusion.cross_attention.conftest import cross_config, interleaved
from tests.lynx.model_checks import check_packed_is_padded, inputs


def test_a_new_model_is_its_language_model(tokenizer, config, processor, samples):
    """Bit for bit, with images, packed, padded and generating; and training can open the gates."""
    torch.manual_seed(0)
    decoder = LlamaForCausalLM._from_config(config.text_config, attn_implementation="lynx").eval()
    alone = copy.deepcopy(decoder)
    model = LynxForConditionalGeneration(config, language_model=decoder).eval()
    padded, packed = processor.pad(samples), processor.pack(samples)
    mask = padded["attention_mask"]
    position_ids = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        expected = alone(padded["input_ids"], attention_mask=mask, position_ids=position_ids).logits
        assert torch.equal(model(**inputs(padded)).logits, expected)
        rows = [alone(torch.tensor([sample.token_ids])).logits[0] for sample in samples]
        torch.testing.assert_close(model(**inputs(packed)).logits[0], torch.cat(rows), rtol=0, atol=1e-5)
    question = {"input_ids": padded["input_ids"], "attention_mask": mask}
    tokens = model.generate(**inputs(padded), max_new_tokens=4, eos_token_id=-1)
    assert torch.equal(tokens, alone.generate(**question, max_new_tokens=4, eos_token_id=-1, pad_token_id=0))
    model(**packed).loss.backward()
    moves = {name for name, parameter in model.named_parameters() if parameter.grad.any()}
    gates = {name for name, _ in model.named_parameters() if name.endswith("_gate")}
    assert len(gates) == 6
    assert gates <= moves
    assert not any("to_kv" in name or name.startswith("resampler") for name in moves)


def test_packed_and_padded_give_the_same(model, processor, samples):
    check_packed_is_padded(model, processor, samples)


@pytest.mark.parametrize(("sees", "second_item"), [("preceding", False), ("all", True)])
def test_whom_an_image_reaches(tokenizer, sees, second_item):
    """Change one image of one sample: other samples and earlier tokens stay bit for bit."""
    config = cross_config(tokenizer, sees_media=sees, resampler_concatenates_latents=second_item)
    model, processor = make_model(config), LynxProcessor.for_model(config, tokenizer)
    one, two = (processor.encode(interleaved(seed)) for seed in (0, 10))
    changed = copy.deepcopy(two)
    changed.media[0][0] = make_image(99)
    logits = [model(**inputs(processor.pack([one, each, one]))).logits[0] for each in (two, changed)]
    length, begin, end = len(one.token_ids), two.places[0], two.places[1]
    same = [torch.equal(*each) for each in zip(*(each.split(length) for each in logits), strict=True)]
    assert same == [True, False, True]
    is_same = (logits[0] == logits[1]).all(1)[length : 2 * length]
    assert is_same[:begin].all()
    assert not is_same[begin:end].any()
    # Later tokens hear of it through self-attention, whichever media they see; of what the first block gives them
    # only where they see it.
    packed = processor.pack([one])
    spans = packed["cross_layout"].visible()[:, : config.num_latents].all(1)
    assert spans[begin:end].all()
    assert spans[end:].all() == spans[end:].any() == second_item


def test_text_only_batches(model, processor):
    """With the layout that the processor makes, or without: the feed-forward acts on text alone, too."""
    sample = processor.encode(conversation("Hello", "yes"))
    batch = processor.pack([sample])
    assert batch["cross_layout"].num_keys == 0
    alone = model(torch.tensor([sample.token_ids])).logits[0]
    torch.testing.assert_close(model(**inputs(batch)).logits[0], alone, rtol=0, atol=1e-5)
    other = processor.encode(conversation("Odd?", "no", images=[make_image(0)]))
    beside_others = model(**inputs(processor.pack([other, sample]))).logits[0, len(other.token_ids) :]
    torch.testing.assert_close(beside_others, alone, rtol=0, atol=1e-5)
    model(**batch).loss.backward()
    blocks = [layer.cross_attention for layer in model.get_decoder().layers]
    assert all(parameter.grad is not None for block in blocks for parameter in block.parameters())


def test_blocks_stand_before_every_kth_layer(tokenizer):
    model = LynxForConditionalGeneration(cross_config(tokenizer, cross_attention_frequency=2))
    assert [hasattr(layer, "cross_attention") for layer in model.get_decoder().layers] == [False, True, False]
    names = dict(model.named_parameters())
    assert "language_model.model.layers.1.self_attn.q_proj.weight" in names, "blocks must not rename the decoder"
    assert not any("output_adapter" in name for name in names)
    assert "LlamaDecoderLayerWithCrossAttention" in model._no_split_modules
    assert len(model(torch.tensor([[1, 2]]), output_hidden_states=True).hidden_states) == 4


def test_saved_and_loaded(model, processor, samples, tmp_path):
    checkpoint.save(tmp_path / "model", model, processor)
    loaded, its_processor = checkpoint.load(tmp_path / "model")
    for each in (processor.pack(samples), its_processor.pack(samples)):
        assert torch.equal(loaded(**each).loss, model(**processor.pack(samples)).loss)
    processor.sees_media = "all"
    checkpoint.save(tmp_path / "other", model, processor)
    with pytest.raises(ValueError, match="the processor has sees_media=all, but the model needs preceding"):
        checkpoint.load(tmp_path / "other")
