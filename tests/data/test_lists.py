"""The prepared folder: written whole, the same bytes again, read back as records."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import sys
from dataclasses import replace

import numpy as np
import polars as pl
import pytest

from alro_fast import __version__
from alro_fast.data import lists as module
from alro_fast.data.lists import (
    FILES,
    LIST_SCHEMA,
    SEEN_SCHEMA,
    SIGNAL_COLUMNS,
    TARGET_SCHEMA,
    check_output_folder,
    open_prepared,
    read_manifest,
    seen_frame,
    write_prepared,
)
from alro_fast.data.records import Item, RankingList
from alro_fast.errors import AlroFastError
from alro_fast.ranking.orders import unlabelled
from alro_fast.run_folder import contents

NAN = float("nan")
ITEMS = [Item(i, f"id-{i}", f"Film {i} <é>, The", "Drama" if i % 2 else "") for i in range(6)]


def ranking_list(name: str, user: str, history: dict[int, float], candidates: dict[int, float]) -> RankingList:
    return RankingList(
        name,
        user,
        tuple(ITEMS[i] for i in history),
        tuple(history.values()),
        tuple(ITEMS[i] for i in candidates),
        tuple(candidates.values()),
    )


LISTS = {
    "train": [
        ranking_list("u-1", "u", {0: 4.0}, {2: 1.0, 1: 5.0}),
        ranking_list("v-0", "v", {}, {0: 2.0, 3: 2.0, 5: NAN}),
    ],
    "test": [ranking_list("u-3", "u", {0: 4.0, 1: 5.0, 2: 1.0}, {4: 3.5, 5: NAN, 3: 0.5})],
}


def same(a: RankingList, b: RankingList) -> bool:
    return repr(a) == repr(b)  # NaN is not equal to itself


def test_records_come_back_as_they_went_in(tmp_path):
    write_prepared(tmp_path / "out", ITEMS, LISTS, {"dataset": "made", "seed": 3})
    data = open_prepared(tmp_path / "out")
    assert data.items == ITEMS
    for split, lists in LISTS.items():
        found = data.lists(split)
        assert len(found) == len(lists)
        assert all(same(a, b) for a, b in zip(found, lists))
        assert same(found[-1], lists[-1])
    assert len(data.lists("valid")) == 0
    assert data.manifest["dataset"] == "made"
    assert data.manifest["package_version"] == __version__
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(FILES)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_views(tmp_path):
    write_prepared(tmp_path, ITEMS, LISTS)
    train = open_prepared(tmp_path).lists("train")
    assert train.user_ids == ["u", "v"]
    assert train.all_equal.tolist() == [False, True]
    assert same(train[1:][0], LISTS["train"][1])
    assert len(train[5:]) == 0
    with pytest.raises(IndexError):
        train[2]


def test_train_statistics_leave_held_out_ratings_out(tmp_path):
    """u rated items 0, 1, 2 before the test list {4, 3}; v rated 0 and 3 and did not grade 5."""
    write_prepared(tmp_path, ITEMS, LISTS)
    data = open_prepared(tmp_path)
    assert data.train_count.dtype == np.int64
    assert data.train_mean.dtype == np.float64
    assert data.train_count.tolist() == [2, 1, 1, 1, 0, 0]
    assert data.train_mean[:4].tolist() == [3.0, 5.0, 1.0, 2.0]
    assert all(math.isnan(mean) for mean in data.train_mean[4:])


def test_same_bytes_again_and_over_itself(tmp_path):
    for name in ("a", "b", "a"):
        write_prepared(tmp_path / name, ITEMS, LISTS, {"seed": 0})
    for name in FILES:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError("no space left")

    monkeypatch.setattr(module.json, "dumps", full)
    with pytest.raises(OSError, match="no space"):
        write_prepared(tmp_path / "out", ITEMS, LISTS)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_replacement_cannot_be_opened(tmp_path, monkeypatch):
    write_prepared(tmp_path, ITEMS, LISTS)
    monkeypatch.setattr(module.shutil, "move", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write_prepared(tmp_path, ITEMS, LISTS)
    with pytest.raises(AlroFastError, match="not a prepared data folder"):
        open_prepared(tmp_path)


class Killed(BaseException):
    """Raised at a change to a file, and at every one after it, as nothing cleans up behind a kill."""

    changes, last, folder = 0, 0, ""

    @classmethod
    def hook(cls, event: str, given: tuple) -> None:
        known = event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree") or (
            event == "open" and isinstance(given[2], int) and given[2] & os.O_CREAT
        )
        if cls.last and known and str(given[0]).startswith(cls.folder):
            cls.changes += 1
            if cls.changes >= cls.last:
                raise cls


def test_a_replacement_that_is_killed_anywhere_is_made_anew(tmp_path):
    """Without a list of both; and what is left beside the folder is in nobody's way."""
    fewer = {"train": LISTS["train"]}
    write_prepared(tmp_path / "new", ITEMS, LISTS)
    expected = {path.name: path.read_bytes() for path in (tmp_path / "new").iterdir()}
    sys.addaudithook(Killed.hook)
    for number in range(1, 99):
        out = tmp_path / str(number) / "data"
        write_prepared(out, ITEMS, fewer)
        Killed.changes, Killed.last, Killed.folder = 0, number, str(out.parent)
        try:
            write_prepared(out, ITEMS, LISTS)
            break
        except Killed:
            pass
        finally:
            Killed.last = 0
        if read_manifest(out) is not None:
            assert len(open_prepared(out).lists("test")) in (0, 1)
        write_prepared(out, ITEMS, LISTS)
        assert {name: (out / name).read_bytes() for name in contents(out)} == expected
        assert contents(out.parent) == {"data"}
    assert number > 12


