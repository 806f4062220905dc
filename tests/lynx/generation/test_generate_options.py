"""Every option of transformers' ``generate`` on models that are given images, in both fusions.

What a Lynx model says is what transformers' own ``generate`` says of the whole rows, run again at every step without a
cache. Options that read the prompt from its ids alone, that need layers which a Lynx model does not have, or whose code
has left transformers are refused by name; so is what makes no sense together. Each field of ``GenerationConfig`` stands
in one of the tables here, and a field that a new release of transformers adds fails a test by its name.
"""

import copy
import inspect
from functools import partial

import pytest
import torch
from transformers import (
    CompileConfig,
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessor,
    PreTrainedModel,
    StaticCache,
    StoppingCriteria,
    SynthIDTextWatermarkingConfig,
    TextIteratorStreamer,
    TextStreamer,
    WatermarkingConfig,
)
from transformers.generation.streamers import BaseStreamer
from transformers.modeling_outputs import CausalLMOutput

from lynx import LynxConfig, LynxProcessor
from lynx.data.tokenizer import train_tokenizer
from lynx.fusion.cross_attention import CrossAttentionCache, Media, text_layout
from lynx.generation.cache import SharedRootCache
from tests.lynx.conftest import conversation, make_config, make_image, make_model
from tests.lynx.fusion.cross_attention.conftest import cross_config, interleaved
from tests.lynx.model_checks import inputs
from tests.lynx.searches import plain

FUSIONS = {
    "prefix": make_config,
    "cross_attention": cross_config,
    "full prefix": partial(make_config, prefix_is_causal=False),
}
NEW = {"max_new_tokens": 6}
BEAMS = {"num_beams": 3}
SAMPLED = {"do_sample": True}


class WholeRows(PreTrainedModel, GenerationMixin):
    """A model of plain transformers that runs a Lynx model over the whole rows, without a cache."""

    config_class = LynxConfig
    main_input_name = "input_ids"
    _supports_sdpa = True

    def __init__(self, model, processor, samples):
        super().__init__(model.config)
        self.lynx, self.processor, self.samples = [model], processor, samples  # a list: no submodule
        self.generation_config = model.generation_config
        self.prompt = processor.pad(samples)["input_ids"]
        self.media = []
        for sample in samples:
            batch = processor.pad([sample])
            names = ("pixel_values", "frame_positions", "media_layout")
            found = [batch[name] for name in names if name in batch]
            self.media.append(model.encode_media(*found) if found else None)

    @property
    def device(self):
        return torch.device("cpu")

    def forward(self, input_ids, attention_mask=None, **kwargs):
        [model], (rows, length) = self.lynx, input_ids.shape
        repeats = rows // len(self.samples)
        samples = [sample for sample in self.samples for _ in range(repeats)]
        found = [media for media in self.media for _ in range(repeats) if media is not None]
        prompt = self.prompt.repeat_interleave(repeats, 0)
        if not torch.equal(input_ids[:, : prompt.shape[1]], prompt):  # a prompt for classifier-free guidance
            return CausalLMOutput(logits=model(input_ids, attention_mask=attention_mask, use_cache=False).logits)
        media = torch.cat(found) if found else None
        options = {"attention_mask": attention_mask, "use_cache": False}
        if model.fusion.name == "cross_attention":
            texts = []
            for sample in samples:
                pads = prompt.shape[1] - len(sample.token_ids)
                places = [0] * len(sample.media) if sample.places is None else sample.places
                texts += [(pads, [], ()), (length - pads, places, ())]
            layout = text_layout(texts, model.config.num_latents, sees=model.config.sees_media)
            options["media"] = Media(media, layout)
            return CausalLMOutput(logits=model(input_ids, **options).logits)
        if not model.config.prefix_is_causal:
            options["prefix_lengths"] = (input_ids == model.config.image_token_id).sum(1)
        return CausalLMOutput(logits=model(inputs_embeds=model.embed(input_ids, media), **options).logits)


