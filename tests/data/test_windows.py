"""Cutting of lists: the leak rule on random data, the tie rule, the split, negatives."""

from __future__ import annotations

import hashlib
from collections import defaultdict

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alro_fast.data import windows
from alro_fast.data.lists import SPLITS
from alro_fast.data.seeds import hash_ids
from alro_fast.data.sources.interactions import Interactions
from alro_fast.data.windows import ListOptions, build_lists, chronological, plan_windows
from alro_fast.errors import AlroFastError


def silent(_: str) -> None:
    pass


def interactions(rows: list[tuple[int, int, float, int]], users: int, items: int) -> Interactions:
    """Rows of (user, item, rating, time) by code; user u is called "u<u>", item i "i<i>"."""
    user, item, rating, time = (np.array(column) for column in zip(*rows))
    names = pl.Series([f"i{i}" for i in range(items)])
    return Interactions(
        user=user.astype(np.uint32),
        item=item.astype(np.uint32),
        rating=rating.astype(np.float32),
        time=time.astype(np.int64),
        user_ids=pl.Series("user_id", [f"u{u}" for u in range(users)]),
        items=pl.DataFrame({"item_id": names, "title": names, "category": pl.Series([""] * items, dtype=pl.String)}),
        sources=(),
        time_unit="s",
        counts={},
    )


def random_rows(rng: np.random.Generator, users: int, items: int, span: int) -> list[tuple[int, int, float, int]]:
    """Users of very different activity; few distinct times, so that many are equal; rows in no order."""
    rows = []
    for user in range(users):
        for item in rng.permutation(items)[: rng.integers(1, items + 1)]:
            rows.append((user, int(item), float(rng.integers(1, 6)), int(rng.integers(0, span))))
    return [rows[k] for k in rng.permutation(len(rows))]


def records(built) -> dict[str, list[dict]]:
    return {split: built.lists[split].rows(named=True) for split in SPLITS}


options_strategy = st.builds(
    ListOptions,
    history_length=st.integers(1, 6),
    list_size=st.integers(2, 5),
    min_history=st.integers(1, 4),
    train_stride=st.none() | st.integers(1, 7),
    max_train_lists_per_user=st.none() | st.integers(1, 3),
    test_lists=st.sampled_from([1, 1, 2, 3]),
    negatives=st.integers(0, 3),
    negatives_by=st.sampled_from(["uniform", "popularity"]),
    seed=st.integers(0, 2**40),
)


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    users=st.integers(1, 6),
    items=st.integers(20, 40),
    span=st.sampled_from([1, 4, 1000]),
    options=options_strategy,
)
def test_no_leak_on_random_ratings(seed, users, items, span, options):
    rows = random_rows(np.random.default_rng(seed), users, items, span)
    for own in (1, 2):  # users with items that nobody else rates: room for negatives
        rows += [(users + own - 1, i, 3.0, i) for i in range(own * items, (own + 1) * items)]
    users, items = users + 2, 3 * items
    if max(np.bincount([u for u, *_ in rows])) < options.list_size + options.min_history:
        with pytest.raises(AlroFastError, match="no user has"):
            build_lists(interactions(rows, users, items), options, notice=silent)
        return
    built = build_lists(interactions(rows, users, items), options, notice=silent)
    rated = {(f"u{u}", i): (r, t) for u, i, r, t in rows}
    by_user: dict[str, dict[str, list[dict]]] = defaultdict(lambda: {split: [] for split in SPLITS})
    for split, lists in records(built).items():
        for one in lists:
            by_user[one["user_id"]][split].append(one)
            check_list(one, rated, options)
    for user, lists in by_user.items():
        check_user(user, lists, rated, options)
    check_statistics(built, rated)
    check_counts(built, rows, rated, options)


def graded(one: dict) -> list[int]:
    return [i for i, r in zip(one["candidates"], one["ratings"]) if r is not None]


def check_list(one: dict, rated: dict, options: ListOptions) -> None:
    user = one["user_id"]
    candidates, unrated = graded(one), [i for i, r in zip(one["candidates"], one["ratings"]) if r is None]
    assert len(candidates) == options.list_size
    assert len(unrated) == options.negatives
    assert len(set(one["candidates"])) == len(one["candidates"])
    assert not any((user, i) in rated for i in unrated)
    for i, r in zip(one["candidates"] + one["history"], one["ratings"] + one["history_ratings"]):
        assert r is None or r == rated[user, i][0]
    due = [rated[user, i][1] for i in candidates]
    past = [rated[user, i][1] for i in one["history"]]
    assert 1 <= len(past) <= options.history_length
    assert past == sorted(past)
    assert max(past) <= min(due)
    assert (one["first_time"], one["last_time"]) == (min(due), max(due))
    assert not set(one["history"]) & set(one["candidates"])
    assert one["all_equal"] == (len({r for r in one["ratings"] if r is not None}) == 1)


