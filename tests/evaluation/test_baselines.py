"""Baselines that are fitted: what they have seen, what they have not, and what they find."""

from __future__ import annotations

import builtins
import math
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
from made_ratings import interactions, taste_rows
from tiny import catalogue, random_lists

from alro_fast.data.lists import TARGET_SCHEMA, open_prepared, write_prepared
from alro_fast.data.records import Signal
from alro_fast.data.signal_table import signal_features
from alro_fast.data.signals import AVERAGE_PRIOR
from alro_fast.data.windows import ListOptions, build_lists
from alro_fast.errors import AlroFastError
from alro_fast.evaluation.baselines import baseline_scores
from alro_fast.evaluation.fitted_baselines import rating_model_scores
from alro_fast.evaluation.results import evaluate_lists

OPTIONS = ListOptions(list_size=5, history_length=8)
ROWS = taste_rows(users=60, items=120)


def prepare(folder, rows=ROWS):
    built = build_lists(interactions(rows, 120), OPTIONS, notice=lambda what: None)
    write_prepared(folder, built.items, built.lists)
    return open_prepared(folder)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("baselines") / "data")


def test_biased_mf_finds_tastes_that_means_do_not(prepared):
    lists = prepared.lists("test")
    scores = baseline_scores(prepared, lists)
    assert list(scores) == ["random", "popularity", "mean_rating", "shrunk_mean", "biased_mf"]
    found = evaluate_lists(lists, scores, bootstrap=0)
    assert found.mean("biased_mf", "ndcg@3") > found.mean("shrunk_mean", "ndcg@3") + 0.05


@pytest.mark.parametrize("split", ["valid", "test"])
def test_no_baseline_knows_a_rating_of_the_lists_it_orders(prepared, tmp_path, split):
    """Other ratings in the lists of the split, and (valid) after them: the same scores of every baseline."""
    hidden = {"valid": 10, "test": 5}[split]
    many = np.bincount([row[0] for row in ROWS])
    moved = [(u, i, 6 - r if t - 100 >= many[u] - hidden else r, t) for u, i, r, t in ROWS]
    other = prepare(tmp_path / "other", moved)
    before, after = (baseline_scores(one, one.lists(split), split=split) for one in (prepared, other))
    for name in before:
        for one, two in zip(before[name], after[name], strict=True):
            np.testing.assert_array_equal(one, two)
    train = [(u, i, 6 - r if t - 100 < many[u] - 10 else r, t) for u, i, r, t in ROWS]
    other = prepare(tmp_path / "train", train)
    after = baseline_scores(other, other.lists(split), split=split)
    assert not np.array_equal(np.concatenate(before["biased_mf"]), np.concatenate(after["biased_mf"]))


def test_known_ratings_are_all_but_the_held_out(prepared):
    rated = {(f"u{u}", i): float(r) for u, i, r, _ in ROWS}
    for split, later in (("valid", ("valid", "test")), ("test", ("test",))):
        held = {(one.user_id, item.index) for name in later for one in prepared.lists(name) for item in one.candidates}
        known = {(user, item): rating for user, item, rating in prepared.known_ratings(split).rows()}
        assert known.items() <= rated.items()
        assert not known.keys() & held
        assert len(known) > 0.9 * (len(rated) - len(held))


def test_cheap_leaves_out_what_takes_long_and_training_lists_have_no_fitted_row(prepared, monkeypatch):
    lists = prepared.lists("train")
    assert rating_model_scores(prepared, lists, "train") is None
    assert rating_model_scores(prepared, prepared.lists("test"), "test", most=100) is None
    assert "biased_mf" not in baseline_scores(prepared, lists, split="train")
    assert list(baseline_scores(prepared, lists, "none")) == ["random"]
    with pytest.raises(AlroFastError, match="--baselines 'some': expected one of cheap, all, none"):
        baseline_scores(prepared, lists, "some")


def test_the_shrunk_mean_is_between_the_items_and_all(prepared):
    lists = prepared.lists("test")
    scores = baseline_scores(prepared, lists)
    count, mean = prepared.train_count.astype(float), prepared.train_mean
    overall = np.nansum(count * mean) / count.sum()
    for l in range(0, len(lists), 7):
        for i, item in enumerate(lists[l].candidates):
            n, own = count[item.index], np.nan_to_num(mean[item.index])
            expected = (n * own + AVERAGE_PRIOR * overall) / (n + AVERAGE_PRIOR)
            assert scores["shrunk_mean"][l][i] == pytest.approx(expected)