class Asked:
    """A model, prompts of it, and what plain transformers says."""

    def __init__(self, fusion, tokenizer, *, rows):
        config = FUSIONS[fusion](tokenizer)
        self.fusion, self.tokenizer = fusion, tokenizer
        self.model, self.processor = make_model(config), LynxProcessor.for_model(config, tokenizer)
        prompts = [conversation("Which digit is this?", images=[make_image(6)])]
        if fusion == "cross_attention":
            prompts = [interleaved(70)]
        if rows == 2:
            prompts.append(conversation("Hello"))
        self.samples = [self.processor.encode(each) for each in prompts]
        self.batch = inputs(self.processor.pad(self.samples))
        self.whole = WholeRows(self.model, self.processor, self.samples)
        self.prompt = self.batch["input_ids"].shape[1]
        self.known, self.ends = {}, {}
        self.said = self.expected(eos_token_id=-1)[0, self.prompt :].tolist()  # the greedy answer to the first prompt
        self.known, self.ends = {}, {"eos_token_id": self.said[3]}  # or options about the end would do nothing

    def ids(self):
        return {name: self.batch[name] for name in ("input_ids", "attention_mask")}

    def says(self, model=None, **options):
        torch.manual_seed(3)
        options = {**NEW, **self.ends, **options}
        return (self.model if model is None else model).generate(**self.batch, **options)

    def expected(self, **options):
        """What the whole rows say."""
        if (key := repr(options)) not in self.known:
            torch.manual_seed(3)
            options = {**NEW, **self.ends, **options, "use_cache": False}
            self.known[key] = self.whole.generate(**self.ids(), **options)
        return self.known[key]


@pytest.fixture(scope="module", params=["prefix", "cross_attention"])
def asked(request, tokenizer):
    return Asked(request.param, tokenizer, rows=2)


@pytest.fixture(scope="module", params=FUSIONS)
def one(request, tokenizer):
    """A single prompt, with images."""
    return Asked(request.param, tokenizer, rows=1)


def draft(tokenizer, **options):
    """A language model of its own that knows the tokenizer and no images."""
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        pad_token_id=tokenizer.pad_token_id, **options,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


UNENDING = {"eos_token_id": -1}

# Field -> options in which it changes what is said, for a model and its greedy answer; then a Lynx model says the same
# as the whole rows do.
SAYS_THE_SAME = {
    "bad_words_ids": lambda said: {"bad_words_ids": [[said[1]]]},
    "begin_suppress_tokens": lambda said: {"begin_suppress_tokens": [said[0]]},
    "do_sample": SAMPLED,
    "early_stopping": lambda said: {**BEAMS, "early_stopping": True, "eos_token_id": said[1:], "length_penalty": 9.0},
    "eos_token_id": lambda said: {"eos_token_id": [said[1], said[2]]},
    "epsilon_cutoff": {**SAMPLED, "epsilon_cutoff": 0.02},
    "eta_cutoff": {**SAMPLED, "eta_cutoff": 0.9},
    "exponential_decay_length_penalty": {"exponential_decay_length_penalty": (0, 3.0)},
    "forced_eos_token_id": {"forced_eos_token_id": 9, **UNENDING},
    "guidance_scale": {"guidance_scale": 3.0},
    "length_penalty": lambda said: {**BEAMS, "length_penalty": -9.0, "eos_token_id": said[1:]},
    "max_length": {"max_length": 32, "max_new_tokens": None, **UNENDING},
    "max_new_tokens": {"max_new_tokens": 2},
    "max_time": {"max_time": 1e-9},
    "min_length": {"min_length": 60},
    "min_new_tokens": {"min_new_tokens": 6},
    "min_p": {**SAMPLED, "min_p": 0.5},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 1},
    "num_beams": BEAMS,
    "num_return_sequences": {**SAMPLED, "num_return_sequences": 2},
    "pad_token_id": {"pad_token_id": 11},
    "repetition_penalty": {"repetition_penalty": 2.0},
    "sequence_bias": {"sequence_bias": [[[7], 9.0]]},
    "stop_strings": lambda said: {"stop_strings": None, **UNENDING},
    "suppress_tokens": lambda said: {"suppress_tokens": [said[1]]},
    "temperature": {**SAMPLED, "temperature": 0.01},
    "top_h": {**SAMPLED, "top_h": 0.2},
    "top_k": {**SAMPLED, "top_k": 2},
    "top_p": {**SAMPLED, "top_p": 0.3},
    "typical_p": {**SAMPLED, "typical_p": 0.3},
    "watermarking_config": {"watermarking_config": WatermarkingConfig(bias=9.0, seeding_scheme="selfhash")},
}


@pytest.mark.parametrize("field", SAYS_THE_SAME)
def test_it_says_what_the_whole_rows_say(asked, field):
    options = SAYS_THE_SAME[field]
    if callable(options):
        options = options(asked.said)
    if field == "stop_strings":
        options |= {"stop_strings": [asked.tokenizer.decode(asked.said[2])], "tokenizer": asked.tokenizer}
    expected = asked.expected(**options)
    assert torch.equal(asked.says(**options), expected)
    without = asked.expected(**{name: value for name, value in options.items() if name != field})
    assert not torch.equal(without, expected), "the option does nothing here, so nothing is shown"


