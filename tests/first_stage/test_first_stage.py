"""The command: ratings in, a prepared folder with hints out, mistakes in one line."""

from __future__ import annotations

import hashlib
import math
import os
import subprocess
import sys

import polars as pl
import pytest
from made_ratings import taste_rows

from alro_fast import first_stage, prepare
from alro_fast.cli import run
from alro_fast.data.lists import FILES, LIST_SCHEMA, OPTIONAL_FILES, TARGET_SCHEMA, open_prepared
from alro_fast.errors import AlroFastError

pytest.importorskip("implicit")

QUICK = ["--factors", "8", "--num_samples", "60"]


@pytest.fixture
def ratings(tmp_path):
    return write(tmp_path / "r.csv", taste_rows(), "user_id,item_id,rating,timestamp")


def write(path, rows, header):
    path.write_text(header + "\n" + "".join(",".join(map(str, row)) + "\n" for row in rows))
    return path


def command(ratings, out, *more):
    return ["--dataset", "csv", "--ratings_file", str(ratings), "--output_dir", str(out), *more]


def test_stages_folder_and_manifest(ratings, tmp_path, capsys):
    out = tmp_path / "rr"
    first_stage.main(command(ratings, out, *QUICK, "--seed", "3"))
    printed = capsys.readouterr().out
    assert [line[:3] for line in printed.splitlines() if line.startswith("[")] == [
        "[1]",
        "[2]",
        "[3]",
        "[4]",
        "[5]",
        "[6]",
    ]
    assert "| als | hr@3 | hr@5 | hr@10 | ndcg@3 | ndcg@5 | ndcg@10 |" in printed
    data = open_prepared(out)
    manifest = data.manifest
    assert manifest["retriever"]["name"] == "als"
    assert manifest["retriever"]["factors"] == 8
    assert manifest["options"]["like"] == 4.0
    assert manifest["options"]["dislike"] == 2.0
    assert manifest["seed"] == 3
    assert manifest["rating_values"] == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert manifest["retrieval"]["test"]["users"] == len(data.lists("test")) == 40
    assert manifest["sampling"]["draws"] == 60
    assert "0.95^(C - 1)" in manifest["sampling_rule"]
    assert data.targets.schema == TARGET_SCHEMA
    assert data.targets.height == 80
    for split in ("train", "valid", "test"):
        beside = dict.fromkeys(("hints", "candidate_retriever"), pl.List(pl.Float32))
        assert pl.read_parquet(out / f"lists-{split}.parquet").schema == LIST_SCHEMA | beside
    hits = sum(any(not math.isnan(r) for r in one.ratings) for one in data.lists("test"))
    places = data.targets.filter(pl.col("split") == "test")["place"]
    assert hits == (places <= 10).sum()
    assert manifest["retrieval"]["test"]["hr@10"] == pytest.approx(hits / 40)
    assert sorted(p.name for p in out.iterdir()) == sorted((*FILES, *OPTIONAL_FILES))
    assert all(len(one.hints) == len(one.candidates) for one in data.lists("train"))
    digest = hashlib.sha256((out / "targets.parquet").read_bytes()).hexdigest()
    assert manifest["files"]["targets.parquet"]["sha256"] == digest


