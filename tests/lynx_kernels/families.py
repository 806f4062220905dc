"""Compares tiny random models of transformers' families, with ``attn_implementation="lynx"``, with eager attention.

``python -m tests.lynx_kernels.families`` tries every family that a generic small configuration can build, in some
minutes, and prints a line for each case. Arguments are names of families to try. test_transformers_families.py has a
choice.
"""

import collections
import contextlib
import dataclasses
import logging
import sys
import traceback
import unittest.mock
import warnings

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_MAPPING_NAMES

from lynx_kernels import PackedLayout
from lynx_kernels.integrations import plain
from lynx_kernels.integrations import transformers as integration
from lynx_kernels.integrations.apply import apply

integration.register()

_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers")
_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads", "encoder_attention_heads")
SIZES = {
    **dict.fromkeys(_LAYERS, 2), **dict.fromkeys(_HEADS, 4),
    "vocab_size": 64, "hidden_size": 32, "n_embd": 32, "d_model": 32, "embedding_size": 32, "word_embed_proj_dim": 32,
    "intermediate_size": 48, "ffn_dim": 48, "n_inner": 48, "d_ff": 48, "decoder_ffn_dim": 48, "encoder_ffn_dim": 48,
    "num_key_value_heads": 2, "head_dim": 8, "d_kv": 8, "max_position_embeddings": 128, "n_positions": 128,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
    "num_experts": 2, "num_local_experts": 2, "n_routed_experts": 2, "num_experts_per_tok": 1, "top_k": 1,
    "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "n_group": 1, "topk_group": 1,
    "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "qk_head_dim": 16, "rotary_dim": 8, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "linear_num_key_heads": 2, "linear_num_value_heads": 2, "mamba_d_state": 8, "mamba_n_heads": 4, "mamba_d_head": 16,
    "mamba_n_groups": 1, "mamba_expand": 2, "lru_width": 32, "image_size": 16, "patch_size": 4, "num_channels": 3,
    "sliding_window": 3, "attention_chunk_size": 3,
    "attention_dropout": 0.0, "attn_pdrop": 0.0, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
VARIANTS = ({}, {"num_key_value_heads": 4}, {"num_key_value_heads": 4, "head_dim": 16})  # the first one that runs
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}}
_MIXED = {"layer_types": ["linear_attention", "full_attention"]}
OPTIONS = {  # what the generic sizes leave wrong, and layers of both kinds for hybrids
    "bamba": {"attn_layer_indices": [1]},
    "dots1": {"num_key_value_heads": 2, "head_dim": 8, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gemma4_text": {"num_kv_shared_layers": 0, "vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 4},
    "glm4v_text": MROPE,
    **dict.fromkeys(("granitemoehybrid", "qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "kimi_linear"), _MIXED),
    "bailing_hybrid": _MIXED,
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "qwen2_vl_text": MROPE,
    "qwen2_5_vl_text": MROPE,
    "prophetnet": {"num_encoder_layers": 2, "num_decoder_layers": 2, "ngram": 2},
    "xlnet": {"d_inner": 48},
}
PADDINGS = {
    "none": [[1] * 8] * 2,
    "left": [[0] * 3 + [1] * 5, [1] * 8],
    "right": [[1] * 5 + [0] * 3, [1] * 8],
    "between": [[1, 1, 0, 1, 0, 0, 1, 1], [1] * 8],
}
TOLERANCE = 2e-5  # of the largest value, fp32


@dataclasses.dataclass
class Outcome:
    """What a family does under our attention, for one padding."""

    verdict: str  # right, refused, wrong, error
    error: float = 0.0  # largest, of the largest value of eager's
    calls: dict = dataclasses.field(default_factory=dict)  # how often prefix_attention and SDPA ran
    why: str = ""  # it was refused, or failed
    is_built: bool = True

    @property
    def runs_on(self):
        return "+".join(f"{name} {self.calls[name]}" for name in ("kernels", "sdpa") if self.calls.get(name))


def config_of(model_type, **options):
    """A small configuration of a family; raises where the generic sizes do not fit."""
    default = AutoConfig.for_model(model_type)
    names = {name: value for name, value in SIZES.items() if name in default.to_dict()}
    names |= {**options, **OPTIONS.get(model_type, {})}
    while True:
        try:
            return AutoConfig.for_model(model_type, **names)
        except Exception as error:  # a size that this family spells in another way
            [first, *_] = [name for name in names if f"`{name}`" in str(error) or f"'{name}'" in str(error)] or [None]
            if first is None:
                raise
            del names[first]


def build(config, implementation, *, auto=None, state=None):
    """A model, with the state of another or with random values far from the initial ones."""
    auto = auto or (AutoModelForCausalLM if config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES else AutoModel)
    torch.manual_seed(0)
    model = auto.from_config(type(config).from_dict(config.to_dict()), attn_implementation=implementation).eval()
    if state is not None:
        model.load_state_dict(state)
        return model
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.nan_to_num(parameter).clamp(-2, 2) + 0.05 * torch.randn_like(parameter))
    return model


def inputs_of(model, padding):
    """Tokens with a mask, pixels, which have none, or sound; and at which outputs tokens are, if not at all of them."""
    torch.manual_seed(1)
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(2, 3, 16, 16)}, None
    mask = torch.tensor(PADDINGS[padding])
    if model.main_input_name == "input_values":  # sound: 400 samples for each token above
        return {"input_values": torch.randn(2, 3200), "attention_mask": mask.repeat_interleave(400, 1)}, None
    ids = torch.randint(3, 60, mask.shape)
    inputs = {"input_ids": ids, "attention_mask": mask}
    if model.config.is_encoder_decoder:
        return {**inputs, "decoder_input_ids": ids.flip(1), "decoder_attention_mask": mask.flip(0)}, mask.flip(0)
    return inputs, mask