ASSISTED = {"assistant_model": draft}  # made for the tokenizer by the test

# Field -> options in which it changes how the text is found, but not the text.
SAYS_NOTHING_ELSE = {
    "assistant_confidence_threshold": {**ASSISTED, "assistant_confidence_threshold": 0.9},
    "assistant_lookbehind": {**ASSISTED, "assistant_lookbehind": 2},
    "cache_config": {"cache_implementation": "dynamic", "cache_config": {}},
    "cache_implementation": {"cache_implementation": "static"},
    "compile_config": {"compile_config": CompileConfig(), "cache_implementation": "static"},
    "decoder_start_token_id": {"decoder_start_token_id": 5},
    "disable_compile": {"disable_compile": True, "cache_implementation": "static"},
    "forced_bos_token_id": {"forced_bos_token_id": 7},  # forces the first token of a row, which a prompt has
    "low_memory": {"low_memory": True},  # of beam search, where transformers refuses it
    "max_cache_len": {"max_cache_len": 99, "cache_implementation": "static"},
    "max_matching_ngram_size": {"prompt_lookup_num_tokens": 2, "max_matching_ngram_size": 1},
    "num_assistant_tokens": {**ASSISTED, "num_assistant_tokens": 2},
    "num_assistant_tokens_schedule": {**ASSISTED, "num_assistant_tokens_schedule": "heuristic"},
    "output_hidden_states": {"output_hidden_states": True},
    "output_logits": {"output_logits": True},
    "output_scores": {"output_scores": True},
    "prompt_lookup_num_tokens": {"prompt_lookup_num_tokens": 3},
    "remove_invalid_values": {"remove_invalid_values": True},
    "renormalize_logits": {"renormalize_logits": True, "repetition_penalty": 1.0},
    "return_dict_in_generate": {"return_dict_in_generate": True},
    "target_lookbehind": {**ASSISTED, "target_lookbehind": 2},
    "use_cache": {"use_cache": False},
}


@pytest.mark.parametrize("field", SAYS_NOTHING_ELSE)
def test_it_changes_nothing_that_is_said(one, field):
    options = {**UNENDING, **SAYS_NOTHING_ELSE[field]}
    if "assistant_model" in options:
        options["assistant_model"] = draft(one.tokenizer)
    if one.fusion == "cross_attention" and options.get("cache_implementation") == "static":
        with pytest.raises(ValueError, match=r"StaticCache, which cannot hold media.* cache_implementation"):
            one.says(**options)
        return
    found = one.says(**options)
    found = found if torch.is_tensor(found) else found.sequences
    assert torch.equal(found, one.expected(**UNENDING))


@pytest.mark.parametrize("beside", [None, GenerationConfig(**NEW, **UNENDING)], ids=["alone", "beside another"])
def test_an_option_of_the_models_own_config_counts(one, beside):
    """Also where the call brings a configuration that says nothing of it."""
    model = copy.deepcopy(one.model)
    model.generation_config.update(prompt_lookup_num_tokens=2)
    options = {**NEW, **UNENDING} if beside is None else {"generation_config": beside}
    assert not model.shares_roots(options)
    assert torch.equal(model.generate(**one.batch, **options), one.expected(**UNENDING))


# Field -> options that are refused, and whether for images alone.
REFUSED = {
    "assistant_early_exit": ({"assistant_early_exit": 1}, False),
    "assistant_ensemble_weight": ({"assistant_ensemble_weight": 0.5, "prompt_lookup_num_tokens": 2}, True),
    "constraints": ({"constraints": [1], **BEAMS}, False),
    "diversity_penalty": ({"diversity_penalty": 1.0, **BEAMS}, False),
    "dola_layers": ({"dola_layers": "high"}, False),
    "encoder_no_repeat_ngram_size": ({"encoder_no_repeat_ngram_size": 2}, True),
    "encoder_repetition_penalty": ({"encoder_repetition_penalty": 2.0}, True),
    "force_words_ids": ({"force_words_ids": [[5]], **BEAMS}, False),
    "is_assistant": ({"is_assistant": True}, True),
    "num_beam_groups": ({"num_beam_groups": 2, "num_beams": 4}, False),
    "output_attentions": ({"output_attentions": True, "return_dict_in_generate": True}, False),
    "penalty_alpha": ({"penalty_alpha": 0.6, "top_k": 4}, False),
    "prefill_chunk_size": ({"prefill_chunk_size": 4}, True),
    "speculation_type": ({"speculation_type": "dflash"}, False),
    "token_healing": ({"token_healing": True}, False),
    "use_mtp": ({"use_mtp": True}, False),
}
FROM_IDS = ("encoder_no_repeat_ngram_size", "encoder_repetition_penalty", "assistant_ensemble_weight", "is_assistant")


