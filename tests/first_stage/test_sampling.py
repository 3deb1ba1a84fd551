"""Adaptive sampling: every stage's frequencies against the formula, over 10^5 draws."""

from __future__ import annotations

import numpy as np
import pytest

from alro_fast.data.first_stage.sampling import (
    cluster_draws,
    cluster_users,
    describe,
    importance_draws,
    parse_parts,
    penalised_draws,
    rule,
    sample_users,
    user_shares,
)
from alro_fast.errors import AlroFastError

DRAWS = 100_000


def within_three_standard_errors(drawn: np.ndarray, share: np.ndarray) -> bool:
    found = np.bincount(drawn, minlength=len(share)) / len(drawn)
    return bool((np.abs(found - share) <= 3 * np.sqrt(share * (1 - share) / len(drawn))).all())


def test_importance_is_the_logarithm_of_the_likes():
    likes = np.array([1, 2, 3, 10, 40, 700])
    share = np.log(likes) / np.log(likes).sum()
    drawn = importance_draws(likes, DRAWS, np.random.default_rng(0))
    assert within_three_standard_errors(drawn, share)
    assert not within_three_standard_errors(drawn, likes / likes.sum())
    assert (drawn > 0).all()  # ln 1 = 0
    assert set(importance_draws(np.ones(3, dtype=int), 100, np.random.default_rng(0))) == {0, 1, 2}


def test_clusters_give_by_their_size_and_uniformly():
    labels = np.array([0] * 6 + [1] * 3 + [2])
    drawn = cluster_draws(labels, DRAWS, np.random.default_rng(0))
    assert np.bincount(labels[drawn]).tolist() == [60_000, 30_000, 10_000]
    assert within_three_standard_errors(drawn, np.full(10, 0.1))
    assert np.bincount(labels[cluster_draws(labels, 7.0, np.random.default_rng(0))]).tolist() == [4, 2, 1]


def test_penalty_weighs_a_user_c_times_penalty_to_the_c_minus_one():
    repeats = np.array([1, 2, 5, 19, 20, 40])
    weight = np.array([c * 0.95 ** (c - 1) for c in repeats])
    assert np.allclose(user_shares(repeats), weight / weight.sum(), rtol=1e-14)
    assert np.argmax([c * 0.95 ** (c - 1) for c in range(100)]) in (19, 20)
    users = np.array([3, 1, 0, 4, 2, 5])
    drawn = penalised_draws(np.repeat(users, repeats), DRAWS, np.random.default_rng(0))
    share = np.zeros(6)
    share[users] = weight / weight.sum()
    assert within_three_standard_errors(drawn, share)
    unpenalised = penalised_draws(np.repeat(users, repeats), DRAWS, np.random.default_rng(0), penalty=1.0)
    assert not within_three_standard_errors(unpenalised, share)


def test_penalty_of_a_huge_pool_does_not_underflow():
    assert user_shares(np.array([30_000, 30_000])).tolist() == [0.5, 0.5]


def test_whole_sample():
    generator = np.random.default_rng(0)
    likes = np.concatenate([[0, 1], generator.integers(2, 300, 198)])
    centres = np.arange(200) % 4
    embeddings = generator.normal(size=(200, 5)) * 0.01 + centres[:, None]
    sample = sample_users(likes, embeddings, 1000, seed=3, clusters=4)
    assert len(sample.drawn) == 1000
    assert abs(sample.pool.sum() - 1200) <= 4  # a rounding per cluster
    assert sample.pool[:2].tolist() == [0, 0]
    assert sample.cluster[:2].tolist() == [-1, -1]
    assert (sample.pool[sample.drawn] > 0).all()
    pairs = {(a, b) for a, b in zip(centres[2:].tolist(), sample.cluster[2:].tolist())}
    assert len(pairs) == 4  # k-means found the four groups
    again = sample_users(likes, embeddings, 1000, seed=3, clusters=4)
    assert np.array_equal(sample.drawn, again.drawn)
    assert not np.array_equal(sample.drawn, sample_users(likes, embeddings, 1000, seed=4, clusters=4).drawn)
    told = describe(sample, likes)
    assert told["users"] == 198
    assert sum(int(times) * users for times, users in told["users_by_times_drawn"].items()) == 1000
    assert told["likes_per_user"]["sampled"]["mean"] > told["likes_per_user"]["all"]["mean"]


