"""The bridges that keep every token, against their composition written out."""

import pytest
import torch
from torch.nn import functional as F

from lynx import LynxForConditionalGeneration
from lynx.media.projection import Projection
from tests.lynx.conftest import make_config


@pytest.mark.parametrize("is_mlp", [True, False])
def test_projection_is_the_composition(is_mlp):
    torch.manual_seed(0)
    projection = Projection(6, 5, is_mlp=is_mlp, max_frames=3, latent_initializer_range=1.0).double()
    features = torch.randn(4, 2, 5, dtype=torch.float64)
    out = projection(features, torch.tensor([-1, 0, 1, 2]))
    position = torch.cat([torch.zeros(1, 5), projection.frame_position])
    first, *rest = (layer for layer in projection.layers if isinstance(layer, torch.nn.Linear))
    expected = first(features + position[:, None])
    for layer in rest:
        expected = layer(F.gelu(expected))
    assert len(rest) == int(is_mlp)
    torch.testing.assert_close(out, expected.flatten(0, 1))


def test_fresh_frame_positions_have_their_spread(tokenizer):
    config = make_config(tokenizer, bridge="mlp", initializer_range=0.3, latent_initializer_range=0.5)
    projection = LynxForConditionalGeneration(config).projection
    assert 0.4 < projection.frame_position.std() < 0.6
    assert 0.25 < projection.layers[2].weight.std() < 0.35