@pytest.mark.parametrize("field", REFUSED)
def test_it_is_refused_by_name(asked, field):
    options, for_images = REFUSED[field]
    if asked.fusion == "cross_attention" and field in FROM_IDS:
        pytest.skip("its prompts are ids, without embeddings")
    with pytest.raises(ValueError, match=field):
        asked.says(**options)
    model = copy.deepcopy(asked.model)
    model.generation_config.update(**options)
    with pytest.raises(ValueError, match=field):
        asked.says(model, generation_config=GenerationConfig())
    ids = torch.tensor([[5, 6, 7, 5]])
    if not for_images:
        with pytest.raises(ValueError, match=field):
            asked.model.generate(ids, **NEW, **options)


METADATA = {"_from_model_config", "bos_token_id", "continuous_batching_config", "transformers_version"}


def test_every_field_of_generation_config_is_in_a_table():
    """One that a new release of transformers adds belongs into one of them, with options in which it does something."""
    tables = [set(SAYS_THE_SAME), set(SAYS_NOTHING_ELSE), set(REFUSED), METADATA]
    known = set().union(*tables)
    assert sum(map(len, tables)) == len(known), "a field is in two tables"
    assert set(vars(GenerationConfig())) - known == set()


def test_every_argument_of_generate_is_tried():
    known = {
        "inputs", "generation_config", "logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn",
        "synced_gpus", "assistant_model", "streamer", "negative_prompt_ids", "negative_prompt_attention_mask",
        "custom_generate", "kwargs", "self",
    }  # fmt: skip
    assert set(inspect.signature(GenerationMixin.generate).parameters) - known == set()


# What sees the ids


class SeesIds(LogitsProcessor):
    """Remembers the ids that it is given."""

    def __init__(self):
        self.seen = []

    def __call__(self, input_ids, scores):
        self.seen.append(input_ids.clone())
        return scores


class NeverStops(StoppingCriteria):
    """Remembers the ids that it is given."""

    def __init__(self):
        self.seen = []

    def __call__(self, input_ids, scores, **kwargs):
        self.seen.append(input_ids.clone())
        return torch.zeros(len(input_ids), dtype=torch.bool)


def assert_same_sequence(found, expected):
    assert len(found) == len(expected) > 0
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("search", [{}, BEAMS, {**SAMPLED, "num_return_sequences": 2}], ids=str)
def test_processors_and_criteria_see_the_prompt_and_its_placeholders(asked, search):
    seen = []
    for say in (asked.says, partial(asked.expected, use_cache=False)):
        processor, criterion = SeesIds(), NeverStops()
        say(**search, logits_processor=[processor], stopping_criteria=[criterion])
        seen.append((processor.seen, criterion.seen))
    for found, expected in zip(*seen, strict=True):
        assert_same_sequence(found, expected)
    first = seen[0][0][0]
    assert torch.equal(first[0], asked.batch["input_ids"][0]), "image placeholders are seen"


def test_beside_embeddings_alone_they_see_the_new_tokens(one):
    if one.fusion == "cross_attention":
        pytest.skip("its prompts are ids")
    embeds = one.model.embed(one.batch["input_ids"], one.whole.media[0])
    options = {"inputs_embeds": embeds, **NEW, **UNENDING}
    seen = []
    if not one.model.config.prefix_is_causal:
        options["prefix_lengths"] = (one.batch["input_ids"] == one.model.config.image_token_id).sum(1)
    with torch.no_grad():
        for model in (one.model, plain(one.model).language_model):
            processor = SeesIds()
            said = model.generate(**options, logits_processor=[processor])
            seen.append([*processor.seen, said])
            if not one.model.config.prefix_is_causal:
                break  # a plain decoder is causal
    assert [each.shape[1] for each in seen[0]] == list(range(NEW["max_new_tokens"] + 1))
    assert_same_sequence(seen[0], seen[-1])
    assert torch.equal(seen[0][-1], one.expected(**UNENDING)[:, one.prompt :])


def test_allowed_tokens_depend_on_the_row_and_its_ids(asked):
    image = asked.model.config.image_token_id
    calls = []

    def allowed(row, ids):
        calls.append(row)
        return [30 + row + len(ids) % 3, 60 + int((ids == image).sum())]

    for search in ({}, BEAMS):
        options = {"prefix_allowed_tokens_fn": allowed, **search}
        assert torch.equal(asked.says(**options), asked.expected(**options))
    assert set(calls) == {0, 1}


