"""RecRanker's utilities against the paper's figure and the released scoring, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from alro_fast.errors import AlroFastError
from alro_fast.ranking.hybrid import HYBRIDS, constants_of, pairs_of, places_of, utilities, win_shares


def test_the_papers_figure():
    """Four candidates, graded 4, 5, 3, 2; the first beats the second, the third the fourth; listed 1, 2, 3, 4."""
    found = utilities([4, 5, 3, 2], [1, 0, 1, 0], [0, 1, 3, 2], HYBRIDS["paper"])
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


def test_unknown_names_are_refused():
    with pytest.raises(AlroFastError, match="--hybrid 'figure' is unknown; expected one of paper, code"):
        constants_of("figure")
    with pytest.raises(AlroFastError, match="--pairing 'some'"):
        pairs_of(4, "some", np.random.default_rng(0))
