"""What a mean hides: the order shown, repeated or not; and segments of users and of items."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from tiny import catalogue, random_lists

from alro_fast.data.lists import open_prepared, write_prepared
from alro_fast.evaluation.breakdown import breakdown, repeated_order
from alro_fast.evaluation.results import evaluate_lists
from alro_fast.ranking.orders import Ranking, make_ranking, presentations


def test_a_ranking_that_repeats_what_it_was_shown_is_told_from_one_that_does_not():
    lists = random_lists(200, 6)
    draw = np.random.default_rng(0)

    def tau(score, shuffles=1):
        shown = [presentations(one, shuffles, seed=0) for one in lists]
        each = [make_ranking(one, at, score(np.argsort(at, axis=1)), "mean") for one, at in zip(lists, shown)]
        return repeated_order(each)

    assert tau(lambda places: -places.astype(float)) == 1.0
    assert tau(lambda places: -places.astype(float), shuffles=3) == 1.0  # though the merged order is near any
    assert tau(lambda places: places.astype(float)) == -1.0
    assert abs(tau(lambda places: draw.normal(size=places.shape))) < 0.06
    one = Ranking("l", (1, 0, 2), np.zeros(3), np.array([[2, 0, 1]]), np.array([[2.0, 3.0, 9.0]]))  # shows 2, 0, 1
    assert repeated_order([one]) == pytest.approx(1 - 2 / 3)  # of three pairs, (0, 1) alone is turned
    assert math.isnan(repeated_order([]))


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Results of lists of which some cannot be ranked, and the folder they are from."""
    folder = tmp_path_factory.mktemp("breakdown") / "data"
    lists = random_lists(40, 5, seed=1, history=3, items=60)
    test = [replace(one, user_id=f"u{n % 12}") for n, one in enumerate(lists[10:])]
    test[3] = replace(test[3], ratings=(4.0,) * 5)
    write_prepared(folder, catalogue(60), {"train": lists[:10], "test": test}, {"dataset": "made"})
    prepared = open_prepared(folder)
    draw = np.random.default_rng(0)
    scores = {name: [draw.normal(size=5) for _ in test] for name in ("tuned", "untuned", "random")}
    scores |= {"popularity": [np.array(one.ratings) for one in test], "hints": [-np.array(one.ratings) for one in test]}
    return evaluate_lists(test, scores, prepared=prepared, bootstrap=50), test, prepared


def test_segments_hold_every_ranked_list_once_and_average_to_the_mean(measured):
    results, lists, prepared = measured
    found = breakdown(results, lists, prepared, targets=False)
    assert list(found) == ["ratings known of the user", "user", "training ratings of the median candidate"]
    for segments in found.values():
        assert sum(one["lists"] for one in segments) == results.lists - 1
        for name in ("tuned", "untuned", "popularity"):  # the best that needs no model, and no other
            total = sum(one["lists"] * one[name][0] for one in segments)
            assert total / (results.lists - 1) == pytest.approx(results.mean(name, "ndcg@3"))
        assert segments[0].keys() == {"range", "lists", "users", "tuned", "untuned", "popularity"}
        for one in segments:
            mean, low, high = one["tuned"]
            assert low <= mean <= high


def test_users_are_dealt_by_what_the_folder_knows_of_them(measured):
    results, lists, prepared = measured
    known = prepared.known_ratings("test")["user_id"].to_list()
    kept = [one for one in lists if not one.all_equal]
    few = [at for at, one in enumerate(kept) if known.count(one.user_id) < 10]
    (first, *_) = breakdown(results, lists, prepared, targets=False)["ratings known of the user"]
    assert first["range"] == "0 to below 10"
    assert first["lists"] == len(few)
    assert first["tuned"][0] == pytest.approx(results.per_list["tuned"]["ndcg@3"][few].mean())


def test_users_without_a_training_list_are_a_segment(measured):
    results, lists, prepared = measured
    trained = set(prepared.lists("train").user_ids)
    new = [at for at, one in enumerate(one for one in lists if not one.all_equal) if one.user_id not in trained]
    first, second = breakdown(results, lists, prepared, targets=False)["user"]
    assert (first["range"], first["lists"]) == ("new: in no training list", len(new))
    assert first["tuned"][0] == pytest.approx(results.per_list["tuned"]["ndcg@3"][new].mean())
    assert first["lists"] + second["lists"] == len(results.users)


def test_histories_of_one_length_are_no_cut_and_others_are(measured):
    results, lists, _ = measured
    assert breakdown(results, lists, None, targets=False) == {}
    uneven = [
        replace(one, history=one.history[: n % 3], history_ratings=one.history_ratings[: n % 3])
        for n, one in enumerate(lists)
    ]
    (segments,) = breakdown(results, uneven, None, targets=False).values()
    assert [one["range"] for one in segments] == ["0 to below 1", "1 to below 2", "2 or more"]  # all of them below 10
    assert sum(one["lists"] for one in segments) == len(results.users)
