"""Cross-attention fusion: against a plain definition, packed against padded, no leak, generation, and every refusal."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from transformers import DynamicCache, LlamaForCausalLM, StaticCache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from lynx import LynxForConditionalGeneration, LynxProcessor, checkpoint
from lynx.fusion.cross_attention import CrossAttentionCache, Media, text_layout
from lynx.generation import answer
from lynx_kernels import SpanLayout
from tests.lynx.conftest import conversation, make_config, make_model, picture
from tests.lynx_kernels.attention_helpers import EXAMPLES

BLOCKS = {"cross_attention_heads": 2, "cross_attention_head_dim": 8, "cross_attention_expansion": 2}


def cross_config(tokenizer, **options):
    return make_config(tokenizer, fusion="cross_attention", **{**BLOCKS, **options})


@pytest.fixture
def config(tokenizer):
    return cross_config(tokenizer)


def interleaved(seed=0, answer="seven"):
    """An image and a video inside a question, and an image in the next one."""
    content = [
        {"type": "text", "text": "Is this "},
        {"type": "image", "image": picture(seed)},
        {"type": "text", "text": "like "},
        {"type": "video", "video": [picture(seed + 1), picture(seed + 2)]},
        {"type": "text", "text": "this?"},
    ]
    second = [{"type": "text", "text": "Odd?"}, {"type": "image", "image": picture(seed + 3)}]
    return [
        {"role": "user", "content": content},
        {"role": "assistant", "content": answer},
        {"role": "user", "content": second},
    ]


@pytest.fixture
def samples(processor):
    """Interleaved media, none at all, two together before the text, one image."""
    conversations = [
        [*interleaved(), {"role": "assistant", "content": "no"}],
        conversation("Hello", "yes, hello"),
        conversation("Same?", "no", images=[picture(4)], videos=[[picture(5), picture(6)]]),
        conversation("Which digit is this?", "seven", images=[picture(7)]),
    ]
    return [processor.encode(messages) for messages in conversations]


def inputs(batch):
    return {name: value for name, value in batch.items() if name != "labels"}


def tokens_before(processor, sample):
    return [processor.tokenizer.decode(sample.token_ids[:place]) for place in sample.places]


def test_media_stand_where_they_stand_in_the_text(processor, samples):
    first = "<s>User: is this like this?\nBot: seven</s>\nUser: odd?\nBot: no</s>"
    assert processor.tokenizer.decode(samples[0].token_ids) == first
    before = tokens_before(processor, samples[0])
    assert [text.rstrip() for text in before] == [
        "<s>User: is this", "<s>User: is this like", "<s>User: is this like this?\nBot: seven</s>\nUser: odd?",
    ]  # fmt: skip
    assert tokens_before(processor, samples[2]) == ["<s>", "<s>"]
    assert samples[1].places == []


def test_places_follow_the_text_as_it_is_changed(processor):
    """Stripped, lower-cased (to another length, even), and in an answer."""
    image = {"type": "image", "image": picture(0)}
    content = [
        {"type": "text", "text": "  "}, image, {"type": "text", "text": " \u0130 is"}, image,
        {"type": "text", "text": " it  "}, image,
    ]  # fmt: skip
    reply = [image, {"type": "text", "text": "ye"}, image, {"type": "text", "text": "s"}]
    sample = processor.encode([{"role": "user", "content": content}, {"role": "assistant", "content": reply}])
    question = "<s>User: i\u0307 is it"
    assert tokens_before(processor, sample)[:4] == ["<s>", "<s>User: i\u0307 is", question, question + "\nBot:"]
    place = sample.places[4]
    assert processor.tokenizer.decode(sample.token_ids[: place + 1]).endswith("s"), "a token cut by it comes after it"
    second_turn = [*conversation("a", "b"), *conversation("c", images=[picture(0)])]
    assert tokens_before(processor, processor.encode(second_turn)) == ["<s>User: a\nBot: b</s>"]


TEXTS = st.lists(
    st.integers(0, 5).flatmap(
        lambda length: st.tuples(st.just(length), st.lists(st.integers(0, length), max_size=4).map(sorted))
    ),
    max_size=4,
)


@EXAMPLES
@given(TEXTS, st.integers(1, 3), st.sampled_from(["preceding", "all"]))
def test_who_sees_which_media(texts, num_latents, sees):
    layout = text_layout(texts, num_latents, sees=sees)
    owner = [(text, place) for text, (_, places) in enumerate(texts) for place in places]  # of every item
    rows = []
    for text, (length, places) in enumerate(texts):
        for token in range(length):
            nearest = max((place for place in places if place <= token), default=None)
            row = [
                item_text == text and place <= token and (sees == "all" or place == nearest)
                for item_text, place in owner
            ]
            rows.append([seen for seen in row for _ in range(num_latents)])
    shape = sum(length for length, _ in texts), num_latents * len(owner)
    expected = torch.tensor(rows, dtype=torch.bool).reshape(shape)
    assert torch.equal(layout.visible(), expected)


def plain_logits(model, sample, media, sees):
    """One sample by itself, from the descriptions: dense masks, PyTorch's modules, no kernel of ours.

    Args:
        media: (tokens, width) of its items, each ``num_latents``.
    """
    decoder, config = model.get_decoder(), model.config
    ids = torch.tensor([sample.token_ids])
    x = decoder.embed_tokens(ids)
    cos_sin = decoder.rotary_emb(x, position_ids=torch.arange(ids.shape[1])[None])
    token = torch.arange(ids.shape[1])[:, None]
    place = torch.tensor(sample.places, dtype=torch.int64)
    sees_item = place <= token
    if sees == "preceding" and len(place):
        sees_item &= place == torch.where(sees_item, place, -1).amax(1, keepdim=True)
    mask = sees_item.repeat_interleave(config.num_latents, 1)
    frequency = config.cross_attention_frequency
    for number, layer in enumerate(decoder.layers, start=1):
        assert hasattr(layer, "cross_attention") == (number % frequency == 0)
        if number % frequency == 0:
            x = plain_block(layer.cross_attention, x, media, mask)
        hidden = layer.input_layernorm(x)
        attention = layer.self_attn
        q, k, v = (
            project(hidden).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
            for project in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        q, k = apply_rotary_pos_emb(q, k, *cos_sin)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + attention.o_proj(out.transpose(1, 2).flatten(2))
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return model.language_model.lm_head(decoder.norm(x))[0]


def plain_block(block, x, media, mask):
    q = block.to_q(block.norm(x)).unflatten(-1, (-1, block.head_dim))[0]
    k, v = block.to_kv(media).unflatten(-1, (2, -1, block.head_dim)).unbind(1)
    scores = torch.einsum("qhd,khd->hqk", q, k) / block.head_dim**0.5
    weights = scores.masked_fill(~mask, -1e300).softmax(-1) * mask
    x = x + block.attention_gate.tanh() * block.to_out(torch.einsum("hqk,khd->qhd", weights, v).flatten(1))
    inner = F.gelu(block.feed_forward_in(block.feed_forward_norm(x)))
    return x + block.feed_forward_gate.tanh() * block.feed_forward_out(inner)


def in_fp64(model):
    """Llama's RMSNorm rounds to fp32 inside; PyTorch's does not."""
    for module in list(model.language_model.modules()):
        for name, child in list(module.named_children()):
            if type(child).__name__ == "LlamaRMSNorm":
                norm = nn.RMSNorm(child.weight.shape[0], eps=child.variance_epsilon)
                norm.weight = child.weight
                setattr(module, name, norm)
    return model.double()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"sees_media": "all", "cross_attention_frequency": 2},
        {"resampler_concatenates_latents": True, "sees_media": "all"},
        {"resampler_concatenates_latents": True, "cross_attention_frequency": 3},
    ],
    ids=str,
)
def test_equals_the_plain_definition(tokenizer, options):
    """Logits, and the gradient of every parameter, in fp64."""
    config = cross_config(tokenizer, **options)
    model, processor = in_fp64(make_model(config)), LynxProcessor.for_model(config, tokenizer)
    batches = [
        [*interleaved(), {"role": "assistant", "content": "no"}],
        conversation("Hello", "yes"),
        conversation("Same?", "no", images=[picture(4)], videos=[[picture(5), picture(6)]]),
    ]
    samples = [processor.encode(messages) for messages in batches]
    packed = processor.pack(samples)
    logits = model(**inputs(packed)).logits[0]
    items = [len(sample.media) * config.num_latents for sample in samples]
    media = model.encode_media(packed["pixel_values"], packed["frame_positions"], packed["media_layout"]).split(items)
    expected = torch.cat(
        [plain_logits(model, sample, own, config.sees_media) for sample, own in zip(samples, media, strict=True)]
    )
    torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-10)
    weight = torch.randn_like(logits)
    parameters = dict(model.named_parameters())
    ours, theirs = (
        torch.autograd.grad((each * weight).sum(), list(parameters.values())) for each in (logits, expected)
    )
    for name, actual, exact in zip(parameters, ours, theirs, strict=True):
        assert exact.any(), name
        torch.testing.assert_close(actual, exact, rtol=1e-8, atol=1e-8, msg=name)


def test_a_new_model_is_its_language_model(tokenizer, config, processor, samples):
    """Bit for bit, with pictures, packed, padded and generating; and training can open the gates."""
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
    packed, padded = processor.pack(samples), processor.pad(samples)
    packed_logits = model(**inputs(packed)).logits[0]
    padded_logits = model(**inputs(padded)).logits[padded["attention_mask"].bool()]
    assert packed_logits.abs().max() > 0.1
    torch.testing.assert_close(packed_logits, padded_logits, rtol=0, atol=1e-4)
    torch.testing.assert_close(model(**packed).loss, model(**padded).loss, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("sees", "second_item"), [("preceding", False), ("all", True)])
def test_who_a_picture_reaches(tokenizer, sees, second_item):
    """Change one picture of one sample: other samples and earlier tokens stay bit for bit."""
    config = cross_config(tokenizer, sees_media=sees, resampler_concatenates_latents=second_item)
    model, processor = make_model(config), LynxProcessor.for_model(config, tokenizer)
    one, two = (processor.encode(interleaved(seed)) for seed in (0, 10))
    changed = copy.deepcopy(two)
    changed.media[0][0] = picture(99)
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
    other = processor.encode(conversation("Odd?", "no", images=[picture(0)]))
    beside_others = model(**inputs(processor.pack([other, sample]))).logits[0, len(other.token_ids) :]
    torch.testing.assert_close(beside_others, alone, rtol=0, atol=1e-5)
    model(**batch).loss.backward()
    blocks = [layer.cross_attention for layer in model.get_decoder().layers]
    assert all(parameter.grad is not None for block in blocks for parameter in block.parameters())


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
    batch = processor.pack(samples)
    model.train()
    model(**batch).loss.backward()
    plain = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    calls = []
    block = model.get_decoder().layers[0].cross_attention
    block.register_forward_hook(lambda *args: calls.append(1))
    model(**batch).loss.backward()
    assert len(calls) == 2, "the block is part of what is computed again"
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, plain[name], msg=name)


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


def test_blocks_stand_before_every_kth_layer(tokenizer):
    model = LynxForConditionalGeneration(cross_config(tokenizer, cross_attention_frequency=2))
    assert [hasattr(layer, "cross_attention") for layer in model.get_decoder().layers] == [False, True, False]
    names = dict(model.named_parameters())
    assert "language_model.model.layers.1.self_attn.q_proj.weight" in names, "blocks must not rename the decoder"
    assert not any("output_adapter" in name for name in names)
    assert "LlamaDecoderLayerWithCrossAttention" in model._no_split_modules
    assert len(model(torch.tensor([[1, 2]]), output_hidden_states=True).hidden_states) == 4


@pytest.fixture
def questions(processor):
    batch = processor.pad([processor.encode(each) for each in (interleaved(), conversation("Hello"), interleaved(20))])
    return inputs(batch)


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
    """Keys and values once a block, pictures once, however many beams and tokens."""
    calls = []
    model.resampler.register_forward_hook(lambda *args: calls.append("resampler"))
    for layer in model.get_decoder().layers:
        layer.cross_attention.to_kv.register_forward_hook(lambda module, args, out: calls.append(out.shape[0]))
    model.generate(**questions, max_new_tokens=4, num_beams=3, eos_token_id=-1)
    assert calls == ["resampler", *[6 * 3] * 3], "6 items of 3 latents, 3 blocks"


def test_going_on_from_a_cache_by_hand(model, processor):
    """Two rows, several tokens a step; each sees what the last token of its row saw."""
    samples = [processor.encode(each) for each in (interleaved(), conversation("Odd?", images=[picture(8)]))]
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
    samples = [processor.encode(each) for each in (interleaved(), conversation("A question without a picture?"))]
    together = answer(model, processor, samples, max_new_tokens=5)
    assert together == [answer(model, processor, [each], max_new_tokens=5)[0] for each in samples]


def test_saved_and_loaded(model, processor, samples, tmp_path):
    checkpoint.save(tmp_path / "model", model, processor)
    loaded, its_processor = checkpoint.load(tmp_path / "model")
    for each in (processor.pack(samples), its_processor.pack(samples)):
        assert torch.equal(loaded(**each).loss, model(**processor.pack(samples)).loss)
    processor.sees_media = "all"
    checkpoint.save(tmp_path / "other", model, processor)
    with pytest.raises(ValueError, match="the processor has sees_media=all, but the model wants preceding"):
        checkpoint.load(tmp_path / "other")


def test_bad_batches_say_what_is_wrong(tokenizer, model, processor, samples, questions):
    packed = inputs(processor.pack(samples))
    fewer = processor.pack(samples[:1])["cross_layout"]
    fewer_keys = SpanLayout.from_spans([packed["input_ids"].numel()], [(0, 9)], 9)
    shorter = SpanLayout.from_spans([3], [(0, 15)], 15)
    decoder_config = model.get_decoder().config
    filled = DynamicCache(config=decoder_config)
    model.requires_grad_(False)
    filled.update(torch.zeros(1, 2, 4, 8), torch.zeros(1, 2, 4, 8), 0)
    cases = [
        ({**packed, "cross_layout": None}, "cross_layout is missing"),
        ({**packed, "pixel_values": None}, "cross_layout describes 18 vision tokens, but the pictures give 0"),
        ({**packed, "cross_layout": fewer}, r"cross_layout describes \d+ tokens, but input_ids holds"),
        ({**packed, "cross_layout": fewer_keys}, "cross_layout describes 9 vision tokens, but the pictures give 18"),
        (
            {"input_ids": torch.tensor([[1, 2]]), "media": Media(torch.zeros(15, 32), shorter)},
            "3 tokens, the batch has",
        ),
        ({"input_ids": torch.tensor([[1, processor.image_token_id]])}, "one picture token for each of the 0"),
        ({"input_ids": torch.tensor([[1]]), "past_key_values": filled}, "a DynamicCache that cannot hold media"),
        (
            {"input_ids": torch.tensor([[1]]), "past_key_values": DynamicCache(config=decoder_config, offloading=True)},
            "cannot hold media",
        ),
        (
            {"input_ids": torch.tensor([[1]]), "past_key_values": StaticCache(decoder_config, max_cache_len=9)},
            "a StaticCache that cannot hold media",
        ),
    ]
    for batch, message in cases:
        with pytest.raises(ValueError, match=message):
            model(**batch)
    with pytest.raises(ValueError, match="cannot hold media"):
        model.generate(**questions, max_new_tokens=2, cache_implementation="static")
    with pytest.raises(ValueError, match="no media reached LlamaDecoderLayerWithCrossAttention"):
        model.language_model(torch.tensor([[1, 2]]))
    with pytest.raises(ValueError, match="past_key_values holds the media of its text"):
        model(**questions, past_key_values=model(**questions).past_key_values)
    prefix = make_model(make_config(tokenizer))
    with pytest.raises(ValueError, match="cross_layout is for fusion='cross_attention', this model has 'prefix'"):
        prefix(**packed)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cross_attention_frequency": 4}, "cross_attention_frequency is 4, but text_config has 3 layers"),
        ({"cross_attention_heads": 0}, "cross_attention_heads is 0"),
        ({"bridge": "mlp"}, "through bridge='resampler', not 'mlp'"),
        ({"prefix_is_causal": False}, "there is no prefix"),
        ({"sees_media": "later"}, "sees_media='later' is not known; there is 'preceding', 'all'"),
    ],
)
def test_contradictory_configurations_are_refused(tokenizer, options, message):
    with pytest.raises(ValueError, match=message):
        cross_config(tokenizer, **options)


def test_what_another_fusion_ignores_is_no_contradiction(tokenizer):
    assert cross_config(tokenizer, adapter_frequency=9).fusion == "cross_attention"
