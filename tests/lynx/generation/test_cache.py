"""The cache in which rows share roots: what transformers does to it, against full forward passes, in fp64."""

import pickle

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from lynx.generation import cache as cache_module
from lynx.generation.cache import SharedRootCache, StaticTensors
from lynx_kernels import PackedLayout
from tests.lynx.conftest import make_config, make_model

GROUPS = [(5, [2, 0, 3]), (0, [4]), (3, [1])]  # an empty branch, a root of no tokens


@pytest.fixture
def model(model):
    """In fp64, with a factor on the scores that no kernel would take by itself."""
    for layer in model.get_decoder().layers:
        layer.self_attn.scaling = 0.9
    return model.double()


class Rows:
    """A cache, and the tokens of each row that it should stand for."""

    def __init__(self, model, groups=GROUPS, repeats=1, **options):
        torch.manual_seed(0)
        self.model, self.texts, self.roots = model, [], []
        self.root_is_causal = options.get("root_is_causal", True)
        packed = []
        for root, branches in groups:
            root_ids = torch.randint(1, 200, (root,)).tolist()
            packed += root_ids
            for length in branches:
                ids = torch.randint(1, 200, (length,)).tolist()
                packed += ids
                self.texts += [root_ids + ids] * repeats
                self.roots += [root] * repeats
        prompt = model.embed(torch.tensor([packed]))
        layers = len(model.get_decoder().layers)
        self.cache = SharedRootCache(prompt, groups, num_layers=layers, **options)

    @torch.no_grad()
    def expected(self, length):
        """The last logits of every row, each row alone and without a cache."""
        rows = []
        for root, text in zip(self.roots, self.texts, strict=True):
            options = {}
            if not self.root_is_causal:
                options["layout"] = PackedLayout.from_prefixes([root], [len(text) - root], root_is_causal=False)
            rows.append(self.model(torch.tensor([text]), **options).logits[:, -length:])
        return torch.cat(rows)

    @torch.no_grad()
    def read(self):
        ids = torch.zeros(len(self.texts), 1, dtype=torch.int64)
        found = self.model(ids, past_key_values=self.cache).logits
        assert not self.cache.branch_lengths.any()
        for branches in (self.cache.branch_keys, self.cache.branch_values):
            branches[:] = torch.nan  # nothing may read beyond the lengths
        for shared in (self.cache.shared_keys, self.cache.shared_values):
            shared[:, self.cache.layout.num_tokens :] = torch.nan
        torch.testing.assert_close(found, self.expected(1))

    @torch.no_grad()
    def step(self, length=1, forward=None):
        new = torch.randint(1, 200, (len(self.texts), length))
        self.texts = [text + ids for text, ids in zip(self.texts, new.tolist(), strict=True)]
        found = (self.model if forward is None else forward)(new, past_key_values=self.cache).logits
        torch.testing.assert_close(found, self.expected(length))

    def select(self, rows):
        self.texts = [self.texts[row] for row in rows]
        self.roots = [self.roots[row] for row in rows]


@pytest.mark.parametrize("repeats", [1, 3])
@pytest.mark.parametrize("static", [False, True])
def test_rows_go_on_from_their_prompts(model, repeats, static, monkeypatch):
    monkeypatch.setattr(cache_module, "BLOCK", 4)
    rows = Rows(model, repeats=repeats, max_new_tokens=9 if static else None)
    assert rows.cache.get_seq_length() == 0
    rows.read()
    for length in (1, 2, 1, 5):
        rows.step(length)
    assert rows.cache.get_seq_length() == max(map(len, rows.texts))
    assert rows.cache.shared_keys.shape[1] == (20 if static else 18), "the prompt stands once"
    assert rows.cache.branch_keys.shape[2] == 12, "branches in blocks of 4: 9 new tokens"


def test_full_roots(tokenizer):
    model = make_model(make_config(tokenizer, prefix_is_causal=False)).double()
    rows = Rows(model, [(4, [2, 3]), (3, [0])], root_is_causal=False)
    rows.read()
    rows.step(2)


def test_beams_are_reordered(model, monkeypatch):
    monkeypatch.setattr(cache_module, "BLOCK", 4)
    rows = Rows(model, repeats=3)
    rows.read()
    for _ in range(3):
        rows.step()
        beams = torch.cat([3 * i + torch.randint(3, (3,)) for i in range(5)])
        addresses = [rows.cache.branch_keys.data_ptr(), rows.cache.branch_lengths.data_ptr()]
        rows.cache.reorder_cache(beams)
        rows.select(beams.tolist())
        assert addresses == [rows.cache.branch_keys.data_ptr(), rows.cache.branch_lengths.data_ptr()]
    rows.step(2)


def test_rows_may_move_between_roots(model):
    rows = Rows(model)
    rows.read()
    rows.cache.reorder_cache(torch.tensor([4, 3, 2, 1, 0]))
    rows.select([4, 3, 2, 1, 0])
    rows.step()


def test_rows_are_selected_and_repeated(model):
    rows = Rows(model)
    rows.read()
    rows.step()
    rows.cache.batch_select_indices(torch.tensor([3, 0, 4]))
    rows.select([3, 0, 4])
    rows.step()
    rows.cache.batch_repeat_interleave(2)
    rows.select([0, 0, 1, 1, 2, 2])
    assert rows.cache.batch_size == 6
    rows.step()
    rows.cache.batch_select_indices(torch.tensor([True, False, False, True, True, False]))
    rows.select([0, 3, 4])
    rows.step()


