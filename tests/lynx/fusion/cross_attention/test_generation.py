"""Generation, and the cache that holds the media beside the text."""

import copy

import pytest
import torch

from lynx.fusion.cross_attention import CrossAttentionCache
from lynx.generation.answers import answer
from lynx_kernels import SpanLayout
from tests.lynx.conftest import conversation, make_image
from tests.lynx.fusion.cross_attention.conftest import interleaved
from tests.lynx.model_checks import inputs


def test_greedy_generation_is_the_argmax_of_forward(model, processor, questions):
    tokens = model.generate(**questions, max_new_tokens=5, eos_token_id=-1)
    prompt = questions["input_ids"].shape[1]
    samples = [processor.encode(each) for each in (interleaved(), conversation("Hello"), interleaved(20))]
    for step in range(5):
        for row, sample in enumerate(samples):
            longer = copy.deepcopy(sample)
            longer.token_ids.extend(tokens[row, prompt : prompt + step].tolist())
            longer.labels.extend([-100] * step)
            with torch.no_grad():
                logits = model(**inputs(processor.pack([longer]))).logits
            assert logits[0, -1].argmax() == tokens[row, prompt + step]


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}], ids=str)
def test_the_cache_changes_nothing(model, questions, options):
    options = {**options, "max_new_tokens": 6, "eos_token_id": -1}
    expected = model.generate(**questions, **options, use_cache=False)
    assert torch.equal(model.generate(**questions, **options), expected)


def test_guessed_tokens_change_nothing(model, processor):
    """Prompt lookup reads several tokens a step, and takes some back."""
    batch = inputs(processor.pad([processor.encode(interleaved())]))
    options = {"max_new_tokens": 12, "eos_token_id": -1}
    guessed = model.generate(**batch, **options, prompt_lookup_num_tokens=2)
    assert torch.equal(guessed, model.generate(**batch, **options))


def test_media_are_read_once(model, questions):
    """Keys and values once a block, images once, however many beams and tokens."""
    calls = []
    model.resampler.register_forward_hook(lambda *args: calls.append("resampler"))
    for layer in model.get_decoder().layers:
        layer.cross_attention.to_kv.register_forward_hook(lambda module, args, out: calls.append(out.shape[0]))
    model.generate(**questions, max_new_tokens=4, num_beams=3, eos_token_id=-1)
    assert calls == ["resampler", *[6 * 3] * 3], "6 items of 3 latents, 3 blocks"


def test_a_cache_is_begun_for_generation_alone(model, processor, samples):
    """Not where a loss is asked for, nor in training: it would keep the keys and values of all media."""
    padded = processor.pad(samples)

    def has_cache(batch):
        return isinstance(model(**batch).past_key_values, CrossAttentionCache)

    assert has_cache(inputs(padded))
    assert not has_cache(padded)
    assert not has_cache({**inputs(padded), "use_cache": False})
    assert not has_cache(inputs(processor.pack(samples)))
    model.train()
    assert not has_cache(inputs(padded))


def test_going_on_from_a_cache_by_hand(model, processor):
    """Two rows, several tokens a step; each sees what the last token of its row saw."""
    samples = [processor.encode(each) for each in (interleaved(), conversation("Odd?", images=[make_image(8)]))]
    batch = inputs(processor.pad(samples))
    more = torch.tensor([[5, 6, 7], [8, 9, 10]])
    with torch.no_grad():
        out = model(**batch, use_cache=True)
        assert isinstance(out.past_key_values, CrossAttentionCache)
        mask = torch.cat([batch["attention_mask"], torch.ones(2, 3, dtype=torch.int64)], 1)
        position_ids = mask.cumsum(1)[:, -3:] - 1
        cache = out.past_key_values
        swapped = copy.deepcopy(cache)
        step = {"input_ids": more, "position_ids": position_ids}
        logits = model(**step, attention_mask=mask, past_key_values=cache).logits
        for row, sample in enumerate(samples):
            longer = copy.deepcopy(sample)
            longer.token_ids.extend(more[row].tolist())
            expected = model(**inputs(processor.pack([longer]))).logits[0, -3:]
            torch.testing.assert_close(logits[row], expected, rtol=0, atol=1e-4)
        turn = torch.tensor([1, 0])
        for change in ("reorder_cache", "batch_select_indices"):
            each = copy.deepcopy(swapped)
            getattr(each, change)(turn)
            out = model(more[turn], position_ids=position_ids[turn], attention_mask=mask[turn], past_key_values=each)
            torch.testing.assert_close(out.logits, logits[turn], rtol=0, atol=1e-5)
        swapped.batch_repeat_interleave(2)
        double = {"input_ids": more, "position_ids": position_ids, "attention_mask": mask}
        double = {name: value.repeat_interleave(2, 0) for name, value in double.items()}
        out = model(**double, past_key_values=swapped)
        torch.testing.assert_close(out.logits, logits.repeat_interleave(2, 0), rtol=0, atol=1e-5)


def test_the_cache_notes_what_the_last_tokens_saw(config):
    """Of rows of three tokens: an item before the very last one, none at all, an empty segment at the end."""
    spans = [(0, 0), (0, 3), (0, 0), (3, 5), (5, 6)]
    cache = CrossAttentionCache(config.text_config)
    cache.start(SpanLayout.from_spans([2, 1, 3, 3, 0], spans, 6), rows=3)
    assert cache.spans.tolist() == [[0, 3], [0, 0], [3, 5]]
    visible = cache.layout(2).visible()
    assert torch.equal(visible, SpanLayout.from_spans([2] * 3, [(0, 3), (0, 0), (3, 5)], 6).visible())


def test_answers_do_not_depend_on_the_batch(model, processor):
    samples = [processor.encode(each) for each in (interleaved(), conversation("A question without an image?"))]
    together = answer(model, processor, samples, max_new_tokens=5)
    assert together == [answer(model, processor, [each], max_new_tokens=5)[0] for each in samples]