def test_negative_prompts(asked):
    """Classifier-free guidance away from a text of its own, without images."""
    options = {
        "guidance_scale": 2.0, "negative_prompt_ids": torch.tensor([[5, 6, 7], [0, 8, 9]]),
        "negative_prompt_attention_mask": torch.tensor([[1, 1, 1], [0, 1, 1]]), **UNENDING,
    }  # fmt: skip
    expected = asked.expected(**options)
    assert torch.equal(asked.says(**options), expected)
    assert not torch.equal(expected, asked.expected(guidance_scale=2.0, **UNENDING))


def test_guidance_while_the_model_trains(asked):
    model = copy.deepcopy(asked.model).train()
    assert torch.equal(asked.says(model, guidance_scale=3.0), asked.expected(guidance_scale=3.0))


class Collects(BaseStreamer):
    def __init__(self):
        self.values, self.has_ended = [], False

    def put(self, value):
        self.values.append(value)

    def end(self):
        self.has_ended = True


@pytest.mark.parametrize("options", [{}, {"prompt_lookup_num_tokens": 2}], ids=str)
def test_streamers_get_the_prompt_and_then_the_tokens(one, options):
    streamer = Collects()
    said = one.says(**UNENDING, **options, streamer=streamer)
    assert torch.equal(streamer.values[0], one.batch["input_ids"])
    assert torch.equal(torch.cat([each.flatten() for each in streamer.values[1:]]), said[0, one.prompt :])
    assert streamer.has_ended


def test_text_streamers(one, capsys):
    one.says(**UNENDING, streamer=TextStreamer(one.tokenizer, skip_special_tokens=True))
    answer = one.tokenizer.decode(one.said)
    question = one.processor.answer_of(one.batch["input_ids"][0])
    assert capsys.readouterr().out.strip() == f"{question}{answer}".strip(), "a placeholder is no text"
    streamer = TextIteratorStreamer(one.tokenizer, skip_prompt=True)
    one.says(**UNENDING, streamer=streamer)
    assert "".join(streamer) == answer
    with pytest.raises(ValueError, match="`streamer` cannot be used with beam search"):
        one.says(**BEAMS, streamer=Collects())


def test_custom_generate(asked):
    """A decoding loop of the caller's, which is given what transformers' own are given."""
    calls = []

    def loop(model, input_ids, **kwargs):
        calls.append(tuple(input_ids.shape))
        return GenerationMixin._sample(model, input_ids, **kwargs)

    assert torch.equal(asked.says(custom_generate=loop), asked.expected())
    assert calls == [(2, asked.prompt)]


def test_inputs_is_another_name_of_the_ids(asked):
    batch = {**asked.batch, "inputs": asked.batch["input_ids"]}
    with pytest.raises(ValueError, match="input_ids or inputs, not both"):
        asked.model.generate(**batch, **NEW)
    del batch["input_ids"]
    assert torch.equal(asked.model.generate(**batch, **NEW, **asked.ends), asked.expected())


# What is returned beside the text


def assert_same_values(found, expected, where=""):
    if torch.is_tensor(expected):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4, msg=lambda text: f"{where}: {text}")
    elif isinstance(expected, tuple):
        assert len(found) == len(expected), where
        for number, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
            assert_same_values(ours, theirs, f"{where}[{number}]")
    else:
        assert found is expected is None, where


@pytest.mark.parametrize("search", [{}, SAMPLED, BEAMS], ids=str)
@pytest.mark.parametrize("attention", ["eager", "lynx"])
def test_all_that_can_be_returned_is_what_the_plain_decoder_returns(asked, search, attention):
    if asked.fusion == "cross_attention":
        pytest.skip("a plain decoder has no cross-attention")
    vision_tokens = torch.cat([each for each in asked.whole.media if each is not None])
    options = {**NEW, **search, "return_dict_in_generate": True, "eos_token_id": asked.said[3]}
    names = ["scores", "logits", "hidden_states", *(["attentions"] if attention == "eager" else [])]
    options |= {f"output_{name}": True for name in names}
    with torch.no_grad():
        embeds = asked.model.embed(asked.batch["input_ids"], vision_tokens)
        torch.manual_seed(3)
        expected = plain(asked.model).language_model.generate(**asked.ids(), inputs_embeds=embeds, **options)
    torch.manual_seed(3)
    found = (plain(asked.model) if attention == "eager" else asked.model).generate(**asked.batch, **options)
    assert torch.equal(found.sequences, expected.sequences)
    more = ("sequences_scores", "beam_indices") if search == BEAMS else ()
    for name in (*names, *more):
        if name == "hidden_states":  # at pads, they are of no use
            is_token = asked.batch["attention_mask"].bool().repeat_interleave(search.get("num_beams", 1), 0)
            for each in (found, expected):
                each.hidden_states = (
                    tuple(layer[is_token] for layer in each.hidden_states[0]),
                    *each.hidden_states[1:],
                )
        assert expected[name] is not None
        assert_same_values(found[name], expected[name], name)


