"""The release's checkpoints: the same numbers as the released model, in every layout, there and back."""

import math

import pytest
import torch

from lynx import LynxConfig, checkpoint
from lynx.checkpoint import names, shapes
from lynx.media.resampler import media_layout
from tests.lynx.conftest import VISION, make_config, make_model
from tests.lynx.reference_helpers import HEADS, IDS, frames_of, inputs, load, parts_of
from tests.lynx.reference_model import ReferenceModel


@pytest.fixture(scope="module")
def reference():
    return ReferenceModel()


@pytest.fixture
def weights(reference):
    return {key: tensor.clone() for key, tensor in reference.state_dict().items()}


def relative(actual, exact):
    return ((actual - exact).abs().max() / exact.abs().max()).item()


@pytest.mark.parametrize("kind", ["image", "video"])
@pytest.mark.parametrize("frequency", [1, 2])
def test_numbers_are_the_reference_s(kind, frequency):
    """In fp64: features to 1e-9; what passes the decoder, whose norms transformers computes in fp32, to 1e-5."""
    reference = ReferenceModel(frequency=frequency)
    model = load(reference.state_dict())
    frames = frames_of(kind)
    batch = inputs(model, frames, IDS)
    media = {name: batch[name] for name in ("pixel_values", "frame_positions")}
    features = model.encode_media(**media, layout=batch["media_layout"])
    assert relative(features, reference.features(frames)) < 1e-9
    assert relative(model(**batch).logits[0], reference(frames, IDS)) < 1e-5
    labels = torch.cat([torch.full((1, 6 + 4), -100), IDS[None, 4:]], 1)
    loss, exact = model(**batch, labels=labels).loss, reference.loss(frames, IDS, 3)
    assert relative(loss, exact) < 1e-5
    loss.backward()
    exact.backward()
    gradients = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            gradients.update(names.to_reference(name, parameter.grad))
    for key, parameter in reference.named_parameters():
        if kind == "image" and key == "absolute_frame_pos_embed":
            assert not gradients.pop(key).any()
        else:
            assert relative(gradients.pop(key), parameter.grad) < 1e-5, key
    assert not gradients


def test_fp32_too(reference, weights):
    model = load({key: tensor.float() for key, tensor in weights.items()})
    frames = frames_of("video")
    logits = model(**inputs(model, frames.float(), IDS)).logits[0]
    assert relative(logits.double(), reference(frames, IDS)) < 1e-5


@pytest.mark.parametrize("beams", [1, 4])
def test_tokens_are_the_reference_s(reference, weights, beams):
    """Of a padded batch, each row what the released model says to it alone."""
    model = load(weights)
    model.generation_config.eos_token_id = None
    frames, prompts = frames_of("video"), [IDS[:3], IDS[:5]]
    batches = [inputs(model, frames, ids) for ids in prompts]
    pads = torch.full((1, 2), model.config.pad_token_id)
    expected = [reference.search(frames, ids, 6, beams) for ids in prompts]
    assert expected[0] != expected[1]
    tokens = model.generate(
        input_ids=torch.cat([torch.cat([pads, batches[0]["input_ids"]], 1), batches[1]["input_ids"]]),
        attention_mask=torch.tensor([[0, 0] + [1] * 9, [1] * 11]),
        pixel_values=torch.cat([batches[0]["pixel_values"]] * 2),
        frame_positions=torch.arange(3).repeat(2),
        media_layout=media_layout([3, 3], 10, 6),
        max_new_tokens=6,
        num_beams=beams,
    )
    assert tokens[:, 11:].tolist() == expected