def test_same_bytes_whatever_the_number_of_threads(ratings, tmp_path):
    for threads in ("1", "2"):
        words = command(ratings, tmp_path / threads, *QUICK)
        environment = os.environ | {"POLARS_MAX_THREADS": threads, "OMP_NUM_THREADS": threads}
        done = subprocess.run(
            [sys.executable, "-m", "alro_fast.first_stage", *words], env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert "Warning" not in done.stderr
    for name in (*FILES, "targets.parquet", "seen.parquet"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()


def test_second_run_other_options_and_another_command_over_it(ratings, tmp_path):
    out = tmp_path / "rr"
    first_stage.main(command(ratings, out, *QUICK))
    before = (out / "lists-train.parquet").read_bytes()
    first_stage.main(command(ratings, out, *QUICK))
    assert before == (out / "lists-train.parquet").read_bytes()
    with pytest.raises(AlroFastError, match=r"with other options; choose another, or pass --overwrite_output_dir"):
        first_stage.main(command(ratings, out, *QUICK, "--like", "5"))
    prepare.main(command(ratings, out, "--list_size", "3", "--overwrite_output_dir"))
    assert open_prepared(out).targets is None
    assert sorted(p.name for p in out.iterdir()) == sorted((*FILES, "seen.parquet"))


def test_data_without_times(ratings, tmp_path, capsys):
    """Said clearly; with --time_column none each user's ratings are ordered by the seed."""
    bare = write(tmp_path / "books.csv", [row[:3] for row in taste_rows()], "user_id,item_id,rating")
    with pytest.raises(AlroFastError, match=r"books\.csv has no column 'timestamp'"):
        first_stage.main(command(bare, tmp_path / "out", *QUICK))
    targets = []
    for seed in ("0", "0", "1"):
        out = tmp_path / f"out-{len(targets)}"
        first_stage.main(command(bare, out, *QUICK, "--time_column", "none", "--seed", seed))
        targets.append(open_prepared(out).targets["item"].to_list())
    assert targets[0] == targets[1] != targets[2]
    assert open_prepared(out).manifest["time_unit"] == "none"
    with pytest.raises(SystemExit):
        first_stage.main(["--help"])
    assert "none: a table without times" in " ".join(capsys.readouterr().out.split())


def test_users_are_sampled_by_the_parts_that_are_named(ratings, tmp_path):
    """As many lists whatever is left out; the manifest says by which rule."""
    found = {}
    for parts in ("importance,clustering,penalty", "clustering", "none"):
        first_stage.main(command(ratings, tmp_path / parts, *QUICK, "--sampling", parts))
        data = open_prepared(tmp_path / parts)
        assert data.manifest["options"]["sampling"] == parts
        found[data.manifest["sampling_rule"]] = [one.list_id for one in data.lists("train")]
    assert len(found) == 3
    assert len({len(lists) for lists in found.values()}) == 1
    assert len({tuple(lists) for lists in found.values()}) == 3


def test_choice_lists_only(ratings, tmp_path):
    first_stage.main(command(ratings, tmp_path / "out", *QUICK, "--choice_lists_only"))
    lists = open_prepared(tmp_path / "out").lists("train")
    assert len(lists) == 60
    assert not any(one.list_id.endswith("-rated") for one in lists)


MISTAKES = [
    (["--num_candidates", "1"], "error: --num_candidates 1 is too small; at least 2 is needed"),
    (["--retriever", "popularity", "--factors", "8"], "error: --factors is no option of retriever popularity"),
    (["--dislike", "5"], "error: --dislike 5 is not below --like 4"),
    (["--like", "9"], "error: no rating is at least --like 9 (they run from 1 to 5); lower --like"),
    (["--sampling", "ln"], "error: --sampling 'ln': expected some of importance,clustering,penalty"),
    (["--retriever", "nope"], "error: argument --retriever: invalid choice: 'nope'"),
]


@pytest.mark.parametrize("flags, message", MISTAKES)
def test_mistakes_are_one_line_and_leave_nothing(ratings, tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit) as stopped:
        run(first_stage.main, command(ratings, tmp_path / "out", *flags))
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert error.startswith(message)
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_ml_latest_small(shared_data, tmp_path):
    """Two users have fewer than three likes; the retriever does better than popularity on the real test targets."""
    out, source = tmp_path / "rr", shared_data / "ml-latest-small"
    words = ["--dataset", "ml-latest-small", "--raw_dir", str(source), "--num_samples", "200"]
    first_stage.main([*words, "--output_dir", str(out)])
    data = open_prepared(out)
    assert data.manifest["counts"]["users_with_targets"] == len(data.lists("test")) == 608
    raw = {(str(u), str(i)): (r, t) for u, i, r, t in pl.read_csv(source / "ratings.csv").rows()}
    for row in data.targets.filter(pl.col("split") == "test").to_dicts():
        rating, _ = raw[row["user_id"], data.items[row["item"]].item_id]
        assert rating >= 4.0
    for one in data.lists("test"):
        last = max(raw[one.user_id, item.item_id][1] for item in one.history)
        for item, rating in zip(one.candidates, one.ratings):
            if math.isnan(rating):
                later = raw.get((one.user_id, item.item_id), (0, math.inf))
                assert later[1] >= last  # unrated, or rated after the history
            else:
                assert raw[one.user_id, item.item_id][0] == rating
    figures = data.manifest["retrieval"]["test"]
    assert 0.07 < figures["hr@10"] < 0.13  # 0.094; popularity 0.044
    assert data.manifest["hint_rmse"] < 0.87  # the standard deviation of the ratings is 1.04
