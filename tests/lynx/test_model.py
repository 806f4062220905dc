"""The model: packed against padded, no leak between samples, every vision tower, generation, gradients."""

import copy

import pytest
import torch
from torch import nn
from transformers import CohereConfig, GraniteConfig, LlamaForCausalLM

from lynx import LynxForConditionalGeneration, LynxProcessor
from lynx.generation.answers import answer
from lynx_kernels import PackedLayout
from lynx_kernels.backends import onednn
from lynx_kernels.ops.head_common import chunked, entries
from tests.lynx.conftest import VISION, conversation, make_config, make_image, make_model
from tests.lynx.model_checks import check_checkpointing_changes_nothing, check_packed_is_padded, inputs
from tests.numbers import assert_within_budget


@pytest.mark.parametrize("vision", VISION)
def test_packed_and_padded_give_the_same_logits(tokenizer, vision):
    config = make_config(tokenizer, vision)
    model, processor = make_model(config), LynxProcessor.for_model(config, tokenizer)
    samples = [
        processor.encode(conversation("Which digit is this?", "seven", images=[make_image(0)])),
        processor.encode(conversation("Hello", "yes")),
        processor.encode(
            conversation("Which digits?", "1 2 3", videos=[[make_image(1), make_image(2), make_image(3)]])
        ),
    ]
    check_packed_is_padded(model, processor, samples)


def test_questions_about_one_image_can_share_it(model, processor):
    """Two branches on one root give what two rows with the image in each give."""
    samples = [
        processor.encode(conversation(question, answer, images=[make_image(0)]))
        for question, answer in (("Which digit is this?", "seven"), ("Odd?", "yes"))
    ]
    first, second = (processor.pack([sample]) for sample in samples)
    shared = {**first, "layout": PackedLayout.from_groups([(3, [len(sample.token_ids) for sample in samples])])}
    for name in ("input_ids", "labels"):
        shared[name] = torch.cat([first[name], second[name][:, 3:]], 1)
    logits = model(**inputs(shared)).logits[0]
    expected = torch.cat([model(**inputs(first)).logits[0], model(**inputs(second)).logits[0, 3:]])
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)


def test_positions_count_the_tokens(model, processor, samples):
    """Packed or left-padded, every token has the same position: rotary scores hide it where only distances count."""
    seen = []
    model.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["position_ids"]), with_kwargs=True
    )
    packed, padded = processor.pack(samples), processor.pad(samples)
    model(**packed)
    model(**padded)
    assert torch.equal(seen[0][0], packed["layout"].position_ids)
    assert torch.equal(seen[1][padded["attention_mask"].bool()], seen[0][0])


def test_text_only_batch_needs_no_images(model, processor):
    batch = processor.pack([processor.encode(conversation("Hello", "yes"))])
    assert "pixel_values" not in batch
    assert model(**batch).loss.isfinite()


@pytest.mark.parametrize("changed", range(5))
def test_no_sample_sees_another(model, processor, samples, changed):
    """Change one sample's content, lengths unchanged: every other sample's logits stay bit for bit."""
    sample = samples[changed]
    others = copy.deepcopy(samples)
    others[changed] = type(sample)(
        [[make_image(100 + i) for i in range(len(item))] for item in sample.media],
        sample.is_video,
        [sample.token_ids[0], *(1 + token % 100 for token in sample.token_ids[1:])],
        sample.labels,
    )
    before, after = (processor.pack(each) for each in (samples, others))
    logits = [model(**inputs(batch)).logits[0] for batch in (before, after)]
    lengths = [len(each.media) * processor.num_latents + len(each.token_ids) for each in samples]
    for index, (old, new) in enumerate(zip(*(each.split(lengths) for each in logits), strict=True)):
        assert torch.equal(old, new) == (index != changed), f"sample {index}"


def test_loss_is_the_cross_entropy_of_the_answers(model, processor, samples):
    padded = processor.pad(samples)
    logits = model(**inputs(padded)).logits
    expected = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), padded["labels"][:, 1:].flatten())
    torch.testing.assert_close(model(**processor.pack(samples)).loss, expected, rtol=1e-5, atol=1e-6)
    total = model(**processor.pack(samples), num_items_in_batch=7).loss * 7
    torch.testing.assert_close(total, expected * (padded["labels"] != -100).sum(), rtol=1e-5, atol=1e-6)


