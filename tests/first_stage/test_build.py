"""Lists with hints: what is in them, and that nothing in training knows of a held-out like."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from made_ratings import interactions, taste_rows

from alro_fast.data.first_stage.build import build_hinted
from alro_fast.data.first_stage.likes import split_likes
from alro_fast.data.first_stage.options import HintOptions
from alro_fast.data.first_stage.retrieval import RetrieverOptions, fit_retriever
from alro_fast.data.first_stage.sampling import cluster_users
from alro_fast.errors import AlroFastError

pytest.importorskip("implicit")

ITEMS = 120
ROWS = taste_rows(users=40, items=100)
DATA = interactions(ROWS, ITEMS)
OPTIONS = HintOptions(num_samples=120, history_length=12, of_retriever=RetrieverOptions(factors=8))


def build(data=DATA, options=OPTIONS):
    notes = []
    return build_hinted(data, options, notes.append), notes


@pytest.fixture(scope="module")
def built():
    return build()[0]


SPLIT = split_likes(DATA, 4.0, 0)
RATED = {
    user: dict(zip(SPLIT.item[rows].tolist(), SPLIT.rating[rows].tolist()))
    for user, rows in ((u, slice(*SPLIT.offsets[u : u + 2])) for u in range(SPLIT.users))
}


def number(one):
    return int(one.user_id[1:])


def parts(lists):
    return [one for one in lists if not one.list_id.endswith("-rated")], [
        one for one in lists if one.list_id.endswith("-rated")
    ]


def test_choice_lists_are_three_of_a_rating_two_of_the_next_and_five_unrated(built):
    choices, _ = parts(built.lists["train"])
    assert len(choices) == 120
    whole = 0
    for one in choices:
        rated = RATED[number(one)]
        by_rating = Counter(r for r in one.ratings if not math.isnan(r))
        counts = Counter(rated.values())
        if counts[5.0] > 3 and counts[4.0] > 2:
            assert by_rating == {5.0: 3, 4.0: 2}
            whole += 1
        else:
            best = sorted(rated.values(), reverse=True)[: sum(by_rating.values())]
            assert sorted(by_rating.elements(), reverse=True) == best
        unrated = [item.index for item, r in zip(one.candidates, one.ratings) if math.isnan(r)]
        assert len(unrated) == len(set(unrated)) == 5
        assert not set(unrated) & set(rated)
        assert all(item.index < 100 for item in one.candidates)  # the others have no training rating
        assert all(rated[item.index] == r for item, r in zip(one.candidates, one.ratings) if not math.isnan(r))
    assert built.counts["choice_lists_of_two_ratings"] == whole > 60
    assert built.counts["choice_lists_of_the_best_rated"] == 120 - whole > 0


def test_rated_lists_are_training_ratings_of_every_value(built):
    _, rated = parts(built.lists["train"])
    assert len(rated) == 120
    seen = Counter()
    for one in rated:
        mine = RATED[number(one)]
        assert all(mine[item.index] == r for item, r in zip(one.candidates, one.ratings))
        assert len(one.candidates) == min(10, len(mine) // 2)
        seen.update(one.ratings)
    assert set(seen) == {1.0, 2.0, 3.0, 4.0, 5.0}


def test_histories_hold_other_training_ratings_in_time_order(built):
    when = {(user, item): time for user, item, _, time in ROWS}
    for split, lists in built.lists.items():
        for one in lists:
            items = [item.index for item in one.history]
            assert len(items) == len(set(items)) <= 12
            assert not set(items) & {item.index for item in one.candidates}
            times = [when[number(one), item] for item in items]
            assert times == sorted(times)
            mine = RATED[number(one)]
            assert list(one.history_ratings) == [mine[item] for item in items]  # no held-out rating among them
            if split != "train":
                latest = SPLIT.item[SPLIT.offsets[number(one)] : SPLIT.offsets[number(one) + 1]][-12:]
                assert items == latest.tolist()


def test_a_user_drawn_again_gives_other_lists_and_an_order_that_tells_nothing(built):
    choices, _ = parts(built.lists["train"])
    assert len({one.list_id for one in built.lists["train"]}) == len(built.lists["train"])
    drawn = Counter(one.user_id for one in choices)
    assert Counter(f"u{user}" for user in built.sample.drawn.tolist()) == drawn
    twice = [one for one in choices if one.user_id == drawn.most_common(1)[0][0]]
    assert len({frozenset(item.index for item in one.candidates) for one in twice}) == len(twice) > 1
    rated_at = np.mean([[not math.isnan(r) for r in one.ratings] for one in choices], axis=0)
    assert (np.abs(rated_at - 0.5) < 0.17).all()


def test_ranked_lists_are_the_retrievers_best_with_the_target_rated(built):
    targets = {(row["split"], row["user_id"]): row for row in built.targets.to_dicts()}
    for split, lists in (("valid", built.lists["valid"]), ("test", built.lists["test"])):
        assert [one.user_id for one in lists] == [f"u{u}" for u in np.flatnonzero(SPLIT.target[split] >= 0)]
        hits = 0
        for one in lists:
            row = targets[split, one.user_id]
            assert row["item"] == SPLIT.target[split][number(one)]
            items = [item.index for item in one.candidates]
            assert len(items) == 10
            assert not set(items) & set(RATED[number(one)])
            if split == "test":
                assert SPLIT.target["valid"][number(one)] not in items
            rated = [i for i, r in zip(items, one.ratings) if not math.isnan(r)]
            if row["place"] is not None and row["place"] <= 10:
                hits += 1
                assert items.index(row["item"]) + 1 == row["place"]
                assert rated == [row["item"]]
                assert one.ratings[items.index(row["item"])] == SPLIT.target_rating[split][number(one)]
            else:
                assert rated == []
        figures = built.retrieval[split]
        assert figures["users"] == len(lists)
        assert figures["targets_among_candidates"] == figures["hr@10"] == hits / len(lists)
        assert 0 < hits < len(lists)


def test_every_candidate_has_a_hint_on_the_rating_scale(built):
    for lists in built.lists.values():
        for one in lists:
            assert len(one.hints) == len(one.candidates)
            assert all(1 <= hint <= 5 for hint in one.hints)
    rated = parts(built.lists["train"])[1]
    hints, ratings = zip(*[pair for one in rated for pair in zip(one.hints, one.ratings)])
    assert np.corrcoef(hints, ratings)[0, 1] > 0.4


def test_users_are_clustered_by_the_retrievers_embeddings(built):
    retriever = fit_retriever(OPTIONS.retriever, SPLIT, OPTIONS.of_retriever, OPTIONS.seed)
    users = np.flatnonzero(SPLIT.like_count >= 2)
    expected = cluster_users(retriever.embeddings[users], seed=OPTIONS.seed)
    np.testing.assert_array_equal(built.sample.cluster[users], expected)
    assert len(np.unique(expected)) == 10


def moved(rating=None, identity=False):
    """DATA with every held-out like rated otherwise, or standing for another item that the user has not rated."""
    rows = list(ROWS)
    at = {(user, item): place for place, (user, item, *_) in enumerate(rows)}
    mine = {user: {i for u, i, *_ in rows if u == user} for user in range(SPLIT.users)}
    for split in ("valid", "test"):
        for user in np.flatnonzero(SPLIT.target[split] >= 0).tolist():
            item = int(SPLIT.target[split][user])
            place = at[user, item]
            user, item, value, time = rows[place]
            if identity:
                item = next(i for i in range(ITEMS - 1, -1, -1) if i not in mine[user])
                mine[user].add(item)
            rows[place] = (user, item, rating or value, time)
    return interactions(rows, ITEMS)


@pytest.mark.parametrize("retriever", ["als", "bpr", "item-knn"])
def test_training_does_not_depend_on_held_out_likes(retriever):
    """Other ratings and other items held out: the same training lists, hints, statistics and sample."""
    of_retriever = RetrieverOptions() if retriever == "item-knn" else RetrieverOptions(factors=8)
    options = replace(OPTIONS, retriever=retriever, of_retriever=of_retriever, num_samples=40)
    before, _ = build(options=options)
    for data in (moved(rating=4), moved(identity=True)):
        after, _ = build(data, options)
        assert repr(after.lists["train"]) == repr(before.lists["train"])
        assert after.items.equals(before.items)
        assert np.array_equal(after.sample.drawn, before.sample.drawn)
        assert repr(after.lists["valid"]) != repr(before.lists["valid"])
    shuffled, _ = build(interactions([(u, i, 9 - r if r > 3 else r, t) for u, i, r, t in ROWS], ITEMS), options)
    assert repr(shuffled.lists["train"]) != repr(before.lists["train"])  # training ratings do matter


def test_what_is_ranked_does_not_depend_on_the_targets_rating_or_item():
    before, _ = build()
    for data in (moved(rating=4), moved(identity=True)):
        after, _ = build(data)
        pairs = list(zip(before.lists["valid"], after.lists["valid"], strict=True))
        for one, other in pairs:
            assert (one.candidates, one.hints, one.history) == (other.candidates, other.hints, other.history)
        assert any(repr(one.ratings) != repr(other.ratings) for one, other in pairs)
    after, _ = build(moved(rating=4))
    for one, other in zip(before.lists["test"], after.lists["test"], strict=True):
        assert (one.candidates, one.hints, one.history) == (other.candidates, other.hints, other.history)


def test_a_training_hint_has_not_seen_its_rating(built):
    """A candidate's own rating changed: where its list shows it, its hint stays."""
    one = next(o for o in parts(built.lists["train"])[1] if min(o.ratings) <= 2)
    low = next(item.index for item, rating in zip(one.candidates, one.ratings) if rating <= 2)
    rows = [(u, i, 3 if (u, i) == (number(one), low) else r, t) for u, i, r, t in ROWS]
    after, _ = build(interactions(rows, ITEMS))
    twin = next(o for o in after.lists["train"] if o.list_id == one.list_id)
    assert twin.candidates == one.candidates
    changed = [k for k in range(len(one.ratings)) if one.ratings[k] != twin.ratings[k]]
    assert len(changed) == 1
    assert twin.hints[changed[0]] == one.hints[changed[0]]
    assert twin.hints != one.hints
    shares, others = (each.signal("retriever").candidates for each in (one, twin))
    assert shares[changed[0]] == others[changed[0]]


