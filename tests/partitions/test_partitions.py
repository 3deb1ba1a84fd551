"""Lists in partitions: the same as of all users at once, whatever their number and however often the run was ended."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from alro_fast import prepare
from alro_fast.data.lists import SPLITS, open_prepared
from alro_fast.data.partitions import build, work
from alro_fast.errors import AlroFastError

USERS, ITEMS, PARTS = 300, 120, 7


def write_parts(folder: Path, rows: int = 9000, seed: int = 0, doubled: bool = False) -> Path:
    """Ratings in several Parquet files, of any order of users and times; some items rated twice by a user."""
    draw = np.random.default_rng(seed)
    user, item = draw.integers(0, USERS, rows), np.minimum(draw.zipf(1.3, rows) * 7 % ITEMS, ITEMS - 1)
    table = pl.DataFrame(
        {
            "user_id": user,
            "item_id": [f"i{one}" for one in item],
            "rating": draw.integers(1, 11, rows) / 2,
            "timestamp": draw.permutation(rows) // 2,
        }
    ).unique(["user_id", "item_id", "timestamp"], maintain_order=True)
    if doubled:
        table = pl.concat([table, table.sample(20, seed=1)])
    for name in ("_SUCCESS", "read.me"):
        (folder / name).write_text("")
    for part, lines in enumerate(np.array_split(np.arange(table.height), PARTS)):
        table[lines].write_parquet(folder / f"part-{part:03}.parquet")
    titles = pl.DataFrame({"item_id": [f"i{i}" for i in range(ITEMS)], "title": [f"Film {i}" for i in range(ITEMS)]})
    titles.with_columns(pl.when(pl.int_range(ITEMS) % 10 > 0).then("title").alias("title")).write_csv(folder / "t.csv")
    return folder


@pytest.fixture
def ratings(tmp_path) -> Path:
    (folder := tmp_path / "ratings").mkdir()
    return write_parts(folder)


def words(ratings: Path, out: Path, *more: str) -> list[str]:
    named = ["--dataset", "parquet", "--ratings_file", str(ratings), "--output_dir", str(out)]
    return [*named, "--items_file", str(ratings / "t.csv"), "--list_size", "4", "--history_length", "6", *more]


def tables(folder: Path) -> dict[str, pl.DataFrame]:
    """The lists by split, and what users have seen."""
    data = open_prepared(folder)
    seen = data.seen()
    rows = pl.DataFrame({"user_id": list(seen), "items": [one.tolist() for one in seen.values()]})
    return {split: data.lists(split).frame for split in SPLITS} | {"seen": rows}


def files_of(folder: Path) -> dict[str, str]:
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in folder.rglob("*")
        if file.is_file()
    }


CASES = {
    "plain": (),
    "negatives": ("--negatives", "3", "--negatives_by", "popularity", "--test_lists", "2"),
    "core": ("--k_core", "8"),
    "core of titled": ("--k_core", "12", "--untitled", "drop", "--train_stride", "2"),
}


@pytest.mark.parametrize("case", CASES)
def test_partitions_are_the_lists_of_all_at_once(case, ratings, tmp_path):
    at_once, three, many = (tmp_path / name for name in ("at-once", "three", "many"))
    prepare.main(words(ratings, at_once, *CASES[case]))
    prepare.main(words(ratings, three, *CASES[case], "--partitions", "3"))
    prepare.main(words(ratings, many, *CASES[case], "--partitions", "11"))
    whole, parts, more = (tables(folder) for folder in (at_once, three, many))
    assert len(list((three / "lists-train").iterdir())) == 3
    assert not (three / "unfinished").exists()
    for name, frame in whole.items():
        key = "user_id" if name == "seen" else "list_id"
        assert parts[name].sort(key).equals(frame.sort(key)), name
        assert more[name].equals(parts[name]), name  # in the same order
    manifests = [open_prepared(folder).manifest for folder in (at_once, three)]
    assert manifests[0]["counts"] == manifests[1]["counts"]
    assert manifests[0]["rating_values"] == manifests[1]["rating_values"]
    assert manifests[0]["sources"] == manifests[1]["sources"]
    assert (at_once / "items.parquet").read_bytes() == (three / "items.parquet").read_bytes()


@pytest.mark.parametrize("ended_in", ["sort", "cut_lists", "clear", "_place", "manifest_text"])
def test_a_run_that_ended_goes_on(ended_in, ratings, tmp_path, monkeypatch, capsys):
    """Ended at the second call of a function, then gone on with: the bytes of a run that was left alone."""
    more = ("--k_core", "6", "--partitions", "4")
    prepare.main(words(ratings, tmp_path / "alone", *more))
    real, calls = getattr(build, ended_in), []

    def ending(*arguments):
        calls.append(arguments)
        if len(calls) == (1 if ended_in in ("clear", "manifest_text") else 3):
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(build, ended_in, ending)
    with pytest.raises(KeyboardInterrupt):
        prepare.main(words(ratings, tmp_path / "ended", *more))
    with pytest.raises(AlroFastError, match="not a prepared data folder"):
        open_prepared(tmp_path / "ended")
    capsys.readouterr()
    monkeypatch.setattr(build, ended_in, real)
    done = []
    monkeypatch.setattr(build, "clean", lambda *arguments: done.append(arguments))
    prepare.main(words(ratings, tmp_path / "ended", *more))
    assert not done, "the ratings were read again"
    assert "going on with what" in capsys.readouterr().out
    assert files_of(tmp_path / "ended") == files_of(tmp_path / "alone")


@pytest.mark.parametrize("more", [("--partitions", "2"), ()])
def test_a_run_that_was_killed_before_its_first_file_begins_anew(more, ratings, tmp_path, monkeypatch):
    prepare.main(words(ratings, tmp_path / "alone", *more))
    monkeypatch.setattr(work, "write_json", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        prepare.main(words(ratings, tmp_path / "killed", "--partitions", "2"))
    assert [path.name for path in (tmp_path / "killed").iterdir()] == [".unfinished-making"]
    monkeypatch.undo()
    prepare.main(words(ratings, tmp_path / "killed", *more))
    assert files_of(tmp_path / "killed") == files_of(tmp_path / "alone")
    assert not list((tmp_path / "killed").glob(".*"))


def test_a_killed_run_goes_on(ratings, tmp_path):
    """SIGKILL in the middle of the third partition's lists."""
    more = ("--partitions", "5")
    prepare.main(words(ratings, tmp_path / "alone", *more))
    program = (
        "import os, signal, sys\n"
        "from alro_fast import prepare\n"
        "from alro_fast.data.partitions import cut\n"
        "real, calls = cut.write_table, []\n"
        "def write(*arguments):\n"
        "    calls.append(1)\n"
        "    if len(calls) == 11:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return real(*arguments)\n"
        "cut.write_table = write\n"
        "prepare.main(sys.argv[1:])\n"
    )
    command = [sys.executable, "-c", program, *words(ratings, tmp_path / "killed", *more)]
    assert subprocess.run(command, env=os.environ, capture_output=True).returncode == -9
    done = tmp_path / "killed" / "unfinished" / "lists"
    assert sorted(path.name for path in done.iterdir() if path.name[0] != ".") == ["00000", "00001"]
    prepare.main(words(ratings, tmp_path / "killed", *more))
    assert files_of(tmp_path / "killed") == files_of(tmp_path / "alone")