def test_the_draws_of_a_whole_sample_follow_the_formula():
    """10^5 draws: the pool by likes, ln(likes) and uniformly; the draws by C 0.95^(C - 1), given the pool."""
    values = np.array([2, 4, 20, 150, 900])
    group = np.arange(3000) % 5
    likes = values[group]
    sample = sample_users(likes, np.random.default_rng(0).normal(size=(3000, 2)), DRAWS)
    n = round(0.6 * DRAWS)
    share = np.log(values) / np.log(values).sum()
    found = np.bincount(group, weights=sample.pool)
    error = np.sqrt(n * (share * (1 - share) + 0.2 * 0.8))
    assert (np.abs(found - n * (share + 0.2)) <= 3 * error).all()
    assert not (np.abs(found - n * 0.4) <= 3 * error).all()

    times, weight = sample.pool, sample.pool * 0.95 ** (sample.pool - 1.0)
    by_times = np.bincount(times, weights=weight / weight.sum())
    assert within_three_standard_errors(times[sample.drawn], by_times)
    assert not within_three_standard_errors(times[sample.drawn], np.bincount(times, weights=times / times.sum()))


def test_every_cluster_gives_its_share_of_a_whole_sample():
    """Ten users far apart, ten clusters of one: three draws of each, whatever the dice say."""
    for seed in range(10):
        sample = sample_users(np.full(10, 5), np.eye(10), 50, seed=seed)
        assert sample.pool.min() >= 3
        assert sample.pool.sum() == 60


GROUPS = np.arange(3000) % 5
VALUES = np.array([2, 4, 20, 150, 900])
LN_SHARE = np.log(VALUES) / np.log(VALUES).sum()


@pytest.mark.parametrize(
    ("parts", "pooled", "share"),
    [
        ("importance", 120_000, LN_SHARE),
        ("clustering", 120_000, np.full(5, 0.2)),
        ("penalty", 120_000, np.full(5, 0.2)),
        ("none", DRAWS, np.full(5, 0.2)),
        ("importance,clustering", 120_000, (LN_SHARE + 0.2) / 2),
    ],
)
def test_each_part_can_be_left_out(parts, pooled, share):
    """The pool keeps its size and is drawn by what is left; without the penalty its entries weigh the same."""
    sample = sample_users(
        VALUES[GROUPS], np.random.default_rng(0).normal(size=(3000, 2)), DRAWS, parts=parse_parts(parts)
    )
    assert len(sample.drawn) == DRAWS
    assert abs(sample.pool.sum() - pooled) <= 10  # a rounding per cluster
    found = np.bincount(GROUPS, weights=sample.pool) / sample.pool.sum()
    assert (np.abs(found - share) <= 3 * np.sqrt(share * (1 - share) / pooled)).all()
    if parts == "none":
        assert np.array_equal(np.bincount(sample.drawn, minlength=3000), sample.pool)
        return
    drawn = sample.pool[sample.drawn]
    for penalty, holds in ((0.95, "penalty" in parts), (1.0, "penalty" not in parts)):
        expected = (user_shares(sample.pool[sample.pool > 0], penalty) * sample.pool[sample.pool > 0]).sum()
        assert (abs(drawn.mean() - expected) <= 3 * drawn.std() / np.sqrt(DRAWS)) == holds


def test_parts_by_name():
    assert parse_parts("penalty, importance") == ("importance", "penalty")
    assert parse_parts("none") == ()
    for wrong in ("", "importance,none", "importance,importance", "ln"):
        with pytest.raises(AlroFastError, match=r"--sampling .*expected some of importance,clustering,penalty, each"):
            parse_parts(wrong)


def test_the_rule_says_what_is_used():
    assert "0.6 num_samples draws in proportion to ln(training likes) and 0.6 num_samples draws spread over 10" in rule(
        parse_parts("importance,clustering,penalty")
    )
    alone = rule(parse_parts("importance"))
    assert "1.2 num_samples draws in proportion" in alone
    assert "0.95" not in alone
    assert "1.2 num_samples draws uniform" in rule(parse_parts("penalty"))
    assert rule(()).startswith("num_samples draws, uniform")


def test_fewer_users_than_clusters():
    assert set(cluster_users(np.zeros((5, 2)))) == {0}
    assert sample_users(np.array([2, 2]), np.eye(2), 10).drawn.shape == (10,)


def test_refusals():
    with pytest.raises(AlroFastError, match="--num_samples 0 is too small"):
        sample_users(np.array([5]), np.ones((1, 1)), 0)
    with pytest.raises(AlroFastError, match="no user has 2 training likes"):
        sample_users(np.array([1, 0]), np.ones((2, 1)), 5)
