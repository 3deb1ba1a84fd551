"""The command: files in, a prepared folder out, mistakes in one line."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest
from places import SHARED

from alro_fast import prepare
from alro_fast.cli import run
from alro_fast.data import prepared
from alro_fast.data.lists import FILES, open_prepared
from alro_fast.data.sources.download import download as real_download
from alro_fast.errors import AlroFastError

HEADER = "user_id,item_id,rating,timestamp\n"


@pytest.fixture
def ratings(tmp_path) -> Path:
    """Three users with 40, 30 and 5 ratings."""
    path = tmp_path / "r.csv"
    rows = [(u, i) for u, many in enumerate((40, 30, 5)) for i in range(many)]
    lines = (f"{u},{i + 20 * u},{(u * i) % 5 + 1},{1000 + i // 2}\n" for u, i in rows)
    path.write_text(HEADER + "".join(lines))
    return path


def command(ratings: Path, out: Path, *more: str) -> list[str]:
    return ["--dataset", "csv", "--ratings_file", str(ratings), "--output_dir", str(out), "--untitled", "keep", *more]


def test_stages_counts_and_manifest(ratings, tmp_path, capsys):
    out = tmp_path / "lists"
    prepare.main(command(ratings, out, "--seed", "7", "--list_size", "5"))
    lines = capsys.readouterr().out.splitlines()
    assert [line[:3] for line in lines if line.startswith("[")] == ["[1]", "[2]", "[3]"]
    assert "read 75 ratings, 3 users, 50 items" in "\n".join(lines)
    assert "cut lists: train 8, valid 2, test 2; users skipped: 1" in "\n".join(lines)
    data = open_prepared(out)
    manifest = data.manifest
    assert manifest["sources"] == [
        {
            "name": "r.csv",
            "bytes": ratings.stat().st_size,
            "sha256": hashlib.sha256(ratings.read_bytes()).hexdigest(),
        }
    ]
    assert manifest["seed"] == manifest["options"]["seed"] == 7
    assert manifest["options"]["list_size"] == 5
    assert manifest["counts"]["users_skipped"] == 1
    assert manifest["counts"]["lists"] == {split: len(data.lists(split)) for split in ("train", "valid", "test")}
    assert manifest["rating_values"] == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert manifest["licence"] is None
    assert "hash of (seed, user id, item id)" in manifest["tie_rule"]
    assert str(tmp_path) not in json.dumps(manifest)
    for name, entry in manifest["files"].items():
        assert hashlib.sha256((out / name).read_bytes()).hexdigest() == entry["sha256"]


def test_same_bytes_whatever_the_number_of_threads(ratings, tmp_path):
    outs = [tmp_path / f"threads-{threads}" for threads in (1, 2)]
    for threads, out in zip((1, 2), outs):
        subprocess.run(
            [sys.executable, "-m", "alro_fast.prepare", *command(ratings, out, "--negatives", "2")],
            env=os.environ | {"POLARS_MAX_THREADS": str(threads)},
            check=True,
            capture_output=True,
        )
    for name in FILES:
        assert (outs[0] / name).read_bytes() == (outs[1] / name).read_bytes()


def test_seed_decides_ties(ratings, tmp_path):
    for seed in ("0", "1"):
        prepare.main(command(ratings, tmp_path / seed, "--seed", seed))
    tests = [pl.read_parquet(tmp_path / seed / "lists-train.parquet") for seed in ("0", "1")]
    assert tests[0]["history"].to_list() != tests[1]["history"].to_list()


def test_second_run_over_its_own_output(ratings, tmp_path):
    out = tmp_path / "lists"
    prepare.main(command(ratings, out))
    before = {name: (out / name).read_bytes() for name in FILES}
    prepare.main(command(ratings, out))
    assert before == {name: (out / name).read_bytes() for name in FILES}
    with pytest.raises(AlroFastError, match=r"made from csv with other options.*--overwrite_output_dir"):
        prepare.main(command(ratings, out, "--list_size", "5"))
    assert before == {name: (out / name).read_bytes() for name in FILES}
    prepare.main(command(ratings, out, "--list_size", "5", "--overwrite_output_dir"))
    assert open_prepared(out).manifest["options"]["list_size"] == 5


def test_help_promises_dates_only_where_they_are_read(capsys):
    with pytest.raises(SystemExit):
        prepare.main(["--help"])
    assert "whole numbers, or dates in Parquet;" in " ".join(capsys.readouterr().out.split())


def test_output_folder_with_something_else_is_refused_before_any_work(ratings, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "model.safetensors").touch()
    ratings.write_text("not even read")
    with pytest.raises(AlroFastError, match=r"holds something else \(model\.safetensors\)"):
        prepare.main(command(ratings, tmp_path / "mine", "--overwrite_output_dir"))


@pytest.mark.parametrize("below", ["r.csv/lists", "r.csv/some/lists", "x" * 300])
def test_output_folder_that_cannot_be_written_is_refused_before_any_work(ratings, tmp_path, below):
    ratings.write_text("not even read")
    with pytest.raises(AlroFastError, match=r"output folder .* cannot be written \(.+\); choose another"):
        prepare.main(command(ratings, tmp_path / below))
    assert [p.name for p in tmp_path.iterdir()] == ["r.csv"]


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no /proc")
def test_output_folder_below_a_file_system_that_takes_none(ratings):
    ratings.write_text("not even read")
    with pytest.raises(AlroFastError, match=r"output folder /proc/nope cannot be written"):
        prepare.main(command(ratings, Path("/proc/nope")))


BAD_ARGUMENTS = [
    ([], "the following arguments are required: --dataset, --output_dir"),
    (["--dataset", "nope", "--output_dir", "o"], "argument --dataset: invalid choice: 'nope'"),
    (["--dataset", "csv", "--output_dir", "o", "--list_size", "abc"], "argument --list_size: invalid int value: 'abc'"),
    (["--dataset", "csv", "--output_dir", "o", "--list_s", "5"], "unrecognized arguments: --list_s 5"),
]


@pytest.mark.parametrize("arguments, message", BAD_ARGUMENTS)
def test_bad_arguments_are_one_line(capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        run(prepare.main, arguments)
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert error.startswith(f"error: {message}")
    assert error.endswith("; python -m alro_fast.prepare --help lists the options\n")
    assert error.count("\n") == 1


MISTAKES = [
    (["--list_size", "1"], HEADER, "error: --list_size 1 is too small; at least 2 is needed"),
    (["--rating_column", "stars"], HEADER + "1,1,1,1\n", "error: r.csv has no column 'stars'"),
    ([], "", "error: r.csv is empty"),
    ([], HEADER + "1,1,x,1\n", "error: r.csv row 1 has a rating that is not a number"),
    ([], HEADER + "1,1,-1,1\n", "error: r.csv row 1 has a negative rating"),
    ([], HEADER + "1,1,1,1\n", "error: no user has 15 ratings"),
]


@pytest.mark.parametrize("flags, text, message", MISTAKES)
def test_mistakes_are_one_line_and_leave_nothing(ratings, tmp_path, flags, text, message):
    ratings.write_text(text)
    out = tmp_path / "lists"
    done = subprocess.run(
        [sys.executable, "-m", "alro_fast.prepare", *command(ratings, out, *flags)], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.startswith(message)
    assert done.stderr.count("\n") == 1
    assert not out.exists()


def test_download_happens_without_raw_dir_and_needs_acceptance(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(AlroFastError, match="--accept_licence"):
        prepare.main(["--dataset", "ml-100k", "--output_dir", str(tmp_path / "out")])
    assert "MovieLens terms of use" in capsys.readouterr().out
    asked = []

    def fetched(dataset, folder, *, accept_licence):
        asked.append((dataset, accept_licence))
        folder.mkdir(parents=True)
        (folder / "u.data").write_text("1\t1\t1\t1\n")
        (folder / "u.item").write_text("|".join(["1", "One", "", "", "", *["0"] * 19]))
        return real_download(dataset, folder, accept_licence=False)  # both files at hand: nothing is asked for

    monkeypatch.setattr(prepared, "download", fetched)
    with pytest.raises(AlroFastError, match="not the files of ml-100k as published: 1 ratings"):
        prepare.main(["--dataset", "ml-100k", "--output_dir", str(tmp_path / "out"), "--accept_licence"])
    assert asked == [("ml-100k", True)]


def test_amazon_is_not_downloaded(tmp_path):
    with pytest.raises(AlroFastError, match="no published checksum"):
        prepare.main(["--dataset", "amazon-2018", "--output_dir", str(tmp_path / "out"), "--accept_licence"])


def test_many_rating_values_are_recorded_as_a_range(tmp_path):
    path = tmp_path / "r.csv"
    path.write_text(HEADER + "".join(f"1,{i},{i / 4},{i}\n" for i in range(101)))
    prepare.main(command(path, tmp_path / "out"))
    assert open_prepared(tmp_path / "out").manifest["rating_values"] == {"min": 0.0, "max": 25.0}


def test_ml_latest_small_end_to_end(tmp_path):
    source = SHARED / "ml-latest-small"
    if not source.is_dir():
        pytest.skip("no ml-latest-small beside the checkout (ALRO_FAST_SHARED_DATA)")
    out = tmp_path / "lists"
    prepare.main(["--dataset", "ml-latest-small", "--raw_dir", str(source), "--output_dir", str(out)])
    data = open_prepared(out)
    counts = data.manifest["counts"]
    assert (counts["ratings"], counts["users"], counts["items"], counts["rated_items"]) == (100_836, 610, 9_742, 9_724)
    assert counts["lists"] == {"train": 8_355, "valid": 547, "test": 610}
    assert counts["ratings_sharing_a_timestamp"] == 23_228
    published = pl.read_csv(source / "ratings.csv")
    held_out = 10 * (counts["lists"]["valid"] + counts["lists"]["test"])
    assert data.train_count.sum() == published.height - held_out
    raw = {(str(u), str(i)): (r, t) for u, i, r, t in published.rows()}
    last_seen = published.group_by(pl.col("userId").cast(pl.String)).agg(pl.col("timestamp").max())
    newest = dict(last_seen.rows())
    for one in data.lists("test"):
        times = [raw[one.user_id, item.item_id][1] for item in one.candidates]
        assert max(times) == newest[one.user_id]
        assert max(raw[one.user_id, item.item_id][1] for item in one.history) <= min(times)
        assert [raw[one.user_id, item.item_id][0] for item in one.candidates] == list(one.ratings)
    assert data.manifest["licence"]["name"].startswith("MovieLens")