def test_a_first_label_has_no_predictor(model, processor, samples):
    """No token stands before it, and none of the row before it learns it."""
    for batch in (processor.pad(samples[:3]), processor.pad(samples[1:2])):
        expected = model(**batch).loss
        length = batch["labels"].shape[1]
        labels = torch.where(torch.arange(length) == 0, 7, batch["labels"])
        logits = model(**inputs(batch)).logits
        torch.testing.assert_close(model(**{**batch, "labels": labels, "max_supervised": None}).loss, expected)
        torch.testing.assert_close(
            nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()), expected
        )
    batch = processor.pack(samples)
    starts = torch.cat([torch.tensor([True]), batch["layout"].position_ids[1:] == 0])
    labels = torch.where(starts, 7, batch["labels"])
    torch.testing.assert_close(model(**{**batch, "labels": labels}).loss, model(**batch).loss)


def test_unsupervised_rows_do_not_reach_the_vocabulary_on_a_device(model, processor, samples, monkeypatch):
    """The batch says how many rows are supervised, where the host may not read its labels."""
    batch = processor.pack(samples)
    expected = model(**batch).loss
    monkeypatch.setattr(entries, "host_may_read", lambda tensor: False)
    seen = []
    product = chunked._product
    monkeypatch.setattr(chunked, "_product", lambda left, right: seen.append(left.shape[0]) or product(left, right))
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).loss, expected)
    assert sum(seen) == batch["max_supervised"] < batch["labels"].numel()


def test_every_parameter_learns(model, processor, samples):
    model(**processor.pack(samples)).loss.backward()
    silent = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert silent == []
    zero = [name for name, parameter in model.named_parameters() if not parameter.grad.any()]
    assert zero == []


def test_gradient_checkpointing_changes_nothing(model, processor, samples):
    check_checkpointing_changes_nothing(model, processor.pack(samples))


@pytest.mark.parametrize(("frequency", "expected"), [(1, [True] * 3), (2, [True, False, True])])
def test_adapters_follow_every_kth_layer(tokenizer, frequency, expected):
    model = LynxForConditionalGeneration(make_config(tokenizer, adapter_frequency=frequency))
    layers = model.get_decoder().layers
    assert [hasattr(layer, "output_adapter") for layer in layers] == expected
    names = dict(model.named_parameters())
    assert "language_model.model.layers.0.self_attn.q_proj.weight" in names, "adapters must not rename the decoder"
    assert "LlamaDecoderLayerWithAdapter" in model._no_split_modules
    assert len(model(torch.tensor([[1, 2]]), output_hidden_states=True).hidden_states) == 4


def test_each_part_starts_from_its_own_spread(tokenizer):
    config = make_config(tokenizer, initializer_range=0.3, latent_initializer_range=0.5, adapter_size=64)
    config.text_config.initializer_range = 1.0
    model = LynxForConditionalGeneration(config)
    layer, resampler = model.get_decoder().layers[0], model.resampler
    for weight, spread in (
        (layer.mlp.up_proj.weight, 1.0),
        (layer.output_adapter.down.weight, 0.02),
        (layer.output_adapter.up.weight, 0.02),
        (resampler.layers[0].attention.to_kv.weight, 0.3),
        (resampler.frame_position, 0.5),
    ):
        assert 0.8 * spread < weight.std() < 1.2 * spread
    assert layer.output_adapter.scale == 1


def test_an_adapter_of_scale_zero_leaves_the_language_model(tokenizer, processor):
    config = make_config(tokenizer)
    torch.manual_seed(0)
    decoder = LlamaForCausalLM(config.text_config).eval()
    ids = torch.tensor([[1, 5, 9, 7]])
    with torch.no_grad():
        alone = decoder(ids).logits
        model = LynxForConditionalGeneration(config, language_model=decoder).eval()
        assert not torch.equal(model(ids).logits, alone)
        for layer in model.get_decoder().layers[::2]:
            layer.output_adapter.scale.zero_()
        assert torch.equal(model(ids).logits, alone)