def check_user(user: str, lists: dict[str, list[dict]], rated: dict, options: ListOptions) -> None:
    """Held-out items are in nothing that comes before they are due, and the windows are where they should be."""
    of_user = {i: t for (u, i), (_, t) in rated.items() if u == user}
    size, least = options.list_size, options.min_history
    many = options.test_lists
    assert len(lists["test"]) == sum(len(of_user) >= nth * size + least for nth in range(1, many + 1))
    assert len(lists["valid"]) == (len(of_user) >= (many + 1) * size + least)
    in_order = [*lists["train"], *lists["valid"], *lists["test"]]
    positions = [int(one["list_id"].rsplit("-", 1)[1]) for one in in_order]
    assert [one["list_id"].rsplit("-", 1)[0] for one in in_order] == [user] * len(in_order)
    assert positions == sorted(set(positions))
    for later, one in enumerate(in_order):
        for earlier in in_order[:later]:
            due_later = set(graded(one)) - set(graded(earlier)) if one in lists["train"] else set(graded(one))
            assert not due_later & set(graded(earlier))
            assert not due_later & set(earlier["history"])
            if one in lists["train"]:
                assert not set(graded(one)) & set(earlier["history"])
    if lists["test"]:
        last = set(graded(lists["test"][-1]))
        rest = [t for i, t in of_user.items() if i not in last]
        assert max(rest) <= min(of_user[i] for i in last)
        assert positions[-1] == len(of_user) - size
    stride = options.train_stride or size
    starts = []
    start = len(of_user) - (options.test_lists + 2) * size
    while start >= least and (
        options.max_train_lists_per_user is None or len(starts) < options.max_train_lists_per_user
    ):
        starts.insert(0, start)
        start -= stride
    assert positions[: len(lists["train"])] == starts
    for position, one in zip(positions, in_order):
        assert len(one["history"]) == min(position, options.history_length)


def check_statistics(built, rated: dict) -> None:
    held_out = {
        (one["user_id"], i) for split in ("valid", "test") for one in records(built)[split] for i in graded(one)
    }
    kept = defaultdict(list)
    for (user, item), (rating, _) in rated.items():
        if (user, item) not in held_out:
            kept[item].append(rating)
    for item, row in enumerate(built.items.rows(named=True)):
        assert row["train_count"] == len(kept[item])
        assert row["train_mean"] == (pytest.approx(np.mean(kept[item])) if kept[item] else None)


def check_counts(built, rows: list, rated: dict, options: ListOptions) -> None:
    many = np.bincount([u for u, *_ in rows])
    assert built.counts["users_skipped"] == (many < options.list_size + options.min_history).sum()
    times = [(u, t) for u, _, _, t in rows]
    assert built.counts["ratings_sharing_a_timestamp"] == sum(times.count(x) > 1 for x in times)
    for split, lists in records(built).items():
        assert built.counts["lists"][split] == len(lists)
        assert built.counts["lists_all_equal"][split] == sum(one["all_equal"] for one in lists)
        tied = sum(rated[one["user_id"], one["history"][-1]][1] == one["first_time"] for one in lists)
        assert built.counts["lists_with_a_tie_at_their_start"][split] == tied


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), options=options_strategy)
def test_row_order_and_chunking_change_nothing(seed, options):
    rng = np.random.default_rng(seed)
    rows = random_rows(rng, 5, 30, 3)
    for own in (1, 2):  # as above, all at one time
        rows += [(4 + own, i, 3.0, 7) for i in range(own * 30, (own + 1) * 30)]
    found = []
    for chunk in (1 << 16, 3):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(windows, "SORT_ROWS", chunk)
            patch.setattr(windows, "CHUNK_LISTS", chunk)
            found.append(build_lists(interactions(rows, 7, 90), options, notice=silent))
        rows = [rows[k] for k in rng.permutation(len(rows))]
    for split in SPLITS:
        assert found[0].lists[split].equals(found[1].lists[split])
    columns = ["item_id", "train_count"]
    assert found[0].items[columns].equals(found[1].items[columns])


