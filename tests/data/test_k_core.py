"""The k-core against a brute force on random graphs of users and items, and what prepare and first_stage do with it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from made_ratings import interactions

from alro_fast import first_stage, prepare
from alro_fast.data.lists import FILES, open_prepared
from alro_fast.data.sources.k_core import core_rows, k_core
from alro_fast.errors import AlroFastError


def brute_force(pairs: set[tuple[int, int]], k: int) -> set[tuple[int, int]]:
    """One user or item with too few ratings is taken out, then the next is looked for."""
    while True:
        for place in (0, 1):
            for code in {pair[place] for pair in pairs}:
                mine = {pair for pair in pairs if pair[place] == code}
                if len(mine) < k:
                    pairs = pairs - mine
                    break
            else:
                continue
            break
        else:
            return pairs


@pytest.mark.parametrize("seed", range(30))
def test_random_graphs(seed):
    generator = np.random.default_rng(seed)
    users, items = generator.integers(1, 12, size=2)
    share = generator.random()
    pairs = [(u, i) for u in range(users) for i in range(items) if generator.random() < share] or [(0, 0)]
    generator.shuffle(pairs)
    user, item = np.array(pairs).T
    for k in range(1, 6):
        kept = core_rows(user, item, k)
        assert {tuple(pair) for pair in np.array(pairs)[kept].tolist()} == brute_force({(u, i) for u, i in pairs}, k)


def chain(length: int) -> list[tuple[int, int, int, int]]:
    """u0 - i0 - u1 - i1 - ...: both ends are peeled until nothing is left of it; and a square that stays."""
    rows = [(n, n, 4, n) for n in range(length)] + [(n + 1, n, 3, n) for n in range(length - 1)]
    return rows + [(u, i, 5, 9) for u in (length, length + 1) for i in (length, length + 1)]


def test_rows_users_and_items_keep_their_order_and_are_counted():
    data = interactions(chain(6), 9)
    core = k_core(data, 2)
    assert core.user.tolist() == [0, 0, 1, 1]
    assert core.item.tolist() == [0, 1, 0, 1]
    assert (core.user.dtype, core.item.dtype, core.rating.dtype) == (np.uint32, np.uint32, np.float32)
    assert core.rating.tolist() == [5, 5, 5, 5]
    assert core.time.tolist() == [9, 9, 9, 9]
    assert core.user_ids.to_list() == ["u6", "u7"]
    assert core.items["item_id"].to_list() == ["i6", "i7"]
    assert core.counts["k_core"] == {
        "before": {"users": 8, "items": 8, "ratings": 15},
        "after": {"users": 2, "items": 2, "ratings": 4},
    }
    assert core.counts["ratings"] == 15


def test_when_nothing_remains_the_line_says_what_did():
    with pytest.raises(AlroFastError) as raised:
        k_core(interactions(chain(6), 8), 40)
    assert str(raised.value) == (
        "--k_core 40 leaves nothing of 15 ratings; "
        "--k_core 2 is the last that leaves anything: 2 users, 2 items, 4 ratings"
    )
    with pytest.raises(AlroFastError, match="--k_core 2 leaves nothing of 2 ratings; nor does any other"):
        k_core(interactions([(0, 0, 4, 1), (0, 1, 4, 2)], 2), 2)


@pytest.fixture
def ratings(tmp_path) -> Path:
    """Twelve users who rated thirty items each, and forty users with one rating of an item of their own."""
    rows = [f"{u},{i},{(u * i) % 5 + 1},{100 + i}" for u in range(12) for i in range(30)]
    rows += [f"{u},{1000 + u},5,7" for u in range(100, 140)]
    path = tmp_path / "r.csv"
    path.write_text("\n".join(["user_id,item_id,rating,timestamp", *rows]))
    return path


def words(ratings: Path, out: Path, *more: str) -> list[str]:
    return ["--dataset", "csv", "--ratings_file", str(ratings), "--output_dir", str(out), *more]


def test_prepare_takes_the_core_and_says_so(ratings, tmp_path, capsys):
    prepare.main(words(ratings, tmp_path / "core", "--k_core", "10"))
    assert "took the 10-core: 12 users, 30 items, 360 ratings" in capsys.readouterr().out
    data = open_prepared(tmp_path / "core")
    assert data.manifest["counts"]["k_core"]["before"] == {"users": 52, "items": 70, "ratings": 400}
    assert data.manifest["options"]["k_core"] == 10
    assert "again and again" in data.manifest["core_rule"]
    assert (len(data.items), len(data.lists("test"))) == (30, 12)
    prepare.main(words(ratings, tmp_path / "all"))
    manifest = json.loads((tmp_path / "all" / "manifest.json").read_text())
    assert "k_core" not in json.dumps(manifest)
    with pytest.raises(AlroFastError, match="with other options"):
        prepare.main(words(ratings, tmp_path / "core"))


def test_a_file_of_the_core_alone_gives_the_same_lists(ratings, tmp_path):
    prepare.main(words(ratings, tmp_path / "core", "--k_core", "10"))
    lines = ratings.read_text().splitlines()
    ratings.write_text("\n".join([lines[0], *(line for line in lines[1:] if int(line.split(",")[0]) < 100)]))
    prepare.main(words(ratings, tmp_path / "alone"))
    for name in FILES:
        if name.endswith(".parquet"):
            assert pl.read_parquet(tmp_path / "core" / name).equals(pl.read_parquet(tmp_path / "alone" / name))


def test_first_stage_takes_it_too(ratings, tmp_path):
    pytest.importorskip("implicit")
    more = ["--retriever", "popularity", "--num_samples", "20", "--k_core", "12"]
    first_stage.main(words(ratings, tmp_path / "core", *more))
    manifest = open_prepared(tmp_path / "core").manifest
    assert manifest["counts"]["k_core"]["after"] == {"users": 12, "items": 30, "ratings": 360}
    assert manifest["core_rule"]


@pytest.mark.parametrize("k", ["1", "0", "-3"])
def test_a_core_of_one_is_no_filter(ratings, tmp_path, k):
    with pytest.raises(AlroFastError, match=f"--k_core {k} is too small; at least 2 is needed"):
        prepare.main(words(ratings, tmp_path / "out", "--k_core", k))


def test_the_five_core_of_ml_latest_small_is_its_own_five_core(shared_data):
    from alro_fast.data.sources.interactions import read_interactions

    data = read_interactions("ml-latest-small", shared_data / "ml-latest-small")
    core = k_core(data, 5)
    assert np.bincount(core.user).min() >= 5
    assert np.bincount(core.item).min() >= 5
    assert core_rows(core.user, core.item, 5).all()
    assert core.items.height == len(np.unique(core.item))
    assert core.counts["k_core"]["before"]["ratings"] == 100_836
