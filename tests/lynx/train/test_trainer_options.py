"""A Lynx model under transformers' own ``Trainer``: every field of ``TrainingArguments``, in both fusions.

What is trained is what plain PyTorch makes of the logits: the mean, over all supervised tokens of a step, of the cross
entropy of each token and the row before it. What is evaluated are these logits and this loss. What cannot be right is
refused by name. Each field stands in one of the tables here, and one that a new release of transformers adds fails a
test by its name.
"""

import copy
import dataclasses
import gc
import os
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import IterableDataset
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorWithFlattening,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainingArguments,
)
from transformers.trainer_pt_utils import LabelSmoother

from lynx import LynxProcessor
from tests.lynx import processes
from tests.lynx.conftest import conversation, make_config, make_image, make_model, make_tokenizer
from tests.lynx.fusion.cross_attention.conftest import cross_config
from tests.lynx.model_checks import inputs

FUSIONS = {"prefix": make_config, "cross_attention": cross_config}
QUIET = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no"}
# One step over four rows: weights move by their gradients.
ONE_STEP = {
    "max_steps": 1, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "optim": "sgd",
    "learning_rate": 1.0, "lr_scheduler_type": "constant", "max_grad_norm": 0.0,
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def quick_collections():
    """Trainer collects garbage at its start; what the imports left is not looked through each time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@cache
def _made(fusion):
    tokenizer = make_tokenizer()
    config = FUSIONS[fusion](tokenizer)
    model, processor = make_model(config), LynxProcessor.for_model(config, tokenizer)
    conversations = [
        conversation("Which digit is this?", "seven", images=[make_image(0)]),
        conversation("Hello", "yes, hello, and a longer answer than all others"),
        conversation("Same?", "no", images=[make_image(4)], videos=[[make_image(5), make_image(6)]]),
        conversation("Odd?", "yes", images=[make_image(7)]),
    ]
    return model, processor, [processor.encode(each) for each in conversations]


class Case:
    """A model of its own, samples for it, and a folder to train in."""

    def __init__(self, fusion, folder):
        model, self.processor, self.samples = _made(fusion)
        self.model, self.fusion, self.folder = copy.deepcopy(model), fusion, folder

    def trainer(self, *, data=None, collator=None, kind=Trainer, arguments=TrainingArguments, passed=(), **options):
        data = self.samples if data is None else data
        return kind(
            self.model,
            arguments(str(self.folder), **{**QUIET, **options}),
            train_dataset=data,
            eval_dataset=None if isinstance(data, IterableDataset) else data,
            data_collator=self.processor.pad if collator is None else collator,
            **dict(passed),
        )

    def trained(self, **options):
        """By how much each weight moved."""
        before = {name: each.detach().clone() for name, each in self.model.named_parameters()}
        self.trainer(**{**ONE_STEP, **options}).train()
        return {name: before[name] - each.detach() for name, each in self.model.named_parameters()}

    def logits(self, samples=None):
        """The logits and labels of a padded batch."""
        batch = self.processor.pad(self.samples if samples is None else samples)
        return self.model(**inputs(batch)).logits, batch["labels"]

    def gradients(self, samples=None, loss=None):
        """Of the plain loss of all samples."""
        self.model.zero_grad()
        (plain if loss is None else loss)(*self.logits(samples)).backward()
        found = {
            name: torch.zeros_like(each) if each.grad is None else each.grad.clone() for name, each in self.named()
        }
        self.model.zero_grad()
        return found

    def named(self):
        return list(self.model.named_parameters())


def plain(logits, labels, **options):
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), **options)


@pytest.fixture(params=FUSIONS)
def case(request, tmp_path):
    return Case(request.param, tmp_path)


@pytest.fixture
def prefix(tmp_path):
    return Case("prefix", tmp_path)


def adding(make, **extra):
    """A collator that adds to a batch."""
    return lambda samples: {**make(samples), **extra}


def assert_same(found, expected, tolerance=1e-4):
    """Each gradient within a part of the largest value, all together within a part of their norm."""
    total = sum(each.square().sum() for each in expected.values()).sqrt()
    assert total > 1e-2
    error = sum((found[name] - expected[name]).square().sum() for name in expected).sqrt()
    assert error <= tolerance * total, f"{error / total}"


# Training

# Field -> options with which the same is trained.
TRAINS_THE_SAME = {
    "activation_checkpointing": {"gradient_checkpointing": True},
    "data_seed": {"data_seed": 3},
    "dataloader_num_workers": {"dataloader_num_workers": 1},
    "dataloader_persistent_workers": {"dataloader_num_workers": 1, "dataloader_persistent_workers": True},
    "full_determinism": {"full_determinism": True},
    "gradient_accumulation_steps": {},
    "gradient_checkpointing_kwargs": {
        "gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False},
    },
    "label_names": {"label_names": ["labels"]},
    "per_device_train_batch_size": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1},
    "remove_unused_columns": {"remove_unused_columns": False},
    "seed": {"seed": 3},
    "torch_empty_cache_steps": {"torch_empty_cache_steps": 1},
    "use_cache": {"use_cache": True},
}  # fmt: skip


@pytest.mark.parametrize("field", TRAINS_THE_SAME)
def test_it_trains_the_same(case, field, monkeypatch):
    """As a mean of rows' or batches' means would not: the rows have very different numbers of supervised tokens."""
    monkeypatch.setattr(os, "environ", os.environ.copy())
    expected = case.gradients()
    try:
        assert_same(case.trained(**TRAINS_THE_SAME[field]), expected)
    finally:
        torch.use_deterministic_algorithms(False)


def test_packed_rows_train_the_same(case):
    expected = case.gradients()
    assert_same(case.trained(collator=case.processor.pack), expected)


@pytest.mark.parametrize("strategy", ["random", "sequential", "group_by_length", "batch_rebalance"])
def test_rows_in_any_order_train_the_same(prefix, strategy):
    records = [{"input_ids": each.token_ids, "sample": each} for each in prefix.samples]
    expected = prefix.gradients()
    options = {"train_sampling_strategy": strategy, "remove_unused_columns": False}
    trained = prefix.trained(
        data=records, collator=lambda each: prefix.processor.pad([record["sample"] for record in each]), **options
    )
    assert_same(trained, expected)


def train_rank(rank, fusion, folder, options):
    return Case(fusion, folder).trained(**options)


@pytest.mark.parametrize("averages", [True, False])
def test_two_ranks_train_the_same(case, averages):
    """Or the mean of the two ranks' means, where the tokens of all ranks are not counted together."""
    ranks = [case.samples[:2], case.samples[2:]]
    expected = case.gradients()
    if not averages:
        first, second = map(case.gradients, ranks)
        expected = {name: (first[name] + second[name]) / 2 for name in expected}
    options = {
        "gradient_accumulation_steps": 1, "train_sampling_strategy": "sequential",
        "average_tokens_across_devices": averages,
    }  # fmt: skip
    for trained in processes.ranks(2, case.folder, train_rank, case.fusion, case.folder, options):
        assert_same(trained, expected)


def test_the_last_rows_are_dropped(case):
    options = {"per_device_train_batch_size": 3, "dataloader_drop_last": True, "train_sampling_strategy": "sequential"}
    expected = case.gradients(case.samples[:3])
    assert_same(case.trained(**options), expected)


def test_a_batch_that_is_too_large_is_made_smaller(case):
    def collator(samples):
        if len(samples) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return case.processor.pad(samples)

    options = {
        "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "train_sampling_strategy": "sequential",
    }  # fmt: skip
    expected = case.gradients(case.samples[:3])
    assert_same(case.trained(collator=collator, auto_find_batch_size=True, **options), expected)


def test_gradients_are_clipped(case):
    expected = case.gradients()
    norm = sum(each.square().sum() for each in expected.values()).sqrt()
    limit = 0.5 * float(norm)
    assert_same(case.trained(max_grad_norm=limit), {name: 0.5 * each for name, each in expected.items()})


def test_bf16_is_autocast(case):
    expected = case.gradients()
    trained = case.trained(bf16=True)
    assert_same(trained, expected, 5e-2)
    with pytest.raises(AssertionError):
        assert_same(trained, expected, 1e-4)


def test_noise_on_the_embeddings(case):
    """That of NEFTune; image tokens, which come of no table, have none."""
    alpha, clean = 20.0, case.gradients()

    def noisy(table, args, output):
        size = alpha / (output.shape[1] * output.shape[2]) ** 0.5
        return output + torch.empty_like(output).uniform_(-size, size)

    case.model.register_forward_pre_hook(lambda *args: torch.manual_seed(5) and None)
    handle = case.model.get_input_embeddings().register_forward_hook(noisy)
    expected = case.gradients()
    handle.remove()
    options = {
        "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "train_sampling_strategy": "sequential",
    }  # fmt: skip
    assert_same(case.trained(neftune_noise_alpha=alpha, **options), expected)
    with pytest.raises(AssertionError):
        assert_same(expected, clean, 1e-2)


@pytest.mark.parametrize("how", ["pad", "pack"])
def test_labels_are_smoothed(case, how):
    """By what the collator says; Trainer's own option is refused. The definition is Trainer's, its labels shifted."""
    collator = getattr(case.processor, how)
    expected = case.gradients(loss=lambda logits, labels: LabelSmoother(0.2)({"logits": logits}, labels, True))
    assert_same(case.trained(collator=adding(collator, label_smoothing=0.2)), expected)
    with pytest.raises(AssertionError):
        assert_same(expected, case.gradients(), 1e-2)
    trainer = case.trainer(collator=collator, label_smoothing_factor=0.2)
    for act in (trainer.train, trainer.evaluate, partial(trainer.predict, case.samples)):
        with pytest.raises(ValueError, match=r"label_smoothing_factor is not supported.* label_smoothing=0\.1"):
            act()


def test_labels_are_smoothed_for_a_head_that_must_be_called(case):
    batch = adding(case.processor.pad, label_smoothing=0.2)(case.samples)
    expected = case.model(**batch).loss
    case.model.get_output_embeddings().register_forward_hook(lambda *args: None)
    for training in (False, True):
        torch.testing.assert_close(case.model.train(training)(**batch).loss, expected, rtol=1e-5, atol=0)
    backwards = torch.arange(batch["labels"].shape[1]).flip(0)
    torch.testing.assert_close(case.model.eval()(**batch, logits_to_keep=backwards).loss, expected, rtol=1e-5, atol=0)


def test_a_loss_of_ones_own(case):
    """It is given logits where the collator says so, by which it says that it shifts the labels."""

    def own(outputs, labels, num_items_in_batch):
        return plain(outputs.logits, labels, reduction="sum") / num_items_in_batch

    passed = {"compute_loss_func": own}
    with pytest.raises(ValueError, match=r"compute_loss_func, which must shift labels itself, .* skip_logits=False"):
        case.trained(passed=passed)
    expected = case.gradients()
    assert_same(case.trained(collator=adding(case.processor.pad, skip_logits=False), passed=passed), expected)


@pytest.mark.parametrize("collator", ["flattening", "flash", "padding"])
def test_texts_in_batches_of_transformers(case, collator):
    """Joined to one row, whose position ids begin anew with each text, or padded on the right."""
    texts = [[5, 6, 7, 8, 9], [10, 11, 12], [4, 5, 20, 21]]
    make = {
        "flattening": DataCollatorWithFlattening(),
        "flash": DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True),
        "padding": DataCollatorForLanguageModeling(case.processor.tokenizer, mlm=False),
    }[collator]
    data = [{"input_ids": each} for each in texts]
    losses = [plain(case.model(ids).logits, ids, reduction="sum") for ids in (torch.tensor([each]) for each in texts)]
    expected = sum(losses) / sum(len(each) - 1 for each in texts)
    found = case.trainer(data=data, collator=make).evaluate()["eval_loss"]
    assert found == pytest.approx(expected.item(), rel=1e-5)
    options = {**ONE_STEP, "per_device_train_batch_size": 3, "gradient_accumulation_steps": 1}
    trained = case.trainer(data=data, collator=make, **options).train()
    assert trained.training_loss == pytest.approx(expected.item(), rel=1e-5)


