import json
import logging

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lynx_kernels import PackPlanner, plan_packs
from lynx_kernels.packing.balance import balance
from lynx_kernels.packing.filling import Pack
from tests.lynx_kernels import packing_reference as reference

BUDGET = 20

# Few distinct lengths and patches, so that ties occur; half of the samples have no patches.
samples = st.lists(
    st.tuples(st.integers(1, BUDGET), st.one_of(st.just(0), st.sampled_from([1, 2, 3, 7, 90]))), max_size=80
)
options = st.fixed_dictionaries({"ranks": st.integers(1, 4), "lookahead": st.integers(0, 5)})


def arrays(costs):
    return np.array(costs, np.int64).reshape(-1, 2).T


def online(costs, **chosen):
    made = PackPlanner(BUDGET, **chosen)
    return made.push(*arrays(costs)) + made.flush()


def check_packs(steps, costs, ranks, left_out=()):
    """Every sample is in exactly one pack, packs are in order and within the budget, every rank has a pack."""
    assert all(len(step) == ranks for step in steps)
    packs = [pack for step in steps for pack in step]
    assert sorted(index for pack in packs for index in pack) == [i for i in range(len(costs)) if i not in left_out]
    for pack in packs:
        assert pack == sorted(pack)
        assert sum(costs[index][0] for index in pack) <= BUDGET
    for step in steps[:-1]:
        assert all(step)


def loads(step, costs):
    return [sum(costs[index][1] for index in pack) for pack in step]


@given(costs=samples, chosen=options)
def test_every_sample_is_in_one_pack(costs, chosen):
    check_packs(online(costs, **chosen), costs, chosen["ranks"])
    known = plan_packs(*arrays(costs), token_budget=BUDGET, ranks=chosen["ranks"])
    check_packs(known, costs, chosen["ranks"])


def check_against_reference(tokens, patches, token_budget, ranks, lookahead):
    """The steps equal the reference's, from a stream and with all costs known."""
    made = PackPlanner(token_budget, ranks=ranks, lookahead=lookahead)
    definition = reference.Planner(token_budget, ranks, lookahead)
    assert made.push(tokens, patches) == definition.push(tokens, patches)
    assert made.flush() == definition.flush()
    known = plan_packs(tokens, patches, token_budget=token_budget, ranks=ranks)
    assert known == reference.plan_known(tokens, patches, token_budget, ranks)


@settings(max_examples=300)
@given(costs=samples, chosen=options)
def test_steps_equal_the_reference(costs, chosen):
    check_against_reference(*arrays(costs).tolist(), BUDGET, chosen["ranks"], chosen["lookahead"])


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    count=st.integers(0, 400),
    token_budget=st.sampled_from([7, 40, 300, 2**31 - 1]),
    ranks=st.integers(1, 40),
    lookahead=st.integers(0, 9),
    lengths=st.sampled_from([0.02, 0.2, 1.0]),  # the longest sample, as a share of the budget
    patches=st.sampled_from([[0, 1], [0, 901, 4505], range(30), range(5000), [0, 2**31 - 1, 2**31 - 2]]),
)
def test_steps_of_many_ranks_equal_the_reference(seed, count, token_budget, ranks, lookahead, lengths, patches):
    generator = np.random.default_rng(seed)
    tokens = generator.integers(1, max(1, int(lengths * token_budget)), count, endpoint=True)
    drawn = generator.choice(patches, count)
    check_against_reference(tokens.tolist(), drawn.tolist(), token_budget, ranks, lookahead)


@pytest.mark.parametrize("ranks", [1, 8, 64])
def test_steps_at_full_size_equal_the_reference(ranks):
    generator = np.random.default_rng(0)
    tokens = np.minimum(4096, generator.lognormal(5, 1, 5000).astype(np.int64) + 1)
    patches = generator.integers(0, 5, 5000) * generator.integers(200, 1000, 5000)
    check_against_reference(tokens.tolist(), patches.tolist(), 4096, ranks, 16)


