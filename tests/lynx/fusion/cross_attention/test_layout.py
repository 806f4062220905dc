"""Where media stand in a text, and which of its tokens see them."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from lynx.fusion.cross_attention import text_layout
from tests.lynx.conftest import conversation, make_image
from tests.lynx_kernels.attention_helpers import EXAMPLES


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
    image = {"type": "image", "image": make_image(0)}
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
    second_turn = [*conversation("a", "b"), *conversation("c", images=[make_image(0)])]
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