@pytest.mark.parametrize(
    "options",
    [{}, {"use_cache": False}, {"num_beams": 3}, {"do_sample": True}, {"num_beams": 2, "do_sample": True}],
    ids=str,
)
def test_generate(model, processor, options):
    questions = [
        processor.encode(conversation("Which digit is this?", images=[make_image(0)])),
        processor.encode(conversation("Hello")),
        processor.encode(conversation("Which digits are these?", videos=[[make_image(1), make_image(2)]])),
    ]
    texts = answer(model, processor, questions, max_new_tokens=6, **options)
    assert len(texts) == 3
    assert all(isinstance(text, str) for text in texts)


def test_beams_find_what_an_exhaustive_search_finds(model, processor):
    """Two new tokens, more beams than the vocabulary has tokens: beam search is then exact."""
    batch = processor(text="Which digit is this?", images=make_image(0))
    vocabulary = model.config.text_config.vocab_size
    options = {"max_new_tokens": 2, "min_new_tokens": 2, "length_penalty": 0.0}
    tokens = model.generate(**batch, **options, num_beams=vocabulary)[0, -2:]
    ids = torch.cat([batch["input_ids"].repeat(vocabulary, 1), torch.arange(vocabulary)[:, None]], 1)
    vision_tokens = model.encode_media(batch["pixel_values"]).repeat(vocabulary, 1)
    with torch.no_grad():
        scores = model(inputs_embeds=model.embed(ids, vision_tokens)).logits[:, -2:].log_softmax(-1)
    scores[:, :, model.config.eos_token_id] = -torch.inf
    total = scores[0, 0][:, None] + scores[:, 1]  # of every pair of tokens
    total[model.config.eos_token_id] = -torch.inf
    assert tokens.tolist() == list(divmod(int(total.argmax()), vocabulary))


def test_images_are_encoded_once_however_many_beams(model, processor):
    calls = []
    model.resampler.register_forward_hook(lambda *args: calls.append(1))
    model.generate(**processor(text="What?", images=make_image(0)), max_new_tokens=4, num_beams=3)
    assert len(calls) == 1


def test_greedy_generation_is_the_argmax_of_forward(model, processor):
    """The cache, the left padding and the positions: each new token is what a forward pass over the row would give."""
    batch = processor(text=["Which digit is this?", "No"], images=[make_image(0), None])
    tokens = model.generate(**batch, max_new_tokens=5, eos_token_id=-1)
    prompt = batch["input_ids"].shape[1]
    assert torch.equal(tokens[:, :prompt], batch["input_ids"])
    for step in range(5):
        ids = tokens[:, : prompt + step]
        mask = torch.cat([batch["attention_mask"], torch.ones(2, step, dtype=torch.int64)], 1)
        with torch.no_grad():
            logits = model(**{**batch, "input_ids": ids, "attention_mask": mask}).logits
        assert torch.equal(logits[:, -1].argmax(-1), tokens[:, prompt + step])


def test_answers_do_not_depend_on_the_batch(model, processor):
    questions = [
        processor.encode(conversation("Which digit is this?", images=[make_image(0)])),
        processor.encode(conversation("A much longer question, so that the other row is padded?")),
    ]
    together = answer(model, processor, questions, max_new_tokens=5)
    assert together == [answer(model, processor, [each], max_new_tokens=5)[0] for each in questions]


def test_bad_batches_say_what_is_wrong(model, processor, samples):
    packed, padded = inputs(processor.pack(samples)), inputs(processor.pad(samples))
    without_images = {name: padded[name] for name in ("input_ids", "attention_mask")}
    one_image = processor.pack(samples[:1])
    cases = [
        (without_images, "one image token for each of the 0 vision tokens, but it holds 15"),
        ({**packed, "pixel_values": one_image["pixel_values"]}, r"media_layout describes \d+ vision tokens"),
        ({**packed, "frame_positions": torch.zeros(2).long()}, "frame_positions has shape"),
        ({**packed, "pixel_values": packed["pixel_values"][:, :5]}, "pixel_values must be"),
        ({**packed, "attention_mask": padded["attention_mask"]}, "attention_mask .* or layout"),
        ({**packed, "input_ids": packed["input_ids"].repeat(2, 1)[:1, :-1]}, "as its layout says"),
        ({**packed, "labels": torch.zeros(1, 3).long()}, "labels have shape"),
        ({}, "input_ids or inputs_embeds"),
        ({**padded, "attention_mask": padded["attention_mask"][:, 1:]}, "attention_mask has shape"),
        ({**packed, "frame_positions": torch.full((8,), 9)}, "below max_frames, 4"),
        ({**padded, "input_ids": None, "inputs_embeds": torch.zeros(1, 2, 32)}, "pixel_values beside input_ids"),
    ]
    for batch, message in cases:
        with pytest.raises(ValueError, match=message):
            model(**batch)


