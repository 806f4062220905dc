"""Models outside transformers' AttentionInterface are refused when they are built, or when they use our mask."""

import logging

import accelerate
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    CLIPVisionConfig,
    CodeGenConfig,
    GPTJConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    OpenAIGPTConfig,
    PreTrainedModel,
    RoFormerConfig,
    RoFormerModel,
    SamModel,
    XGLMConfig,
)
from transformers.masking_utils import causal_mask_function, create_bidirectional_mask, create_causal_mask, or_masks
from transformers.models.sam.modeling_sam import SamVisionEncoder

from lynx_kernels import PackedLayout
from lynx_kernels.integrations import outsiders
from lynx_kernels.integrations import transformers as integration
from lynx_kernels.integrations.attention_mask import AttentionMask
from tests.lynx_kernels import families

integration.register()


@pytest.fixture
def unchecked(monkeypatch):
    """Skips the check of the source, as for a model in a notebook."""
    monkeypatch.setattr(outsiders, "check", lambda *_: None)


OUTSIDERS = [
    "bloom", "mpt", "codegen", "xglm", "imagegpt", "gpt_neox_japanese", "roformer", "rembert", "megatron-bert",
    "big_bird", "canine", "convbert", "ibert", "mpnet", "nystromformer", "squeezebert", "tapas", "visual_bert", "mvp",
]  # fmt: skip


@pytest.mark.parametrize("family", OUTSIDERS)
def test_models_that_compute_with_our_mask_are_refused(family, unchecked):
    """With padding and without."""
    for padding, each in families.outcomes(family).items():
        assert each.verdict == "refused", f"{padding}: {each}"
        assert "computes with its attention mask itself" in each.why
        assert family in each.why


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("config_class", [BloomConfig, RoFormerConfig])
def test_every_length_is_refused(config_class, length, unchecked):
    """The mask was once a tensor with four columns, which fitted the scores of four tokens."""
    config = config_class(vocab_size=50, hidden_size=32, n_layer=1, n_head=4, is_decoder=True)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="lynx")
    with pytest.raises(ValueError, match=f"{config.model_type} computes with its attention mask itself"):
        model(torch.ones(1, length, dtype=torch.int64), use_cache=False)


def test_models_are_refused_when_they_are_built():
    for config, reason in (
        (GPTJConfig(n_layer=1), r"GPTJ_ATTENTION_CLASSES\["),
        (BloomConfig(n_layer=1), "masks itself"),
    ):
        with pytest.raises(ValueError, match=rf'{reason}.*take "sdpa" or "eager"'), torch.device("meta"):
            AutoModelForCausalLM.from_config(config, attn_implementation="lynx")


def test_saved_models_are_refused(tmp_path):
    RoFormerModel(RoFormerConfig(vocab_size=50, hidden_size=32, num_hidden_layers=1)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="RoFormerModel does not call transformers' AttentionInterface"):
        RoFormerModel.from_pretrained(tmp_path, attn_implementation="lynx")
    RoFormerModel.from_pretrained(tmp_path, attn_implementation="eager")  # of other names nothing changes
    with pytest.raises(ValueError, match="is not supported"):
        RoFormerModel.from_pretrained(tmp_path, attn_implementation="no such thing")