def test_guesses_change_nothing_that_is_returned(one):
    is_full = one.fusion == "full prefix"  # which eager attention does not know
    names = ("scores", "logits", "hidden_states", *(() if is_full else ("attentions",)))
    options = {"return_dict_in_generate": True, **UNENDING, **{f"output_{name}": True for name in names}}
    model = one.model if is_full else plain(one.model)
    found, expected = (one.says(model, **options, **more) for more in ({"prompt_lookup_num_tokens": 3}, {}))
    assert torch.equal(found.sequences, expected.sequences)
    for name in names:
        assert_same_values(found[name], expected[name], name)


@pytest.mark.parametrize("attention", ["lynx", "sdpa"])
def test_attention_weights_that_nobody_computes_are_refused(asked, attention):
    model = copy.deepcopy(asked.model)
    model.language_model.set_attn_implementation(attention)
    message = f"output_attentions: attn_implementation='{attention}' returns no attention weights"
    with pytest.raises(ValueError, match=message):
        model(**asked.batch, output_attentions=True)
    with pytest.raises(ValueError, match=message):
        asked.says(model, output_attentions=True, return_dict_in_generate=True)


def test_attention_weights(asked):
    """Of the decoder's own attention, a tensor a layer; also where the model's configuration asks for them."""
    model = copy.deepcopy(asked.model)
    model.set_attn_implementation("eager")
    shape = (2, 4, asked.prompt, asked.prompt)
    with torch.no_grad():
        assert [each.shape for each in model(**asked.batch, output_attentions=True).attentions] == [shape] * 3
        model.config.output_attentions = model.config.output_hidden_states = True
        found = model(**asked.batch)
    assert [each.shape for each in found.attentions] == [shape] * 3
    assert len(found.hidden_states) == 4
    model.language_model.set_attn_implementation("lynx")
    with pytest.raises(ValueError, match="attn_implementation='lynx' returns no attention weights"):
        model(**asked.batch)


# Training in between


@pytest.mark.parametrize("options", [{}, BEAMS, SAMPLED, {"use_cache": False}, {"past_key_values": None}], ids=str)
@pytest.mark.parametrize("attention", ["lynx", "eager"])
def test_sampling_while_the_model_trains_with_gradient_checkpointing(asked, options, attention):
    """transformers' layers then pass over the cache, with no more than a warning."""
    model = copy.deepcopy(asked.model)
    model.language_model.set_attn_implementation(attention)
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    expected = asked.expected(**{name: value for name, value in options.items() if name != "past_key_values"})
    if "past_key_values" in options:
        options = {"past_key_values": DynamicCache()}
    assert torch.equal(asked.says(model, **options), expected)
    assert model.training
    assert all(layer.gradient_checkpointing for layer in model.get_decoder().layers), "it goes on after generation"
    with pytest.raises(ValueError, match="max_new_tokens"):
        asked.says(model, max_new_tokens=-1)
    assert all(layer.gradient_checkpointing for layer in model.get_decoder().layers), "also after an error"


def test_a_cache_that_checkpointing_would_drop_is_refused(asked):
    model = copy.deepcopy(asked.model).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for options in ({"use_cache": True}, {"past_key_values": DynamicCache()}):
        with pytest.raises(ValueError, match="gradient checkpointing keeps no keys and values"):
            model(**asked.batch, **options)
    assert model(**asked.batch).past_key_values is None, "not an empty one, from which nothing can go on"
    assert model.eval()(**asked.batch, use_cache=True).past_key_values.get_seq_length() == asked.prompt


# Caches that are handed in


