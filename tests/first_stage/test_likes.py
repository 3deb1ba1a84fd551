"""The split of a user's ratings: two held-out likes, and the training ratings before them."""

from __future__ import annotations

import numpy as np
import pytest
from made_ratings import interactions, taste_rows

from alro_fast.data.first_stage.likes import split_likes
from alro_fast.errors import AlroFastError

#        item: rating, in time order
USER = [(0, 5), (1, 1), (2, 4), (3, 3), (4, 4), (5, 2), (6, 5), (7, 1)]


def one_user(rows=USER, like=4.0):
    return split_likes(interactions([(0, item, rating, time) for time, (item, rating) in enumerate(rows)], 9), like, 0)


def test_last_two_likes_are_held_out_and_later_ratings_dropped():
    """Likes 0, 2, 4, 6: test 6, validation 4; 5 and 7 come after the validation target and are no targets."""
    split = one_user()
    assert (split.target["test"].tolist(), split.target["valid"].tolist()) == ([6], [4])
    assert (split.target_rating["test"].tolist(), split.target_rating["valid"].tolist()) == ([5.0], [4.0])
    assert split.item.tolist() == [0, 1, 2, 3]
    assert split.rating.tolist() == [5.0, 1.0, 4.0, 3.0]
    assert split.dropped == 2
    assert split.like_count.tolist() == [2]


def test_a_user_with_two_likes_has_no_targets_and_keeps_every_rating():
    others = [(1, item, 5, item) for item in range(3)]
    split = split_likes(interactions([(0, 0, 5, 0), (0, 1, 1, 1), (0, 2, 4, 2), *others], 3), 4.0, 0)
    assert split.target["test"].tolist() == [-1, 2]
    assert split.target["valid"].tolist() == [-1, 1]
    assert np.isnan(split.target_rating["test"][0])
    assert split.offsets.tolist() == [0, 3, 4]


def test_file_order_does_not_matter_and_every_rating_is_accounted_for():
    rows = taste_rows()
    split = split_likes(interactions(rows, 60), 4.0, 0)
    shuffled = [rows[i] for i in np.random.default_rng(1).permutation(len(rows))]
    again = split_likes(interactions(shuffled, 60), 4.0, 0)
    for name in ("offsets", "item", "rating"):
        assert np.array_equal(getattr(split, name), getattr(again, name))
    held = sum(int((split.target[name] >= 0).sum()) for name in ("valid", "test"))
    assert len(split.item) + held + split.dropped == len(rows)


def test_without_times_the_seed_orders_the_ratings():
    rows = [(user, item, 5, 0) for user, item, *_ in taste_rows()]
    first, same, other = (split_likes(interactions(rows, 60), 4.0, seed) for seed in (0, 0, 1))
    assert np.array_equal(first.target["test"], same.target["test"])
    assert (first.target["test"] != other.target["test"]).mean() > 0.5


def test_no_likes_or_too_few():
    with pytest.raises(AlroFastError, match=r"no rating is at least --like 6 \(they run from 1 to 5\)"):
        one_user(like=6.0)
    with pytest.raises(AlroFastError, match=r"no user has 3 ratings of at least --like 5 \(the most is 2\)"):
        one_user(like=5.0)
