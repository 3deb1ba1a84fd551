"""Fused scores: what is standardised, what the fit minimises, what it reads, and what its file says."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from scipy.optimize import minimize
from tiny import random_lists

from alro_fast.data.records import Signal
from alro_fast.errors import AlroFastError
from alro_fast.ranking.fusion import RIDGE, Fusion, check_signals, features
from alro_fast.ranking.orders import make_ranking, presentations

SIGNALS = ("hint", "average")


def lists_and_scores(count: int = 40, seed: int = 0):
    """Lists whose hints tell more of the ratings than the model's scores, and averages that tell nothing."""
    draw = np.random.default_rng(seed)
    lists, scores = [], []
    for one in random_lists(count, range(3, 8), seed=seed):
        ratings = np.array(one.ratings)
        hints, average = ratings + draw.normal(0, 0.8, len(ratings)), draw.normal(3, 1, len(ratings))
        lists.append(replace(one, hints=tuple(hints), signals=(Signal("average", (), tuple(average)),)))
        scores.append(10 * (ratings + draw.normal(0, 1.6, len(ratings))))
    return lists, scores


def test_features_are_standardised_within_the_list_and_unknown_values_count_nothing():
    one = replace(
        random_lists(1, 4)[0],
        hints=(1.0, np.nan, 3.0, 2.0),
        signals=(Signal("average", (), (3.5, 3.5, 3.5, 3.5)), Signal("near", (), (np.nan,) * 4)),
    )
    found = features(one, np.array([10.0, 20.0, 30.0, 40.0]), ("hint", "average", "near", "count"))
    np.testing.assert_allclose(found[:, 0], np.array([-3, -1, 1, 3]) / np.sqrt(5))
    np.testing.assert_allclose(found[:, 1], np.array([-1, 0, 1, 0]) * np.sqrt(3 / 2))
    assert not found[:, 2:].any()
    moved = features(one, np.array([1.0, 2.0, 3.0, 4.0]) - 7, ("hint",))
    np.testing.assert_allclose(moved[:, 0], found[:, 0])
    close = features(one, 3.0 + np.array([0.0, 1e-7, -1e-7, 0.0]), ())
    assert np.abs(close).max() < 0.01  # rounding is no difference


def test_the_fit_is_the_minimum_of_its_definition():
    """Against scipy, on the loss written anew with loops over pairs."""
    lists, scores = lists_and_scores()
    lists.append(replace(lists[0], ratings=(4.0,) * len(lists[0].ratings)))  # nothing to rank: no part of it
    scores.append(scores[0])
    fusion = Fusion.fit(lists, scores, SIGNALS)

    def loss(weights):
        per_list = []
        for one, own in zip(lists, scores, strict=True):
            fused = features(one, own, SIGNALS) @ weights
            pairs = [(i, j) for i, a in enumerate(one.ratings) for j, b in enumerate(one.ratings) if a > b]
            per_list += [np.mean([np.log1p(np.exp(fused[j] - fused[i])) for i, j in pairs])] if pairs else []
        return np.mean(per_list) + RIDGE / 2 * weights @ weights

    np.testing.assert_allclose(fusion.weights, minimize(loss, np.zeros(3), tol=1e-12).x, atol=1e-4)
    assert fusion.lists == sum(not one.all_equal for one in lists)
    model, hint, average = fusion.weights
    assert hint > model > abs(average)


def test_shuffled_labels_leave_next_to_nothing_to_weigh():
    """The fit finds what ratings say and nothing else; and ratings are all it could leak: scores come beside them."""
    draw = np.random.default_rng(0)
    lists, scores = lists_and_scores(400)
    shuffled = [replace(one, ratings=tuple(draw.permutation(one.ratings))) for one in lists]
    told = np.linalg.norm(Fusion.fit(lists, scores, SIGNALS).weights)
    assert np.linalg.norm(Fusion.fit(shuffled, scores, SIGNALS).weights) < 0.1 * told


def test_one_sided_lists_have_finite_weights():
    """Scores that order every list without a mistake: the ridge holds the weights."""
    lists, _ = lists_and_scores(3)
    fusion = Fusion.fit(lists, [np.array(one.ratings) for one in lists], SIGNALS)
    assert np.isfinite(fusion.weights).all()
    with pytest.raises(AlroFastError, match="no validation list has candidates with different ratings"):
        Fusion.fit([replace(lists[0], ratings=(3.0,) * len(lists[0].ratings))], [np.zeros(9)], SIGNALS)


def test_a_ranking_is_fused_as_a_whole_and_presentation_by_presentation():
    (one, *_), (own, *_) = lists_and_scores(1)
    fusion = Fusion(SIGNALS, (1.0, 2.0, -0.5), 1, 3)
    shown = presentations(one, 3, seed=0)
    ranking = make_ranking(one, shown, own + np.random.default_rng(1).normal(0, 9, shown.shape), "mean")
    fused = fusion.rank(one, ranking)
    expected = features(one, ranking.scores, SIGNALS) @ [1.0, 2.0, -0.5]
    np.testing.assert_allclose(fused.scores, expected)
    assert list(fused.order) == np.argsort(-expected, kind="stable").tolist()
    for row, merged in zip(ranking.presentation_scores, fused.presentation_scores, strict=True):
        np.testing.assert_allclose(merged, features(one, row, SIGNALS) @ [1.0, 2.0, -0.5])


def test_the_file_holds_the_weights_and_what_is_wrong_with_one_is_said(tmp_path):
    with pytest.raises(AlroFastError, match=r"holds no fusion.json.*train with --fuse true"):
        Fusion.load(tmp_path)
    lists, scores = lists_and_scores()
    fusion = Fusion.fit(lists, scores, ("hint",))
    fusion.save(tmp_path)
    assert Fusion.load(tmp_path) == fusion
    assert json.loads((tmp_path / "fusion.json").read_text())["weights"].keys() == {"model", "hint"}
    check_signals(fusion, ("average", "hint"), "list 1")
    with pytest.raises(AlroFastError, match="list 1 has no hint beside its candidates"):
        check_signals(fusion, ("average",), "list 1")
    for text in ("{", "[]", '{"weights": {"model": "x"}, "lists": 1, "pairs": 1}', '{"weights": {"hint": 1}}',
                 '{"weights": {"model": 1, "age": 2}, "lists": 1, "pairs": 1}'):  # fmt: skip
        (tmp_path / "fusion.json").write_text(text)
        with pytest.raises(AlroFastError, match=r"fusion.json is damaged"):
            Fusion.load(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        '{"weights": {}, "lists": 1, "pairs": 1}',
        '{"weights": {"model": 1.0}, "lists": "x", "pairs": 1}',
        '{"weights": {"model": NaN, "hint": 1.0}, "lists": 1, "pairs": 1}',
        '{"weights": {"hint": 1.0}, "lists": 1, "pairs": 1}',
        '{"weights": {"model": 1.0, "count": 1.0}, "lists": 1, "pairs": 1}',
        '{"weights": [1], "lists": 1, "pairs": 1}',
        "{",
    ],
)
def test_weights_that_no_fit_made_are_one_line(tmp_path, text):
    (tmp_path / "fusion.json").write_text(text)
    with pytest.raises(AlroFastError, match=r"fusion.json is damaged: expected the weights that training fitted"):
        Fusion.load(tmp_path)
