"""``SharedPrefixGRPOTrainer`` trains as TRL's ``GRPOTrainer``, on the same completions."""

import inspect
import logging
import math

import peft
import pytest
import torch
import trl
from trl.trainer import grpo_trainer
from trl.trainer.utils import FusedCausalLMOutput

from lynx_kernels.integrations.trl import SharedPrefixGRPOTrainer
from lynx_kernels.integrations.trl.grpo import _shuffled_by_group
from tests.lynx_kernels import trl_models

GROUP = 4


class Scripted:
    """Completions drawn from the prompts alone, so that both trainers see the same in each step."""

    def _generate_single_turn(self, prompt_ids, *args, **options):
        found = []
        for number, prompt in enumerate(prompt_ids):
            generator = torch.Generator().manual_seed(99 * self.state.global_step + 9 * sum(prompt) + number % GROUP)
            length = int(torch.randint(1, 6, (), generator=generator))
            tokens = torch.randint(5, 9, (length,), generator=generator).tolist()
            found.append([*tokens, 2] if length < 5 else tokens)
        return found, None


class Theirs(Scripted, trl.GRPOTrainer):
    pass


class Ours(Scripted, SharedPrefixGRPOTrainer):
    pass


def reward(completion_ids, **columns):
    return [sum(each) % 7 / 3 for each in completion_ids]


def make(kind, folder, family="Llava", *, dtype=torch.float32, reward=reward, data=None, model=None, rollout_func=None,
         **options):  # fmt: skip
    built, processor = trl_models.build(family, None if options.get("beta", 0) == 0 else folder / "model", dtype)
    wanted = {
        "per_device_train_batch_size": 2 * GROUP, "num_generations": GROUP, "max_completion_length": 5, "max_steps": 2,
        "learning_rate": 0.1, "optim": "sgd", "logging_steps": 1, "report_to": [], "save_strategy": "no",
        "disable_tqdm": True, "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "max_grad_norm": 0.0,
    }  # fmt: skip
    config = trl.GRPOConfig(folder, **(wanted | options))
    data = trl_models.prompts() if data is None else data
    return kind(
        model or built, reward_funcs=reward, args=config, train_dataset=data, processing_class=processor,
        rollout_func=rollout_func,
    )  # fmt: skip


def train(kind, folder, family="Llava", *, peft_config=None, **options):
    """Losses, and what trained."""
    model = None
    if peft_config is not None:
        built, _ = trl_models.build(family)
        torch.manual_seed(0)
        model = peft.get_peft_model(built, peft_config)
    trainer = make(kind, folder, family, model=model, **options)
    trainer.train()
    losses = [each["loss"] for each in trainer.state.log_history if "loss" in each]
    return losses, {name: each.detach() for name, each in trainer.model.named_parameters() if each.requires_grad}


def check(ours, theirs, tolerance):
    torch.testing.assert_close(torch.tensor(ours[0]), torch.tensor(theirs[0]), rtol=tolerance, atol=tolerance)
    assert ours[1].keys() == theirs[1].keys()
    for name, each in theirs[1].items():
        torch.testing.assert_close(
            ours[1][name], each, rtol=tolerance, atol=tolerance, msg=lambda text, n=name: n + text
        )


