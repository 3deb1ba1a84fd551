"""Signals: what they are, that none knows a rating of the list it stands in, and that a leak would be found."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
from made_ratings import interactions, taste_rows

from alro_fast import prepare
from alro_fast.data import near
from alro_fast.data import signals as module
from alro_fast.data.lists import open_prepared, write_prepared
from alro_fast.data.near import Residuals
from alro_fast.data.records import Signal
from alro_fast.data.signal_table import PREPARED, bucket
from alro_fast.data.signals import AVERAGE_PRIOR, ItemSide, SignalOptions, add_signals, item_attributes
from alro_fast.data.windows import ListOptions, build_lists, hash_ids, splitmix64
from alro_fast.errors import AlroFastError
from alro_fast.evaluation import metrics

ITEMS, FOLDS = 120, 4
ROWS = taste_rows(users=60, items=ITEMS)
OPTIONS = ListOptions(list_size=5, history_length=8)
ALL = SignalOptions(("average", "count", "hint", "near"), FOLDS)


def made(rows=ROWS, options=OPTIONS, signals=ALL):
    data = interactions(rows, ITEMS)
    data = replace(data, items=data.items.with_columns(category=pl.Series([f"kind {i % 40}" for i in range(ITEMS)])))
    built = build_lists(data, options, notice=lambda what: None)
    return built, add_signals(built, data, signals, options)


@pytest.fixture(scope="module")
def built():
    return made()


def side(frame, name):
    return frame["hints" if name == "hint" else f"candidate_{name}"].to_list()


def shuffled(seed=0):
    """ROWS with the ratings of all rows shuffled: nothing tells a rating but itself."""
    ratings = np.random.default_rng(seed).permutation([row[2] for row in ROWS])
    return [(u, i, int(r), t) for (u, i, _, t), r in zip(ROWS, ratings)]


def above_chance(frame, name) -> float:
    """How many standard errors NDCG@3 of the lists, ordered by a signal, is above that of a random order."""
    ratings = metrics.pad(frame["ratings"].to_list())
    ranked = ~metrics.all_equal(ratings)
    scores = np.nan_to_num(metrics.pad([[np.nan if v is None else v for v in row] for row in side(frame, name)]))
    gained = metrics.ndcg(scores, ratings, 3)[ranked] - metrics.ndcg(np.zeros_like(scores), ratings, 3)[ranked]
    return float(gained.mean() / (gained.std() / np.sqrt(len(gained))))


def test_every_signal_tells_something_of_real_tastes(built):
    frames = built[1]
    assert frames["train"].height > 300
    assert above_chance(frames["train"], "average") > 4  # every seventh item is disliked by all
    assert above_chance(frames["train"], "hint") > above_chance(frames["train"], "average")
    assert above_chance(frames["train"], "near") > 4


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_no_signal_beats_chance_on_shuffled_ratings(seed):
    _, frames = made(shuffled(seed))
    for split in ("train", "valid", "test"):
        for name in PREPARED:
            assert abs(above_chance(frames[split], name)) < 3.3, (split, name)


def test_a_planted_leak_is_found(monkeypatch):
    """Item sides that have seen the lists' own ratings; then user sides that have."""

    class Leaking(ItemSide):
        def __init__(self, timeline, user_of_rating, rows, *more):
            super().__init__(timeline, user_of_rating, np.arange(len(timeline.item)), *more)

    monkeypatch.setattr(module, "ItemSide", Leaking)
    _, frames = made(shuffled())
    assert above_chance(frames["train"], "average") > 4
    assert above_chance(frames["train"], "hint") > 4

    class Late(ItemSide):
        def predictor(self, name):
            predict = super().predictor(name)

            def late(past, rating, starts, wanted):
                return predict(past, rating, np.minimum(starts + OPTIONS.list_size, len(past)), wanted)

            return late

    monkeypatch.setattr(module, "ItemSide", Late)
    _, frames = made(shuffled())
    for name in ("hint", "near"):
        assert above_chance(frames["train"], name) > 4, name


def altered(where):
    """ROWS with the ratings changed of those that `where` (user, place in the user's time order, how many) says."""
    many = np.bincount([row[0] for row in ROWS])
    return [(u, i, 6 - r if r != 3 else 1, t) if where(u, t - 100, many[u]) else (u, i, r, t) for u, i, r, t in ROWS]