def test_tie_rule_is_the_stated_hash():
    def key(seed: int, user: str, item: str) -> int:
        def blake(text):
            return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")

        def mix(x):
            x = (x + 0x9E3779B97F4A7C15) % 2**64
            x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
            x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
            return x ^ (x >> 31)

        return mix(mix((seed + blake(user)) % 2**64) ^ blake(item))

    data = interactions([(u, i, 1.0, 9 - i // 10) for u in (1, 0) for i in range(20)], 2, 20)
    orders = []
    for seed in (0, 3):
        args = hash_ids(data.user_ids), hash_ids(data.items["item_id"]), seed
        timeline, unsorted_users = chronological(data, *args)
        assert unsorted_users == 2
        for u in range(2):
            found = timeline.item[timeline.offsets[u] : timeline.offsets[u + 1]].tolist()
            late, early = range(10), range(10, 20)
            expected = [sorted(part, key=lambda i: key(seed, f"u{u}", f"i{i}")) for part in (early, late)]
            assert found == expected[0] + expected[1]
            orders.append(tuple(found))
    assert len(set(orders)) == 4  # other users and other seeds order ties in other ways


def test_presented_order_tells_nothing_of_time():
    """Over many lists every chronological place is presented first about equally often."""
    rng = np.random.default_rng(0)
    rows = [(u, int(i), 3.0, t) for u in range(400) for t, i in enumerate(rng.permutation(60)[:40])]
    built = build_lists(interactions(rows, 400, 60), ListOptions(list_size=5), notice=silent)
    time = {(f"u{u}", i): t for u, i, _, t in rows}
    first = np.zeros(5)
    for one in records(built)["train"]:
        times = [time[one["user_id"], i] for i in one["candidates"]]
        first[sorted(times).index(times[0])] += 1
    share = first / first.sum()
    assert abs(share - 0.2).max() < 5 * np.sqrt(0.2 * 0.8 / first.sum())


def test_presented_order_depends_on_the_seed():
    rows = [(0, i, 3.0, i) for i in range(40)]
    a, b = (build_lists(interactions(rows, 1, 40), ListOptions(seed=s), notice=silent).lists["train"] for s in (0, 1))
    assert a["candidates"].to_list() != b["candidates"].to_list()
    assert a["candidates"].list.sort().to_list() == b["candidates"].list.sort().to_list()


def test_negatives_by_popularity_follow_the_counts():
    """Items 0-9 are rated by all but the last users, items 10-19 by one in ten."""
    rng = np.random.default_rng(1)
    rows = []
    for user in range(300):
        common = list(range(10)) if user < 200 else []
        rare = [i for i in range(10, 20) if rng.random() < 0.1]
        own = list(range(20, 34))
        rows += [(user, i, 3.0, t) for t, i in enumerate(common + rare + own)]
    shares = {}
    for how in ("uniform", "popularity"):
        options = ListOptions(list_size=4, min_history=2, negatives=1, negatives_by=how)
        built = build_lists(interactions(rows, 300, 34), options, notice=silent)
        lists = [one for split in SPLITS for one in records(built)[split] if int(one["user_id"][1:]) >= 200]
        drawn = np.array([i for one in lists for i, r in zip(one["candidates"], one["ratings"]) if r is None])
        counts = built.items["train_count"].to_numpy()
        shares[how] = (drawn < 10).mean(), counts[:10].sum() / counts[:20].sum()
    assert shares["popularity"][0] == pytest.approx(shares["popularity"][1], abs=0.08)
    assert shares["uniform"][0] == pytest.approx(0.53, abs=0.12)


def test_negatives_when_nearly_everything_is_rated():
    """One eligible item is left to user 0: hashing must find it, or the list is filled from what is left."""
    rows = [(0, i, 3.0, i) for i in range(200)] + [(1, i, 3.0, 200 - i) for i in range(150, 201)]
    data = interactions(rows, 2, 201)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(windows, "MAX_DRAWS", 1)
        built = build_lists(data, ListOptions(negatives=1, min_history=1), notice=silent)
    for split in SPLITS:
        for one in records(built)[split]:
            unrated = [i for i, r in zip(one["candidates"], one["ratings"]) if r is None]
            assert unrated == [200] if one["user_id"] == "u0" else unrated[0] < 150


def test_negatives_as_zero_give_clicks_something_to_rank():
    """All ratings are one: without grades for negatives there is nothing to rank; with them everything is as before."""
    rng = np.random.default_rng(2)
    rows = [(u, int(i), 1.0, t) for u in range(20) for t, i in enumerate(rng.permutation(90)[:30])]
    data, cut = interactions(rows, 20, 90), {"list_size": 3, "min_history": 2, "negatives": 4, "seed": 1}
    plain, zero = (
        records(build_lists(data, ListOptions(**cut, ungraded=how), notice=silent)) for how in ("unrated", "as_zero")
    )
    for split in SPLITS:
        assert len(plain[split]) == len(zero[split]) > 0
        for one, other in zip(plain[split], zero[split], strict=True):
            assert one["candidates"] == other["candidates"]
            assert [rating or 0.0 for rating in one["ratings"]] == other["ratings"]
            assert sorted(other["ratings"]) == [0.0] * 4 + [1.0] * 3
            assert (one["all_equal"], other["all_equal"]) == (True, False)
    single = ListOptions(list_size=1, negatives=4, ungraded="as_zero")
    assert all(sum(one["ratings"]) == 1 for one in records(build_lists(data, single, notice=silent))["test"])
    assert "ungraded" not in ListOptions(negatives=4).recorded
    assert single.recorded["ungraded"] == "as_zero"


def test_too_many_negatives():
    rows = [(0, i, 3.0, i) for i in range(40)]
    with pytest.raises(AlroFastError, match="--negatives 1 is too many"):
        build_lists(interactions(rows, 1, 60), ListOptions(negatives=1), notice=silent)


def test_users_with_too_few_ratings_are_skipped_counted_and_told():
    rows = [(0, i, 3.0, i) for i in range(14)] + [(1, i, 3.0, i) for i in range(15)]
    notes = []
    built = build_lists(interactions(rows, 2, 20), ListOptions(), notice=notes.append)
    assert notes[:-1] == ["1 of 2 users skipped: fewer than 15 ratings"]
    assert notes[-1].startswith("no train and no valid lists: users have too few ratings for --list_size 10")
    assert built.counts["users_skipped"] == 1
    assert built.lists["test"]["user_id"].to_list() == ["u1"]
    with pytest.raises(AlroFastError, match=r"no user has 15 ratings .*the most is 14"):
        build_lists(interactions(rows[:14], 1, 20), ListOptions(), notice=silent)


def test_unsorted_times_are_sorted_with_a_notice():
    rows = [(0, i, 3.0, 20 - i) for i in range(20)] + [(1, i, 3.0, i) for i in range(20)]
    notes = []
    built = build_lists(interactions(rows, 2, 20), ListOptions(), notice=notes.append)
    assert notes[:-1] == ["ratings of 1 users were not in time order: sorted"]
    assert built.lists["test"]["history"].to_list() == [list(range(19, 9, -1)), list(range(10))]


def test_windows_of_a_user_with_47_ratings():
    found = plan_windows(np.array([47]), ListOptions(train_stride=4, list_size=10, min_history=5))
    assert {split: starts.tolist() for split, (_, starts) in found.items()} == {
        "test": [37],
        "valid": [27],
        "train": [5, 9, 13, 17],
    }


BAD_OPTIONS = [
    ({"list_size": 1}, "--list_size 1 is too small; at least 2"),
    ({"list_size": 1, "negatives": 3}, "--list_size 1 is too small; at least 2"),
    ({"ungraded": "zero"}, "--ungraded 'zero'; expected one of unrated, as_zero"),
    ({"history_length": 0}, "--history_length 0"),
    ({"min_history": 0}, "--min_history 0"),
    ({"train_stride": 0}, "--train_stride 0"),
    ({"max_train_lists_per_user": 0}, "--max_train_lists_per_user 0"),
    ({"negatives": -1}, "--negatives -1"),
    ({"seed": -1}, "--seed -1"),
    ({"negatives_by": "luck"}, "--negatives_by 'luck'"),
]


@pytest.mark.parametrize("options, message", BAD_OPTIONS)
def test_bad_options(options, message):
    with pytest.raises(AlroFastError) as error:
        ListOptions(**options)
    assert message in str(error.value)


def test_several_test_lists_are_said_in_the_rule_and_one_leaves_the_manifest_alone():
    assert ListOptions().split_rule == windows.SPLIT_RULE
    assert "test_lists" not in ListOptions().recorded
    several = ListOptions(test_lists=3)
    assert "the last 3 x list_size ratings are 3 test lists one after the other" in several.split_rule
    assert several.recorded["test_lists"] == 3
