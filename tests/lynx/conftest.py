"""A model small enough to make in milliseconds, and conversations to feed it."""

import numpy as np
import pytest
import torch
from transformers import Blip2VisionConfig, CLIPVisionConfig, LlamaConfig, SiglipVisionConfig

from lynx import LynxConfig, LynxForConditionalGeneration, LynxProcessor
from lynx.data.tokenizer import train_tokenizer

VISION = {"blip_2_vision_model": Blip2VisionConfig, "clip_vision_model": CLIPVisionConfig, "siglip": SiglipVisionConfig}


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


def make_tokenizer():
    return train_tokenizer(["User: which digit is this?\nBot: seven", "User: odd or even?\nBot: 7"], vocab_size=300)


def make_config(tokenizer, vision="blip_2_vision_model", **options):
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    tower = VISION[vision](
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )
    defaults = {
        "image_token_id": len(tokenizer), "num_latents": 3, "resampler_depth": 2, "resampler_heads": 2,
        "resampler_head_dim": 8, "max_frames": 4, "adapter_frequency": 2, "adapter_size": 8,
    }  # fmt: skip
    return LynxConfig(text, tower, **{**defaults, **options})


@pytest.fixture
def config(tokenizer):
    return make_config(tokenizer)


@pytest.fixture
def model(config):
    return make_model(config)


def make_model(config):
    torch.manual_seed(0)
    model = LynxForConditionalGeneration(config).eval()
    with torch.no_grad():  # far from the initial values, so that every parameter shows in the logits
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


@pytest.fixture
def processor(config, tokenizer):
    return LynxProcessor.for_model(config, tokenizer)


def make_image(seed, height=10, width=13):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def conversation(question, answer=None, images=(), videos=()):
    content = [
        *({"type": "image", "image": image} for image in images),
        *({"type": "video", "video": video} for video in videos),
        {"type": "text", "text": question},
    ]
    messages = [{"role": "user", "content": content}]
    if answer is not None:
        messages.append({"role": "assistant", "content": answer})
    return messages


@pytest.fixture
def samples(processor):
    """Rows with an image, with none, with a video, with two items, and a dialog of two rounds."""
    conversations = [
        conversation("Which digit is this?", "seven", images=[make_image(0)]),
        conversation("Hello", "yes, hello"),
        conversation("Which digits?", "1 2 3", videos=[[make_image(i) for i in range(3)]]),
        conversation("Same?", "no", images=[make_image(4)], videos=[[make_image(5), make_image(6)]]),
        [*conversation("Odd?", "yes", images=[make_image(7)]), *conversation("And even?", "no")],
    ]
    return [processor.encode(messages) for messages in conversations]


@pytest.fixture
def reads(model):
    """How many tokens the decoder reads in each forward pass."""
    found = []
    layer = model.get_decoder().layers[0]
    layer.register_forward_pre_hook(lambda module, args, kwargs: found.append(args[0].shape[:2]), with_kwargs=True)
    return found


QUESTIONS = ["Which digit is this?", "Odd or even?", "Which digit is that?"]


@pytest.fixture
def asked(processor):
    """Three questions about one image, one about a video and one about nothing, mixed."""
    one, clip = make_image(0), [make_image(1), make_image(2)]
    first, second, third = (processor.encode(conversation(text, images=[one])) for text in QUESTIONS)
    video = processor.encode(conversation("Which digits?", videos=[clip]))
    return [first, video, second, processor.encode(conversation("Hello")), third]