def values(frames, split):
    names = [
        name for name in frames[split].columns if name == "hints" or name.endswith(("_average", "_count", "_near"))
    ]
    return [frames[split][name].to_list() for name in names]


def test_signals_do_not_depend_on_what_is_held_out(built):
    before = built[1]
    tests = made(altered(lambda user, place, many: place >= many - 5))[1]
    for split in before:
        assert values(tests, split) == values(before, split)
        assert (tests[split]["ratings"].to_list() == before[split]["ratings"].to_list()) is (split != "test")
    held = made(altered(lambda user, place, many: place >= many - 10))[1]
    assert values(held, "train") == values(before, "train")
    assert values(held, "valid") == values(before, "valid")
    assert values(held, "test") != values(before, "test")  # a test list may know validation ratings
    train = made(altered(lambda user, place, many: place < many - 10))[1]
    assert values(train, "valid") != values(before, "valid")


def test_a_users_own_and_later_ratings_stay_out_of_its_lists(built):
    """User 7's ratings from place 20 on changed: its lists that begin there or before keep every signal."""
    before, after = built[1]["train"], made(altered(lambda user, place, many: user == 7 and place >= 20))[1]["train"]
    kept = moved = 0
    for row, (one, other) in enumerate(zip(before.to_dicts(), after.to_dicts(), strict=True)):
        assert one["list_id"] == other["list_id"]
        if one["user_id"] != "u7":
            continue
        start = int(one["list_id"].split("-")[1])
        assert one["candidate_average"] == other["candidate_average"]  # no rating of the user at any time
        if start <= 20:
            assert one["hints"] == other["hints"], row
            assert one["candidate_near"] == other["candidate_near"], row
            kept += 1
        else:
            moved += one["hints"] != other["hints"]
    assert kept >= 2
    assert moved >= 1


def test_average_and_count_are_those_of_the_other_folds(built):
    frames = built[1]
    key = splitmix64(splitmix64(hash_ids(interactions(ROWS, ITEMS).user_ids)))
    fold = (key % np.uint64(FOLDS)).astype(int)
    many = np.bincount([row[0] for row in ROWS])
    for split, held in (("train", 10), ("valid", 10), ("test", 5)):
        one = frames[split].row(3, named=True)
        mine = fold[int(one["user_id"][1:])]
        others = [(i, r) for u, i, r, t in ROWS if fold[u] != mine and t - 100 < many[u] - held]
        overall = np.mean([r for _, r in others])
        for part, column in (("history", "history"), ("candidate", "candidates")):
            for item, average, count in zip(one[column], one[f"{part}_average"], one[f"{part}_count"], strict=True):
                ratings = [r for i, r in others if i == item]
                expected = (sum(ratings) + AVERAGE_PRIOR * overall) / (len(ratings) + AVERAGE_PRIOR)
                assert count == len(ratings)
                assert average == pytest.approx(expected, abs=1e-6) if ratings else average is None


def test_a_hint_is_the_users_own_ridge_regression(built):
    """Weights found anew from all ratings before the list, by the augmented least squares."""
    timeline = built[0].timeline
    user_of = np.repeat(np.arange(60), np.diff(timeline.offsets))
    attributes, ridge = item_attributes(["Film"] * ITEMS, ["A, B" if i % 3 else "" for i in range(ITEMS)])
    item_side = ItemSide(timeline, user_of, np.flatnonzero(user_of % 2 == 0), attributes, ridge, ["hint"])
    own = slice(*timeline.offsets[7:9])
    past, rating = timeline.item[own].astype(int), timeline.rating[own].astype(float)
    found = item_side.hints(past, rating, np.array([6, 6, 11]), [np.arange(9), np.arange(3), np.arange(9)])
    for start, hints in zip((6, 6, 11), found):
        features = item_side.features[past[:start]]
        rows = np.concatenate([features, np.sqrt(item_side.ridge)])
        wanted = np.concatenate([rating[:start] - item_side.offset[past[:start]], np.zeros(features.shape[1])])
        weights = np.linalg.lstsq(rows, wanted, rcond=None)[0]
        items = np.arange(len(hints))
        np.testing.assert_allclose(hints, item_side.offset[items] + item_side.features[items] @ weights, atol=1e-9)