@given(costs=samples, chosen=options, data=st.data())
def test_steps_do_not_depend_on_chunks_or_saving(costs, chosen, data):
    made, steps, start = PackPlanner(BUDGET, **chosen), [], 0
    while start < len(costs):
        stop = data.draw(st.integers(start + 1, len(costs)))
        steps += made.push(*arrays(costs[start:stop]))
        start = stop
        if data.draw(st.booleans()):
            state = json.loads(json.dumps(made.state_dict()))
            made = PackPlanner(BUDGET, **chosen)
            made.push([BUDGET, 1])  # loading a state discards this sample
            made.load_state_dict(state)
            assert made.state_dict() == state
    assert steps + made.flush() == online(costs, **chosen)


@settings(max_examples=200)
@given(costs=samples, chosen=options)
def test_no_sample_waits_longer_than_max_wait(costs, chosen):
    made = PackPlanner(BUDGET, **chosen)
    came, left, count = {}, {}, 0
    for index, cost in enumerate(costs):
        came[index] = count
        for step in made.push(*cost):
            count += 1
            left |= {each: count for pack in step for each in pack}
    for step in made.flush():
        count += 1
        left |= {each: count for pack in step for each in pack}
    assert made.max_wait == 4 * (chosen["ranks"] + chosen["lookahead"]) + 1
    assert max((left[index] - came[index] for index in came), default=0) <= made.max_wait


def test_better_fitting_samples_do_not_starve_one():
    made = PackPlanner(10, lookahead=2)
    steps = made.push([6] + [7, 3] * 50)  # 7 and 3 fill every pack; no pack with the 6 is as full
    assert 0 in steps[0][0]
    made = PackPlanner(10, lookahead=2)
    steps = made.push([7, 6] + [7, 3] * 50)
    assert [index for index, step in enumerate(steps) if 1 in step[0]] == [1]


def test_step_is_made_as_soon_as_enough_tokens_wait():
    made = PackPlanner(10, ranks=2, lookahead=1)
    assert made.push([10, 10, 9]) == []
    assert made.push(1) == [[[0], [1]]]
    assert made.flush() == [[[2], [3]]]
    made = PackPlanner(10, lookahead=0)
    assert made.push([1, 10]) == [[[0]], [[1]]]  # one sample may complete two steps


def test_order_of_arrival_then_longest_that_fits():
    made = PackPlanner(10, lookahead=4)
    made.push([3, 4, 5, 2, 3, 3, 1])
    # 3 and 4 are placed in order. 5 does not fit; the longest that fits is the older 3. Then 5 2 3, and 1 is left.
    assert made.flush() == [[[0, 1, 4]], [[2, 3, 5]], [[6]]]


@pytest.mark.parametrize(
    ("budget", "tokens", "expected"),
    [
        (10, [4, 3, 6, 3], [[0, 2], [1, 3]]),  # the average is 4, so the first phase ends with room for 6
        (10, [3, 4, 6, 3], [[0, 1, 3], [2]]),  # with room for 7 it continues
        (
            8,
            [1, 8, 8, 8],
            [[0], [1], [2], [3]],
        ),  # at least a quarter of the budget is placed in order, whatever the average
        (8, [2, 1, 6, 7, 8], [[0, 2], [1, 3], [4]]),  # but not more than that
    ],
)
def test_last_sample_of_a_pack_is_chosen_among_all(budget, tokens, expected):
    made = PackPlanner(budget, lookahead=9)
    assert made.push(tokens) == []
    assert [step[0] for step in made.flush()] == expected


def test_patches_are_balanced_within_the_budget():
    made = PackPlanner(10, ranks=2, lookahead=9)
    # Placed in order, both packs get 10 tokens, but 8 and 0 patches. Swapping two samples of equal length fixes this.
    made.push([5, 5, 5, 5], [4, 0, 0, 4])
    assert [sorted(loads(step, [(5, 4), (5, 0), (5, 0), (5, 4)])) for step in made.flush()] == [[4, 4]]
    packs = [Pack(10), Pack(10)]
    for index, (rank, tokens, patches) in enumerate([(0, 6, 4), (0, 3, 4), (1, 5, 0), (1, 4, 0)]):
        packs[rank].add((tokens, patches, index))
    balance(packs)
    # Exchanging 6 for 4 does not fit, because the taker has room for 1. Exchanging 3 for 4 fits both: 6 + 4 and 5 + 3.
    assert [pack.numbers() for pack in packs] == [[0, 3], [1, 2]]
    assert [(pack.room, pack.patches) for pack in packs] == [(0, 4), (2, 4)]


