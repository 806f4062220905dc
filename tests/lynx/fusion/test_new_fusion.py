"""A fusion is its own file and a line in the registry: here is one more, and everything works with it."""

from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import nn

from lynx import LynxConfig, LynxProcessor, checkpoint
from lynx.fusion import FUSIONS, fusion_of
from lynx.fusion.base import Fusion, check_frequency
from lynx.train import flops, param_groups
from lynx_kernels.integrations import layers
from tests.lynx.conftest import conversation, make_config, make_image, make_model
from tests.lynx.model_checks import inputs


class MeanFusion(Fusion):
    """Every token of a row reads the mean of the row's vision tokens, through one matrix a layer; for padded rows."""

    name = "mean"
    options = {"mean_frequency": 1}  # noqa: RUF012
    inputs = ("item_counts", "means")
    submodule = "mean_reader"
    param_group = "mean_readers"
    param_group_help = "the matrices that read the mean"
    shares_roots = False

    def check(self, config):
        check_frequency("mean_frequency", config)

    def install(self, decoder, config):
        width = config.text_config.hidden_size
        return {
            layers.insert(layer, self.submodule, nn.Linear(width, width, bias=False), _with_reader)
            for layer in decoder[:: config.mean_frequency]
        }

    def flops_rows(self, name):
        return "latents"

    def prefix_length(self, num_vision_tokens):
        return 0

    def batch_inputs(self, samples, *, num_latents, sees_media, padded_length=None):
        return {"item_counts": torch.tensor([len(sample.media) for sample in samples])}

    def embed(self, model, input_ids, vision_tokens):
        return model.embed(input_ids)

    def feed(self, model, rows, vision_tokens, inputs):
        means = inputs.get("means")
        if means is None:
            means = self.means(model, vision_tokens, inputs["item_counts"])
        return replace(rows, keywords={**rows.keywords, "means": means})

    def generation_inputs(self, model, input_ids, vision_tokens, attention_mask, inputs):
        return {"means": self.means(model, vision_tokens, inputs["item_counts"])}

    def means(self, model, vision_tokens, item_counts):
        counts = (item_counts * model.config.num_latents).tolist()
        return torch.stack([each.mean(0) if len(each) else each.sum(0) for each in vision_tokens.split(counts)])


@cache
def _with_reader(layer_class):
    def forward(self, hidden_states, *args, means, **kwargs):
        return layer_class.forward(self, hidden_states + self.mean_reader(means)[:, None], *args, **kwargs)

    return layers.subclass(layer_class, "WithMeanReader", forward, _with_reader)


@pytest.fixture
def config(tokenizer, monkeypatch):
    monkeypatch.setitem(FUSIONS, "mean", MeanFusion())
    return make_config(tokenizer, fusion="mean", mean_frequency=2)


@pytest.fixture
def questions(processor):
    conversations = [
        conversation("Which digit is this?", images=[make_image(0)]),
        conversation("Hello, is this a longer question?"),
        conversation("Same?", images=[make_image(1)], videos=[[make_image(2), make_image(3)]]),
    ]
    return inputs(processor.pad([processor.encode(each) for each in conversations]))


def test_its_options_are_fields_of_the_configuration(config, tmp_path):
    assert config.mean_frequency == 2
    config.save_pretrained(tmp_path)
    assert LynxConfig.from_pretrained(tmp_path).mean_frequency == 2
    assert "mean_frequency" in LynxConfig.field_names()
    for options, message in (
        ({"mean_frequency": 0}, "mean_frequency is 0, must be an integer of at least 1"),
        ({"mean_frequency": 4}, "mean_frequency is 4, but text_config has 3 layers"),
    ):
        with pytest.raises(ValueError, match=message):
            LynxConfig(config.text_config, config.vision_config, fusion="mean", **options)


def test_it_reads_trains_and_is_counted(tokenizer, model, processor):
    samples = [
        processor.encode(conversation("What?", "this", videos=[[make_image(0), make_image(1)]])),
        processor.encode(conversation("Hello", "yes")),
    ]
    batch = processor.pad(samples)
    assert "cross_layout" not in batch
    model(**batch).loss.backward()
    assert [name for name, parameter in model.named_parameters() if not parameter.grad.any()] == []
    counts = param_groups.set_trainable(model, ["mean_readers"])
    assert counts == {"mean_readers": 2 * 32 * 32}, "in every second of three layers"
    other = make_model(make_config(tokenizer))
    param_groups.set_trainable(other, ["adapters"])
    of_latents, of_resampler = (flops.StepFlops(each).per_row["latents"] for each in (model, other))
    assert of_latents - of_resampler == 2 * 2 * 32 * 32 * 2, "two matrices: the product and the weight's gradient"


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=str)
def test_generation(model, questions, options):
    """With a cache and without; greedy tokens are the argmax of forward."""
    options = {**options, "max_new_tokens": 4, "eos_token_id": -1}
    tokens = model.generate(**questions, **options)
    assert torch.equal(tokens, model.generate(**questions, **options, use_cache=False))
    if "num_beams" not in options:
        with torch.no_grad():
            first = model(**questions).logits[:, -1].argmax(-1)
        assert torch.equal(tokens[:, questions["input_ids"].shape[1]], first)


def test_images_reach_their_row_alone(model, questions):
    changed = {**questions, "pixel_values": questions["pixel_values"].clone()}
    changed["pixel_values"][:4] += 1  # of the first image
    with torch.no_grad():
        before, after = model(**questions).logits, model(**changed).logits
    assert (before != after).flatten(1).any(1).tolist() == [True, False, False]


def test_it_is_saved_and_loaded(model, processor, questions, tmp_path):
    checkpoint.save(tmp_path, model, processor)
    loaded, its_processor = checkpoint.load(tmp_path)
    assert (type(loaded.fusion), fusion_of(its_processor)) == (MeanFusion, loaded.fusion)
    with torch.no_grad():
        assert torch.equal(loaded(**questions).logits, model(**questions).logits)


def test_its_inputs_are_refused_by_the_others(tokenizer, config, questions):
    prefix = make_config(tokenizer)
    message = "item_counts is for fusion='mean', this model has 'prefix'"
    with pytest.raises(ValueError, match=message):
        make_model(prefix)(**questions)
    with pytest.raises(ValueError, match=message):
        make_model(prefix).generate(**questions)
    assert LynxProcessor.for_model(prefix, tokenizer).prefix_length([[make_image(0)]]) == 3