def signalled(lists, seed):
    """Signals of which neither alone tells the rating: a noisy one, and one that counts twice above 3.5."""
    draw = np.random.default_rng(seed)
    made = []
    for one in lists:
        ratings = np.asarray(one.ratings)
        noisy = tuple((ratings + draw.normal(0, 1.5, len(ratings))).tolist())
        other = tuple((np.abs(ratings - 2.5) + draw.normal(0, 0.3, len(ratings))).tolist())
        past = (1.0,) * len(one.history)
        made.append(replace(one, hints=noisy, signals=(Signal("average", past, other), Signal("count", past, other))))
    return made


def test_lambdamart_learns_from_training_lists_and_is_chosen_on_validation(tmp_path):
    pytest.importorskip("lightgbm", reason="LambdaMART needs lightgbm")
    sizes = {"train": 600, "valid": 100, "test": 100}
    splits = {name: signalled(random_lists(n, 6, seed=n), n + 1) for name, n in sizes.items()}
    splits["test"] = [replace(one, list_id=f"t{n}") for n, one in enumerate(splits["test"])]
    write_prepared(tmp_path / "data", catalogue(300), splits)
    prepared = open_prepared(tmp_path / "data")
    lists = prepared.lists("test")
    scores = baseline_scores(prepared, lists, "all")
    found = evaluate_lists(lists, scores, bootstrap=0)
    assert list(found.per_list)[-2:] == ["lambdamart", "hints"]
    assert found.mean("lambdamart", "ndcg@3") > found.mean("hints", "ndcg@3") + 0.05
    again = baseline_scores(prepared, lists, "all")
    np.testing.assert_array_equal(np.concatenate(again["lambdamart"]), np.concatenate(scores["lambdamart"]))
    unlabelled = [replace(lists[i], ratings=(1.0,) * 6) for i in range(len(lists))]
    blind = baseline_scores(prepared, unlabelled, "all")
    np.testing.assert_array_equal(np.concatenate(blind["lambdamart"]), np.concatenate(scores["lambdamart"]))


def test_features_are_signals_and_their_distance_from_the_lists_mean():
    one = replace(random_lists(1, 3)[0], hints=(1.0, math.nan, 4.0))
    expected = [[1.0, math.nan, -1.5, math.nan], [math.nan] * 4, [4.0, math.nan, 1.5, math.nan]]
    np.testing.assert_array_equal(signal_features(one, ["hint", "average"]), expected)


def test_what_is_missing_leaves_a_row_out_with_a_line(prepared, tmp_path, monkeypatch):
    notes = []
    assert "lambdamart" not in baseline_scores(prepared, prepared.lists("test"), "all", notice=notes.append)
    assert notes == ["no row lambdamart: the lists carry no signals; prepare them with --signals"]
    write_prepared(tmp_path / "data", catalogue(300), {"train": signalled(random_lists(20, 6), 0)})
    real = builtins.__import__

    def without(name, *more, **named):
        if name == "lightgbm":
            raise ImportError(name)
        return real(name, *more, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    signalled_only = open_prepared(tmp_path / "data")
    baseline_scores(signalled_only, signalled_only.lists("train"), "all", split="train", notice=notes.append)
    assert notes[1:] == ["no row lambdamart: LightGBM is not here: pip install 'alro-fast[baselines]'"]


def test_sasrec_orders_lists_of_one_target_by_what_follows_in_histories(tmp_path):
    """Item i is always followed by i + 1: the candidate that comes next is found."""
    shelf, lists, rows = catalogue(12), [], []
    for user in range(80):
        start = user % 12
        past = [shelf[(start + k) % 12] for k in range(6)]
        new = [shelf[(start + k) % 12] for k in (8, 6, 10)]
        lists.append(
            replace(
                random_lists(1, 3)[0], list_id=f"l{user}", user_id=f"u{user}", history=tuple(past),
                history_ratings=(5.0,) * 6, candidates=tuple(new), ratings=(math.nan, 4.0, math.nan),
            )
        )  # fmt: skip
        rows.append(("test", f"u{user}", (start + 6) % 12, 2))
    targets = pl.DataFrame(rows, schema=TARGET_SCHEMA, orient="row")
    write_prepared(tmp_path / "data", shelf, {"test": lists}, {"options": {"like": 4.0}}, targets)
    prepared = open_prepared(tmp_path / "data")
    scores = baseline_scores(prepared, prepared.lists("test"), "all")
    assert "lambdamart" not in scores
    assert np.mean([row.argmax() == 1 for row in scores["sasrec"]]) > 0.8
    assert "sasrec" not in baseline_scores(prepared, prepared.lists("test"))