def test_near_is_what_its_formulas_say(built, monkeypatch):
    """One user's, by sums over pairs of items; more ratings than neighbours, and a list that starts before the last."""
    monkeypatch.setattr(near, "NEIGHBOURS", 9)
    timeline = built[0].timeline
    user_of = np.repeat(np.arange(60), np.diff(timeline.offsets))
    rows = np.flatnonzero(user_of % 2 == 0)
    found = Residuals(user_of[rows], timeline.item[rows].astype(int), timeline.rating[rows].astype(float), ITEMS)
    own = slice(*timeline.offsets[7:9])
    past, rating = timeline.item[own].astype(int), timeline.rating[own].astype(float)
    starts, wanted = np.array([6, 20]), [past[6:11], past[20:25]]
    table = {(u, i): v for u, i, v in zip(found.user.tolist(), found.item.tolist(), found.value.tolist())}
    raters = range(found.users)
    for start, items, result in zip(starts, wanted, found.neighbours().near(past, rating, starts, wanted), strict=True):
        above = rating[:start] - found.level[past[:start]]
        mine = above - above.sum() / (start + 5)
        for item, value in zip(items, result, strict=True):
            alike = []
            for other in past[:start]:
                pairs = [(table.get((v, item), 0.0), table.get((v, other), 0.0)) for v in raters]
                power = sum(a * a for a, _ in pairs) * sum(b * b for _, b in pairs)
                alike.append(max(0.0, sum(a * b for a, b in pairs)) / (power**0.5 + 4))
            kept = np.array([one if one >= sorted(alike)[-min(9, start)] else 0.0 for one in alike])
            assert value == pytest.approx(kept @ mine / (kept.sum() + 0.5), abs=1e-5)


def test_near_is_refused_before_its_table_would_not_fit(monkeypatch):
    monkeypatch.setattr(near, "MOST_CELLS", 60 * ITEMS - 1)
    with pytest.raises(AlroFastError, match=f"a table of {ITEMS} items x 60 users, .* leave near out$"):
        made()
    made(signals=SignalOptions(("hint",), FOLDS))


def test_attributes_are_categories_and_decades_of_length_one():
    found, ridge = item_attributes(["A (1999)", "B (1935)", "C"], ["Drama, War", "War|Crime", ""])
    assert len(ridge) == found.shape[1]
    np.testing.assert_allclose(found[:, :3], [[0, 0.5**0.5, 0.5**0.5], [0.5**0.5, 0, 0.5**0.5], [0, 0, 0]])
    np.testing.assert_allclose(np.square(found[:, 3:]).sum(axis=1), [1, 1, 0])
    assert found[0, 3:].argmax() == 8  # 2000 of 1920, 1930, ...
    assert item_attributes(["A", "B"], ["", ""])[0].shape == (2, 0)


def test_buckets_of_counts():
    assert [bucket(count) for count in (0, 1, 2, 4, 5, 9, 10, 19, 20, 999, 1000)] == [
        (0, 0), (1, 1), (2, 2), (2, 2), (3, 5), (3, 5), (4, 10), (4, 10), (5, 20), (9, 500), (10, 1000),
    ]  # fmt: skip


@pytest.fixture
def ratings_file(tmp_path):
    path = tmp_path / "ratings.csv"
    lines = [f"{u},{i},{r},{t}\n" for u, i, r, t in ROWS]
    path.write_text("user,item,rating,timestamp\n" + "".join(lines))
    return path


def command(ratings, out, *more):
    columns = [
        "--user_column",
        "user",
        "--item_column",
        "item",
        "--rating_column",
        "rating",
        "--time_column",
        "timestamp",
    ]
    words = ["--dataset", "csv", "--ratings_file", ratings, "--output_dir", out, "--list_size", "5", *columns, *more]
    return [str(word) for word in words]


