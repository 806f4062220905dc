"""The attention benchmark: its peers at tiny sizes, what their timed calls return, and how work is counted."""

import sys
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import pairwise
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import attention, attention_peers, memory
from benchmarks.attention import _traffic, candidates, cases, inputs_of, operation, setup
from benchmarks.attention_peers import BLOCKS, Peer, prefix_peers, two_calls
from benchmarks.attention_workloads import FOLDER, Workload, workloads
from benchmarks.checks import assert_near, forward, train
from benchmarks.harness import measure
from benchmarks.tables import as_text
from lynx_kernels import prefix_attention
from lynx_kernels.backends.dispatch import Explanation

PREFIX, CROSS, DECODE = "prefix_attention", "cross_attention", "prefix_attention_decode"
WORKLOADS = {
    "full": Workload("full", PREFIX, ((3, (4,)), (3, (2,)), (3, (1,))), False),
    "full roots of other lengths": Workload("full", PREFIX, ((3, (4,)), (5, (2,))), False),
    "causal": Workload("causal", PREFIX, ((3, (4,)), (3, (2,)))),
    "full questions": Workload("questions", PREFIX, ((5, (2, 3, 1)), (4, (2, 2))), False),
    "causal questions": Workload("questions", PREFIX, ((5, (2, 3, 1)), (4, (2, 2)))),
    "texts": Workload("texts", PREFIX, ((0, (7,)), (0, (5,)))),
    "resampler": Workload("resampler", CROSS, ((9, (3,)),) * 3),
    "beams": Workload("beams", DECODE, ((6, (2, 2)), (6, (4, 4)))),
    "beams of one length": Workload("beams", DECODE, ((6, (3, 3)),)),
}
all_workloads = pytest.mark.parametrize("workload", WORKLOADS.values(), ids=WORKLOADS)


def plain(function, **options):
    """In place of torch.compile, which takes seconds."""
    return function


@pytest.fixture(autouse=True)
def small_caches(monkeypatch):
    monkeypatch.setattr("benchmarks.timing.cache_size", lambda device: 2**13)


def tiny(workload, mode="forward", dtype=torch.float32):
    return setup(workload, mode, dtype, "cpu", 4, 16, compiler=plain)


def modes_of(workload):
    return ["forward"] if workload.operation == DECODE else ["forward", "train"]


@all_workloads
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.filterwarnings("ignore::UserWarning")  # FlexAttention asks to be compiled
def test_every_provider_is_right(workload, dtype):
    for mode in modes_of(workload):
        case = tiny(workload, mode, dtype)
        assert len(case.providers) >= 3
        for name, call in case.providers.items():
            case.check(name)
            call(case.copies[-1])


@all_workloads
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_timed_call_does_the_work_that_was_checked(workload):
    for mode in modes_of(workload):
        case, run = tiny(workload, mode), train if mode == "train" else forward
        packed = inputs_of(workload, torch.float32, "cpu", 4, 16, requires_grad=mode == "train")
        grad = torch.randn(packed[0].shape, generator=torch.Generator().manual_seed(1))
        exact = run(partial(operation(workload, "cpu"), impl="reference"), grad.double(), doubled(packed))
        for name, peer in candidates(workload, mode, "cpu", ["reference"], plain).items():
            if isinstance(peer, str):
                continue
            output, *gradients = case.providers[name](case.copies[0])
            assert_near([peer.form.restore(output)], exact[:1])
            # The gradients of prepared inputs, brought back to the packed ones, are those of the packed ones.
            if mode == "train":
                prepared = peer.form.prepare(*packed)
                assert_near([exact[0].float(), *torch.autograd.grad(prepared, packed, gradients)], exact)


def doubled(inputs):
    return [each.detach().double().requires_grad_(each.requires_grad) for each in inputs]


@pytest.mark.parametrize("name", ["full", "causal", "full questions"])
@pytest.mark.parametrize(
    ("wrong", "where"),
    [
        (lambda q, k, v, layout: prefix_attention(q, k, v, layout, scale=0.2), "output"),
        (lambda q, k, v, layout: prefix_attention(q, k.roll(1, 0), v, layout), "output"),
        (lambda q, k, v, layout: prefix_attention(q, k.detach() + 0 * k, v, layout), "gradient 1"),
    ],
    ids=["scale", "keys", "gradient"],
)
def test_a_wrong_provider_is_refused(name, wrong, where, monkeypatch):
    def ours(workload, impls, device):
        return {"lynx wrong": Peer(partial(wrong, layout=workload.layout(device)), 1)}

    monkeypatch.setattr(attention, "_ours", ours)
    case = tiny(WORKLOADS[name], "train")
    with pytest.raises(AssertionError, match=f"{where}: error"):
        case.check("lynx wrong")