@pytest.mark.parametrize("static", [False, True])
def test_crop_forgets_the_newest(model, static):
    rows = Rows(model, max_new_tokens=8 if static else None)
    rows.read()
    rows.step(3)
    rows.cache.crop(-2)
    rows.texts = [text[:-2] for text in rows.texts]
    rows.step()
    longest = max(map(len, rows.texts))
    rows.cache.crop(longest + 1)
    rows.step()
    rows.cache.crop(longest)  # what older releases of transformers pass: the length to keep
    rows.texts = [text[:-1] for text in rows.texts]
    rows.cache.crop(0)
    rows.step()
    rows.cache.reorder_cache(torch.tensor([4, 3, 2, 1, 0]))  # all that is left moves
    rows.select([4, 3, 2, 1, 0])
    rows.step()
    with pytest.raises(ValueError, match="cannot remove 5 tokens of each row: one row has only 4 after its prompt"):
        rows.cache.crop(-5)
    rows.cache.crop(-4)
    rows.texts = [text[:-4] for text in rows.texts]
    rows.step()


def test_static_shapes_compile_once(model):
    rows = Rows(model, max_new_tokens=70)
    rows.read()
    counter = CompileCounter()
    torch._dynamo.reset()
    forward = torch.compile(model, backend=counter, fullgraph=True)
    for _ in range(5):
        rows.step(forward=forward)
        rows.cache.reorder_cache(torch.arange(5))
    assert counter.frame_count == 1
    assert rows.cache.is_compileable
    assert not Rows(model).cache.is_compileable


def test_half_precision_is_kept(model):
    rows = Rows(model.bfloat16())
    with torch.no_grad():
        model(torch.zeros(5, 1).long(), past_key_values=rows.cache)
        model(torch.ones(5, 1).long(), past_key_values=rows.cache)
    assert {rows.cache.shared_keys.dtype, rows.cache.branch_values.dtype} == {torch.bfloat16}


def test_errors_say_what_is_wrong(model):
    prompt = torch.zeros(1, 3, 32, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"prompt is \(1, 3, 32\), but its groups hold 4 tokens"):
        SharedRootCache(prompt, [(2, [2])], num_layers=3)
    with pytest.raises(ValueError, match="row 1 of the prompt has no token"):
        SharedRootCache(prompt, [(3, [0]), (0, [0])], num_layers=3)
    cache = SharedRootCache(prompt, [(1, [1, 1])], num_layers=3)
    for shape in ((3, 1), (2, 2)):
        with pytest.raises(ValueError, match=r"the cache's unread prompt needs a multiple of 2 rows of 1"):
            model(torch.zeros(shape, dtype=torch.int64), past_key_values=cache)
    with pytest.raises(ValueError, match="is for one prompt"):
        cache.reset()


def test_what_transformers_asks_it(model):
    rows = Rows(model)
    assert (len(rows.cache), rows.cache.batch_size, rows.cache.is_initialized) == (3, 5, False)
    rows.read()
    assert (len(rows.cache), rows.cache.batch_size, rows.cache.is_initialized) == (3, 5, True)
    assert rows.cache.get_mask_sizes(2) == (10, 0)
    assert rows.cache.get_max_length() == -1
    static = Rows(model, max_new_tokens=8)
    static.read()
    assert static.cache.get_max_length() == 2 * cache_module.BLOCK


NAMES = ("shared_keys", "shared_values", "branch_keys", "branch_values", "ranges", "branch_lengths")


def addresses(cache):
    return [getattr(cache, name).data_ptr() for name in (*NAMES, "_rows")]


def test_static_tensors_serve_one_generation_after_the_other(model):
    """CUDA graphs write to addresses: the next generation has the same, unless the last one still uses them."""
    tensors = StaticTensors()
    first = Rows(model, max_new_tokens=3, static_tensors=tensors)
    first.read()
    first.step()
    before = addresses(first.cache)
    beside = Rows(model, max_new_tokens=3, static_tensors=tensors)
    beside.read()
    assert not set(before) & set(addresses(beside.cache)), "two at a time have tensors of their own"
    first.step()
    del first
    groups = [(root + 1, branches) for root, branches in GROUPS]  # as many rows, other lengths
    second = Rows(model, groups, max_new_tokens=3, static_tensors=tensors)
    second.read()
    assert addresses(second.cache) == before
    second.step(2)
    beside.step()
    del second
    larger = Rows(model, [*GROUPS, (2, [2])], max_new_tokens=3, static_tensors=tensors)
    larger.read()
    larger.step()


def test_a_model_keeps_its_static_tensors(model):
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    seen = []
    forward = model.forward_shared

    def watch(cache, *args, **kwargs):
        out = forward(cache, *args, **kwargs)
        seen.append(addresses(cache))
        return out

    model.forward_shared = watch
    options = {"cache_implementation": "static", "max_new_tokens": 3, "num_beams": 2}
    found = [model.generate(ids, **options) for _ in range(2)]
    assert torch.equal(*found)
    assert all(each == seen[0] for each in seen)
    held = model.generate(ids, **options, return_dict_in_generate=True)
    assert torch.equal(held.sequences, found[0])
    kept = held.past_key_values.shared_keys[:, :6].clone()
    model.generate(ids + 1, **options)
    assert torch.equal(held.past_key_values.shared_keys[:, :6], kept), "what a caller holds is left alone"
    copied = pickle.loads(pickle.dumps(model.static_tensors))
    assert copied._tensors == {}