def longer(asked, said):
    """The rows with what was said and three more tokens."""
    more = torch.tensor([[5, 6, 7]]).repeat(len(said), 1)
    ids = torch.cat([said, more], 1)
    mask = torch.cat([asked.batch["attention_mask"], torch.ones(len(said), ids.shape[1] - asked.prompt).long()], 1)
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("rows", ["whole", "new"])
@pytest.mark.parametrize("cache", ["its own", "dynamic", "static"])
def test_going_on_from_a_cache(asked, cache, rows):
    """The cache of an earlier answer, or one that the caller passed to it, holds what was said."""
    if cache == "static" and asked.fusion == "cross_attention":
        pytest.skip("refused, see above")
    options = {**NEW, **UNENDING}
    handed = {
        "its own": None, "dynamic": DynamicCache(), "static": StaticCache(asked.model.config.text_config, 64),
    }[cache]  # fmt: skip
    first = asked.model.generate(**asked.batch, **options, past_key_values=handed, return_dict_in_generate=True)
    held = first.past_key_values
    assert handed is None or held is handed
    if cache != "static":
        assert type(held) is {
            ("prefix", "its own"): SharedRootCache, ("prefix", "dynamic"): DynamicCache,
        }.get((asked.fusion, cache), CrossAttentionCache)  # fmt: skip
    batch = longer(asked, first.sequences)
    expected = asked.whole.generate(**batch, **options, use_cache=False)
    if rows == "new":
        batch["input_ids"] = batch["input_ids"][:, -4:]  # the last token that was said and the three
        expected = expected[:, -4 - NEW["max_new_tokens"] :]
    elif asked.fusion == "prefix" and cache != "its own":
        batch = {**asked.batch, **batch}  # transformers cuts the embeddings of the whole rows
    calls = []
    handle = asked.model.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    found = asked.model.generate(**batch, **options, past_key_values=held)
    handle.remove()
    assert torch.equal(found, expected)
    assert calls[0] == 4


def test_a_cache_that_does_not_fit_the_rows_is_refused(asked):
    first = asked.says(**UNENDING, return_dict_in_generate=True)
    batch, held = longer(asked, first.sequences), first.past_key_values
    size = first.sequences.shape[1]

    def refused(message, **changed):
        with pytest.raises(ValueError, match=message):
            asked.model.generate(**{**batch, **changed}, **NEW, past_key_values=held)

    refused(f"holds {size - 1} tokens of each row, and the batch has 3 in rows of 3", **{
        name: value[:, -3:] for name, value in batch.items()
    })  # fmt: skip
    refused(f"the batch has 3 in rows of {size + 3}", input_ids=batch["input_ids"][:, -3:])
    with pytest.raises(ValueError, match="past_key_values with an assistant or prompt lookup"):
        asked.model.generate(**batch, **NEW, past_key_values=held, prompt_lookup_num_tokens=2)
    of_beams = asked.says(**BEAMS, return_dict_in_generate=True).past_key_values
    with pytest.raises(ValueError, match="past_key_values is left of a beam search"):
        asked.model.generate(**batch, **NEW, **BEAMS, past_key_values=of_beams)
    if asked.fusion == "cross_attention":
        return
    refused("holds 2 rows, but 2 prompts with 3 beams or answers each need 6", num_beams=3)
    refused("holds 2 rows, but 1 prompts", **{name: value[:1] for name, value in batch.items()})
    mask = batch["attention_mask"].clone()
    mask[0, -2] = 0
    refused("every row must go on by the same number of tokens", attention_mask=mask)
    more_pads = {name: torch.nn.functional.pad(value, (5, 0)) for name, value in batch.items()}
    refused("no column may be pads alone", **more_pads)


def test_what_shared_roots_cannot_read_is_refused(asked):
    if asked.fusion == "cross_attention":
        pytest.skip("it shares no roots")
    held = asked.says(return_dict_in_generate=True).past_key_values
    rows = {"input_ids": torch.tensor([[5, 6], [7, 8]]), "past_key_values": held}
    for name in ("pixel_values", "labels"):
        with pytest.raises(ValueError, match=f"{name} cannot be read into a SharedRootCache"):
            asked.model(**rows, **{name: torch.zeros(1)})
    for name in ("output_hidden_states", "output_attentions"):
        with pytest.raises(ValueError, match=f"{name} with a SharedRootCache"):
            asked.model(**rows, **{name: True})
    with pytest.raises(ValueError, match="pads among the next tokens"):
        asked.model(**rows, attention_mask=torch.tensor([[1, 1], [0, 1]]))


# Guessed tokens


