"""Preference metrics on scores small enough to count by hand, and against scikit-learn."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from alro_fast.evaluation.metrics import bootstrap_interval
from alro_fast.evaluation.preference_metrics import (
    Scored,
    accuracy_interval,
    pooled_coin_auc,
    preference_metrics,
    roc_auc,
)
from alro_fast.evaluation.preferences import measure, table


def scored(user, chosen, rejected, paired=False):
    return Scored(user, np.array(chosen, dtype=float), np.array(rejected, dtype=float), paired)


def test_by_hand():
    """Three records of two users: 1:3 with one loss, pairs with one tie, 1:1 won."""
    records = [scored("a", [-2], [-3, -1, -4]), scored("b", [-2, -5], [-3, -5], paired=True), scored("a", [-1], [-9])]
    found = preference_metrics(records)
    assert found["pair_accuracy"] == pytest.approx((1 + 0 + 1 + 1 + 0.5 + 1) / 6)
    assert found["user_auc"] == pytest.approx(((1 + 0 + 1 + 1) / 4 + 1.5 / 2) / 2)
    assert found["hit@1"] == pytest.approx((0 + 0.5 + 1) / 3)
    assert found["valid"] == 1.0


def test_ties_at_the_top_are_shared_and_several_positives_compare_with_all():
    assert scored("a", [-1], [-1, -1]).hit() == pytest.approx(1 / 3)
    assert scored("a", [-1, -5], [-2, -3]).wins().tolist() == [1, 1, 0, 0]
    assert scored("a", [-1, -5], [-2, -3]).hit() == 1


def test_scores_that_are_no_numbers_are_counted_as_invalid():
    found = preference_metrics([scored("a", [-1], [-2]), scored("b", [math.nan], [-2])])
    assert found["valid"] == 0.5
    assert found["pair_accuracy"] == 1.0
    assert math.isnan(preference_metrics([scored("b", [math.nan], [-2])])["hit@1"])


def test_the_interval_is_of_the_valid_records():
    records = [scored(str(i), [0], [1 if i % 4 else -1]) for i in range(40)]
    broken = [scored("40", [math.nan], [0]), scored("41", [0], [-math.inf])]
    assert accuracy_interval([*broken, *records]) == accuracy_interval(records)
    assert all(map(math.isnan, accuracy_interval(broken)))


def test_auc_is_that_of_scikit_learn():
    draw = np.random.default_rng(0)
    for _ in range(5):
        scores, labels = draw.integers(0, 6, 40).astype(float), draw.random(40) < 0.4
        assert roc_auc(scores, labels) == pytest.approx(roc_auc_score(labels, scores))
    assert math.isnan(roc_auc(np.ones(3), np.ones(3, dtype=bool)))


def test_the_pooled_auc_tosses_one_seeded_coin_per_pair():
    """As the authors' notebook does: either answer of each pair, pooled over users, and unlike pair accuracy."""
    draw = np.random.default_rng(1)
    length = draw.normal(size=60) * 50
    records = [scored(str(i), [x + 1], [x]) for i, x in enumerate(length)]
    coin = random.Random(42)
    heads = [coin.random() < 0.5 for _ in records]
    scores = [one.chosen[0] if head else one.rejected[0] for one, head in zip(records, heads)]
    assert pooled_coin_auc(records) == pytest.approx(roc_auc_score(heads, scores))
    assert preference_metrics(records)["pair_accuracy"] == 1.0
    assert pooled_coin_auc(records) < 0.75  # every pair is won, and yet: users are compared with each other
    assert pooled_coin_auc(records) != pooled_coin_auc(records, seed=7)


def test_the_interval_holds_the_mean():
    records = [scored(str(i), [0], [1 if i % 4 else -1]) for i in range(40)]
    mean, low, high = accuracy_interval(records)
    assert mean == pytest.approx(0.25)
    assert low < mean < high


def test_the_interval_is_that_of_the_user_auc():
    """A user with many records, or many pairs, counts once, in the mean and in every resample."""
    records = [scored("a", [0.0], [1.0] * 9) for _ in range(12)]
    records += [scored(user, [2.0], [other]) for user, other in zip("bcdefgh", (1, 3, 1, 1, 1, 1, 1))]
    mean, low, high = accuracy_interval(records)
    assert mean == preference_metrics(records)["user_auc"] == pytest.approx(6 / 8)
    assert (low, high) == bootstrap_interval(np.array([0.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0]))[1:]
    assert high == 1.0


def test_the_table_is_of_80_columns_and_says_records():
    """Figures of the data set's name and of two rankers; what cannot be measured is a dash, not nan."""
    records = [scored(f"u{n}", [1], [0, 2]) for n in range(12_345)]
    rows = {"untuned": records, "earlier stage": records[:1]}
    made = table({"a_file_with_rather_a_long_name": measure(rows, 10)}).split("\n")
    assert max(map(len, made)) <= 80
    assert made[2] == "a_file_with_rather_a_long_name, records: 12,345"
    assert made[3].split()[:5] == ["untuned", "0.5000", "0.5000", "[0.500,", "0.500]"]
    assert "nan" not in table({"x": measure({"tuned": []}, 0)})