@given(costs=samples, chosen=options)
def test_no_single_swap_would_balance_better(costs, chosen):
    """No further swap within the budgets lowers the largest load, unless the limit of swaps was reached."""
    for step in online(costs, **chosen):
        patches = loads(step, costs)
        rooms = [BUDGET - sum(costs[index][0] for index in pack) for pack in step]
        giver = max(range(len(step)), key=lambda rank: (patches[rank], rank))
        for taker, pack in enumerate(step):
            for given_tokens, given_patches in (costs[index] for index in step[giver]):
                for back_tokens, back_patches in [(0, 0), *(costs[index] for index in pack)]:
                    moved = given_patches - back_patches
                    fits = -rooms[giver] <= given_tokens - back_tokens <= rooms[taker]
                    assert not (fits and 0 < moved < patches[giver] - patches[taker])


def test_swaps_are_limited():
    """The limit is 16 per rank. Here 49 would be possible, each moving one patch."""
    tokens, patches = [1] * 200, [0] * 100 + [1000] + [1] * 99
    step = PackPlanner(100, ranks=2, lookahead=0).push(tokens, patches)[0]
    assert step == reference.Planner(100, 2, 0).push(tokens, patches)[0]
    assert loads(step, list(zip(tokens, patches, strict=True))) == [1049 - 32, 50 + 32]


def test_ranks_share_the_last_step():
    made = PackPlanner(100, ranks=4)
    made.push([10] * 10, [1] * 10)
    assert sorted(map(len, made.flush()[0])) == [2, 2, 3, 3]
    made.push([1, 1])
    assert sorted(map(len, made.flush()[0])) == [0, 0, 1, 1]
    assert made.flush() == []


def test_plan_packs_is_first_fit_decreasing():
    tokens = [4, 1, 6, 3, 7, 9, 5, 5, 2]
    # 9 1, 7 3, 6 4, 5 5, 2. Steps are in the order of their first samples; the short one is last.
    expected = [[[0, 2]], [[1, 5]], [[3, 4]], [[6, 7]], [[8]]]
    assert plan_packs(tokens, token_budget=10) == expected
    assert plan_packs([], token_budget=10, ranks=2) == []
    assert plan_packs([2, 3], token_budget=10, ranks=3) == [[[1], [0], []]]


def test_plan_packs_groups_packs_with_similar_patches():
    patches = [9, 0, 1, 8, 0, 0, 3, 2]
    steps = plan_packs([10] * 8, patches, token_budget=10, ranks=2)
    assert steps == [[[0], [3]], [[2], [1]], [[4], [5]], [[6], [7]]]
    # Three packs for two ranks: the samples of the left-over pack are distributed.
    assert plan_packs([10, 10, 5, 5], token_budget=10, ranks=2) == [[[0], [1]], [[2], [3]]]


def test_too_long(caplog):
    made = PackPlanner(10, too_long="error")
    made.push([5, 5])
    before = made.state_dict()
    with pytest.raises(ValueError, match=r"sample 3 has 11 tokens, more than token_budget=10; .*too_long='skip'"):
        made.push([10, 11, 12])
    assert made.state_dict() == before
    with pytest.raises(ValueError, match="sample 0 has 11 tokens"):
        plan_packs([11], token_budget=10)

    made = PackPlanner(10, too_long="skip")
    with caplog.at_level(logging.WARNING, logger="lynx_kernels.packing"):
        steps = made.push([5, 11, 12]) + made.push([10, 13]) + made.flush()
        assert plan_packs([3, 11], token_budget=10, too_long="skip") == [[[0]]]
    assert steps == [[[0]], [[3]]]
    assert (made.skipped, made.num_seen, made.state_dict()["skipped"]) == (3, 5, 3)
    assert [each.message for each in caplog.records] == [
        "sample 1 has 11 tokens, more than token_budget=10; skipped (2 in this call, 2 so far)",
        "sample 4 has 13 tokens, more than token_budget=10; skipped (1 in this call, 3 so far)",
        "sample 1 has 11 tokens, more than token_budget=10; skipped (1 in this call, 1 so far)",
    ]