def test_folder_with_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(AlroFastError, match=r"holds something else \(thesis\.tex\)"):
        write_prepared(tmp_path, ITEMS, LISTS)
    write_prepared(tmp_path / "out", ITEMS, LISTS)
    (tmp_path / "out" / "notes.txt").touch()
    with pytest.raises(AlroFastError, match=r"holds something else \(notes\.txt\)"):
        write_prepared(tmp_path / "out", ITEMS, LISTS)
    with pytest.raises(AlroFastError, match="is a file"):
        check_output_folder(tmp_path / "thesis.tex")


@pytest.mark.parametrize("manifest", ["{}", "[1]", "no json", '{"format": "another"}'])
def test_files_of_our_names_without_our_manifest_are_refused(tmp_path, manifest):
    (tmp_path / "manifest.json").write_text(manifest)
    with pytest.raises(AlroFastError, match="something else"):
        check_output_folder(tmp_path)
    with pytest.raises(AlroFastError, match=r"not a prepared data folder; make one with: python -m alro_fast\.prepare"):
        open_prepared(tmp_path)


def test_opening_what_is_not_there_or_not_whole(tmp_path):
    with pytest.raises(AlroFastError, match="not a prepared data folder"):
        open_prepared(tmp_path / "nowhere")
    write_prepared(tmp_path, ITEMS, LISTS)
    with pytest.raises(AlroFastError, match="unknown split 'dev'; expected one of train, valid, test"):
        open_prepared(tmp_path).lists("dev")
    (tmp_path / "lists-test.parquet").unlink()
    with pytest.raises(AlroFastError, match=r"lacks lists-test\.parquet"):
        open_prepared(tmp_path).lists("test")
    (tmp_path / "lists-train.parquet").write_bytes((tmp_path / "lists-valid.parquet").read_bytes())
    with pytest.raises(AlroFastError, match=r"lists-train\.parquet is not the file its manifest"):
        open_prepared(tmp_path).lists("train")
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | {"format_version": 99}))
    with pytest.raises(AlroFastError, match="format version 99; this package reads 1"):
        open_prepared(tmp_path)


def test_wrong_columns_under_a_matching_hash(tmp_path):
    frame = pl.DataFrame({"item_id": ["a"]})
    write_prepared(tmp_path, frame, {})
    with pytest.raises(AlroFastError, match=r"has columns \['item_id'\]; expected"):
        open_prepared(tmp_path)


def rewrite(folder, name, frame):
    """Another file under a manifest that says it belongs there."""
    frame.write_parquet(folder / name)
    manifest = json.loads((folder / "manifest.json").read_text())
    digest = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    manifest["files"][name] = {"rows": frame.height, "sha256": digest}
    (folder / "manifest.json").write_text(json.dumps(manifest))