@pytest.mark.parametrize("changed", ["full", "causal"])
def test_a_mask_that_is_off_by_one_is_refused(changed, monkeypatch):
    real = attention_peers._dense_mask
    monkeypatch.setattr(attention_peers, "_dense_mask", lambda *args: real(*args) & (real(*args).cumsum(-1) < 5))
    case = tiny(WORKLOADS[changed])
    with pytest.raises(AssertionError, match="output"):
        case.check("sdpa padded")
    case.check("sdpa split")


def block_by_block(queries, keys, is_causal, device="cpu"):
    """What varlen, flash-attn and xformers compute, spelled out: causal is aligned at the last query and key."""

    def attend(q, k, v):
        outputs, query, key = [], 0, 0
        assert (q.shape[0], k.shape[0]) == (sum(queries), sum(keys))
        for num_queries, num_keys in zip(queries, keys, strict=True):
            scores = torch.einsum("qhd,khd->hqk", q[query : query + num_queries], k[key : key + num_keys])
            hidden = torch.ones(num_queries, num_keys).triu(num_keys - num_queries + 1) if is_causal else 0
            weights = (scores * q.shape[-1] ** -0.5).masked_fill(torch.as_tensor(hidden) > 0, -torch.inf).softmax(-1)
            outputs.append(torch.einsum("hqk,khd->qhd", weights, v[key : key + num_keys]))
            query, key = query + num_queries, key + num_keys
        return torch.cat(outputs)

    return attend


def with_offsets(is_causal):
    """The calling convention that varlen and flash-attn share; ``is_causal`` reads it from their options."""

    def attend(q, k, v, query_offsets, key_offsets, longest_query, longest_key, **options):
        lengths = [[end - start for start, end in pairwise(each.tolist())] for each in (query_offsets, key_offsets)]
        assert (longest_query, longest_key) == (max(lengths[0]), max(lengths[1]))
        assert query_offsets.dtype == key_offsets.dtype == torch.int32
        return block_by_block(*lengths, is_causal(options))(q, k, v)

    return attend


@pytest.fixture
def pretended(monkeypatch):
    """Libraries that run on GPUs only, pretended in plain PyTorch with their own calling conventions."""

    class Mask(SimpleNamespace):
        @classmethod
        def from_seqlens(cls, q_seqlen, kv_seqlen, device):
            return cls(queries=q_seqlen, keys=kv_seqlen)

    class CausalMask(Mask):
        pass

    def memory_efficient_attention(q, k, v, attn_bias):
        causal = isinstance(attn_bias, CausalMask)
        return block_by_block(attn_bias.queries, attn_bias.keys, causal)(q[0], k[0], v[0])[None]

    modules = {
        "flash_attn": {"flash_attn_varlen_func": with_offsets(lambda options: options["causal"])},
        "xformers": {},
        "xformers.ops": {"memory_efficient_attention": memory_efficient_attention},
        "xformers.ops.fmha": {},
        "xformers.ops.fmha.attn_bias": {
            "BlockDiagonalMask": Mask, "BlockDiagonalCausalFromBottomRightMask": CausalMask
        },
    }  # fmt: skip
    for name, contents in modules.items():
        module = ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)
    windows = {(-1, 0): True, (-1, -1): False}
    varlen = with_offsets(lambda options: windows[options["window_size"]])
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen)
    monkeypatch.setattr(attention_peers, "sdpa_kernel", lambda backend: nullcontext())
    for module in ("attention_peers", "attention_cache_peers"):
        monkeypatch.setattr(f"benchmarks.{module}.only_on_gpus", lambda device: None)
        monkeypatch.setattr(f"benchmarks.{module}.missing", lambda name, device: None)


@all_workloads
def test_peers_that_need_a_gpu_are_called_rightly(workload, pretended):
    for mode in modes_of(workload):
        case = tiny(workload, mode)
        found = [name for name in case.providers for block in BLOCKS if block in name]
        assert len(found) == len(BLOCKS)
        for name in found:
            assert name.startswith("repeated ") == (workload.shares_roots and workload.operation == PREFIX)
        for name in (*found, *(name for name in case.providers if "cudnn" in name)):
            case.check(name)
            case.providers[name](case.copies[0])


def test_two_calls_cover_full_prefixes_and_one_covers_causal_sequences():
    calls = []

    def make(queries, keys, is_causal, device):
        calls.append((queries, keys, is_causal))
        return block_by_block(queries, keys, is_causal)

    for name in ("full", "causal", "texts"):
        inputs = inputs_of(WORKLOADS[name], torch.float64, "cpu", 4, 16, requires_grad=False)
        assert_near([two_calls(make, WORKLOADS[name], "cpu")(*inputs)], [operation(WORKLOADS[name], "cpu")(*inputs)])
    assert calls == [
        ([3, 3, 3], [3, 3, 3], False), ([4, 2, 1], [7, 5, 4], True),
        ([7, 5], [7, 5], True), ([7, 5], [7, 5], True),
    ]  # fmt: skip