@pytest.mark.parametrize(("layers", "frequency", "found"), [(5, 1, 1), (5, 2, 2), (6, 3, 3), (4, 4, 4), (5, 7, 5)])
def test_sizes_come_from_the_weights(layers, frequency, found):
    reference = ReferenceModel(layers=layers, frequency=frequency, grid=4, patch=5, blocks=3, rows=61, frames=2)
    config = load(reference.state_dict()).config
    text, tower = config.text_config, config.vision_config
    assert (text.num_hidden_layers, text.hidden_size, text.intermediate_size, text.vocab_size) == (layers, 32, 44, 61)
    assert (config.adapter_frequency, config.adapter_size) == (found, 16)
    assert (tower.num_hidden_layers, tower.hidden_size, tower.intermediate_size) == (3, 24, 40)
    assert (tower.patch_size, tower.image_size) == (5, 20)
    assert (config.num_latents, config.resampler_depth, config.resampler_expansion, config.max_frames) == (6, 2, 4, 2)
    assert (config.resampler_heads, config.resampler_head_dim) == (8, 64)
    assert config.image_token_id == 61
    assert text.pad_token_id == 60


def test_what_weights_cannot_tell_is_the_release_s():
    """32 and 16 heads where nothing else is said, and the epsilons that a test at fp32 would not see."""
    reference = ReferenceModel(width=64, media_width=32)
    config = checkpoint.load_reference(reference.state_dict()).config
    assert (config.text_config.num_attention_heads, config.vision_config.num_attention_heads) == (32, 16)
    assert (config.text_config.rms_norm_eps, config.vision_config.layer_norm_eps) == (1e-6, 1e-6)
    assert config.text_config.rope_parameters["rope_theta"] == 10000
    assert config.text_config.max_position_embeddings == 2048
    assert (config.text_config.bos_token_id, config.text_config.eos_token_id) == (1, 2)


def test_overrides_count(weights):
    text = {"num_attention_heads": 2, "rms_norm_eps": 1e-3, "rope_theta": 500.0, "num_key_value_heads": 2}
    config = {"text_config": text, "vision_config": {"num_attention_heads": 3}, "resampler_heads": 4}
    model = checkpoint.load_reference(weights, config=config)
    assert model.config.text_config.head_dim == 16
    assert model.config.text_config.rope_parameters["rope_theta"] == 500
    assert model.config.vision_config.num_attention_heads == 3
    assert (model.config.resampler_heads, model.config.resampler_head_dim) == (4, 128)
    assert model.get_decoder().norm.variance_epsilon == 1e-3


def test_a_whole_configuration_counts(weights):
    config = load(weights).config
    again = LynxConfig(**{**config.to_dict(), "max_frames": 4})
    with pytest.raises(ValueError, match=r"absolute_frame_pos_embed is \(1, 3, 1, 24\), expected \(1, 4, 1, 24\)"):
        load(weights, config=again)
    assert load(weights, config=config).config is config


# ---- layouts


@pytest.mark.parametrize("prefix", ["", "model.", "module.", "module.model."])
@pytest.mark.parametrize("wrapped", [False, True])
def test_prefixes_and_wrappers(weights, prefix, wrapped):
    state = {prefix + key: tensor for key, tensor in weights.items()}
    loaded = checkpoint.export_reference(load({"model": state, "epoch": 3} if wrapped else state))
    assert list(loaded) == list(weights) or set(loaded) == set(weights)
    assert all(torch.equal(loaded[key], weights[key]) for key in weights)


def test_only_some_keys_have_the_prefix(weights):
    state = {("model." if key.startswith("LLM.") else "") + key: tensor for key, tensor in weights.items()}
    assert torch.equal(load(state).get_input_embeddings().weight, weights["LLM.model.embed_tokens.weight"])


def test_one_weight_twice_is_refused(weights):
    weights["model.bridge.latents"] = weights["bridge.latents"]
    with pytest.raises(ValueError, match=r"hold some keys twice, under different prefixes: bridge\.latents"):
        load(weights)


@pytest.mark.parametrize("wrap", [lambda state: state, lambda state: {"module": state}])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_three_files_make_one_model(weights, wrap, prefix):
    """EVA's original layout, as the split one; and a language model whose keys rightly start with "model."."""
    rest, tower, language = (wrap({prefix + key: tensor for key, tensor in part.items()}) for part in parts_of(weights))
    loaded = checkpoint.export_reference(load(rest, vision_state_dict=tower, llm_state_dict=language))
    assert set(loaded) == set(weights)
    assert all(torch.equal(loaded[key], weights[key]) for key in weights)


