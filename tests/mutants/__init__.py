# ruff: noqa: E501 - a fault is a line
"""Deliberate faults, each with the tests that must see it.

``python -m tests.mutants`` puts each into a copy of the project and runs its tests there, some minutes for all; words
after it choose those in whose file or text they stand. ``test_mutants`` checks that every text is still there.
"""

from typing import NamedTuple


class Mutant(NamedTuple):
    """A fault.

    Attributes:
        file: where it is put.
        old: what stands there, once.
        new: what takes its place.
        tests: the arguments of pytest for tests of which one must fail.
    """

    file: str
    old: str
    new: str
    tests: str


KERNELS, TESTS = "lynx_kernels/", "tests/lynx_kernels/"
ATTENTION, REFERENCE = f"{KERNELS}ops/attention_common/reference.py", f"{TESTS}test_attention.py"
DECODE, DECODE_TESTS = f"{KERNELS}ops/prefix_attention_decode/reference.py", f"{TESTS}test_prefix_attention_decode.py"
LAYOUT, LAYOUT_TESTS = f"{KERNELS}layout/packed.py", f"{TESTS}test_forest_layout.py {TESTS}test_layout.py"
FOREST = f"{KERNELS}layout/forest.py"
BLOCKS, PATTERNS = f"{KERNELS}layout/blocks.py", f"{KERNELS}integrations/patterns.py"
MASKS, PATTERN_TESTS = f"{KERNELS}integrations/mask_function.py", f"{TESTS}test_transformers_patterns.py"
FUNCTION, APPLY = f"{KERNELS}integrations/transformers.py", f"{KERNELS}integrations/apply.py"
PLAIN = f"{KERNELS}integrations/plain.py"
APPLY_TESTS, COLLATOR_TESTS = f"{TESTS}test_apply.py", f"{TESTS}test_packed_collator.py"
HEAD_LOSS, COLLATOR = f"{KERNELS}integrations/head_loss.py", f"{KERNELS}integrations/collator.py"
ADAPTER, ADAPTER_TESTS = f"{KERNELS}ops/adapter/reference.py", f"{TESTS}test_adapter.py"
EMBEDDINGS, EMBEDDINGS_TESTS = f"{KERNELS}ops/pack_embeddings/reference.py", f"{TESTS}test_pack_embeddings.py"
CHUNKED = f"{KERNELS}ops/head_common/chunked.py"
LOSS_TESTS = f"{TESTS}test_linear_cross_entropy.py {TESTS}test_token_log_probs.py"
FILLING, PLANNER = f"{KERNELS}packing/filling.py", f"{KERNELS}packing/planner.py"
PACKING_TESTS = f"{TESTS}test_packing.py"
PROCESSORS, PROCESSOR_TESTS = f"{KERNELS}integrations/processors/", f"{TESTS}test_processors.py"
TRL, TRL_TESTS = f"{KERNELS}integrations/trl/", f"{TESTS}test_trl_branches.py"
GRPO, GRPO_TESTS = f"{TRL}grpo.py", f"{TESTS}test_trl_grpo.py"
DPO_TESTS, SFT_TESTS = f"{TESTS}test_trl_dpo.py", f"{TESTS}test_trl_sft.py"
PENDING, BACKEND = f"{PROCESSORS}pending.py", f"{PROCESSORS}backend.py"