def test_causal_masks_of_both_devices_mean_the_same():
    q, k, v = (torch.randn(1, 2, length, 16) for length in (3, 5, 5))
    spelled_out, symbol = (attention_peers._causal_mask(3, 5, device) for device in ("cpu", "cuda"))
    assert_near(
        [attention_peers.sdpa(q, k, v, attn_mask=symbol)], [attention_peers.sdpa(q, k, v, attn_mask=spelled_out)]
    )


def test_flex_builds_its_mask_when_it_says_so_and_for_changing_lengths():
    built = []

    def spy(function, **options):
        def run(*args, **kwargs):
            if function is attention_peers.create_block_mask:
                built.append((args[3], options["dynamic"]))
            else:
                assert kwargs["block_mask"].seq_lengths == (args[0].shape[2],) * 2
            return function(*args, **kwargs)

        return run

    workload = WORKLOADS["full"]
    peers = prefix_peers(workload, requires_grad=False, device="cpu", compiler=spy)
    inputs = inputs_of(workload, torch.float32, "cpu", 4, 16, requires_grad=False)
    tokens = sum(workload.lengths)
    assert built == []
    expected = {
        "flex": [(tokens, False)],
        "flex and mask": [(tokens, False)] * 5,
        "flex changing": [(tokens + more, True) for more in (0, 1, 2, 3, 0)],
    }
    for name, lengths in expected.items():
        built.clear()
        for _ in range(5):
            peers[name].attend(*peers[name].form.prepare(*inputs))
        assert built == lengths