GOOD = {"list_id": "x", "user_id": "u", "history": [0], "history_ratings": [4.0], "candidates": [2, 1],
        "ratings": [1.0, None], "all_equal": True, "first_time": 1, "last_time": 2}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"candidates": [2, 99]}, "list 'x' has an item in its candidates that is none of the 6 of items.parquet"),
        ({"history": [6]}, "list 'x' has an item in its history that is none of the 6"),
        ({"history": [None]}, "list 'x' has an item in its history that is none of the 6"),
        ({"candidates": [2, 2]}, "list 'x' names a candidate twice"),
        ({"candidates": [], "ratings": []}, "list 'x' has no candidates"),
        ({"candidates": None, "ratings": None}, "list 'x' has no candidates"),
        ({"ratings": [1.0]}, "list 'x' has ratings of another length than its candidates"),
        ({"ratings": None}, "list 'x' has ratings of another length than its candidates"),
        ({"history_ratings": [4.0, 4.0]}, "list 'x' has history_ratings of another length than its history"),
        ({"ratings": [-1.0, 2.0]}, "list 'x' has a negative rating among its ratings"),
        ({"history_ratings": [-0.5]}, "list 'x' has a negative rating among its history_ratings"),
        ({"ratings": [101.0, 2.0]}, "list 'x' has a rating among its ratings that is infinite or above 100"),
        ({"history_ratings": [math.inf]}, "list 'x' has a rating among its history_ratings that is infinite"),
        ({"user_id": None}, "list 'x' has no name, no user or no all_equal"),
        ({"hints": [1.0]}, "list 'x' has hints of another length than its candidates"),
        ({"history_average": [1.0, 2.0]}, "list 'x' has history_average of another length than its history"),
    ],
)
def test_impossible_values_are_found_when_the_folder_is_opened(tmp_path, change, said):
    """In a split that nobody has asked for yet; and refused when they are written."""
    schema = LIST_SCHEMA | {name: SIGNAL_COLUMNS[name] for name in change if name in SIGNAL_COLUMNS}
    frame = pl.DataFrame([GOOD, GOOD | change], schema=schema, strict=False)
    if "hints" in change or "history_average" in change:  # a list may do without
        assert frame.select(list(schema)[-1]).to_series().null_count() == 1
    write_prepared(tmp_path / "lists", ITEMS, LISTS)
    open_prepared(tmp_path / "lists")
    rewrite(tmp_path / "lists", "lists-test.parquet", frame)
    with pytest.raises(AlroFastError, match=re.escape(f"lists-test.parquet: {said}")):
        open_prepared(tmp_path / "lists")
    with pytest.raises(AlroFastError, match=re.escape(said.split("'x'")[1]) if "above" not in said else "100"):
        write_prepared(tmp_path / "again", ITEMS, {"test": frame})
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize(
    ("column", "values", "said"),
    [
        ("title", [None], "an item without an id, a title or a category"),
        ("item_id", ["id-1"], "an item_id twice"),
        ("train_count", [-1], "a train_count that is missing or negative"),
        ("train_mean", [math.nan], "a train_mean that is negative or no number"),
    ],
)
def test_impossible_items_are_found_too(tmp_path, column, values, said):
    write_prepared(tmp_path, ITEMS, LISTS)
    frame = pl.read_parquet(tmp_path / "items.parquet")
    cells = [*values, *frame[column].to_list()[1:]]
    rewrite(tmp_path, "items.parquet", frame.with_columns(pl.Series(column, cells, dtype=frame.schema[column])))
    with pytest.raises(AlroFastError, match=said):
        open_prepared(tmp_path)


def test_files_that_nobody_asked_for_yet_are_compared_with_the_manifest(tmp_path):
    write_prepared(tmp_path, ITEMS, LISTS, seen=seen_frame(np.array([0]), np.array([4]), pl.Series(["u"])))
    open_prepared(tmp_path)
    seen = pl.DataFrame({"user_id": ["u"], "items": [[7]]}, schema=SEEN_SCHEMA)
    rewrite(tmp_path, "seen.parquet", seen)
    with pytest.raises(AlroFastError, match="names item 7, none of the 6"):
        open_prepared(tmp_path)
    write_prepared(tmp_path, ITEMS, LISTS, seen=seen_frame(np.array([0]), np.array([4]), pl.Series(["u"])))
    for name in ("lists-valid.parquet", "seen.parquet"):
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[:-1])
        with pytest.raises(AlroFastError, match=f"{name} is not the file its manifest.json speaks of"):
            open_prepared(tmp_path)
        (tmp_path / name).write_bytes(whole)
    (tmp_path / "manifest.json").write_text(json.dumps({"format": "alro_fast ranking lists", "format_version": 1}))
    with pytest.raises(AlroFastError, match=r"manifest.json is damaged: it names no files"):
        open_prepared(tmp_path)