OPTIONS = {
    "dapo": {},
    "reference": {"beta": 0.1, "loss_type": "grpo", "num_iterations": 2},
    "accumulated": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": GROUP, "loss_type": "dr_grpo"},
    "old policy": {"steps_per_generation": 4, "per_device_train_batch_size": GROUP, "loss_type": "bnpo"},
    "sequences": {"importance_sampling_level": "sequence", "loss_type": "luspo", "num_iterations": 2},
    "cispo": {"loss_type": "cispo", "top_entropy_quantile": 0.5},
    "sapo": {"loss_type": "sapo", "mask_truncated_completions": True},
    "vespo": {"loss_type": "vespo", "num_iterations": 2, "off_policy_mask_threshold": 0.5},
    "checkpointed": {"gradient_checkpointing": True},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_are_those_of_trl(name, tmp_path, monkeypatch):
    """Where a generation batch is cut, TRL's shuffling is made to keep groups together, as ours does."""
    monkeypatch.setattr(grpo_trainer, "shuffle_sequence_dict", lambda batch: _shuffled_by_group(batch, GROUP))
    check(train(Ours, tmp_path, **OPTIONS[name]), train(Theirs, tmp_path, **OPTIONS[name]), 2e-5)


@pytest.mark.parametrize("family", trl_models.FAMILIES)
def test_families_train_as_with_trl(family, tmp_path):
    check(train(Ours, tmp_path, family), train(Theirs, tmp_path, family), 2e-5)


def test_lora_on_tower_and_text(tmp_path):
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj", "qkv"], use_dora=True, init_lora_weights=False)
    found = [train(kind, tmp_path, "Qwen25VL", peft_config=config, beta=0.0, gradient_checkpointing=True)
             for kind in (Ours, Theirs)]  # fmt: skip
    assert any("visual" in name for name in found[0][1])
    check(*found, 2e-5)


class PlainHead(torch.autograd.Function):
    """Stands in for TRL's head, which computes in fp32 whatever the dtype is."""

    @staticmethod
    def apply(hidden, weight, bias, labels, temperature, chunk, softcap, scale, outputs):
        logits = (hidden @ weight.T) / temperature
        log_probs = logits.log_softmax(-1)
        entropy, is_top1 = -(log_probs.exp() * log_probs).sum(-1), logits.argmax(-1) == labels
        return log_probs.gather(-1, labels[:, None])[:, 0], entropy, None, logits.mean(-1), is_top1


def test_twenty_steps_in_fp64(tmp_path, monkeypatch):
    monkeypatch.setattr("trl.trainer.utils._ChunkedLogProbFunction", PlainHead)
    trl_models.without_fp32(trl_models.build("Qwen3VL")[0], monkeypatch)
    options = {"dtype": torch.float64, "max_steps": 20, "beta": 0.1, "num_iterations": 2}
    options |= {"optim": "adamw_torch", "learning_rate": 1e-3}
    check(*(train(kind, tmp_path, "Qwen3VL", **options) for kind in (Ours, Theirs)), 1e-9)


def test_a_hundred_steps_in_fp32(tmp_path):
    options = {"max_steps": 100, "num_iterations": 2, "optim": "adamw_torch", "learning_rate": 1e-3}
    ours, theirs = (train(kind, tmp_path, **options)[0] for kind in (Ours, Theirs))
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=0, atol=1e-3)


def test_rollout_and_training_agree(tmp_path):
    """What generate() sampled from has the log-probabilities that training computes; the first ratio is exactly 1."""
    trainer = make(SharedPrefixGRPOTrainer, tmp_path, "Qwen25VL", steps_per_generation=4)
    batch = [dict(each) for each in trainer.train_dataset for _ in range(GROUP)]
    ours, theirs = trainer.model, trl_models.build("Qwen25VL")[0]
    ours.train()
    inputs = trainer._generate_and_score_completions(batch)
    old = inputs["old_per_token_logps"]
    media = {name: inputs[name] for name in ("pixel_values", "image_grid_thw", "mm_token_type_ids", "num_images")}
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    new, _, _ = trainer._get_per_token_logps_and_entropies(
        ours, ids, mask, inputs["completion_ids"].shape[1], batch_size=2 * GROUP, **media
    )
    assert torch.equal(new.detach(), old)  # on the layout of the old ones
    logits = theirs(
        ids, attention_mask=mask, **{name: each for name, each in media.items() if name != "num_images"}
    ).logits
    length = inputs["completion_ids"].shape[1]
    sampled = logits[:, -length - 1 : -1].log_softmax(-1).gather(-1, inputs["completion_ids"][..., None])[..., 0]
    is_token = inputs["completion_mask"].bool()
    torch.testing.assert_close(new[is_token], sampled[is_token], rtol=0, atol=1e-5)


def test_a_prompt_runs_once(tmp_path):
    trainer = make(Ours, tmp_path, max_steps=1)
    seen = []
    tower = trainer.model.model.vision_tower
    tower.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    trainer.train()
    assert [len(each) for each in seen] == [2]  # two groups of four; no old or reference policy in this step
    ratio = [each["tokens_per_packed_token"] for each in trainer.state.log_history if "loss" in each]
    assert 1.5 < ratio[0] < GROUP


