"""Model families of transformers with our attention: each equals its own eager attention, or is refused by name.

This is a choice of each kind. ``python -m tests.lynx_kernels.families`` tries all families, in some minutes.
"""

import pytest
import torch

from lynx_kernels import PackedLayout
from lynx_kernels.integrations import transformers as integration
from tests.lynx_kernels import families

KERNELS = [
    "llama", "qwen2", "qwen3_moe", "gemma", "phi3", "opt", "gpt2", "gpt_neox", "olmo2", "cohere", "stablelm", "mixtral",
    "bart", "whisper", "qwen2_vl_text", "clip_text_model", "lfm2", "mistral", "cohere2", "olmo3", "gemma2",
    "gemma3_text", "gemma4_text", "gpt_oss", "llama4_text", "qwen2_moe", "deepseek_v2", "minicpm3",
]  # fmt: skip
SDPA = ["bert", "roberta", "electra", "distilbert", "wav2vec2", "vit", "siglip_vision_model", "modernbert"]
PRODUCTS = ["gemma2", "gpt_oss"]
OWN = ["openai-gpt", "deberta", "fsmt", "wavlm"]  # masks and attention of their own
REFUSED = {
    **dict.fromkeys(["bloom", "mpt", "codegen", "xglm", "imagegpt"], "does not call transformers' AttentionInterface"),
    **dict.fromkeys(
        ["roformer", "rembert", "megatron-bert", "mpnet"], "does not call transformers' AttentionInterface"
    ),
    **dict.fromkeys(["gptj", "gpt_neo", "falcon", "data2vec-vision", "sam_vision_model"], "ATTENTION_CLASSES"),
    **dict.fromkeys(["t5", "umt5"], "has no position biases"),
    "deepseek_v32": "computes with its attention mask itself",  # its indexer does, to choose keys
}
OPTIONS = {family: {"num_key_value_heads": 4} for family in ("deepseek_v2", "minicpm3", "deepseek_v32")}


@pytest.mark.parametrize("family", KERNELS + SDPA + OWN)
def test_families_equal_their_eager_attention(family):
    found = families.outcomes(family, **OPTIONS.get(family, {}))
    for padding, each in found.items():
        assert each.verdict == "right", f"{padding}: {each}"
        runs_on = "kernels" if family in KERNELS and padding != "between" else "sdpa"
        # Soft caps and sinks run on plain products instead of SDPA.
        expected = set() if family in OWN or (runs_on == "sdpa" and family in PRODUCTS) else {runs_on}
        assert expected <= each.calls.keys(), f"{padding}: {each}"
        assert "kernels" not in each.calls or family in KERNELS, f"{padding}: {each}"


@pytest.mark.parametrize("family", REFUSED)
def test_families_are_refused(family):
    for padding, each in families.outcomes(family, **OPTIONS.get(family, {})).items():
        assert each.verdict == "refused", f"{padding}: {each}"
        assert REFUSED[family] in each.why
        assert "eager" in each.why or "take another one for" in each.why


@pytest.mark.parametrize("family", ["qwen3_next", "lfm2", "jamba", "bamba", "granitemoehybrid"])
def test_packed_rows_of_hybrids_are_refused(family):
    """Linear attention and convolutions do not read a layout: they would mix the samples."""
    options = {"layer_types": ["full_attention", "conv" if family == "lfm2" else "linear_attention"]}
    if family in ("bamba", "jamba"):
        options = {"attn_layer_indices": [0]} if family == "bamba" else {"attn_layer_period": 2, "attn_layer_offset": 0}
    model = families.build(families.config_of(family, **options), "lynx")
    layout = PackedLayout.causal([3, 5])
    inputs = {"position_ids": layout.position_ids[None], "attention_mask": integration.packed_mask(layout)}
    with pytest.raises(ValueError, match=f"{family} .*would mix the samples of a packed row|cannot take packed rows"):
        model(torch.arange(3, 11)[None], use_cache=False, **inputs)