def test_joined_texts_need_positions(prefix, tokenizer):
    data = [{"input_ids": [5, 6, 7]}, {"input_ids": [8, 9]}]
    flash = DataCollatorWithFlattening(return_position_ids=False, return_flash_attn_kwargs=True)
    with pytest.raises(ValueError, match="cu_seq_lens_q, cu_seq_lens_k without position_ids"):
        prefix.trainer(data=data, collator=flash, **ONE_STEP).train()
    full = make_model(make_config(tokenizer, prefix_is_causal=False))
    with pytest.raises(ValueError, match="position_ids that start again in a row need prefix_is_causal=True"):
        full(**DataCollatorWithFlattening()(data))
    assert full(torch.tensor([[5, 6]]), position_ids=torch.tensor([[3, 4]])).logits.isfinite().all()


def test_a_resumed_run_goes_on(case):
    """To the weights that a run without a break has, from what ``save_model`` wrote."""
    options = {"per_device_train_batch_size": 1, "learning_rate": 1e-2, "save_strategy": "steps", "save_steps": 2}
    start = copy.deepcopy(case.model)
    case.trainer(max_steps=4, **options).train()
    expected = dict(case.named())
    case.model = start
    case.trainer(max_steps=4, **options).train(resume_from_checkpoint=str(case.folder / "checkpoint-2"))
    for name, each in case.named():
        assert torch.equal(each, expected[name]), name