def test_each_part_of_a_model_has_its_own_check():
    vision = CLIPVisionConfig(
        hidden_size=24, intermediate_size=40, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    config = LlavaConfig(vision_config=vision, text_config=XGLMConfig(d_model=32, num_layers=1, attention_heads=4))
    with pytest.raises(ValueError, match=r"XGLMModel .*A model of several parts can take one for each"):
        LlavaForConditionalGeneration._from_config(config, attn_implementation="lynx")
    parts = {"": "lynx", "vision_config": "lynx", "text_config": "eager"}
    model = LlavaForConditionalGeneration._from_config(config, attn_implementation=parts)
    assert model.model.vision_tower.config._attn_implementation == "lynx"


def test_models_are_not_refused_for_others_in_their_module():
    """SAM's vision encoder has attention classes of its own. SamModel, which contains it, has not."""
    outsiders.check(SamModel, "lynx")
    with pytest.raises(ValueError, match=r"SamVisionEncoder .*SAM_VISION_ATTENTION_CLASSES"):
        outsiders.check(SamVisionEncoder, "lynx")


def test_other_attention_is_logged_once(caplog):
    outsiders.check.cache_clear()
    config = OpenAIGPTConfig(vocab_size=50, n_embd=32, n_layer=1, n_head=4)
    with caplog.at_level(logging.WARNING, "lynx_kernels"):
        AutoModelForCausalLM.from_config(config, attn_implementation="lynx")
        AutoModelForCausalLM.from_config(config, attn_implementation="lynx")
    [said] = [each.getMessage() for each in caplog.records if "OpenAIGPTModel" in each.getMessage()]
    assert "does not change it" in said


class Scores(nn.Module):
    """Attention under a name that the check of the source does not know."""

    def __init__(self, is_causal):
        super().__init__()
        self.is_causal = is_causal

    def forward(self, x, mask, how):
        scores = x @ x.transpose(-1, -2)
        return how(scores[:, None], mask).softmax(-1)[:, 0] @ x


class Stranger(PreTrainedModel):
    config_class = LlamaConfig

    def __init__(self, config):
        super().__init__(config)
        self.scores = Scores(config.is_causal)
        self.post_init()

    def forward(self, x, attention_mask=None, how=None):
        make = create_causal_mask if self.config.is_causal else create_bidirectional_mask
        mask = make(self.config, x, attention_mask, past_key_values=None)
        return self.scores(x, mask, how)


WAYS = {
    "add": lambda scores, mask: scores + mask,
    "radd": lambda scores, mask: mask + scores,
    "iadd": lambda scores, mask: scores.add_(mask),
    "sub": lambda scores, mask: scores - (1.0 - mask) * 1e9,
    "mul": lambda scores, mask: scores + mask * 1e9,
    "where": lambda scores, mask: torch.where(mask, scores, -1e9),
    "masked_fill": lambda scores, mask: scores.masked_fill(mask, -1e9),
    "equal": lambda scores, mask: scores.masked_fill(mask == 0, -1e9),
    "not": lambda scores, mask: scores.masked_fill(~mask, -1e9),
    "less": lambda scores, mask: scores.masked_fill(mask < 0, -1e9),
    "to": lambda scores, mask: scores + mask.to(scores.dtype),
    "to another": lambda scores, mask: scores + mask.to(scores),
    "float": lambda scores, mask: scores + mask.float(),
    "cat": lambda scores, mask: scores + torch.cat([mask, mask]),
    "stack": lambda scores, mask: scores + torch.stack((mask,))[0],
    "expand": lambda scores, mask: scores + mask.expand(-1, 4, -1, -1),
    "clone": lambda scores, mask: scores + mask.clone(),
    "column": lambda scores, mask: scores + mask[:, :, -1],
    "row": lambda scores, mask: scores + mask[0],
    "new axis": lambda scores, mask: scores + mask[:, None],
    "crop": lambda scores, mask: scores + mask[:, :, :, : scores.shape[-1]],
    "if": lambda scores, mask: scores if mask else -scores,
    "len": lambda scores, mask: scores[: len(mask)],
    "array": lambda scores, mask: scores + torch.as_tensor(mask),
    "sdpa": lambda scores, mask: F.scaled_dot_product_attention(scores, scores, scores, attn_mask=mask),
    "out": lambda scores, mask: torch.add(scores, scores, out=mask),
    "keyword": lambda scores, mask: torch.where(input=scores, condition=mask, other=-1e9),
}


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("way", WAYS)
def test_foreign_uses_are_refused(way, is_causal):
    config = LlamaConfig(hidden_size=8, num_attention_heads=2, is_causal=is_causal)
    model = Stranger._from_config(config, attn_implementation="lynx")
    x = torch.randn(2, 4, 8)
    for mask in (None, torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]), torch.tensor([[1, 0, 1, 1], [1, 1, 1, 1]])):
        with pytest.raises(ValueError, match=r'llama computes .* with attn_implementation="sdpa" or "eager"'):
            model(x, mask, WAYS[way])


