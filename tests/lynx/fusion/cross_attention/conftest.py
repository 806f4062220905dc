"""A small model with cross-attention, and conversations with media between their words."""

import pytest

from tests.lynx.conftest import conversation, make_config, make_image
from tests.lynx.model_checks import inputs

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
        {"type": "image", "image": make_image(seed)},
        {"type": "text", "text": "like "},
        {"type": "video", "video": [make_image(seed + 1), make_image(seed + 2)]},
        {"type": "text", "text": "this?"},
    ]
    second = [{"type": "text", "text": "Odd?"}, {"type": "image", "image": make_image(seed + 3)}]
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
        conversation("Same?", "no", images=[make_image(4)], videos=[[make_image(5), make_image(6)]]),
        conversation("Which digit is this?", "seven", images=[make_image(7)]),
    ]
    return [processor.encode(messages) for messages in conversations]


@pytest.fixture
def questions(processor):
    batch = processor.pad([processor.encode(each) for each in (interleaved(), conversation("Hello"), interleaved(20))])
    return inputs(batch)