def test_the_release_s_own_weights_come_first(weights):
    rest, tower, language = parts_of(weights)
    rest["LLM.model.norm.weight"] = weights["LLM.model.norm.weight"] + 1
    model = load(rest, vision_state_dict=tower, llm_state_dict={f"LLM.{key}": value for key, value in language.items()})
    assert torch.equal(model.get_decoder().norm.weight, rest["LLM.model.norm.weight"])


def test_what_lynx_leaves_out_of_eva_is_named(weights, caplog):
    rest, tower, language = parts_of(weights)
    tower |= {"norm.weight": torch.ones(24), "head.weight": torch.ones(3, 24), "mask_token": torch.ones(1, 1, 24)}
    config = {**HEADS, "vision_config": {"num_attention_heads": 4, "num_hidden_layers": 1}}
    model = load(rest, vision_state_dict=tower, llm_state_dict=language, config=config)
    assert len(model.vision_tower.encoder.layers) == 1
    for name in ("norm.weight", "head.weight", "mask_token", "vision_encoder.blocks.1.norm1.weight"):
        assert name in caplog.text
    with pytest.raises(ValueError, match=r"unexpected: vision_encoder\.blocks\.1\.norm1\.weight"):
        load(weights, config=config)


def test_the_40th_block_of_eva_g_is_left_out():
    with torch.device("meta"):
        blocks = {f"vision_encoder.blocks.{block}.norm1.weight": torch.empty(1408) for block in range(40)}
        small = {f"vision_encoder.blocks.{block}.norm1.weight": torch.empty(24) for block in range(40)}
    assert shapes.configuration(blocks, {}).vision_config.num_hidden_layers == 39
    config = {"vision_config": {"num_attention_heads": 4}}
    assert shapes.configuration(small, config).vision_config.num_hidden_layers == 40


def cubic(old, new):
    """(new, old): Keys' cubic kernel with a = -3/4 at pixel centres, pixels beyond the edge as those at it."""

    def kernel(x):
        x = abs(x)
        if x <= 1:
            return 1.25 * x**3 - 2.25 * x**2 + 1
        return -0.75 * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0

    matrix = torch.zeros(new, old, dtype=torch.float64)
    for i in range(new):
        centre = (i + 0.5) * old / new - 0.5
        for j in range(math.floor(centre) - 1, math.floor(centre) + 3):
            matrix[i, min(max(j, 0), old - 1)] += kernel(centre - j)
    return matrix


@pytest.mark.parametrize("grid", [2, 5, 8])
@pytest.mark.parametrize("apart", [False, True])
def test_positions_are_resized(weights, grid, apart):
    config = {**HEADS, "vision_config": {"num_attention_heads": 4, "image_size": 4 * grid}}
    rest, tower, language = parts_of(weights)
    parts = {"vision_state_dict": tower, "llm_state_dict": language} if apart else {}
    position = load(rest if apart else weights, config=config, **parts).vision_tower.embeddings.position_embedding[0]
    old = weights["vision_encoder.pos_embed"][0]
    assert torch.equal(position[0], old[0])
    matrix = cubic(3, grid)
    expected = torch.einsum("ai,bj,ijd->abd", matrix, matrix, old[1:].view(3, 3, -1)).flatten(0, 1)
    torch.testing.assert_close(position[1:], expected, rtol=0, atol=1e-12)


def test_positions_of_no_grid_are_refused(weights):
    weights["vision_encoder.pos_embed"] = torch.zeros(1, 8, 24)
    with pytest.raises(ValueError, match=r"vision_encoder\.pos_embed is \(1, 8, 24\), expected \(1, 5, 24\)"):
        load(weights)


