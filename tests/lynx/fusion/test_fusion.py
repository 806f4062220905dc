"""What both fusions share: modules inside the layers of a decoder of transformers."""

import copy
import pickle

import pytest
import torch

from lynx import LynxProcessor
from lynx.train import flops, param_groups
from tests.lynx.conftest import conversation, make_config, make_image, make_model


@pytest.mark.parametrize("fusion", ["prefix", "cross_attention"])
def test_a_model_goes_to_another_process(tokenizer, fusion):
    """Pickled, as spawned processes get it, and copied: the layers' classes are made, and no module has them."""
    config = make_config(tokenizer, fusion=fusion)
    model, processor = make_model(config), LynxProcessor.for_model(config, tokenizer)
    batch = processor.pack([processor.encode(conversation("What?", "this", images=[make_image(0)]))])
    for again in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert type(again.get_decoder().layers[0]) is type(model.get_decoder().layers[0])
        assert torch.equal(again(**batch).loss, model(**batch).loss)
        with torch.no_grad():
            again.get_decoder().layers[0].self_attn.q_proj.weight.zero_()
        assert not torch.equal(again(**batch).loss, model(**batch).loss), "a model of its own"


@pytest.mark.parametrize("fusion", ["prefix", "cross_attention"])
def test_which_rows_an_installed_weight_is_counted_for(tokenizer, fusion):
    """Keys and values of the media are made of the vision tokens, all else in a layer of the text."""
    model = make_model(make_config(tokenizer, fusion=fusion))
    param_groups.set_trainable(model, [model.fusion.param_group])
    per_row = flops.StepFlops(model).per_row
    decoder = dict(model.get_decoder().layers.named_parameters())
    weights = {name: weight for name, weight in decoder.items() if weight.dim() == 2}
    trained = sum(weight.numel() for weight in weights.values() if weight.requires_grad)
    of_media = [weight.numel() for name, weight in weights.items() if name.endswith("cross_attention.to_kv.weight")]
    assert len(of_media) == (3 if fusion == "cross_attention" else 0)
    frozen = sum(weight.numel() for weight in weights.values()) - trained
    assert per_row["tokens"] == 2 * (2 * frozen + 3 * (trained - sum(of_media)))
    resampler = {name: weight for name, weight in model.resampler.layers.named_parameters() if weight.dim() == 2}
    of_latents = sum(weight.numel() for name, weight in resampler.items() if ".to_kv." not in name)
    assert per_row["latents"] == 2 * (of_latents + 2 * sum(of_media))