def test_arguments_are_checked(tmp_path):
    with pytest.raises(AlroFastError, match=r"unknown splits \['dev'\]"):
        write_prepared(tmp_path, ITEMS, {"dev": []})
    with pytest.raises(AlroFastError, match="item 'id-1' has index 1 at position 0"):
        write_prepared(tmp_path, ITEMS[1:], LISTS)
    with pytest.raises(AlroFastError, match="list frame has columns"):
        write_prepared(tmp_path, ITEMS, {"train": pl.DataFrame({"list_id": ["a"]})})
    assert list(tmp_path.iterdir()) == []


def test_frames_are_written_as_given(tmp_path):
    frame = pl.DataFrame(
        [("u-1", "u", [0], [4.0], [2, 1], [1.0, None], True, 10, 20)], schema=LIST_SCHEMA, orient="row"
    )
    write_prepared(tmp_path, ITEMS, {"valid": frame})
    data = open_prepared(tmp_path)
    assert same(data.lists("valid")[0], ranking_list("u-1", "u", {0: 4.0}, {2: 1.0, 1: NAN}))
    assert pl.read_parquet(tmp_path / "lists-valid.parquet").equals(frame)


HINTED = [
    replace(LISTS["train"][0], hints=(2.5, NAN)),
    replace(LISTS["train"][1], hints=()),
    replace(LISTS["test"][0], hints=(0.25, 1.0, 4.0)),
]


def test_hints_come_back_and_leave_other_folders_alone(tmp_path):
    write_prepared(tmp_path / "plain", ITEMS, LISTS)
    write_prepared(tmp_path / "hinted", ITEMS, LISTS | {"train": HINTED})
    found = open_prepared(tmp_path / "hinted").lists("train")
    assert all(same(a, b) for a, b in zip(found, HINTED, strict=True))
    assert same(found[1:][1], HINTED[2])
    assert pl.read_parquet(tmp_path / "hinted" / "lists-train.parquet").schema == LIST_SCHEMA | {
        "hints": pl.List(pl.Float32)
    }
    for split in ("train", "test"):
        assert pl.read_parquet(tmp_path / "plain" / f"lists-{split}.parquet").schema == LIST_SCHEMA
    names = ("items.parquet", "lists-test.parquet")
    assert all((tmp_path / "plain" / n).read_bytes() == (tmp_path / "hinted" / n).read_bytes() for n in names)


def test_select_takes_ratings_and_hints_along():
    chosen = HINTED[2].select([2, 0])
    assert same(
        chosen, replace(ranking_list("u-3", "u", {0: 4.0, 1: 5.0, 2: 1.0}, {3: 0.5, 4: 3.5}), hints=(4.0, 0.25))
    )
    assert HINTED[1].select([1]).hints == ()
    assert unlabelled(HINTED[2]).hints == HINTED[2].hints


TARGETS = pl.DataFrame([("test", "u", 4, 1), ("test", "v", 5, None)], schema=TARGET_SCHEMA, orient="row")


def test_targets_come_back_and_leave_with_the_folder_they_were_written_to(tmp_path):
    out = tmp_path / "out"
    write_prepared(out, ITEMS, LISTS, targets=TARGETS)
    assert open_prepared(out).targets.equals(TARGETS)
    (out / "sampling.png").touch()
    write_prepared(out, ITEMS, LISTS)
    assert open_prepared(out).targets is None
    assert sorted(p.name for p in out.iterdir()) == sorted(FILES)
    write_prepared(out, ITEMS, LISTS, targets=TARGETS)
    TARGETS[:1].write_parquet(out / "targets.parquet")
    with pytest.raises(AlroFastError, match=r"targets\.parquet is not the file its manifest"):
        open_prepared(out)


def test_a_scale_whose_gains_overflow_is_refused(tmp_path):
    lists = [ranking_list("a", "u", {0: 3.0}, {1: 100.0, 2: 200.0})]
    with pytest.raises(AlroFastError, match=r"ratings reach 200, and gains are 2\^rating - 1"):
        write_prepared(tmp_path / "out", ITEMS, {"train": lists}, {})
    assert not (tmp_path / "out").exists()
