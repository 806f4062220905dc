"""Answers over a vision prefix of 576 tokens against what people run today.

Baseline and peer: ``plain``, transformers' own ``generate`` of the same decoder from embeddings, in which the prefix
stands once for every question, with its dynamic cache and PyTorch's attention; on GPUs also ``plain static``, the same
with its static cache, whose steps it compiles into CUDA graphs. Ours: ``shared``, over a cache in which beams, and
questions about one image, share roots, and on GPUs ``static``, the same with static shapes, compiled likewise.

``first token`` is the time to it; ``answer`` is the time of ``new`` tokens, the first one counted, and its rate counts
those of every answer (of one beam). The adapters are ours in all: attention and cache are compared. Weights are random:
only shapes matter to the clock. The images are encoded before, once for all.
"""

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import Blip2VisionConfig, LlamaConfig

from benchmarks.harness import Case, Setup
from lynx import LynxConfig, LynxForConditionalGeneration

VISION, TEXT = 576, 24  # tokens of an image, tokens of a question
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Width, feed-forward, layers, heads, heads of keys, vocabulary, adapters' width.
SHAPES = {
    "small": (256, 768, 4, 4, 4, 4096, 128),
    "SmolLM2-135M": (576, 1536, 30, 9, 3, 49152, 288),
    "Vicuna-7B": (4096, 11008, 32, 32, 32, 32000, 2048),
}
# Beams, questions an image, images. More would take plain minutes a call on a CPU, and a GPU's memory.
SEARCHES = ((1, 1, 1), (5, 1, 1), (1, 8, 1))
MANY = ((1, 1, 16), (5, 1, 16), (1, 8, 16))
# Shape, dtype, new tokens, searches.
CPU = (("small", "fp32", 32, (*SEARCHES, *MANY)), ("SmolLM2-135M", "fp32", 32, (*SEARCHES, MANY[0])))
CUDA = (("Vicuna-7B", "bf16", 64, (*SEARCHES, (5, 8, 1), *MANY)),)
MODES = ("first token", "answer")


def cases(*, quick: bool, device: str) -> Iterator[Case]:
    """Every shape and search; quick: the first shape, one image."""
    for name, dtype, new_tokens, searches in (CUDA if device == "cuda" else CPU)[: 1 if quick else None]:
        for beams, questions, images in searches:
            if quick and images > 1:
                continue
            for mode in MODES:
                new = 1 if mode == "first token" else new_tokens
                yield Case(
                    "generation",
                    mode,
                    f"{dtype} {name} beams={beams} questions={questions} new={new_tokens} images={images}",
                    partial(setup, name, DTYPES[dtype], beams, questions, images, new, device),
                    ("plain", "plain static", "lynx shared", "lynx static"),
                )


def make_model(name: str, dtype: torch.dtype, device: str) -> LynxForConditionalGeneration:
    """A model of this shape with random weights; its vision tower, which nobody asks, is as small as can be."""
    width, feed_forward, layers, heads, key_heads, vocabulary, adapter = SHAPES[name]
    text = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=feed_forward,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        bos_token_id=None,
        eos_token_id=None,  # every answer has as many tokens as asked for
        pad_token_id=0,
        initializer_range=width**-0.5,
    )
    tower = Blip2VisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=4, patch_size=4
    )
    torch.manual_seed(0)
    with torch.device(device):
        config = LynxConfig(text, tower, image_token_id=vocabulary, resampler_depth=1, adapter_size=adapter)
        return LynxForConditionalGeneration(config).to(dtype).eval()