def test_pairs_are_those_that_see_each_other():
    for workload in WORKLOADS.values():
        if workload.operation == PREFIX:
            assert workload.pairs == int(workload.layout("cpu").visible().sum())
            assert workload.repeated().pairs == int(workload.repeated().layout("cpu").visible().sum())
    assert WORKLOADS["resampler"].pairs == 3 * 9 * 3
    assert WORKLOADS["beams"].pairs == 2 * (6 + 2) + 2 * (6 + 4)
    [questions] = workloads("questions", 1)
    assert questions.pairs == 576**2 + 8 * (32 * 576 + 32 * 33 // 2)
    assert questions.repeated().pairs == 8 * (576**2 + 32 * 576 + 32 * 33 // 2)


def test_floor_does_as_many_flop_as_the_rate_counts():
    large = Workload("large", PREFIX, ((0, (4096,)),))
    for mode, factor in (("forward", 4), ("train", 14)):
        case = tiny(large, mode)
        assert case.flops == factor * (4096 * 4097 // 2) * 4 * 16
        with FlopCounterMode(display=False) as counter:
            case.providers["matmuls"](case.copies[0])
        assert counter.get_total_flops() == pytest.approx(case.flops, rel=0.01)


def test_traffic_counts_what_must_be_read_and_written():
    def traffic(name, mode):
        inputs = inputs_of(WORKLOADS[name], torch.bfloat16, "cpu", 4, 16, requires_grad=False)
        return _traffic(WORKLOADS[name], mode, inputs) / (2 * 4 * 16)  # in rows of a token

    queries, keys = 9, 27
    assert traffic("resampler", "forward") == 2 * queries + 2 * keys
    assert traffic("resampler", "train") == 2 * queries + 2 * keys + (3 * queries + 2 * keys) + (queries + 2 * keys)
    # Roots once, of every beam no more than it has: 6 + 2 + 2 and 6 + 4 + 4 keys, as many values.
    assert traffic("beams", "forward") == 2 * 4 + 2 * (10 + 14)
    assert tiny(WORKLOADS["beams"]).flops == tiny(WORKLOADS["full"]).traffic == 0


def test_who_does_not_fit_is_left_out_with_a_reason(monkeypatch):
    monkeypatch.setitem(attention._MOST_HELD_BYTES, "cpu", 0)
    case = tiny(WORKLOADS["full"], "train")
    assert case.left_out["eager"].startswith("its scores would take 0 GiB, more than 0")
    assert "lynx reference" in case.left_out
    assert case.left_out["xformers"] == "runs on GPUs only"
    assert case.left_out["flex"] == "FlexAttention has no backward on CPUs"
    assert not set(case.left_out) & set(case.providers)
    monkeypatch.setitem(attention._MOST_SECONDS, "cpu", 1e-12)
    assert "a call would take about" in tiny(WORKLOADS["full"]).left_out["sdpa padded"]
    assert attention_peers.missing("flash-attn", "cuda") in (None, "flash_attn is not installed")


def test_who_writes_scores_is_expected_to_be_slower(monkeypatch):
    workload = WORKLOADS["texts"]
    padded = 4 * 2 * 7**2 * 4 * 16  # FLOP of two padded texts of at most 7 tokens, 4 heads of 16
    monkeypatch.setattr(attention, "matmul_rate", lambda device, dtype: padded / 0.5)
    case = tiny(workload)
    assert case.left_out["eager"] == "a call would take about 2.0 s, more than 1"
    assert "sdpa padded" in case.providers


def test_setup_tells_the_frame_what_to_measure(monkeypatch):
    case = tiny(WORKLOADS["full"], "train")
    assert case.captured
    assert not tiny(Workload("large", PREFIX, ((0, (8193,)),))).captured
    assert tiny(WORKLOADS["resampler"]).captured
    saved = memory.saved(partial(case.providers["lynx reference"], case.copies[0]), case.parameters)
    rows = 16 * 4 * 4  # bytes of a number for each of 16 tokens and 4 heads
    layout = WORKLOADS["full"].layout("cpu")
    tables = layout.runs.nbytes + layout.tokens.nbytes + layout.key_runs.nbytes
    assert saved == 16 * rows + rows + tables  # output and LSE, not q, k, v
    assert tiny(WORKLOADS["full"]).parameters == ()
    refused = dict.fromkeys(["triton", "cpu", "reference"], "not today")
    monkeypatch.setattr(attention, "explain", lambda *args: Explanation("other", refused))
    assert tiny(WORKLOADS["full"]).left_out["lynx reference"] == "not today"
    assert not [name for name in tiny(WORKLOADS["full"]).providers if name.startswith("lynx ")]


def test_left_out_is_stored_and_shown():
    [some] = [case for case in cases(quick=True, device="cpu") if "fp32 H=16 D=64 decode" in str(case)]
    some = replace(some, build=partial(tiny, WORKLOADS["beams"]))
    rows = measure(some, rounds=2)
    left_out = {row.provider: row.note for row in rows if row.metric == "left out"}
    assert set(left_out) == {
        "cudnn repeated",
        "varlen repeated",
        "flash-attn repeated",
        "xformers repeated",
        "lynx triton",
        "lynx cuda",
    }
    assert "left out" in as_text(rows)
    assert "runs on GPUs only" in as_text(rows)
    assert {row.provider for row in rows if row.metric == "GB/s"} >= {"sdpa repeated", "lynx reference", "copy"}


@pytest.mark.parametrize("quick", [True, False])
def test_cases_say_what_they_ask_and_what_does_not_fit(quick):
    asked = list(cases(quick=quick, device="cpu"))
    assert {case.kernel for case in asked} == {PREFIX, CROSS, DECODE}
    assert not [case for case in asked if case.kernel == DECODE and case.mode == "train"]
    assert len({str(case) for case in asked}) == len(asked)
    for case in asked:
        if " questions " in case.shape:
            assert " bound=5.80 B=" in case.shape
        else:
            assert "bound" not in case.shape
        if " long " in case.shape:
            assert "a call would take about" in case.left_out
    names = next(case for case in asked if "questions" in case.shape and case.mode == "forward").providers
    assert {"eager", "repeated sdpa padded", "repeated flex", "lynx reference", "matmuls"} <= set(names)
    assert not {"repeated eager", "repeated flex and mask", "repeated flex changing"} & set(names)
    few = Workload("questions", PREFIX, ((5, (2, 3)),), False)
    assert {*tiny(few).providers, *tiny(few).left_out} == {*names}


def test_workloads_are_what_they_say():
    expected = {
        "lynx": (64, 32, 1, 16, 128), "llava": (64, 576, 1, 16, 128), "llava-long": (64, 576, 1, 64, 512),
        "video": (16, 2048, 1, 16, 128), "questions": (16, 576, 8, 32, 32), "long": (4, 0, 1, 16384, 16384),
        "long-4k": (4, 0, 1, 4096, 4096), "resampler": (64, 901, 1, 32, 32),
        "resampler-video": (64, 4505, 1, 32, 32), "decode": (64, 576, 5, 16, 128),
    }  # fmt: skip
    assert {path.stem for path in FOLDER.glob("*.json")} == set(expected)
    for name, (samples, root, num_branches, shortest, longest) in expected.items():
        for workload in workloads(name, samples):
            assert {(length, len(branches)) for length, branches in workload.groups} == {(root, num_branches)}
            lengths = [length for _, branches in workload.groups for length in branches]
            assert shortest <= min(lengths) <= max(lengths) <= longest
    assert [each.root_is_causal for each in workloads("lynx", 1)] == [False, True]
    with pytest.raises(ValueError, match=r"long\.json has 4 groups, fewer than 5"):
        workloads("long", 5)


def test_every_file_is_asked_for_on_every_device():
    for asked in (attention.CPU, attention.CUDA):
        assert {file for file, _ in asked} == {path.stem for path in FOLDER.glob("*.json")}
        for file, samples in asked:
            assert workloads(file, samples)