def test_prepare_writes_them_with_their_rules_and_lists_carry_them(ratings_file, tmp_path, capsys):
    more = ["--signals", "average,hint", "--signal_folds", "3", "--negatives", "2"]
    prepare.main(command(ratings_file, tmp_path / "out", *more))
    assert "computed signals: average, hint" in capsys.readouterr().out
    data = open_prepared(tmp_path / "out")
    assert data.lists("test").signals == ["average", "hint"]
    rule = data.manifest["signals"]
    assert (rule["folds"], list(rule["computed"])) == (3, ["average", "hint"])
    assert "no signal depends on a rating of the list" in rule["rule"]
    one = data.lists("train")[5]
    assert [signal.name for signal in one.signals] == ["average"]
    assert len(one.signals[0].history) == len(one.history)
    assert len(one.hints) == len(one.signals[0].candidates) == len(one.candidates) == 7  # unrated ones too
    assert one.signal("hint") == Signal("hint", (), one.hints)
    assert one.signal("count") == Signal("count", (), ())
    first = data.lists("train")[:9][5]
    assert first == one or repr(first) == repr(one)
    again = tmp_path / "again"
    prepare.main(command(ratings_file, again, *more))
    assert (again / "manifest.json").read_bytes() == (tmp_path / "out" / "manifest.json").read_bytes()
    prepare.main(command(ratings_file, tmp_path / "out", *more))  # the same again: nothing to refuse
    with pytest.raises(AlroFastError, match="made from csv with other options"):
        prepare.main(command(ratings_file, tmp_path / "out", "--negatives", "2"))


def test_without_signals_the_folder_is_what_it_was(ratings_file, tmp_path):
    prepare.main(command(ratings_file, tmp_path / "out"))
    data = open_prepared(tmp_path / "out")
    assert data.lists("train").signals == []
    assert data.lists("train")[0].signals == ()
    assert "signals" not in json.dumps(data.manifest)
    assert "test_lists" not in data.manifest["options"]


def test_records_with_signals_come_back(ratings_file, tmp_path):
    prepare.main(command(ratings_file, tmp_path / "out", "--signals", "average,count,hint,near", "--signal_folds", "3"))
    data = open_prepared(tmp_path / "out")
    lists = [data.lists("train")[i] for i in range(4)]
    lists[2] = replace(lists[2], hints=(), signals=lists[2].signals[:1])
    write_prepared(tmp_path / "copy", data.items, {"train": lists})
    found = open_prepared(tmp_path / "copy").lists("train")
    for one, other in zip(lists, found, strict=True):
        assert repr(one.signal("average")) == repr(other.signal("average"))
        assert repr(one.signal("count")) == repr(other.signal("count"))
        assert repr(one.signal("near")) == repr(other.signal("near"))
        assert repr(one.hints) == repr(other.hints)
    turned = lists[0].select([2, 0])
    for name in PREPARED:
        assert turned.signal(name).candidates == tuple(lists[0].signal(name).candidates[i] for i in (2, 0))
        assert turned.signal(name).history == lists[0].signal(name).history


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--signals", "average,fame"), "--signals average,fame: expected some of average, count, hint, near,"),
        (("--signals", ""), "--signals : expected some of"),
        (("--signals", "count,count"), "each once"),
        (("--signals", "count", "--signal_folds", "1"), "--signal_folds 1 is too small"),
        (("--test_lists", "0"), "--test_lists 0 is too small"),
    ],
)
def test_mistakes_are_named_before_anything_is_read(more, said, ratings_file, tmp_path):
    with pytest.raises(AlroFastError, match=said):
        prepare.main(command(ratings_file, tmp_path / "out", *more))
    assert not (tmp_path / "out").exists()


def test_one_user_has_nobody_to_learn_from(tmp_path):
    rows = [(0, i, 1 + i % 5, i) for i in range(40)]
    with pytest.raises(AlroFastError, match="--signal_folds 4 is more than the 1 users; lower it"):
        made(rows)


def test_a_split_without_lists_has_signals_of_none():
    """So many test lists that nothing is left to train on: said when lists are cut, and no mistake of the signals."""
    notes = []
    data = interactions(ROWS, ITEMS)
    options = replace(OPTIONS, test_lists=50)
    cut = build_lists(data, options, notice=notes.append)
    assert any(note.startswith("no train and no valid lists: users have too few ratings for") for note in notes)
    frames = add_signals(cut, data, ALL, options)
    assert [frames[split].height for split in ("train", "valid")] == [0, 0]
    assert frames["test"].height == cut.lists["test"].height > 0
