"""What both fusions share: modules inside the layers of somebody else's decoder."""

import copy
import pickle

import pytest
import torch

from lynx import LynxProcessor
from tests.lynx.conftest import conversation, make_config, make_model, picture


@pytest.mark.parametrize("fusion", ["prefix", "cross_attention"])
def test_a_model_goes_to_another_process(tokenizer, fusion):
    """Pickled, as spawned processes get it, and copied: the layers' classes are made, and no module has them."""
    config = make_config(tokenizer, fusion=fusion)
    model, processor = make_model(config), LynxProcessor.for_model(config, tokenizer)
    batch = processor.pack([processor.encode(conversation("What?", "this", images=[picture(0)]))])
    for again in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert type(again.get_decoder().layers[0]) is type(model.get_decoder().layers[0])
        assert torch.equal(again(**batch).loss, model(**batch).loss)
        with torch.no_grad():
            again.get_decoder().layers[0].self_attn.q_proj.weight.zero_()
        assert not torch.equal(again(**batch).loss, model(**batch).loss), "a model of its own"
