"""Generation on a GPU: the same tokens as transformers, and CUDA graphs for steps with static shapes."""

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import Blip2VisionConfig, DynamicCache, LlamaConfig

from lynx import LynxConfig, LynxForConditionalGeneration
from tests.gpu.bench import DEVICE, check_never_synchronises

SEARCHES = {"greedy": {}, "beams": {"num_beams": 5}}
NEW = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}


@pytest.fixture(scope="module")
def model():
    text = LlamaConfig(
        vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.1, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    tower = Blip2VisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1, image_size=4, patch_size=4
    )
    torch.manual_seed(0)
    config = LynxConfig(text, tower, image_token_id=512, resampler_depth=1, adapter_size=32)
    return LynxForConditionalGeneration(config).to(DEVICE).eval()


def prompts(seed, rows=3, length=70):
    """Left-padded rows of several lengths."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 512, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(rows):
        pads = (7 * row + 5 * seed) % 20
        ids[row, :pads], mask[row, :pads] = 0, 0
    return {"input_ids": ids.to(DEVICE), "attention_mask": mask.to(DEVICE)}


def generate(model, batch, search, **options):
    return model.generate(**batch, **NEW, **SEARCHES[search], **options)


@pytest.mark.parametrize("search", SEARCHES)
def test_tokens_equal_transformers(model, search):
    batch = prompts(0)
    expected = generate(model, batch, search, past_key_values=DynamicCache())
    assert torch.equal(generate(model, batch, search), expected)
    assert len({tuple(row) for row in expected[:, 70:].tolist()}) > 1, "different prompts must give different answers"


@pytest.mark.parametrize("search", SEARCHES)
def test_static_steps_are_compiled_once(model, search):
    """They give the same tokens, and another generation with prompts of other lengths compiles nothing."""
    torch._dynamo.reset()
    counters.clear()
    for seed in range(3):
        batch = prompts(seed)
        assert torch.equal(
            generate(model, batch, search, cache_implementation="static"), generate(model, batch, search)
        )
        if DEVICE == "cuda":
            assert counters["stats"]["unique_graphs"] == 1
            assert counters["inductor"]["cudagraph_skips"] == 0


@pytest.mark.usefixtures("cuda")
def test_step_never_synchronises(model):
    cache = model.shared_cache(model.embed(prompts(0)["input_ids"][:1]), [(70, [0, 0])], {})
    new = torch.full((2, 1), 5, device=DEVICE)
    with torch.no_grad():
        model(input_ids=new, past_key_values=cache)
        check_never_synchronises(lambda: [model(input_ids=new, past_key_values=cache).logits])