def test_other_options_or_files_begin_anew(ratings, tmp_path, monkeypatch):
    out = tmp_path / "lists"
    real = build.cut_lists
    monkeypatch.setattr(build, "cut_lists", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        prepare.main(words(ratings, out, "--partitions", "4"))
    monkeypatch.setattr(build, "cut_lists", real)
    changed = ratings / "part-003.parquet"
    pl.read_parquet(changed).head(100).write_parquet(changed)
    prepare.main(words(ratings, out, "--partitions", "4"))
    prepare.main(words(ratings, tmp_path / "fresh", "--partitions", "4"))
    assert files_of(out) == files_of(tmp_path / "fresh")
    prepare.main(words(ratings, out, "--overwrite_output_dir"))  # lists at once take the place of partitions
    assert sorted(path.name for path in out.iterdir() if path.is_dir()) == []


def test_repeated_rows_and_a_scale_that_is_none(tmp_path):
    (folder := tmp_path / "ratings").mkdir()
    write_parts(folder, doubled=True)
    with pytest.raises(AlroFastError, match=r"ratings, partition 0 of 2: \d+ rows repeat .* --duplicates drop"):
        prepare.main(words(folder, tmp_path / "out", "--partitions", "2"))
    for name, more in (("one", ()), ("two", ("--partitions", "2"))):
        prepare.main(words(folder, tmp_path / name, "--duplicates", "drop", *more))
    found = [json.loads((tmp_path / name / "manifest.json").read_text()) for name in ("one", "two")]
    assert found[0]["counts"] == found[1]["counts"]
    assert found[0]["counts"]["duplicates_dropped"] == 20
    with pytest.raises(AlroFastError, match=r"--k_core 200 leaves nothing of [\d,]+ ratings; --k_core \d+ is the last"):
        prepare.main(words(folder, tmp_path / "core", "--duplicates", "drop", "--k_core", "200", "--partitions", "2"))
    with pytest.raises(AlroFastError, match="--partitions 0: expected 1 to 10,000"):
        prepare.main(words(folder, tmp_path / "none", "--partitions", "0"))
    with pytest.raises(AlroFastError, match="--signals is no option of partitioned lists"):
        prepare.main(words(folder, tmp_path / "signals", "--signals", "average", "--partitions", "2"))


def test_few_users_in_many_partitions(ratings, tmp_path):
    """Partitions without a user have no files; ranges of a rating scale are those of all partitions."""
    for file in ratings.glob("part-*"):
        table = pl.read_parquet(file).filter(pl.col("user_id") < 9)
        table.with_columns(rating=pl.col("timestamp") / 1999).write_parquet(file)
    for name, more in (("one", ()), ("many", ("--partitions", "64"))):
        prepare.main(words(ratings, tmp_path / name, *more))
    assert 0 < len(list((tmp_path / "many" / "lists-test").iterdir())) <= 9
    one, many = (open_prepared(tmp_path / name) for name in ("one", "many"))
    assert set(one.manifest["rating_values"]) == {"min", "max"}
    assert one.manifest["rating_values"] == many.manifest["rating_values"]
    np.testing.assert_allclose(one.train_mean, many.train_mean, rtol=1e-14)


@pytest.mark.parametrize("damage", ["cut", "gone", "other columns"])
def test_a_damaged_part_is_named(damage, ratings, tmp_path):
    out = tmp_path / "lists"
    prepare.main(words(ratings, out, "--partitions", "3"))
    part = out / "lists-valid" / "00001.parquet"
    if damage == "cut":
        part.write_bytes(part.read_bytes()[:-5])
    elif damage == "gone":
        part.unlink()
    else:
        pl.read_parquet(part).drop("ratings").write_parquet(part)
        manifest = json.loads((out / "manifest.json").read_text())
        manifest["files"]["lists-valid/00001.parquet"]["sha256"] = hashlib.sha256(part.read_bytes()).hexdigest()
        (out / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(AlroFastError, match=r"lists-valid/00001\.parquet.*prepare the data again"):
        open_prepared(out)


def test_folders_and_patterns_of_tables(ratings, tmp_path):
    """A folder, a pattern, CSV beside Parquet; parts whose columns differ."""
    prepare.main(words(ratings, tmp_path / "folder"))
    pattern = ["--ratings_file", str(ratings / "part-*.parquet"), "--items_file", str(ratings / "t.csv")]
    prepare.main([*words(ratings, tmp_path / "pattern"), *pattern])
    assert files_of(tmp_path / "folder") == files_of(tmp_path / "pattern")
    (texts := tmp_path / "texts").mkdir()
    for file in sorted(ratings.glob("part-*")):
        (texts / "deeper").mkdir(exist_ok=True)
        pl.read_parquet(file).write_csv(texts / "deeper" / f"{file.stem}.csv")
    prepare.main([*words(ratings, tmp_path / "csv"), "--dataset", "csv", "--ratings_file", str(texts)])
    assert tables(tmp_path / "csv")["test"].equals(tables(tmp_path / "folder")["test"])
    with pytest.raises(AlroFastError, match=r"has no file that ends in \.parquet"):
        prepare.main([*words(ratings, tmp_path / "none"), "--ratings_file", str(texts)])
    other = ratings / "part-004.parquet"
    pl.read_parquet(other).with_columns(pl.col("user_id").cast(pl.String)).write_parquet(other)
    with pytest.raises(AlroFastError, match=r"part-004.parquet has String as its user, and part-000.parquet has Int64"):
        prepare.main(words(ratings, tmp_path / "mixed"))
    with (texts / "deeper" / "part-002.csv").open("a") as file:
        file.write("7,i3,much,5\n")
    with pytest.raises(AlroFastError, match=r"part-002.csv row \d+ has a rating that is not a number: user '7'"):
        prepare.main([*words(ratings, tmp_path / "bad"), "--dataset", "csv", "--ratings_file", str(texts)])
