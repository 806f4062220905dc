"""``generate`` over a cache with shared roots: the tokens of transformers' own generation."""

import copy

import pytest
import torch
from transformers import CompileConfig, DynamicCache, GenerationConfig

from lynx.generation import cache as cache_module
from lynx.generation.answers import generate_answers
from tests.lynx.conftest import conversation, make_config, make_image, make_model
from tests.lynx.searches import NEW, SEARCHES, plain


@pytest.fixture
def batch(processor):
    return processor(
        text=["Which digit is this?", "Hello", "Which digits are these?"],
        images=[make_image(0), None, None],
        videos=[None, None, [make_image(1), make_image(2)]],
    )


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("inputs", ["ids", "embeddings"])
def test_generate_says_what_transformers_says(model, batch, reads, search, inputs):
    if inputs == "embeddings":
        vision_tokens = model.encode_media(batch["pixel_values"], batch["frame_positions"], batch["media_layout"])
        embeds = model.embed(batch["input_ids"], vision_tokens)
        batch = {"inputs_embeds": embeds.detach(), "attention_mask": batch["attention_mask"]}
    found = []
    for each in (plain(model), model):
        reads.clear()
        torch.manual_seed(7)
        wanted = {"return_dict_in_generate": True, "output_scores": True}
        found.append(each.generate(**batch, **SEARCHES[search], **NEW, **wanted))
    expected, shared = found
    assert torch.equal(shared.sequences, expected.sequences)
    for ours, theirs in zip(shared.scores, expected.scores, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    if search == "beams":
        torch.testing.assert_close(shared.sequences_scores, expected.sequences_scores)
    assert reads[0] == (1, int(batch["attention_mask"].sum())), "a prompt is read once, without its pads"


@pytest.mark.parametrize("search", ["greedy", "beams"])
def test_static_shapes_change_nothing(model, batch, search):
    expected = model.generate(**batch, **SEARCHES[search], **NEW)
    assert torch.equal(model.generate(**batch, **SEARCHES[search], **NEW, cache_implementation="static"), expected)


@pytest.mark.parametrize("search", ["greedy", "beams"])
def test_steps_of_static_shapes_compile_once(model, processor, batch, search, monkeypatch):
    """As on GPUs: those of sampling by transformers, those of beam search by us."""
    expected = model.generate(**batch, **SEARCHES[search], **NEW)
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    compile_config = CompileConfig(fullgraph=True, backend=backend, mode=None)
    compile_config._compile_all_devices = True
    model.generation_config.compile_config = compile_config
    if search == "beams":
        compiles = type(model)._compiles
        monkeypatch.setattr(type(model), "_compiles", lambda self, cache: compiles(OnGpu(), cache))
    torch._dynamo.reset()
    options = {**SEARCHES[search], **NEW, "cache_implementation": "static"}
    assert torch.equal(model.generate(**batch, **options), expected)
    assert len(compiled) == 1
    other = processor(text=["Which digit is that?", "Hello", "Bye"], images=[make_image(3), None, None])
    assert torch.equal(model.generate(**other, **options), model.generate(**other, **SEARCHES[search], **NEW))
    assert len(compiled) == 1, "another generation, with prompts of other lengths, takes what is compiled"


class OnGpu:
    device = torch.device("cuda")


def test_full_prefixes(tokenizer, processor):
    """An image whose vision tokens all see each other, against forward passes over packed rows."""
    model = make_model(make_config(tokenizer, prefix_is_causal=False))
    sample = processor.encode(conversation("Which digit is this?", images=[make_image(0)]))
    [said] = generate_answers(model, processor, [sample], max_new_tokens=5)
    batch = processor(text="Which digit is this?", images=make_image(0))
    assert model.generate(**batch, max_new_tokens=5)[0, batch["input_ids"].shape[1] :].tolist() == said.token_ids
    for step, token in enumerate(said.token_ids):
        row = copy.deepcopy(sample)
        row.token_ids.extend(said.token_ids[:step])
        row.labels.extend([-100] * step)
        packed = processor.pack([row])
        layout = type(packed["layout"]).from_prefixes([3], [len(row.token_ids)], root_is_causal=False)
        with torch.no_grad():
            logits = model(**{**packed, "labels": None, "layout": layout}).logits
        assert int(logits[0, -1].argmax()) == token


def test_long_answers_outgrow_a_block(model, batch, monkeypatch):
    expected = plain(model).generate(**batch, max_new_tokens=20, min_new_tokens=20, num_beams=2)
    monkeypatch.setattr(cache_module, "BLOCK", 4)
    assert torch.equal(model.generate(**batch, max_new_tokens=20, min_new_tokens=20, num_beams=2), expected)


@pytest.mark.parametrize(
    "options",
    [
        {"past_key_values": DynamicCache()},
        {"use_cache": False},
        {"prompt_lookup_num_tokens": 2},
        {"output_hidden_states": True},
        {"generation_config": GenerationConfig(use_cache=False, max_new_tokens=8)},
        {"generation_config": GenerationConfig(prompt_lookup_num_tokens=2, max_new_tokens=8)},
    ],
    ids=lambda options: next(iter(options)),
)
def test_who_needs_another_cache_gets_it(model, processor, reads, options):
    batch = processor(text="Which digit is this?")
    options = {**({} if "generation_config" in options else NEW), **copy.deepcopy(options)}
    assert not model.shares_roots(options)
    expected = model.generate(**batch, **NEW)
    assert torch.equal(model.generate(**batch, **options), expected)


def test_a_batch_without_a_mask(model, reads):
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    for first, read in ((5, (1, 6)), (model.config.pad_token_id, (2, 3))):  # perhaps a pad: transformers decides
        ids[0, 0] = first
        expected = plain(model).generate(ids, **NEW)
        reads.clear()
        assert torch.equal(model.generate(ids, **NEW), expected)
        assert reads[0] == read
    with pytest.raises(ValueError, match="attention_mask has shape"):
        model.generate(ids, attention_mask=torch.ones(2, 2), **NEW)
    with pytest.raises(ValueError, match="needs max_new_tokens"):
        model.generate(ids[:, 1:], max_length=9, cache_implementation="static")