def test_state():
    made = PackPlanner(10, ranks=2, lookahead=3, too_long="skip")
    made.push([4, 11, 5], [7, 8, 0])
    state = made.state_dict()
    assert state == {
        "version": 1, "token_budget": 10, "ranks": 2, "lookahead": 3, "num_seen": 3, "skipped": 1,
        "waiting": [[0, 4, 7], [2, 5, 0]],
    }  # fmt: skip
    for changed in ({"version": 2}, {"token_budget": 11}, {"ranks": 1}, {"lookahead": 0}):
        [(name, value)] = changed.items()
        with pytest.raises(ValueError, match=f"the state has {name}={value}, but this planner"):
            made.load_state_dict(state | changed)
    with pytest.raises(ValueError, match="the state has version=None"):
        made.load_state_dict({})


def test_state_of_the_first_version_loads():
    """A state stored at commit f69d88f, and the steps that its planner made next."""
    made = PackPlanner(20, ranks=2, lookahead=1, too_long="skip")
    state = {
        "version": 1, "token_budget": 20, "ranks": 2, "lookahead": 1, "num_seen": 15, "skipped": 1,
        "waiting": [[10, 13, 0], [11, 8, 4505], [13, 3, 901]],
    }  # fmt: skip
    made.load_state_dict(json.loads(json.dumps(state)))
    assert made.state_dict() == state
    assert made.push([6, 2, 9, 14, 5, 20, 3, 7], [901, 0, 4505, 0, 901, 0, 0, 901]) == [[[10, 15], [11, 13, 17]]]
    assert made.flush() == [[[16, 21, 22], [18, 19]], [[20], []]]


def test_forms_of_input():
    results = []
    for tokens, patches in (
        ([3, 4], [1, 2]), ((3, 4), None), (np.array([3, 4], np.int32), np.array([1, 2], np.uint8)),
        (np.array([3, 0, 4, 0])[::2], np.array([1, 0, 2, 0])[::2]), (np.array([3, 4]), [1, 2]),
    ):  # fmt: skip
        made = PackPlanner(10)
        made.push(tokens, patches)
        results.append(made.state_dict()["waiting"])
    assert results.count([[0, 3, 1], [1, 4, 2]]) == 4
    assert results[1] == [[0, 3, 0], [1, 4, 0]]
    made = PackPlanner(10)
    assert made.push([]) == made.push([], []) == []
    made.push(3, 5)
    assert made.state_dict()["waiting"] == [[0, 3, 5]]


@pytest.mark.parametrize(
    ("tokens", "patches", "error", "message"),
    [
        ([3, 0], None, ValueError, r"sample 2 has 0 tokens, expected 1 to 2\^31 - 1"),
        ([3, 2**31], None, ValueError, "sample 2 has 2147483648 tokens"),
        ([3, 4], [1, -1], ValueError, "sample 2 has -1 patches, expected 0 to"),
        ([3, 4], [1], ValueError, "1 patches for 2 tokens"),
        ([3, 4], [], ValueError, "0 patches for 2 tokens"),
        ([[3, 4]], None, ValueError, r"tokens have shape \(1, 2\)"),
        (0, 1, ValueError, "sample 1 has 0 tokens"),
        (2**31, 1, ValueError, "sample 1 has 2147483648 tokens"),
        (3, -1, ValueError, "sample 1 has -1 patches"),
        (3, 2**31, ValueError, "sample 1 has 2147483648 patches"),
        (True, 1, TypeError, "tokens are bool"),
        ([3.5], None, TypeError, "tokens are float64, expected integers"),
        ([True], None, TypeError, "tokens are bool"),
        ([3], ["a"], TypeError, "patches are <U1"),
    ],
)
def test_errors_of_costs(tokens, patches, error, message):
    made = PackPlanner(10)
    made.push([1])
    before = made.state_dict()
    with pytest.raises(error, match=message):
        made.push(tokens, patches)
    assert made.state_dict() == before


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"token_budget": 0}, "token_budget=0, expected 1 to"),
        ({"ranks": 0}, "ranks=0, expected 1 to"),
        ({"ranks": 2**31}, "ranks=2147483648"),
        ({"lookahead": -1}, "lookahead=-1, expected 0 to"),
        ({"too_long": "drop"}, "too_long='drop', expected 'error' or 'skip'"),
    ],
)
def test_errors_of_options(chosen, message):
    with pytest.raises(ValueError, match=message):
        PackPlanner(**{"token_budget": 10, **chosen})
    if "lookahead" not in chosen:
        with pytest.raises(ValueError, match=message):
            plan_packs([1], **{"token_budget": 10, **chosen})