def other_tokenizer():
    return train_tokenizer(["User: which digit?\nBot: four", "some other text about digits"], vocab_size=285)


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("kind", ["plain", "a Lynx model", "another tokenizer's", "the prompt"])
def test_whoever_guesses_the_text_is_the_same(one, kind, do_sample):
    """Greedy, or sampled from one token alone; and guesses are indeed read several at once."""
    options = {**UNENDING, **({"do_sample": True, "top_k": 1} if do_sample else {})}
    if kind == "the prompt":
        options["prompt_lookup_num_tokens"] = 3
    elif kind == "another tokenizer's":
        names = {"tokenizer": one.tokenizer, "assistant_tokenizer": other_tokenizer()}
        options |= names | {"assistant_model": draft(names["assistant_tokenizer"])}
    elif kind == "a Lynx model":
        options["assistant_model"] = copy.deepcopy(one.model)
    else:
        options["assistant_model"] = draft(one.tokenizer)
    lengths, processor = [], SeesIds()
    handle = one.model.register_forward_hook(lambda module, args, out: lengths.append(out.logits.shape[1]))
    found = one.says(**options, logits_processor=[processor])
    handle.remove()
    judged = [ids for ids in processor.seen if torch.equal(ids[:, : one.prompt], one.batch["input_ids"])]
    assert {ids.shape[1] for ids in judged} >= set(range(one.prompt, found.shape[1])), "with its placeholders"
    assert torch.equal(found, one.expected(**UNENDING))
    assert max(lengths) > 1, "nothing was guessed"


def test_placeholders_are_never_guessed(tokenizer):
    """An image between the words, after an n-gram that the prompt ends with."""
    config = make_config(tokenizer)
    model, image = make_model(config), config.image_token_id
    ids = torch.tensor([[5, 6, image, image, image, 7, 5, 6]])
    pixels = torch.rand(4, 48)
    expected = model.generate(ids, pixels, **NEW, **UNENDING)
    assert torch.equal(model.generate(ids, pixels, **NEW, **UNENDING, prompt_lookup_num_tokens=3), expected)
    assert not (expected[:, 8:] == image).any()


def test_guesses_are_refused_where_they_would_be_wrong(one):
    lookup = {"prompt_lookup_num_tokens": 2}
    for options, message in (
        ({"guidance_scale": 2.0}, "guidance_scale=2.0 is not supported with an assistant or prompt lookup"),
        (
            {"watermarking_config": SynthIDTextWatermarkingConfig(keys=[1, 2], ngram_len=2), **SAMPLED},
            "watermarking_config=.* is not supported with an assistant or prompt lookup: SynthID",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            one.says(**lookup, **options)
        one.says(**options)
    embeds = {"inputs_embeds": torch.randn(1, 5, 32), "prefix_lengths": torch.tensor([0])}
    if one.fusion == "prefix":
        with pytest.raises(ValueError, match="guesses are made from ids; pass input_ids of the same tokens"):
            one.model.generate(**embeds, **NEW, **lookup)
        with pytest.raises(ValueError, match=r"input_ids are \(1, 4\), but inputs_embeds have \(1, 5\) tokens"):
            one.model.generate(torch.tensor([[5, 6, 7, 8]]), **embeds, **NEW)


# Prompts without images


@pytest.mark.parametrize(
    "options",
    [
        {"prefill_chunk_size": 2}, {"encoder_repetition_penalty": 0.2}, {"encoder_no_repeat_ngram_size": 1},
        {"assistant_ensemble_weight": 0.5, **ASSISTED},
    ],
    ids=lambda options: next(iter(options)),
)  # fmt: skip
def test_what_is_refused_with_images_is_transformers_own_without(tokenizer, options):
    model = make_model(make_config(tokenizer))
    ids = torch.tensor([[5, 6, 7, 8, 5]])
    if "assistant_model" in options:
        options = {**options, "assistant_model": draft(tokenizer)}
    expected = plain(model).language_model.generate(ids, **NEW, **UNENDING, **options)
    assert torch.equal(model.generate(ids, **NEW, **UNENDING, **options), expected)


def test_chunks_of_text_without_media(tokenizer):
    model = make_model(cross_config(tokenizer))
    ids = torch.tensor([[5, 6, 7, 8, 5]])
    expected = model.generate(ids, **NEW, **UNENDING, use_cache=False)
    assert torch.equal(model.generate(ids, **NEW, **UNENDING, prefill_chunk_size=2), expected)


def test_continuous_batching_is_refused(asked):
    with pytest.raises(ValueError, match="cache_implementation='paged' is not supported"):
        asked.says(cache_implementation="paged")
    with pytest.raises(ValueError, match="continuous batching reads input_ids alone"):
        asked.model.generate_batch([[5, 6, 7]], max_new_tokens=2)


@pytest.mark.parametrize("kind", ["offloaded", "offloaded_static"])
def test_offloading_from_a_cpu_is_refused(asked, kind):
    with pytest.raises(ValueError, match=f"cache_implementation='{kind}' is not supported on a CPU"):
        asked.says(cache_implementation=kind)
