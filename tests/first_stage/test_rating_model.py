"""Predicted ratings: ridge solutions, an error that beats means, and folds that have not seen what they predict."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from made_ratings import interactions, taste_rows

from alro_fast.data import rating_model
from alro_fast.data.first_stage.hints import FoldedModels
from alro_fast.data.first_stage.likes import split_likes
from alro_fast.data.rating_model import fit_ratings

SPLIT = split_likes(interactions(taste_rows(), 60), 4.0, 0)


def test_each_side_solves_its_ridge_regression():
    user, item, rating = SPLIT.user, SPLIT.item, SPLIT.rating.astype(float)
    model = fit_ratings(user, item, rating, SPLIT.users, SPLIT.items)
    ridge = np.diag([rating_model.BIAS_RIDGE] + [rating_model.FACTOR_RIDGE] * rating_model.FACTORS)
    for one in (0, 7, 59):
        rows = item == one
        features = model.user[user[rows]].copy()
        wanted = rating[rows] - model.mean - features[:, 0]
        features[:, 0] = 1.0
        expected = np.linalg.solve(features.T @ features + ridge, features.T @ wanted)
        assert np.allclose(model.item[one], expected, atol=1e-10)


def test_the_unknown_fall_back_on_what_is_known():
    model = fit_ratings(np.array([0, 0, 1]), np.array([0, 1, 0]), np.array([5.0, 4.0, 1.0]), 3, 3)
    assert model.predict(np.array([2]), np.array([2])) == pytest.approx([10 / 3])
    assert model.predict(np.array([0]), np.array([2]))[0] == pytest.approx(model.mean + model.user[0, 0])
    everything = model.predict(np.repeat(np.arange(3), 3), np.tile(np.arange(3), 3))
    assert everything.min() >= 1.0
    assert everything.max() <= 5.0


def test_out_of_fold_beats_the_mean_on_real_ratings(shared_data):
    from alro_fast.data.sources.interactions import read_interactions

    real = split_likes(read_interactions("ml-latest-small", shared_data / "ml-latest-small"), 4.0, 0)
    kept = real.user < 100
    user, item, rating = real.user[kept], real.item[kept], real.rating[kept].astype(float)
    held = np.random.default_rng(0).random(len(user)) < 0.2
    model = fit_ratings(user[~held], item[~held], rating[~held], real.users, real.items)

    def error(predicted):
        return np.sqrt(np.mean((predicted - rating[held]) ** 2))

    assert error(model.predict(user[held], item[held])) < 0.92 * error(rating[~held].mean())


def test_a_rating_does_not_move_its_own_out_of_fold_prediction():
    models = FoldedModels(SPLIT, 4, seed=0)
    before = models.out_of_fold(SPLIT.user, SPLIT.item)
    moved = 0
    for row in range(0, len(SPLIT.item), 97):
        rating = SPLIT.rating.copy()
        rating[row] = 6 - rating[row] if rating[row] != 3 else 1
        after = FoldedModels(replace(SPLIT, rating=rating), 4, seed=0)
        own = SPLIT.user[[row]], SPLIT.item[[row]]
        assert after.out_of_fold(*own) == before[row]
        moved += after.whole.predict(*own)[0] != models.whole.predict(*own)[0]
    assert moved > 3  # a model that saw the rating does move


def test_folds_do_not_depend_on_what_is_rated():
    models = FoldedModels(SPLIT, 4, seed=0)
    user, item = np.repeat(np.arange(40), 60), np.tile(np.arange(60), 40)
    fold = models.fold(user, item)
    rated = np.isin(user * 60 + item, SPLIT.user * 60 + SPLIT.item)
    assert np.array_equal(fold[rated], models.fold(user[rated], item[rated]))
    assert (np.abs(np.bincount(fold) / len(fold) - 0.25) < 0.04).all()
    assert not np.array_equal(fold, FoldedModels(SPLIT, 4, seed=1).fold(user, item))