@pytest.mark.parametrize("has_bias", [False, True])
def test_logits_of_a_large_vocabulary(model, has_bias, monkeypatch):
    """Without gradients, in fp32 on a CPU, they are oneDNN's; a head that was changed is called as it is."""
    monkeypatch.setattr(onednn, "SMALL_WEIGHT", 0)
    called = []
    product = onednn.linear
    monkeypatch.setattr(onednn, "linear", lambda *args: called.append(1) or product(*args))
    hidden, head = torch.randn(2, 5, 32), model.get_output_embeddings()
    head.bias = nn.Parameter(torch.randn(head.out_features)) if has_bias else None
    expected = head(hidden)
    with torch.no_grad():
        for rows in (hidden, hidden[:, -1:], hidden[:, ::2], hidden[:0], hidden[0]):
            found = model.project(rows)
            exact, low = head.double()(rows.double()), head.float()(rows)
            assert_within_budget(found, exact, low)
        assert len(called) == 5
        hook = head.register_forward_hook(lambda module, args, out: out + 1)
        torch.testing.assert_close(model.project(hidden), expected + 1)
        hook.remove()
        head.forward = lambda rows: torch.zeros(())
        assert model.project(hidden) == 0
        del head.forward
    assert model.project(hidden).requires_grad
    assert len(called) == 5


@pytest.mark.parametrize("tied", [False, True])
def test_the_vocabulary_can_grow(config, tokenizer, tied, tmp_path):
    """New tokens come behind the old ones, whose logits stay; the placeholder of the image moves out of their way."""
    config.text_config.tie_word_embeddings = config.tie_word_embeddings = tied
    model = make_model(config)
    batch = inputs(LynxProcessor.for_model(config, tokenizer)(text="What?", images=make_image(0)))
    before = model(**batch).logits
    size = len(tokenizer) + 3
    model.resize_token_embeddings(size)
    model.config.image_token_id = size
    ids = batch["input_ids"]
    batch["input_ids"] = torch.where(ids == len(tokenizer), size, ids)
    after = model(**batch).logits
    assert after.shape[-1] == size
    torch.testing.assert_close(after[..., : len(tokenizer)], before)
    assert model(**batch, labels=batch["input_ids"].masked_fill(ids == len(tokenizer), -100)).loss > 0
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(LynxForConditionalGeneration.from_pretrained(tmp_path)(**batch).logits, after)


def test_another_attention_refuses_packed_rows(config, processor, samples):
    config.text_config._attn_implementation = "sdpa"
    with pytest.raises(ValueError, match="packed rows need attn_implementation='lynx'"):
        make_model(config)(**inputs(processor.pack(samples)))


def test_reentrant_checkpointing_is_refused(model):
    with pytest.raises(ValueError, match="re-entrant checkpointing"):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})


@pytest.mark.parametrize(
    ("decoder_config", "message"),
    [(CohereConfig(logit_scale=0.1), "logit_scale=0.1"), (GraniteConfig(logits_scaling=3.0), "logits_scaling=3.0")],
)
def test_decoders_with_more_than_a_projection_are_refused(tokenizer, decoder_config, message):
    config = make_config(tokenizer)
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    for name in (*sizes, "num_key_value_heads", "pad_token_id"):
        setattr(decoder_config, name, getattr(config.text_config, name))
    config.text_config = decoder_config
    with pytest.raises(ValueError, match=message):
        LynxForConditionalGeneration(config)


def test_a_projection_with_a_bias_is_refused(tokenizer):
    config = make_config(tokenizer)
    decoder = LlamaForCausalLM(config.text_config)
    decoder.lm_head = nn.Linear(32, len(tokenizer))
    with pytest.raises(ValueError, match="with a bias"):
        LynxForConditionalGeneration(config, language_model=decoder)