def test_candidates_have_their_place_with_the_retriever(built):
    """Held-out lists: shares that fall along its order. Training lists: of a retriever without the likes of a fold."""
    for split in ("valid", "test"):
        for one in built.lists[split]:
            shares = one.signal("retriever").candidates
            assert len(shares) == len(one.candidates)
            assert list(shares) == sorted(shares, reverse=True)
            assert 0 <= shares[-1] <= shares[0] <= 1
    liked, others = [], []
    for one in built.lists["train"]:
        for share, rating in zip(one.signal("retriever").candidates, one.ratings, strict=True):
            (liked if rating >= 4 else others).append(share)
    assert np.mean(liked) > np.mean(others) + 0.05  # taste is learned from the other folds


def test_few_items_left_and_more_candidates_than_there_are():
    small = interactions([row for row in ROWS if row[1] < 24], 24)
    built, notes = build(small, replace(OPTIONS, num_candidates=20))
    assert any("fewer than 20 candidates: all that are left to them" in note for note in notes)
    assert built.counts["short_test_lists"] > 0
    for one in (*built.lists["train"], *built.lists["test"]):
        items = [item.index for item in one.candidates]
        assert len(items) == len(set(items)) <= 20


@pytest.mark.parametrize("retriever", ["als", "bpr", "item-bm25", "popularity", "sasrec", "lightgcn"])
def test_tiny_data_make_sound_lists_or_say_what_is_missing(retriever):
    generator = np.random.default_rng(0)
    fine = 0
    for seed in range(25):
        users, items, share = generator.integers(1, 6), generator.integers(1, 12), generator.random()
        rows = [
            (u, i, int(generator.choice([1, 3, 4, 5, 5, 5])), int(generator.integers(4)))
            for u in range(users)
            for i in range(items)
            if i == 0 or generator.random() < share
        ]
        small = {"iterations": 2, "factors": 4} if retriever in ("als", "bpr", "sasrec", "lightgcn") else {}
        options = HintOptions(
            retriever=retriever, num_candidates=int(generator.integers(2, 12)), num_samples=5, folds=2,
            min_likes=int(generator.integers(2, 4)), seed=seed, of_retriever=RetrieverOptions(**small),
        )  # fmt: skip
        try:
            built, _ = build(interactions(rows, items, users), options)
        except AlroFastError:  # anything else is a bug
            continue
        fine += 1
        for one in (*built.lists["train"], *built.lists["valid"], *built.lists["test"]):
            shown = {item.index for item in one.candidates}
            assert len(shown) == len(one.candidates) == len(one.hints) == len(one.ratings) > 0
            assert not shown & {item.index for item in one.history}
        assert len(built.lists["test"]) + built.counts["users_without_a_candidate"] == built.retrieval["test"]["users"]
    assert fine > 3