def run(model, padding):
    """The outputs at tokens, (tokens, width)."""
    inputs, mask = inputs_of(model, padding)
    options = {} if mask is None else {"use_cache": False}
    with torch.no_grad():
        outputs = model(**inputs, **options)
    first = outputs[0]
    return first[mask.bool()] if mask is not None and first.shape[:2] == mask.shape else first


def compare(ours, theirs, padding):
    expected = run(theirs, padding)
    try:
        with counted() as calls:
            actual = run(ours, padding)
    except Exception as error:
        return outcome_of(error)
    worst = ((actual - expected).abs().max() / expected.abs().max()).item()
    return Outcome("right" if worst <= TOLERANCE else "wrong", worst, dict(calls))


def outcome_of(error):
    """Refused by a sentence of ours, or an error of others."""
    frames = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    is_ours = isinstance(error, ValueError) and "lynx_kernels/integrations" in frames[-1]
    return Outcome("refused" if is_ours else "error", why=f"{type(error).__name__}: {error}")


def applied(model_type, **options):
    """Every padding after ``apply``, against the same model before."""
    model = build(config_of(model_type, **options), None)
    paddings = ("none",) if model.main_input_name == "pixel_values" else PADDINGS
    found = []
    for padding in paddings:
        try:
            expected = run(model, padding)
        except Exception as error:  # it was refused before it was run
            return Outcome("not tried", why=f"{type(error).__name__}: {error}")
        try:
            with apply(model), counted() as calls:
                worst = ((run(model, padding) - expected).abs().max() / expected.abs().max()).item()
        except Exception as error:
            return outcome_of(error)
        found.append(Outcome("right" if worst <= TOLERANCE else "wrong", worst, dict(calls)))
    return max(found, key=lambda each: each.error)


PACKED = PackedLayout.from_segments([2, 3, 4, 8, 3], [-1, 0, 0, -1, -1])
PATHS = [[0, 1, 2, 3, 4], [0, 1, 5, 6, 7, 8], list(range(9, 17)), [17, 18, 19]]