def test_groups_stay_together_where_a_batch_is_cut():
    batch = {"prompt_ids": torch.arange(12), "num_images": list(range(12)), "num_items_in_batch": torch.tensor(3)}
    torch.manual_seed(3)
    found = _shuffled_by_group({**batch, "nothing": None}, 4)
    rows = found["prompt_ids"].tolist()
    assert found["num_images"] == rows
    assert sorted(rows) == list(range(12)) != rows
    assert [{row // 4 for row in rows[start : start + 4]} for start in (0, 4, 8)] != [{0}, {1}, {2}]
    assert all(len({row // 4 for row in rows[start : start + 4]}) == 1 for start in (0, 4, 8))


def test_rewards_that_are_not_finite_are_none(tmp_path, caplog):
    def bad(completion_ids, **columns):
        return [math.nan, -math.inf, 1.0, 0.0, None, 1.0, 0.0, 0.0]

    trainer = make(Ours, tmp_path, reward=bad, max_steps=1)
    with caplog.at_level(logging.WARNING, "lynx_kernels"):
        trainer.train()
    [logged] = [each for each in trainer.state.log_history if "loss" in each]
    assert logged["rewards/not_finite"] == 3
    assert math.isfinite(logged["loss"])
    assert math.isfinite(logged["grad_norm"])
    assert "1 rewards of a batch are infinite" in caplog.text
    advantages = list(trainer._logs["advantages"])
    assert [each > 0 for each in advantages] == [False, False, True, False, False, True, False, False]
    assert [each < 0 for each in advantages] == [False, False, False, True, False, False, True, True]


def test_rollouts_of_ones_own(tmp_path, caplog, monkeypatch):
    """Tokens of an environment and empty completions train nothing; an empty one still counts for its group."""

    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")

    def rollout(prompts, trainer):
        template, options = trainer.processing_class.apply_chat_template, {"tokenize": True, "return_dict": True}
        completions = [[5 + number, 6, 2] if number % GROUP else [] for number in range(len(prompts))]
        return {
            "prompt_ids": template(prompts, add_generation_prompt=True, **options)["input_ids"],
            "completion_ids": completions,
            "logprobs": [[0.0] * len(each) for each in completions],
            "env_mask": [[1, 0, 1][: len(each)] for each in completions],
        }

    trainer = make(SharedPrefixGRPOTrainer, tmp_path, max_steps=1, rollout_func=rollout)
    with caplog.at_level(logging.WARNING, "lynx_kernels"):
        trainer.train()
    assert "completions [0, 4] of a batch are empty: they are rewarded, and train nothing" in caplog.text
    [logged] = [each for each in trainer.state.log_history if "loss" in each]
    assert logged["completions/empty"] == 2
    assert logged["completions/mean_length"] == 6 * 2 / 8
    assert math.isfinite(logged["grad_norm"])
    buffered = trainer._buffered_inputs[0]
    mask = buffered["completion_mask"] * buffered["tool_mask"]
    assert mask.sum(1).tolist().count(0) == 2
    assert (buffered["advantages"] != 0).all()


def test_what_cannot_be_right_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match="SharedPrefixGRPOTrainer: token_log_probs returns entropies without gradients"
    ):
        make(SharedPrefixGRPOTrainer, tmp_path, entropy_coef=0.1)
    with pytest.raises(ValueError, match="SharedPrefixGRPOTrainer: token_log_probs sums logits in fp32 already"):
        make(SharedPrefixGRPOTrainer, tmp_path, cast_lm_head_to_fp32=True)
    model = peft.get_peft_model(
        trl_models.build("Llava")[0], peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    )
    with pytest.raises(ValueError, match="PromptTuningConfig puts tokens of its own before rows"):
        make(SharedPrefixGRPOTrainer, tmp_path, model=model)
    model = peft.get_peft_model(trl_models.build("Llava")[0], peft.LoraConfig(target_modules=["q_proj", "lm_head"]))
    with pytest.raises(ValueError, match="adapter to `lm_head` is not supported"):  # says TRL
        make(SharedPrefixGRPOTrainer, tmp_path, model=model)


def test_what_of_trl_is_replaced_and_what_is_relied_on():
    """A new release of TRL that fails here wants another look at ``integrations/trl``."""
    replaced = {name for name in vars(SharedPrefixGRPOTrainer) if name in vars(trl.GRPOTrainer) and name[:2] != "__"}
    assert replaced - {"_tag_names"} == {
        "_get_per_token_logps_and_entropies", "_prepare_inputs", "_calculate_rewards",
    }  # fmt: skip
    source = inspect.getsource(trl.GRPOTrainer._get_per_token_logps_and_entropies)
    assert "outputs = model(**model_inputs, labels=labels, fused_lm_head=True)" in source
    assert "all_logps.append(outputs.log_probs[:, -logits_to_keep:])" in source
    lines = [line.split("#")[0].strip() for line in inspect.getsource(trl.GRPOTrainer._prepare_inputs).splitlines()]
    assert "\n".join(line for line in lines if line).endswith(
        """mode = "train" if self.model.training else "eval"
if mode == "train":
generate_every = self.args.steps_per_generation * self.num_iterations
if self._step % generate_every == 0 or self._buffered_inputs is None:
generation_batch = self._generate_and_score_completions(generation_batch)
generation_batch = split_pixel_values_by_grid(generation_batch)
generation_batch = shuffle_sequence_dict(generation_batch)
generation_batches = split_tensor_dict(generation_batch, self.args.steps_per_generation)
self._buffered_inputs = [unsplit_pixel_values_by_grid(batch) for batch in generation_batches]
inputs = self._buffered_inputs[self._step % self.args.steps_per_generation]
else:
inputs = self._generate_and_score_completions(generation_batch)
return inputs"""
    )
    assert {"log_probs", "entropy", "mean_logits", "is_top1", "log_sum_sq_probs", "label_mask"} <= set(
        FusedCausalLMOutput.__dataclass_fields__
    )
    assert "_entropy_bonus_enabled" in inspect.getsource(grpo_trainer)