def setup(
    name: str, dtype: torch.dtype, beams: int, questions: int, images: int, new_tokens: int, device: str
) -> Setup:
    """The providers of one case; all must have right first scores, and in fp32 the tokens of plain."""
    torch._dynamo.reset()
    model = make_model(name, dtype, device)
    generator = torch.Generator(device).manual_seed(0)
    table = model.get_input_embeddings().weight
    prefix = torch.randn(images, VISION, table.shape[1], generator=generator, device=device)
    prefix = (prefix * table.float().std()).to(dtype)
    ids = torch.randint(table.shape[0], (images, questions, TEXT), generator=generator, device=device)
    texts = table.detach()[ids]  # (images, questions, TEXT, width)
    options = {"num_beams": beams, "do_sample": False, "max_new_tokens": new_tokens, "min_new_tokens": new_tokens}
    providers: dict[str, Callable[..., Any]] = {
        "plain": partial(plain, model, prefix, texts, options),
        "lynx shared": partial(shared, model, prefix, texts, options),
    }
    left_out = {}
    for static, dynamic in (("plain static", plain), ("lynx static", shared)):
        if device == "cuda":
            static_options = {**options, "cache_implementation": "static"}
            providers[static] = partial(dynamic, model, prefix, texts, static_options)
        else:
            left_out[static] = "steps are compiled on GPUs only"

    # The first question's, in higher precision: twice plain's own error is allowed, and a rounding.
    exact_dtype = torch.float64 if device == "cpu" else torch.float32
    wanted = {"return_dict_in_generate": True, "output_scores": True}
    one = {**options, "max_new_tokens": 1, "min_new_tokens": 1}
    exact_model, exact_prefix, exact_text = (
        each.to(exact_dtype) for each in (copy.deepcopy(model), prefix[:1], texts[:1, :1])
    )
    answered = plain(exact_model, exact_prefix, exact_text, one, None, **wanted)
    exact = answered.scores[0][0]
    finite = exact.isfinite()

    def error_of(found: Any) -> float:
        return (found.scores[0][0].to(exact_dtype) - exact)[finite].abs().max().item()

    def check(provider: str) -> None:
        expected, found = (providers[each](None, **wanted) for each in ("plain", provider))
        largest = exact[finite].abs().max().item()
        error, allowed = error_of(found), 2 * (error_of(expected) + torch.finfo(dtype).eps * largest)
        assert error <= allowed, f"first scores: error {error:.1e} exceeds {allowed:.1e}"
        assert found.sequences.shape == (images * questions, new_tokens), f"shape is {tuple(found.sequences.shape)}"
        if dtype == torch.float32:
            assert torch.equal(found.sequences, expected.sequences), "other tokens than plain's"

    return Setup(
        providers=providers,
        check=check,
        tokens=images * questions * new_tokens if new_tokens > 1 else 0,
        device=device,
        left_out=left_out,
    )


@torch.no_grad()
def plain(model: Any, prefix: Tensor, texts: Tensor, options: dict[str, Any], _copy: object, **wanted: bool) -> Any:
    """Transformers' generate of the decoder, the prefix repeated for every question."""
    repeated = prefix[:, None].expand(-1, texts.shape[1], -1, -1)
    embeds = torch.cat([repeated, texts], 2).flatten(0, 1)
    mask = torch.ones(embeds.shape[:2], dtype=torch.int64, device=embeds.device)
    decoder = model.language_model
    ours = decoder.config._attn_implementation
    decoder.set_attn_implementation("sdpa")
    try:
        return decoder.generate(inputs_embeds=embeds, attention_mask=mask, **options, **wanted)
    finally:
        decoder.set_attn_implementation(ours)


@torch.no_grad()
def shared(model: Any, prefix: Tensor, texts: Tensor, options: dict[str, Any], _copy: object, **wanted: bool) -> Any:
    """Ours, as ``lynx.generation`` does it: the images are roots; of one question each it is part of the root."""
    questions = texts.shape[1]
    packed = torch.cat([prefix, texts.flatten(1, 2)], 1).flatten(0, 1)[None]
    group = (VISION + TEXT, [0]) if questions == 1 else (VISION, [TEXT] * questions)
    cache = model.shared_cache(packed, [group] * len(prefix), options)
    options = {**options, "cache_implementation": None}
    stand_ins = packed[0, cache.last_tokens][:, None]
    return model.generate(inputs_embeds=stand_ins, past_key_values=cache, **options, **wanted)