def test_no_dislikes_is_said_and_one_single_rating_works():
    liked = interactions([(u, i, 5, t) for u, i, r, t in ROWS if r >= 4], ITEMS)
    built, notes = build(liked)
    assert any("no training rating is --dislike 2 or less" in note for note in notes)
    assert built.counts["choice_lists_of_two_ratings"] == 0
    assert {r for one in parts(built.lists["train"])[0] for r in one.ratings if not math.isnan(r)} == {5.0}
    assert all(hint == 5 for one in built.lists["test"] for hint in one.hints)


def test_users_with_few_likes_have_no_targets_unless_asked_for():
    """u40 likes nothing; u41 likes two items, both held out with --min_likes 2: the retriever does not know it."""
    dull = [(40, item, 1, item) for item in range(8)]
    shy = [(41, item, 2, item) for item in range(8)] + [(41, 9, 5, 9), (41, 10, 4, 10)]
    data = interactions([*ROWS, *dull, *shy], ITEMS)
    built, notes = build(data)
    assert "2 of 42 users have fewer than 3 likes: no targets, all their ratings train" in notes
    assert not any(one.user_id == "u40" for lists in built.lists.values() for one in lists)
    assert (built.sample.cluster[[40, 41]] >= 0).tolist() == [False, True]  # u41 may be drawn for training
    assert not any(one.user_id == "u41" for one in built.lists["test"])
    built, notes = build(data, replace(OPTIONS, min_likes=2))
    assert "1 users are unknown to the retriever: their candidates are the most popular items" in notes
    assert built.counts["users_unknown_to_the_retriever"] == 1
    split = split_likes(data, 4.0, 0, 2)
    likes = np.bincount(split.item[split.liked], minlength=ITEMS)
    popular = sorted(set(range(100)) - set(range(8)) - {9}, key=lambda i: (-likes[i], i))
    one = next(one for one in built.lists["test"] if one.user_id == "u41")
    assert [item.index for item in one.candidates] == popular[:10]
    assert len(one.hints) == 10
    assert not any(one.user_id == "u41" for one in built.lists["train"])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_candidates": 1}, "--num_candidates 1 is too small; at least 2"),
        ({"folds": 1}, "--folds 1 is too small; at least 2"),
        ({"dislike": 4.0}, "--dislike 4 is not below --like 4"),
        ({"retriever": "magic"}, "unknown retriever 'magic'"),
        ({"min_likes": 1}, "--min_likes 1 is too small; at least 2"),
        ({"seed": -1}, "--seed -1 is too small"),
    ],
)
def test_bad_options(options, said):
    with pytest.raises(AlroFastError, match=said):
        HintOptions(**options)