MUTANTS = [
    # Attention: values, gradients, sinks
    Mutant(ATTENTION, "grad_scores = scale * weights * (grad_weights - delta)", "grad_scores = weights * (grad_weights - delta)", REFERENCE),
    Mutant(ATTENTION, "* (grad_weights - delta)", "* (grad_weights + delta)", REFERENCE),
    Mutant(ATTENTION, "return delta if grad_lse is None else delta - grad_lse", "return delta if grad_lse is None else delta + grad_lse", REFERENCE),
    Mutant(ATTENTION, "grad_scores * (1 - (scores / softcap)", "grad_scores * (1 + (scores / softcap)", f"{TESTS}test_forest_attention.py"),
    Mutant(ATTENTION, "grad_sinks = -(torch.exp", "grad_sinks = (torch.exp", f"{TESTS}test_forest_attention.py"),
    # Decoding
    Mutant(DECODE, "place[:, None] > query[..., None] - call.window", "place[:, None] >= query[..., None] - call.window", DECODE_TESTS),
    Mutant(DECODE, "(query - query % call.chunk)", "(query - call.chunk)", DECODE_TESTS),
    Mutant(DECODE, "place[:, None] <= query[..., None])", "place[:, None] < query[..., None])", DECODE_TESTS),
    Mutant(DECODE, "call.scale, call.softcap, call.sinks)\n\n\ndef backward", "1.0, call.softcap, call.sinks)\n\n\ndef backward", DECODE_TESTS),
    Mutant(DECODE, "visible, call.scale, call.softcap)", "visible, call.scale)", DECODE_TESTS),
    # Layouts
    Mutant(FOREST, "max(subtree_ends[parents[index]], subtree_ends[index])", "subtree_ends[parents[index]]", LAYOUT_TESTS),
    Mutant(FOREST, "path_starts[parent] + lengths[parent]", "path_starts[parent]", LAYOUT_TESTS),
    Mutant(FOREST, "if ancestor >= 0 and segments.starts[ancestor + 1] == start:", "if ancestor >= 0 and ancestor + 1 == index:", LAYOUT_TESTS),
    Mutant(FOREST, "ancestor = parent if parent < 0 or segments.lengths[parent] > 0 else nearest[parent]", "ancestor = parent", LAYOUT_TESTS),
    Mutant(LAYOUT, "near = of_query - of_key < window", "near = of_query - of_key <= window", LAYOUT_TESTS),
    Mutant(LAYOUT, "near = of_query // chunk == of_key // chunk", "near = of_query - of_key < chunk", LAYOUT_TESTS),
    Mutant(LAYOUT, "return in_tree & (near | (query < see_end))", "return in_tree & near", LAYOUT_TESTS),
    Mutant(LAYOUT, "torch.where(self.tokens[0] < token, -1, before)", "before", LAYOUT_TESTS),
    Mutant(LAYOUT, "chosen = supervised & (predictors >= 0)", "chosen = supervised", f"{LAYOUT_TESTS} {LOSS_TESTS}"),
    Mutant(BLOCKS, "begins = is_inside & ~goes_on", "begins = is_inside & ~goes_on & (predictors >= 0)", LAYOUT_TESTS),
    Mutant(BLOCKS, "is_whole = ~(goes_on & ~is_in_part).any()", "is_whole = ~(goes_on & is_in_part & ~is_in_part).any()", LAYOUT_TESTS),
    # Post-training
    Mutant(f"{TRL}branches.py", "place[is_scored.nonzero()[:, 0] - 1]", "place[is_scored.nonzero()[:, 0]]", TRL_TESTS),
    Mutant(f"{TRL}branches.py", "is_scored = label != IGNORE", "is_scored = (label != IGNORE) & (label.roll(1) != IGNORE)", TRL_TESTS),
    Mutant(f"{TRL}branches.py", "token[is_scored] - 1)", "token[is_scored])", TRL_TESTS),
    Mutant(f"{TRL}branches.py", "other.keys() == media.keys() and all(", "other.keys() == media.keys() or all(", TRL_TESTS),
    Mutant(f"{TRL}branches.py", "members.append(number)\n                break", "found.append((media, [number]))\n                break", TRL_TESTS),
    Mutant(f"{TRL}head.py", "temperature=temperature,\n        bias", "bias", TRL_TESTS),
    Mutant(f"{TRL}head.py", "weights = branches.weights if self.training else None", "weights = None", SFT_TESTS),
    Mutant(GRPO, "key=lambda row: place[row // group_size]", "key=lambda row: 0", GRPO_TESTS),
    Mutant(GRPO, "torch.where(rewards.isinf(), torch.nan, rewards)", "rewards", GRPO_TESTS),
    Mutant(GRPO, '("env_mask", 0)', '("env_mask", 1)', GRPO_TESTS),
    Mutant(f"{TRL}dpo.py", "value.chunk(2)[member]", "value.chunk(2)[0]", DPO_TESTS),
    Mutant(f"{TRL}install.py", "((trainer.model, outputs), (reference, ()))", "((trainer.model, outputs),)", DPO_TESTS),
    Mutant(f"{TRL}sft.py", "total = sum(batch[BRANCHES].weights.sum()", "total = sum((batch[BRANCHES].weights > 0).sum()", SFT_TESTS),
    Mutant(f"{TRL}sft.py", "lambda count: count.rsqrt()", "lambda count: count.sqrt()", SFT_TESTS),
    Mutant(f"{TRL}packs.py", "if not 0 < tokens <= self.token_budget:", "if not 0 < tokens:", SFT_TESTS),
    Mutant(COLLATOR, "if self.placeholder is not None and not any(media):", "if False:", COLLATOR_TESTS),
    # Others' models
    Mutant(PATTERNS, "lambda sliding_window: Pattern(window=sliding_window)", "lambda sliding_window: Pattern(window=sliding_window + 1)", PATTERN_TESTS),
    Mutant(PATTERNS, "return replace(self, blocks=other.blocks)\n", "return self\n", PATTERN_TESTS),
    Mutant(MASKS, "if forks or split:", "if forks:", PATTERN_TESTS),
    Mutant(MASKS, "        if local:\n", "        if not local and local:\n", PATTERN_TESTS),
    Mutant(MASKS, "begins & (pattern.positions % pattern.chunk != 0)", "begins & (pattern.positions < 0)", PATTERN_TESTS),
    Mutant(MASKS, "torch.where(is_token, pattern.blocks, -1)", "pattern.blocks", f"{PATTERN_TESTS} {APPLY_TESTS}"),
    Mutant(FUNCTION, "softcap=softcap, sinks=sinks)\n    return out", "softcap=softcap)\n    return out", PATTERN_TESTS),
    Mutant(PLAIN, "scores = softcap * torch.tanh(scores / softcap)", "scores = torch.tanh(scores / softcap)", PATTERN_TESTS),
    Mutant(PLAIN, "weights[..., :keys], dropout", "weights[..., -keys:], dropout", PATTERN_TESTS),
    Mutant(FUNCTION, "packed_mask(layout.with_local(window=given.window, chunk=given.chunk))", "packed_mask(layout)", APPLY_TESTS),
    Mutant(APPLY, "config._attn_implementation_internal = implementation", "config._attn_implementation_internal = NAME", APPLY_TESTS),
    Mutant(APPLY, "if model in _patched:", "if model is None:", APPLY_TESTS),
    Mutant(HEAD_LOSS, "value=ignore_index)[..., 1:].contiguous()", "value=ignore_index)[..., :-1].contiguous()", APPLY_TESTS),
    Mutant(HEAD_LOSS, "            softcap=cap,\n", "", APPLY_TESTS),
    Mutant(HEAD_LOSS, "            num_items=num_items_in_batch,\n", "", APPLY_TESTS),
    Mutant(HEAD_LOSS, "            predictors=predictors,\n", "", COLLATOR_TESTS),
    Mutant(COLLATOR, "unpredicted = packed.layout.predictors < 0", "unpredicted = packed.layout.predictors < -1", COLLATOR_TESTS),
    Mutant(COLLATOR, "torch.arange(len(ids)) + _FIRST_POSITION.get(self.name, 0)", "torch.arange(len(ids))", COLLATOR_TESTS),
    Mutant(COLLATOR, "shared = int(same.int().cumprod(0).sum())", "shared = int(same.int().sum())", COLLATOR_TESTS),
    # Image processors
    Mutant(PENDING, "(self.whole if is_whole else self).compute()", "self.whole.compute()", PROCESSOR_TESTS),
    Mutant(PENDING, "elif top <= 0 and left <= 0 and top + height >= self.size[0]", "elif top <= 0 and left <= 0", PROCESSOR_TESTS),
    Mutant(PENDING, "if not image._is_inside and image.outside != outside:", "if image is None:", PROCESSOR_TESTS),
    Mutant(PENDING, "if step == 1 and start < stop:", "if start < stop:", PROCESSOR_TESTS),
    Mutant(PENDING, "outside = 0 if self.levels is None else self.levels.table[:, :1, None]", "outside = 0", PROCESSOR_TESTS),
    Mutant(PENDING, "if is_same and np.array_equal(", "if is_same or np.array_equal(", PROCESSOR_TESTS),
    Mutant(PENDING, "part if part.flags.writeable else part.copy()", "part", PROCESSOR_TESTS),
    Mutant(PENDING, "array[index] = 0", "array[index] = 1", PROCESSOR_TESTS),
    Mutant(PENDING, "and len(parts) == indices[-1] - indices[0] + 1:", "or len(parts) == indices[-1] - indices[0] + 1:", PROCESSOR_TESTS),
    Mutant(PENDING, "self._whole = whole ", "self._whole = whole or self ", PROCESSOR_TESTS),
    Mutant(BACKEND, "if type(image) is PendingImage and image.outside is None:", "if type(image) is PendingImage:", PROCESSOR_TESTS),
    Mutant(BACKEND, ' and image.info.get("transparency") is None', "", PROCESSOR_TESTS),
    Mutant(BACKEND, "theirs[1:] == grid and np.array_equal(theirs[0], patches.reshape(len(patches), -1))", "theirs[1:] == grid", PROCESSOR_TESTS),
    Mutant(BACKEND, "if type(image) is PendingImage and image.levels is None:\n        table", "if type(image) is PendingImage:\n        table", PROCESSOR_TESTS),
    Mutant(PENDING, "part.levels and part.levels[1:]", "None", PROCESSOR_TESTS),
    Mutant(PENDING, "(part.shape, part.resample, ", "(part.shape, ", PROCESSOR_TESTS),
    Mutant(f"{KERNELS}ops/pack_frames/fit.py", "fit._replace(top=top, left=left)", "fit._replace(top=top)", f"{TESTS}test_pack_frames.py"),
    Mutant(f"{KERNELS}ops/pack_frames/__init__.py", "and channel >= height * row", "and channel >= 0", f"{TESTS}test_pack_frames.py"),
    # Adapter, embeddings, loss, planner
    Mutant(ADAPTER, "torch.rsqrt(variance + eps)", "torch.rsqrt(variance)", ADAPTER_TESTS),
    Mutant(ADAPTER, "out = x_acc + scale.to(x_acc.dtype) * up.to(x_acc.dtype)", "out = x_acc + up.to(x_acc.dtype)", ADAPTER_TESTS),
    Mutant(EMBEDDINGS, "is_vision = vision_index >= 0", "is_vision = vision_index > 0", EMBEDDINGS_TESTS),
    Mutant(CHUNKED, "grad_bias += grad.sum(0)", "grad_bias = grad.sum(0)", LOSS_TESTS),
    Mutant(FILLING, "self.room += sample[0]\n        self.patches -= sample[1]", "self.room += sample[0]", PACKING_TESTS),
    Mutant(PLANNER, 'state["num_seen"], state["skipped"]', 'state["num_seen"], 0', PACKING_TESTS),
    Mutant("lynx/eval/judge.py", "prediction.strip().lower() in", "prediction.lower() in", "tests/lynx/eval/test_evaluation.py"),
]  # fmt: skip
