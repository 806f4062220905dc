"""The vision tower from packed patches, and the resampler, against compositions written out."""

import pytest
import torch
from torch.nn import functional as F

from lynx.media.resampler import Resampler, media_layout
from lynx.media.tower import encode, takes_patches, tokens_per_frame
from tests.lynx.conftest import VISION, make_config, make_model


@pytest.fixture(params=VISION)
def tower(request, tokenizer):
    return make_model(make_config(tokenizer, request.param)).vision_tower.double()


def test_tokens_are_those_of_transformers(tower):
    """From pixels through transformers' own embeddings; EVA's are taken before the last LayerNorm."""
    pixels = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    if takes_patches(tower.config):
        patches = pixels.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).reshape(3 * 4, 3 * 4 * 4)
        expected = tower.encoder(inputs_embeds=tower.embeddings(pixels)).last_hidden_state
    else:
        patches, expected = pixels, tower(pixel_values=pixels).last_hidden_state
    tokens = encode(tower, patches)
    torch.testing.assert_close(tokens, expected)
    assert tokens.shape[1] == tokens_per_frame(tower.config)


@pytest.mark.parametrize("implementation", ["lynx", "eager"])
def test_packed_frames_never_see_each_other(tokenizer, implementation):
    """Another tower's attention takes a batch of frames, ours one packed row of them: both the same tokens."""
    tower = make_model(make_config(tokenizer)).vision_tower.double()
    assert tower.config._attn_implementation == "lynx"
    patches = torch.randn(3 * 4, 3 * 4 * 4, dtype=torch.float64)
    alone = torch.cat([encode(tower, frame) for frame in patches.split(4)])
    tower.set_attn_implementation(implementation)
    tokens = encode(tower, patches)
    torch.testing.assert_close(tokens, alone, rtol=1e-5, atol=1e-6)  # eager computes its softmax in fp32
    patches[5] += 1
    changed = (encode(tower, patches) != tokens).any(-1)
    assert torch.equal(changed, torch.tensor([[False], [True], [False]]).expand(3, 5))


def test_wrong_pixels_are_refused(tower):
    with pytest.raises(ValueError, match="pixel_values must be"):
        encode(tower, torch.zeros(5, 7))


@pytest.fixture(params=[False, True], ids=["media only", "media and latents"])
def resampler(request):
    torch.manual_seed(0)
    options = {"num_latents": 3, "depth": 2, "num_heads": 2, "head_dim": 4, "expansion": 2, "max_frames": 4}
    options["concatenates_latents"] = request.param
    width = 5 if request.param else 6  # what is concatenated must have one width
    resampler = Resampler(width, 5, **options, latent_initializer_range=1.0).double()
    for parameter in resampler.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return resampler


def written_out(resampler, frames, positions):
    """One item, (frames, tokens, width) -> (latents, width), straight from the description in the paper."""
    media = torch.cat(
        [frame if at < 0 else frame + resampler.frame_position[at] for frame, at in zip(frames, positions, strict=True)]
    )
    latents = resampler.latents
    for layer in resampler.layers:
        attention, (norm, up, _, down) = layer.attention, layer.feed_forward
        normed, keys = attention.norm_latents(latents), attention.norm_media(media)
        if resampler.concatenates_latents:
            keys = torch.cat([keys, normed])
        q = attention.to_q(normed).view(3, 2, 4).transpose(0, 1)
        k, v = (x.view(-1, 2, 4).transpose(0, 1) for x in attention.to_kv(keys).chunk(2, -1))
        latents = latents + attention.to_out(F.scaled_dot_product_attention(q, k, v).transpose(0, 1).flatten(1))
        latents = latents + down(F.gelu(up(norm(latents))))
    return resampler.norm(latents)


def test_resampler_is_the_composition(resampler):
    """An image, a video of three frames and a video of one: their tokens side by side, none mixed."""
    counts, positions = [1, 3, 1], [-1, 0, 1, 2, 0]
    features = torch.randn(5, 7, 5, dtype=torch.float64, requires_grad=True)
    out = resampler(features, torch.tensor(positions), media_layout(counts, 7, 3))
    expected = torch.cat(
        [
            written_out(resampler, part, at)
            for part, at in zip(features.split(counts), ([-1], [0, 1, 2], [0]), strict=True)
        ]
    )
    torch.testing.assert_close(out, expected)
    inputs = [features, *resampler.parameters()]
    weight = torch.randn_like(out)
    for actual, exact in zip(
        *(torch.autograd.grad((each * weight).sum(), inputs) for each in (out, expected)), strict=True
    ):
        torch.testing.assert_close(actual, exact)