def test_packed_masks_are_refused_too(unchecked):
    """Even for a single token: an empty tensor would fit its scores."""
    config = CodeGenConfig(vocab_size=50, n_embd=32, n_layer=1, n_head=4, rotary_dim=4)
    model, layout = AutoModelForCausalLM.from_config(config, attn_implementation="lynx"), PackedLayout.causal([1])
    with pytest.raises(
        ValueError, match=r"codegen changes packed_mask\(layout\) or computes with it.*cannot take packed rows"
    ):
        model(torch.ones(1, 1, dtype=torch.int64), attention_mask=integration.packed_mask(layout), use_cache=False)


def test_layouts_refuse_a_pattern_of_the_model():
    """For example images with full attention, which transformers would leave out."""
    layout = PackedLayout.from_padding_mask(torch.ones(2, 3))
    pattern = or_masks(causal_mask_function, lambda batch, head, query, key: query == key)
    for mask in (integration.packed_mask(layout), integration.padded_mask(layout)):
        options = {"batch_size": 2, "kv_length": 3, "q_length": 3, "device": "cpu", "config": LlamaConfig()}
        assert integration.mask(attention_mask=mask, **options).model == "llama"
        refused = integration.mask(attention_mask=mask, mask_function=pattern, **options)
        with pytest.raises(ValueError, match=r"llama adds to the attention mask .*: a pattern of its own"):
            refused.for_sdpa()


def made(**options):
    padding = torch.tensor([[False, True, True], [True, True, True]])
    return integration.mask(
        batch_size=2, kv_length=3, q_length=3, device="cpu", attention_mask=padding, config=LlamaConfig(), **options
    )


@pytest.mark.parametrize("options", [{}, {"allow_is_causal_skip": False}])  # a layout, and a dense mask
def test_uses_of_transformers_and_accelerate(options):
    """They read the shape, move the mask between devices, crop it, and look for attributes."""
    mask = made(**options)
    assert (tuple(mask.shape), mask.ndim, mask.dim(), mask.size(-1)) == ((2, 1, 3, 3), 4, 4, 3)
    assert (mask.dtype, mask.device) == (torch.bool, torch.device("cpu"))
    assert mask is not None
    assert mask in [None, mask]
    assert not hasattr(mask, "_fields")
    assert mask.to(torch.bool) is mask
    for dtype in ({"dtype": torch.float32}, {"device": "cpu", "dtype": torch.int32}):
        with pytest.raises(ValueError, match="to another dtype"):
            mask.to(**dtype)
    assert mask[:, :, :, :3] is mask[..., :7] is mask[:, :, :, :] is mask.to("cpu") is mask.contiguous() is mask
    [moved] = accelerate.utils.send_to_device([mask], "meta")
    assert isinstance(moved, AttentionMask)
    assert (moved.layout.runs if moved.seen is None else moved.seen).is_meta
    expected = torch.tensor([[[0, 0, 0], [0, 1, 0], [0, 1, 1]], [[1, 0, 0], [1, 1, 0], [1, 1, 1]]], dtype=torch.bool)
    is_token = expected.any(2)
    assert torch.equal(mask.dense()[:, 0][is_token], expected[is_token])
    last = mask[:, :, -1:, :]  # as models that compute the last token's logits alone do
    assert tuple(last.shape) == (2, 1, 1, 3)
    assert torch.equal(last.dense()[:, 0, 0], expected[:, -1])
    assert torch.equal(mask[:, :, 1:, 1:].dense()[:, 0], expected[:, 1:, 1:])