# Evaluation


class Seen:
    """A ``compute_metrics`` that keeps what it is given."""

    def __init__(self):
        self.given = []

    def __call__(self, given, compute_result=True):
        self.given.append(given)
        return {"seen": len(self.given)}


def batches(case, size=2):
    """The logits and labels of the batches that are evaluated."""
    with torch.no_grad():
        return [case.logits(case.samples[i : i + size]) for i in range(0, len(case.samples), size)]


def joined(arrays):
    """As Trainer joins arrays of several lengths: -100 where one is shorter."""
    length = max(each.shape[1] for each in arrays)
    ends = [(0, 0) * (each.dim() - 2) + (0, length - each.shape[1]) for each in arrays]
    return torch.cat([F.pad(each, end, value=-100) for each, end in zip(arrays, ends, strict=True)]).numpy()


EVALUATES_THE_SAME = {
    "eval_accumulation_steps": {"eval_accumulation_steps": 1},
    "eval_use_gather_object": {"eval_use_gather_object": True},
    "include_for_metrics": {"include_for_metrics": ["inputs", "loss"]},
    "per_device_eval_batch_size": {},
}


@pytest.mark.parametrize("field", EVALUATES_THE_SAME)
def test_metrics_are_given_logits_and_labels(case, field):
    seen, expected = Seen(), batches(case)
    trainer = case.trainer(passed={"compute_metrics": seen}, per_device_eval_batch_size=2, **EVALUATES_THE_SAME[field])
    metrics = trainer.evaluate()
    [given] = seen.given
    np.testing.assert_allclose(given.predictions, joined([logits for logits, _ in expected]), atol=1e-4)
    np.testing.assert_array_equal(given.label_ids, joined([labels for _, labels in expected]))
    losses = [plain(*each).item() for each in expected]
    assert metrics["eval_loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    if field == "include_for_metrics":
        ids = [case.processor.pad(case.samples[i : i + 2])["input_ids"] for i in (0, 2)]
        np.testing.assert_array_equal(given.inputs, joined(ids))
        np.testing.assert_allclose(given.losses, np.repeat(losses, 2), rtol=1e-5)


def test_the_loss_alone(case):
    """Without metrics Trainer wants no logits; the collator may say so to the model, too."""
    expected = np.mean([plain(*each).item() for each in batches(case)])
    options = {"prediction_loss_only": True, "per_device_eval_batch_size": 2}
    for collator in (case.processor.pad, adding(case.processor.pad, skip_logits=True)):
        metrics = case.trainer(collator=collator, passed={"compute_metrics": Seen()}, **options).evaluate()
        assert metrics["eval_loss"] == pytest.approx(expected, rel=1e-5)
        assert "eval_seen" not in metrics
    batch = case.processor.pad(case.samples)
    assert case.model(**batch, skip_logits=True).logits is None
    assert case.model.train()(**batch).logits is None
    torch.testing.assert_close(case.model(**batch, skip_logits=False).logits, case.logits()[0])


@pytest.mark.parametrize("field", ["batch_eval_metrics", "eval_do_concat_batches"])
def test_metrics_of_batches(case, field):
    seen, expected = Seen(), batches(case)
    options = {"batch_eval_metrics": True} if field == "batch_eval_metrics" else {"eval_do_concat_batches": False}
    case.trainer(passed={"compute_metrics": seen}, per_device_eval_batch_size=2, **options).evaluate()
    if field == "batch_eval_metrics":
        given = [(each.predictions, each.label_ids) for each in seen.given]
    else:
        given = list(zip(seen.given[0].predictions, seen.given[0].label_ids, strict=True))
    for (logits, labels), (expected_logits, expected_labels) in zip(given, expected, strict=True):
        np.testing.assert_allclose(logits, expected_logits, atol=1e-4)
        np.testing.assert_array_equal(labels, expected_labels)


def test_predictions_of_packed_rows(case):
    with torch.no_grad():
        batch = case.processor.pack(case.samples)
        expected = case.model(**inputs(batch)).logits
        loss = plain(*case.logits())
    reduced = {"preprocess_logits_for_metrics": lambda logits, labels: logits.argmax(-1)}
    options = {"collator": case.processor.pack, "per_device_eval_batch_size": 4}
    found = case.trainer(**options, passed=reduced).predict(case.samples)
    np.testing.assert_array_equal(found.predictions, expected.argmax(-1))
    np.testing.assert_array_equal(found.label_ids, batch["labels"])
    assert found.metrics["test_loss"] == pytest.approx(loss.item(), rel=1e-5)


def test_predictions_without_labels(case):
    found = case.trainer(collator=lambda samples: inputs(case.processor.pad(samples))).predict(case.samples)
    np.testing.assert_allclose(found.predictions, joined([logits for logits, _ in batches(case, 8)]), atol=1e-4)
    assert "test_loss" not in found.metrics


@pytest.mark.parametrize("field", ["bf16_full_eval", "fp16_full_eval"])
def test_low_precision_in_evaluation(case, field):
    [(expected, labels)] = batches(case, 4)
    found = case.trainer(**{field: True}, per_device_eval_batch_size=4).predict(case.samples)
    assert next(case.model.parameters()).dtype == (torch.bfloat16 if field == "bf16_full_eval" else torch.float16)
    is_token = case.processor.pad(case.samples)["attention_mask"].bool()
    error = (torch.tensor(found.predictions).float() - expected)[is_token].norm() / expected[is_token].norm()
    assert 1e-5 < error < 3e-2
    assert found.metrics["test_loss"] == pytest.approx(plain(expected, labels).item(), rel=1e-2)


def test_predict_with_generate(case):
    """Of questions alone: rows that hold their answers are no prompts."""
    questions = [
        case.processor.encode(each) for each in (conversation("Which?", images=[make_image(0)]), conversation("Hello"))
    ]
    options = {"predict_with_generate": True, "kind": Seq2SeqTrainer, "arguments": Seq2SeqTrainingArguments}
    case.model.generation_config.update(max_new_tokens=4, eos_token_id=-1)
    case.model.generation_config.max_length = None
    expected = case.model.generate(**inputs(case.processor.pad(questions)))
    found = case.trainer(data=questions, **options).predict(questions)
    np.testing.assert_array_equal(found.predictions[:, : expected.shape[1]], expected)
    with pytest.raises(ValueError, match=r"labels name answers.* predict_with_generate"):
        case.trainer(**options).predict(case.samples)


# Refused


def test_reentrant_checkpointing_is_refused(case):
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    with pytest.raises(ValueError, match=r"re-entrant checkpointing .* use_reentrant=False"):
        case.trained(**options)


def test_shifted_labels_are_refused(case):
    """As context and sequence parallelism make them."""
    batch = case.processor.pad(case.samples)
    with pytest.raises(ValueError, match=r"shift_labels is not supported.* parallelism_config"):
        case.model(**{**batch, "shift_labels": batch["labels"]})


def test_data_parallel_is_refused(case):
    """Trainer takes it where a process sees several GPUs."""
    with pytest.raises(ValueError, match=r"torch\.nn\.DataParallel.* torchrun"):
        case.model._replicate_for_data_parallel()


def test_batches_of_an_iterable_data_set(case):
    """Accelerate would cut each of their tensors by rows, frames among them."""

    class Stream(IterableDataset):
        def __iter__(self):
            return iter(case.samples)

    expected = case.gradients()
    with pytest.raises(ValueError, match="pixel_values must be"):
        case.trained(data=Stream())
    assert_same(case.trained(data=Stream(), accelerator_config={"dispatch_batches": False}), expected)


# The tables

REFUSED = {"label_smoothing_factor", "parallelism_config"}
TRIED = {
    "accelerator_config", "activation_checkpointing_kwargs", "auto_find_batch_size", "average_tokens_across_devices",
    "batch_eval_metrics", "bf16",
    "bf16_full_eval", "dataloader_drop_last", "eval_do_concat_batches", "fp16_full_eval", "gradient_checkpointing",
    "learning_rate", "lr_scheduler_type", "max_grad_norm", "max_steps", "neftune_noise_alpha", "optim",
    "prediction_loss_only", "resume_from_checkpoint", "save_steps", "save_strategy", "train_sampling_strategy",
    "use_cpu",
}  # fmt: skip
TRIED_ELSEWHERE = {"torch_compile", "torch_compile_backend"}  # test_training_options.py
# They need a GPU, several processes, or a package that is not in our tests.
NOT_TRIED = {
    "ddp_backend", "ddp_broadcast_buffers", "ddp_bucket_cap_mb", "ddp_find_unused_parameters", "ddp_static_graph",
    "ddp_timeout", "deepspeed", "fp16", "fsdp", "fsdp_config", "liger_kernel_config", "local_rank", "tf32",
    "torch_compile_mode", "use_liger_kernel",
}  # fmt: skip
# Neither loss nor inputs: what the optimizer does with gradients, when something happens, and where it is told.
UNTOUCHED = {
    "adam_beta1", "adam_beta2", "adam_epsilon", "dataloader_in_order", "dataloader_multiprocessing_context",
    "dataloader_pin_memory", "dataloader_prefetch_factor", "debug", "disable_tqdm", "do_eval", "do_predict",
    "do_train", "enable_jit_checkpoint", "eval_delay", "eval_on_start", "eval_steps", "eval_strategy",
    "greater_is_better", "hub_always_push", "hub_model_id", "hub_private_repo", "hub_revision", "hub_strategy",
    "hub_token", "ignore_data_skip", "include_num_input_tokens_seen", "length_column_name", "load_best_model_at_end",
    "log_level", "log_level_replica", "log_on_each_node", "logging_first_step", "logging_nan_inf_filter",
    "logging_steps", "logging_strategy", "lr_scheduler_kwargs", "metric_for_best_model", "num_train_epochs",
    "optim_args", "optim_target_modules", "output_dir", "project", "push_to_hub", "report_to",
    "restore_callback_states_from_checkpoint", "run_name", "save_on_each_node", "save_only_model",
    "save_total_limit", "skip_memory_metrics", "trackio_bucket_id", "trackio_space_id", "trackio_static_space_id",
    "warmup_steps", "weight_decay",
}  # fmt: skip


def test_every_field_of_training_arguments_is_in_a_table():
    """One that a new release of transformers adds belongs into one of them, tried if it touches loss or inputs."""
    tables = [
        set(TRAINS_THE_SAME), set(EVALUATES_THE_SAME), TRIED, TRIED_ELSEWHERE, REFUSED, NOT_TRIED, UNTOUCHED,
    ]  # fmt: skip
    known = set().union(*tables)
    assert sum(map(len, tables)) == len(known), "a field is in two tables"
    assert {each.name for each in dataclasses.fields(TrainingArguments)} - known == set()
    page = (Path(__file__).parents[3] / "docs" / "training.md").read_text()
    told = {*TRAINS_THE_SAME, *EVALUATES_THE_SAME, *TRIED_ELSEWHERE, *REFUSED, *NOT_TRIED}
    assert {name for name in told if f"`{name}`" not in page} == set(), "docs/training.md lists what was tried"
