"""RecRanker's utilities against the inference figure and the released scoring, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from alro_fast.errors import AlroFastError
from alro_fast.ranking.hybrid import (
    HYBRIDS,
    SPELLED,
    Constants,
    constants_of,
    first_shares,
    of_tasks,
    pairs_of,
    places_of,
    utilities,
    ways_of,
    win_shares,
)


def test_the_inference_figure():
    """Four candidates, graded 4, 5, 3, 2; the first beats the second, the third the fourth; listed 1, 2, 3, 4."""
    found = utilities([4, 5, 3, 2], [1, 0, 1, 0], [0, 1, 3, 2], HYBRIDS["figure"])
    assert found.round(2).tolist() == [3.33, 2.67, 2.0, 1.33]


def test_the_released_scoring():
    """Ten candidates: R + 0.05 (10 - i), 0.5 for a winner and 0.25 for both when the orders disagree, 0.025 (5 - place)
    for the five that are named."""
    grades = [3, 3, 5, 4, 3, 3, 3, 3, 3, 1]
    wins = [1, 0, 0.5, 0.5, 1, 0, 1, 0, 1, 0]
    order = [2, 3, 9, 0, 5]
    expected = []
    for i in range(10):
        score = grades[i] + 0.05 * (10 - i) + {1: 0.5, 0: 0, 0.5: 0.25}[wins[i]]
        expected.append(score + (0.025 * (5 - order.index(i)) if i in order else 0))
    found = utilities(grades, wins, places_of(order, 10), HYBRIDS["code"])
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)
    full = utilities(grades, wins, places_of([*order, 1, 4, 6, 7, 8], 10), HYBRIDS["code"])
    np.testing.assert_array_equal(full, found)  # beyond five nothing is gained or lost


def test_every_candidate_is_in_one_pair_of_a_matching():
    for m in (1, 2, 9, 10):
        pairs = pairs_of(m, "matching", np.random.default_rng(m))
        met = [i for pair in pairs for i in pair]
        assert len(pairs) == m // 2
        assert len(set(met)) == len(met)
    drawn = {tuple(pairs_of(10, "matching", np.random.default_rng(seed))) for seed in range(20)}
    assert len(drawn) == 20
    assert len(set(pairs_of(10, "all", np.random.default_rng(0)))) == 45


def test_win_shares_are_means_over_a_candidates_pairs():
    shares = win_shares(4, [(0, 1), (0, 2)], [1.0, 0.25])
    np.testing.assert_array_equal(shares, [0.625, 0.0, 0.75, 0.5])


def test_pairs_are_asked_either_way_or_as_they_stand():
    pairs = [(0, 3), (2, 1)]
    assert ways_of(pairs, "both") == [(0, 3), (3, 0), (2, 1), (1, 2)]
    assert ways_of(pairs, "one") == pairs
    assert first_shares([0.75, 0.5, 0.25, 0.0], "both") == [0.625, 0.625]
    assert first_shares([0.75, 0.5], "one") == [0.75, 0.5]


def test_constants_of_ones_own():
    """U = grade g + order (m - i) + win w + place (top - place), by hand for three candidates."""
    assert constants_of(SPELLED) == HYBRIDS["code"]
    own = constants_of("win=2, grade=.5,place=0.1,order=0.25,top=2")
    assert own == Constants(grade=0.5, win=2.0, order=0.25, place=0.1, top=2)
    found = utilities([4, 2, 3], [1, 0, 0.5], [1, np.nan, 0], own)
    np.testing.assert_allclose(found, [2 + 0.75 + 2 + 0.1, 1 + 0.5, 1.5 + 0.25 + 1 + 0.2], rtol=0, atol=1e-12)
    listed = utilities([0] * 7, [0] * 7, range(7), constants_of("place=1,top=all"))
    assert listed.tolist() == [7, 6, 5, 4, 3, 2, 1]
    assert utilities([0] * 7, [0] * 7, range(7), constants_of("place=1")).tolist() == [5, 4, 3, 2, 1, 0, 0]


@pytest.mark.parametrize(
    ("hybrid", "said"),
    [
        ("both", "'both' is unknown; expected code or figure, or constants: grade=1,win=0.5,order=0.05,place=0.025$"),
        ("paper", "paper is called figure now"),
        ("grade=1,wins=2", "'wins=2' names no constant, or one again; expected some of grade, win, order, place, top"),
        ("grade=1,grade=2", "'grade=2' names no constant, or one again"),
        ("grade=1,", "'' names no constant"),
        ("grade=", "grade is ''; expected a number of at least 0"),
        ("win=-1", "win is '-1'; expected a number of at least 0"),
        ("win=nan", "win is 'nan'; expected a number of at least 0"),
        ("order=inf", "order is 'inf'; expected a number"),
        ("place=1,top=0", "top is '0'; expected a whole number of at least 1, or all"),
        ("place=1,top=2.5", "top is '2.5'; expected a whole number"),
        ("grade=0,top=3", "leaves every weight at 0"),
    ],
)
def test_bad_constants_are_refused(hybrid, said):
    with pytest.raises(AlroFastError, match=f"--hybrid .*{said}"):
        constants_of(hybrid)


def test_unknown_names_are_refused():
    with pytest.raises(AlroFastError, match="--pairing 'some'"):
        pairs_of(4, "some", np.random.default_rng(0))
    with pytest.raises(AlroFastError, match="--pair_orders 'two' is unknown; expected one of both, one"):
        ways_of([], "two")


def test_the_hybrid_adds_up_trained_tasks_alone():
    assert of_tasks("code", (1, 1, 1)) == "code"
    assert of_tasks("grade=2,order=1", (1, 0, 0)) == "grade=2,order=1"
    for weights, left in (
        ((0, 1, 1), Constants(win=0.5, order=0.05, place=0.025)),
        ((1, 0, 1), Constants(grade=1, order=0.05, place=0.025)),
        ((1, 1, 0), Constants(grade=1, win=0.5, order=0.05)),
    ):
        spelled = of_tasks("code", weights)
        assert constants_of(spelled) == left
        assert of_tasks(spelled, weights) == spelled  # as a resumed run reads it
    assert constants_of(of_tasks("figure", (1, 1, 0))) == Constants(grade=1 / 3, win=2 / 3, top=None)
    with pytest.raises(AlroFastError, match="reads only tasks that --task_weights leaves out"):
        of_tasks("win=1,order=1", (1, 0, 1))