@pytest.mark.parametrize("told", [False, True])
def test_the_pad_row_is_the_mean(weights, monkeypatch, told):
    """For tables of Vicuna's rows, and where vocab_size says so."""
    if not told:
        monkeypatch.setattr(shapes, "VICUNA_ROWS", 50)
    text = {"num_attention_heads": 4, **({"vocab_size": 51} if told else {})}
    model = load(weights, config={**HEADS, "text_config": text})
    for module, key in (
        (model.get_input_embeddings(), "model.embed_tokens"),
        (model.get_output_embeddings(), "lm_head"),
    ):
        old = weights[f"LLM.{key}.weight"]
        assert torch.equal(module.weight[:50], old)
        torch.testing.assert_close(module.weight[50], old.sum(0) / 50)
    assert model.config.pad_token_id == 50
    assert model.config.image_token_id == 51
    assert shapes.VICUNA_ROWS == 50 or load(weights).config.text_config.vocab_size == 50


def test_rotary_frequencies_of_older_files(weights):
    """They tell the heads, and are refused where the configuration makes others."""
    frequencies = 10000 ** (-torch.arange(0, 16, 2) / 16)
    for layer in range(5):
        weights[f"LLM.model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = frequencies.half()
    config = {"vision_config": {"num_attention_heads": 4}}
    assert load(weights, config=config).config.text_config.num_attention_heads == 2
    with pytest.raises(
        ValueError, match=r"another rotary embedding: LLM\.model\.layers\.4\..*\(8,\).*rope_theta.*\(4,\)"
    ):
        load(weights)
    with pytest.raises(ValueError, match="another rotary embedding"):
        load(weights, config={**config, "text_config": {"rope_theta": 500.0}})


# ---- there and back


def test_export_gives_back_what_was_loaded(weights):
    exported = checkpoint.export_reference(load(weights))
    assert {key: tensor.shape for key, tensor in exported.items()} == {key: weights[key].shape for key in weights}
    assert all(torch.equal(exported[key], weights[key]) for key in weights)


def test_a_model_of_ours_can_be_exported(tokenizer):
    """Also one whose vision tower learned a bias for keys: leaving it out changes no output."""
    model = make_model(make_config(tokenizer)).double()
    loaded = load(checkpoint.export_reference(model), config=model.config)
    frames = frames_of("image")[:, :8, :8]
    with torch.no_grad():
        logits = [each(**inputs(each, frames, IDS)).logits for each in (model, loaded)]
    assert model.vision_tower.encoder.layers[0].self_attn.qkv.bias[24:48].abs().min() > 0
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=1e-6)


def test_a_model_unlike_the_release_is_not_exported(tokenizer):
    for name in sorted(set(VISION) - {"blip_2_vision_model"}):
        with pytest.raises(ValueError, match="cannot hold a model with vision_config"):
            checkpoint.export_reference(make_model(make_config(tokenizer, name)))
    with pytest.raises(ValueError, match="the release's format cannot hold a model with adapter_activation='relu'"):
        checkpoint.export_reference(make_model(make_config(tokenizer, adapter_activation="relu")))


def test_the_model_owns_its_memory_unless_told(weights):
    before = {key: tensor.clone() for key, tensor in weights.items()}
    with torch.no_grad():
        for parameter in load(weights).parameters():
            parameter.zero_()
    assert all(torch.equal(weights[key], before[key]) for key in weights)
    model = load(weights, copy=False)
    assert model.get_input_embeddings().weight.data_ptr() == weights["LLM.model.embed_tokens.weight"].data_ptr()


def test_dtypes(weights):
    """One for all: what was asked for, or what holds them all."""
    for key in weights:
        weights[key] = weights[key].to(torch.float16 if key.startswith("vision_encoder.") else torch.bfloat16)
    assert {parameter.dtype for parameter in load(weights).parameters()} == {torch.float32}
    model = load(weights, dtype=torch.float16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float16}
    assert model.get_decoder().rotary_emb.inv_freq.dtype == torch.float32
    weights["bridge.norm.bias"][0] = 70000
    with pytest.raises(ValueError, match=r"bridge\.norm\.bias has numbers that are too large for torch\.float16"):
        load(weights, dtype=torch.float16)
