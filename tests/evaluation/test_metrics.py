"""Metrics against closed forms, brute force over tie orders, and the libraries people know."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peers import ranx_scores
from scipy import stats

from alro_fast.errors import AlroFastError
from alro_fast.evaluation import metrics

RATINGS = np.array([[5.0, 3.0, 4.0, 1.0, 2.0]])
TIED = np.array([[0.9, 0.9, 0.5, 0.3, 0.1]])


def brute_force(scores, ratings, statistic):
    """Mean of `statistic(ratings in ranked order)` over every order that the scores allow."""
    values = []
    for order in itertools.permutations(range(len(scores))):
        if all(scores[a] >= scores[b] for a, b in itertools.pairwise(order)):
            values.append(statistic([ratings[i] for i in order]))
    return sum(values) / len(values)


def dcg(ranked, cutoff, gain):
    return sum(
        (2**r - 1 if gain == "exp2" else r) / math.log2(2 + position) for position, r in enumerate(ranked[:cutoff])
    )


def random_grades(generator, count=200, size=12, levels=10):
    ratings = generator.integers(1, 11, (count, size)) / 2
    scores = np.round(generator.random((count, size)) * levels) / levels
    return scores, ratings


@pytest.mark.parametrize(
    ("gain", "scores", "expected"),
    [
        ("linear", TIED, 0.9446),
        ("exp2", TIED, 0.8754),
        ("linear", TIED - [[0, 1e-9, 0, 0, 0]], 0.9855),  # input order: what ranx reports for the tie
        ("exp2", TIED - [[0, 1e-9, 0, 0, 0]], 0.9762),
        ("linear", TIED - [[1e-9, 0, 0, 0, 0]], 0.9037),  # the other order: pytrec_eval
        ("linear", np.zeros((1, 5)), 0.7084),  # a constant scorer is worth a random order, not 1
    ],
)
def test_the_published_example(gain, scores, expected):
    assert metrics.ndcg(scores, RATINGS, 3, gain)[0] == pytest.approx(expected, abs=5e-5)


def test_closed_form_without_ties():
    value = metrics.ndcg(np.array([[1.0, 2.0]]), np.array([[2.0, 1.0]]), 2)[0]
    assert value == pytest.approx((1 + 3 / math.log2(3)) / (3 + 1 / math.log2(3)), abs=1e-15)
    assert metrics.ndcg(RATINGS, RATINGS, 3)[0] == 1.0


@pytest.mark.parametrize("cutoff", [1, 3, 10, None])
def test_ndcg_equals_scikit_learn(cutoff):
    sklearn_metrics = pytest.importorskip("sklearn.metrics")
    scores, ratings = random_grades(np.random.default_rng(0))
    for gain in ("linear", "exp2"):
        theirs = [
            sklearn_metrics.ndcg_score([metrics.gains(r, gain)], [s], k=cutoff)
            for s, r in zip(scores, ratings, strict=True)
        ]
        np.testing.assert_allclose(metrics.ndcg(scores, ratings, cutoff, gain), theirs, rtol=0, atol=1e-12)


def test_all_metrics_equal_ranx_without_ties():
    generator = np.random.default_rng(1)
    ratings = generator.integers(1, 6, (40, 12))  # ranx takes whole grades only
    scores = generator.random(ratings.shape)
    qrels, run = (
        {f"q{i:02d}": {f"d{j:02d}": value for j, value in enumerate(row)} for i, row in enumerate(table.tolist())}
        for table in (ratings, scores)
    )
    ours = {
        "ndcg@3": metrics.ndcg(scores, ratings, 3, "linear"),
        "ndcg_burges@5": metrics.ndcg(scores, ratings, 5),
        "hit_rate@2-l4": metrics.hit_rate(scores, ratings, 2, relevant=4),
        "mrr-l4": metrics.reciprocal_rank(scores, ratings, relevant=4),
    }
    theirs = ranx_scores(qrels, run, list(ours))
    for name, values in ours.items():
        np.testing.assert_allclose(values, list(theirs[name].values()), atol=1e-12, err_msg=name)


list_strategy = st.integers(1, 6).flatmap(
    lambda m: st.tuples(
        st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=m, max_size=m),
        st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.5, 5.0]), min_size=m, max_size=m),
    )
)


@settings(max_examples=60, deadline=None)
@given(list_strategy, st.integers(1, 7), st.sampled_from(["exp2", "linear"]))
def test_ties_are_the_mean_over_every_allowed_order(scored, cutoff, gain):
    scores, ratings = scored
    best = max(ratings)
    first = {"scores": np.array([scores]), "ratings": np.array([ratings])}
    ideal = dcg(sorted(ratings, reverse=True), cutoff, gain)
    got = metrics.ndcg(**first, cutoff=cutoff, gain=gain)[0]
    if ideal == 0:
        assert math.isnan(got)
    else:
        assert got == pytest.approx(brute_force(scores, ratings, lambda r: dcg(r, cutoff, gain)) / ideal, abs=1e-12)
    hit = brute_force(scores, ratings, lambda r: float(best in r[:cutoff]))
    assert metrics.hit_rate(**first, cutoff=cutoff)[0] == pytest.approx(hit, abs=1e-12)
    rank = brute_force(scores, ratings, lambda r: 1 / (1 + r.index(best)))
    assert metrics.reciprocal_rank(**first)[0] == pytest.approx(rank, abs=1e-12)


@settings(max_examples=40, deadline=None)
@given(list_strategy, st.data())
def test_ungraded_candidates_change_nothing(scored, data):
    scores, ratings = scored
    extra = data.draw(st.lists(st.sampled_from([-1.0, 0.25, 0.5, 9.0]), min_size=1, max_size=4))
    place = data.draw(st.permutations(range(len(scores) + len(extra))))
    padded_scores = np.array([(scores + extra)[i] for i in place])
    padded_ratings = np.array([(ratings + [math.nan] * len(extra))[i] for i in place])
    alone = metrics.measure(np.array([scores]), np.array([ratings]))
    among = metrics.measure(padded_scores[None], padded_ratings[None])
    for name in alone:
        np.testing.assert_allclose(among[name], alone[name], atol=1e-12, err_msg=name)


def test_lists_are_independent_and_padding_is_inert():
    generator = np.random.default_rng(2)
    rows = [random_grades(generator, count=1, size=int(size)) for size in generator.integers(1, 9, 50)]
    together = metrics.measure(metrics.pad([s[0] for s, _ in rows]), metrics.pad([r[0] for _, r in rows]))
    for i, (scores, ratings) in enumerate(rows):
        for name, value in metrics.measure(scores, ratings).items():
            np.testing.assert_allclose(together[name][i], value[0], atol=1e-12)


def test_all_equal_and_lists_without_grades():
    ratings = metrics.pad([[3, 3, 3], [3, 4], [math.nan, 2], [math.nan], []])
    assert metrics.all_equal(ratings).tolist() == [True, False, True, True, True]
    nothing = metrics.measure(np.zeros((1, 2)), np.full((1, 2), np.nan))
    assert all(math.isnan(value[0]) for value in nothing.values())
    assert all(len(value) == 0 for value in metrics.measure(metrics.pad([]), metrics.pad([])).values())


def test_hit_rate_with_a_threshold_and_without_a_relevant_candidate():
    scores = np.array([[3.0, 2.0, 1.0]])
    ratings = np.array([[1.0, 4.0, 5.0]])
    assert metrics.hit_rate(scores, ratings, 2, relevant=4)[0] == 1.0
    assert metrics.hit_rate(scores, ratings, 2)[0] == 0.0
    assert math.isnan(metrics.hit_rate(scores, ratings, 2, relevant=6)[0])


def test_kendall_tau_equals_scipy_with_ties_and_padding():
    generator = np.random.default_rng(3)
    first, second = (metrics.pad([generator.integers(0, 5, size) for size in range(2, 30)]) for _ in range(2))
    ours = metrics.kendall_tau(first, second)
    theirs = [stats.kendalltau(a[~np.isnan(a)], b[~np.isnan(b)]).statistic for a, b in zip(first, second, strict=True)]
    np.testing.assert_allclose(ours, theirs, atol=1e-12)
    assert metrics.kendall_tau(np.array([[1, 2, 3]]), np.array([[3, 2, 1]]))[0] == -1
    assert metrics.kendall_tau(np.array([[1, 2, 3]]), np.array([[1, 3, 2]]))[0] == pytest.approx(1 / 3)
    with pytest.raises(AlroFastError, match="same candidates"):
        metrics.kendall_tau(np.array([[1.0, 2.0]]), np.array([[1.0, np.nan]]))


def test_bootstrap_interval_covers_the_truth_as_often_as_it_says():
    generator = np.random.default_rng(4)
    covered = 0
    for trial in range(300):
        interval = metrics.bootstrap_interval(generator.random(80), resamples=300, seed=trial)
        covered += interval.low <= 0.5 <= interval.high
    assert 0.91 <= covered / 300 <= 0.98


def test_bootstrap_draws_users_not_lists():
    values = np.repeat(np.random.default_rng(5).random(30), 20)  # 30 users, 20 equal lists each
    by_list = metrics.bootstrap_interval(values)
    by_user = metrics.bootstrap_interval(values, np.repeat(np.arange(30), 20))
    assert by_user.mean == pytest.approx(by_list.mean)
    ratio = (by_user.high - by_user.low) / (by_list.high - by_list.low)
    assert ratio == pytest.approx(math.sqrt(20), rel=0.2)
    assert metrics.bootstrap_interval(values, seed=1) == metrics.bootstrap_interval(values, seed=1)
    assert math.isnan(metrics.bootstrap_interval(np.array([])).mean)
    with pytest.raises(AlroFastError, match="one user per value"):
        metrics.bootstrap_interval(values, ["u"])


def test_sign_flip_p_values():
    assert metrics.sign_flip_test(np.array([1.0, 2.0, 3.0])) == 2 / 8  # exact: only +++ and --- are as extreme
    assert metrics.sign_flip_test(np.array([1.0, -1.0])) == 1.0
    generator = np.random.default_rng(6)
    many = generator.normal(size=(200, 40))
    rejected = np.mean([metrics.sign_flip_test(row, resamples=400) < 0.05 for row in many])
    assert rejected < 0.10
    assert metrics.sign_flip_test(generator.normal(1.0, 1.0, 100)) == pytest.approx(1 / 10_001)
    # lists of one user are flipped together: 2 users cannot be significant, however many lists they have
    assert metrics.sign_flip_test(np.ones(100), np.repeat(["a", "b"], 50)) == 0.5
    shifted = metrics.compare(many[0] + 0.5, many[0])
    assert shifted.difference == pytest.approx(0.5)
    assert shifted.low == pytest.approx(0.5)
    assert shifted.p_value < 0.001


@pytest.mark.parametrize(
    ("scores", "ratings", "message"),
    [
        (np.zeros((1, 2)), np.zeros((1, 3)), "must both be"),
        (np.array([[np.nan, 1.0]]), np.ones((1, 2)), "no score"),
        (np.zeros((1, 2)), np.array([[1.0, -1.0]]), "negative"),
    ],
)
def test_bad_input_is_named(scores, ratings, message):
    with pytest.raises(AlroFastError, match=message):
        metrics.ndcg(scores, ratings, 3)


def test_unknown_gain_and_cutoff():
    with pytest.raises(AlroFastError, match="ratings reach 2000, and gains"):
        metrics.ndcg(np.array([[1.0, 2.0]]), np.array([[2000.0, 1.0]]))
    with pytest.raises(AlroFastError, match="unknown gain 'log'"):
        metrics.ndcg(TIED, RATINGS, 3, "log")
    with pytest.raises(AlroFastError, match="at least 1"):
        metrics.ndcg(TIED, RATINGS, 0)