def packed(model_type, **options):
    """Samples and branches in one row of a causal model after ``apply``, against each path alone before."""
    model = build(config_of(model_type, **options), None)
    ids = torch.randint(3, 60, (PACKED.num_tokens,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        try:
            alone = {tuple(path): model(ids[path][None], use_cache=False).logits[0] for path in PATHS}
        except Exception as error:  # its own sdpa, or a single token
            return Outcome("not tried", why=f"{type(error).__name__}: {error}")
        try:
            with apply(model), counted() as calls:
                inputs = {"attention_mask": integration.packed_mask(PACKED), "position_ids": PACKED.position_ids[None]}
                row = model(ids[None], **inputs, use_cache=False).logits[0]
        except Exception as error:
            return outcome_of(error)
    worst = max(((row[list(path)] - each).abs().max() / each.abs().max()).item() for path, each in alone.items())
    return Outcome("right" if worst <= TOLERANCE else "wrong", worst, dict(calls))


@contextlib.contextmanager
def counted():
    """How often layers ran on our kernels, and on PyTorch's."""
    calls = collections.Counter()

    def counting(name, function):
        def call(*args, **kwargs):
            calls[name] += 1
            return function(*args, **kwargs)

        return call

    patch = unittest.mock.patch.object
    kernels, sdpa = integration.prefix_attention, plain.sdpa_attention_forward
    with (
        patch(integration, "prefix_attention", counting("kernels", kernels)),
        patch(integration, "cross_attention", counting("cross", integration.cross_attention)),
        patch(plain, "sdpa_attention_forward", counting("sdpa", sdpa)),
    ):
        yield calls


def outcomes(model_type, paddings=tuple(PADDINGS), *, auto=None, **options):
    """An outcome for each padding, or one for all where the model is refused when it is made."""
    config = config_of(model_type, **options)
    theirs = build(config, "eager", auto=auto)
    try:
        ours = build(config, "lynx", auto=auto, state=theirs.state_dict())
    except Exception as error:
        return dict.fromkeys(paddings, dataclasses.replace(outcome_of(error), is_built=False))
    if theirs.main_input_name == "pixel_values":
        paddings = ("none",)
    return {padding: compare(ours, theirs, padding) for padding in paddings}


def sweep(names=()):
    """All families, or those of these names, by what happens to them; prints a line for each case."""
    kinds = collections.defaultdict(list)
    for model_type in names or sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_MAPPING_NAMES} & {*CONFIG_MAPPING}):
        found = None
        for options in VARIANTS:
            try:
                with torch.device("meta"):
                    config = config_of(model_type, **options)
                    size = sum(p.numel() for p in _auto(config).from_config(config).parameters())
                if size > 2e7:
                    raise ValueError(f"{size} parameters")
                found = outcomes(model_type, **options)
                break
            except Exception as error:  # its own eager does not run from the generic configuration
                reason = error
        if found is None:
            kinds["not tried"].append(model_type)
            if names:
                print(model_type, "not tried:", type(reason).__name__, reason)
            continue
        for padding, each in found.items():
            print(
                f"{model_type:28} {padding:8} {each.verdict:8} {each.error:.0e} {each.runs_on:20} {each.why[:150]}",
                flush=True,
            )
        kinds[_kind(found.values())].append(model_type)
        cases = {"apply": applied}
        if model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            cases["packed rows"] = packed
        for case, attempt in cases.items():
            each = attempt(model_type, **options)
            print(
                f"{model_type:28} {case:11} {each.verdict:8} {each.error:.0e} {each.runs_on:20} {each.why[:200]}",
                flush=True,
            )
            kinds[each.verdict if each.verdict in ("wrong", "error") else f"{case}: {each.verdict}"].append(model_type)
    return kinds


def _kind(found):
    """The worst that happens with a padding."""
    verdicts = {each.verdict for each in found}
    worst = next(verdict for verdict in ("wrong", "error", "refused", "right") if verdict in verdicts)
    if worst == "refused":
        return f"refused when {'used' if all(each.is_built for each in found) else 'built'}"
    if worst != "right":
        return worst
    runs_on = {name for each in found for name in each.calls}
    if "kernels" in runs_on:
        return "right, on the kernels"
    return "right, on PyTorch's attention" if runs_on else "right, on attention of their own"


def main(names):
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    for kind, found in sorted(sweep(names).items()):
        print(f"{kind} ({len(found)}): {', '.join(found)}")


def _auto(config):
    return AutoModelForCausalLM if config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES else AutoModel


if __name__ == "__main__":
    main(sys.argv[1:])
