from functools import partial

import numpy as np
import pytest

from benchmarks import planner
from benchmarks.harness import Case, measure
from lynx_kernels import PackPlanner


def test_the_mixture_is_of_short_answers_and_long_captions():
    tokens, patches = planner.mixture(20_000)
    assert np.array_equal(tokens, planner.mixture(20_000)[0])
    assert (tokens < 80).mean() == pytest.approx(0.5, abs=0.05)
    assert (tokens > 250).mean() == pytest.approx(0.25, abs=0.05)
    assert (tokens.min(), tokens.max()) == (20, 3032)
    assert {*np.unique(patches)} == {0, 901, 5 * 901}
    assert (patches == 0).mean() == pytest.approx(0.3, abs=0.02)
    assert (patches == 5 * 901).mean() == pytest.approx(0.15, abs=0.02)


@pytest.mark.parametrize("ranks", [1, 8])
def test_packs_are_filled_and_ranks_balanced(ranks):
    costs = planner.mixture(20_000)
    online = PackPlanner(planner.TOKEN_BUDGET, ranks=ranks).push(*costs)
    tokens = sum(costs[0][pack].sum() for step in online for pack in step)
    assert tokens > 0.997 * ranks * len(online) * planner.TOKEN_BUDGET
    assert planner.balance(online, costs) > 0.93
    known = planner.known(ranks, costs)
    assert planner.pack_utilization(known, costs) > 0.995  # the short last step included


def test_two_long_samples_a_pack():
    """A third to two thirds of the budget, where order costs most: two short ones in turn leave room for none."""
    tokens = np.random.default_rng(0).integers(1366, 2731, 20_000)
    steps = PackPlanner(4096).push(tokens)
    assert np.mean([tokens[step[0]].sum() / 4096 for step in steps]) > 0.95
    assert planner.pack_utilization(planner.known(1, (tokens, 0 * tokens)), (tokens, tokens)) > 0.99


def test_peers():
    tokens = np.array([2000, 2000, 2000, 4000, 96, 90])
    assert planner.next_fit((tokens, tokens)) == [[[0, 1]], [[2]], [[3, 4]], [[5]]]
    assert planner.first_fit_decreasing((tokens, tokens)) == [[[3, 4]], [[0, 1, 5]], [[2]]]


def test_pack_utilization_and_balance():
    costs = np.array([2048, 4096, 1024]), np.array([30, 10, 20])
    steps = [[[0], [2]], [[1], []]]
    assert planner.pack_utilization(steps, costs) == (2048 + 4096 + 1024) / (4 * 4096)
    assert planner.balance(steps, costs) == 60 / (2 * (30 + 10))


@pytest.mark.parametrize("mode", planner.PEERS)
def test_cases_check_and_measure(mode, monkeypatch):
    asked = list(planner.cases(quick=False, device="cuda"))
    assert len({str(case) for case in asked}) == len(asked) == 12
    case = Case("planner", mode, "budget=4096 ranks=2 samples=300", partial(planner.setup, mode, 2, 300))
    rows = measure(case, rounds=2)
    assert not [row for row in rows if row.metric in ("wrong", "failed", "peak memory")]
    found = {row.metric: row for row in rows if row.provider == "lynx python"}
    assert "M items/s" in found
    assert 0.5 < found["pack_utilization"].p50 < 1
    assert 0.5 < found["balance"].p50 <= 1

    for wrong, said in (([[[0, 0], [1]]], "lost or used twice"), ([[list(range(300))]], "over the budget")):
        monkeypatch.setitem(planner.PEERS, mode, ("peer", lambda costs, wrong=wrong: wrong, planner.online))
        with pytest.raises(AssertionError, match=said):
            planner.setup(mode, 2, 300).check("peer")
