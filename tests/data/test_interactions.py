"""Checks of raw ratings: each mistake in the files is one line that says what to do."""

from __future__ import annotations

import gzip
import hashlib
import os
from pathlib import Path

import polars as pl
import pytest
from places import SHARED

from alro_fast.data.sources.columns import Columns
from alro_fast.data.sources.interactions import read_interactions, sorted_ids
from alro_fast.errors import AlroFastError

HEADER = "user_id,item_id,rating,timestamp\n"


def read(tmp_path, text: str | bytes, name: str = "r.csv", **arguments):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    notes: list[str] = []
    found = read_interactions("csv", ratings_file=path, notice=notes.append, **arguments)
    return found, notes


BAD = {
    "empty file": ("", "r.csv is empty"),
    "header only": (HEADER, "r.csv holds no ratings"),
    "renamed column": (
        "user_id,item_id,stars,timestamp\n1,1,1,1\n",
        "r.csv has no column 'rating' (it has: user_id, item_id, stars, timestamp); name the right one with "
        "--rating_column",
    ),
    "no header": ("1,2,3,4\n1,3,3,4\n", "has no column 'user_id' (it has: 1, 2, 3, 4)"),
    "word for a rating": (
        HEADER + "1,1,4,1\n1,2,good,2\n1,3,bad,2\n",
        "row 2 has a rating that is not a number: user '1', item '2', rating 'good', time '2' (2 such rows)",
    ),
    "missing rating": (HEADER + "1,1,,1\n", "row 1 has a rating that is not a number"),
    "NaN": (HEADER + "1,1,NaN,1\n", "row 1 has a rating that is NaN or infinite"),
    "infinite": (HEADER + "1,1,-inf,1\n", "row 1 has a rating that is NaN or infinite"),
    "negative rating": (
        HEADER + "1,1,0,1\n1,2,-1,2\n1,3,-2,2\n",
        "r.csv row 2 has a negative rating: user '1', item '2', rating '-1', time '2' (2 such rows)",
    ),
    "negative time": (HEADER + "1,1,1,5\n1,2,1,-5\n", "row 2 has a negative timestamp"),
    "fraction of a time": (HEADER + "1,1,1,5.5\n", "row 1 has a timestamp that is not a whole number"),
    "date as text": (HEADER + "1,1,1,2020-01-01\n", "row 1 has a timestamp that is not a whole number"),
    "no user": (HEADER + ",1,1,1\n", "row 1 has no user"),
    "blank item": (HEADER + "1,  ,1,1\n", "row 1 has no item"),
    "short row": (HEADER + "1,1,1,1\n1,1\n", "row 2 has a rating that is not a number"),
    "long row": (HEADER + "1,1,1,1,1\n", "r.csv cannot be read"),
    "not text": (HEADER.encode() + b"\xff\xfe,1,1,1\n", "r.csv cannot be read"),
    "twice the same": (
        HEADER + "1,7,1,5\n1,8,1,5\n1,7,2,5\n",
        "r.csv: 2 rows repeat (user, item, time), the first for user '1', item '7', time 5; remove them, or pass "
        "--duplicates drop",
    ),
}


@pytest.mark.parametrize("text, message", BAD.values(), ids=BAD)
def test_bad_rows(tmp_path, text, message):
    with pytest.raises(AlroFastError) as error:
        read(tmp_path, text)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("rating", ["4", " 4.0", "4e0", "+4"])
def test_numbers_as_people_write_them(tmp_path, rating):
    found, _ = read(tmp_path, HEADER + f"1,1,{rating},964982703.0\n")
    assert found.rating.tolist() == [4.0]
    assert found.time.tolist() == [964982703]


def test_blank_lines_and_spaces_in_the_header_are_left_out(tmp_path):
    plain, _ = read(tmp_path, HEADER + "1,1,4,1\n2,1,3,2\n")
    found, _ = read(tmp_path, HEADER.replace(",", ", ") + "1,1,4,1\n\n2,1,3,2\n\n")
    assert found.rating.tolist() == plain.rating.tolist() == [4.0, 3.0]
    assert found.user_ids.to_list() == ["1", "2"]


def test_latin_1_is_named(tmp_path):
    with pytest.raises(AlroFastError, match=r"r\.csv cannot be read \(no UTF-8 text: Latin-1, or .*save it"):
        read(tmp_path, (HEADER + "Zoë,1,4,1\n").encode("latin-1"))


def test_a_pipe_is_read_as_a_file_is(tmp_path):
    """As <(...) of a shell and /dev/stdin are."""
    text = (HEADER + "1,1,4,1\n2,1,3,2\n").encode()
    reader, writer = os.pipe()
    try:
        os.write(writer, text)
        os.close(writer)
        found = read_interactions("csv", ratings_file=f"/dev/fd/{reader}", notice=lambda _: None)
    finally:
        os.close(reader)
    assert found.rating.tolist() == [4.0, 3.0]
    assert found.sources[0]["sha256"] == hashlib.sha256(text).hexdigest()
    with pytest.raises(AlroFastError, match="is not a file"):
        read_interactions("csv", ratings_file=tmp_path / "none.csv")


def test_column_of_truth_values_is_no_rating(tmp_path):
    frame = pl.DataFrame({"user_id": [1], "item_id": [1], "rating": [True], "timestamp": [1]})
    frame.write_parquet(tmp_path / "r.parquet")
    with pytest.raises(AlroFastError, match="row 1 has a rating that is not a number"):
        read_interactions("parquet", ratings_file=tmp_path / "r.parquet")


def test_parquet_nan_and_null(tmp_path):
    for rating, what in ((float("nan"), "NaN or infinite"), (None, "not a number")):
        columns = {"user_id": [1, 2], "item_id": [1, 1], "rating": [1.0, rating], "timestamp": [1, 1]}
        pl.DataFrame(columns).write_parquet(tmp_path / "r.parquet")
        with pytest.raises(AlroFastError, match=f"row 2 has a rating that is {what}"):
            read_interactions("parquet", ratings_file=tmp_path / "r.parquet")


def test_cut_and_altered_gzip(tmp_path):
    packed = gzip.compress((HEADER + "".join(f"1,{i},3,{i}\n" for i in range(9999))).encode())
    assert len(read(tmp_path, packed, "r.csv.gz")[0].user) == 9999
    with pytest.raises(AlroFastError, match=r"r\.csv\.gz is a truncated gzip file; fetch it again"):
        read(tmp_path, packed[: len(packed) // 2], "r.csv.gz")
    flipped = packed[:-6] + bytes([packed[-6] ^ 1]) + packed[-5:]  # its checksum
    with pytest.raises(AlroFastError, match=r"r\.csv\.gz is not an intact gzip file"):
        read(tmp_path, flipped, "r.csv.gz")
    with pytest.raises(AlroFastError, match=r"r\.csv\.gz is not an intact gzip file"):
        read(tmp_path, HEADER, "r.csv.gz")


def test_not_a_parquet_file(tmp_path):
    (tmp_path / "r.parquet").write_text(HEADER)
    with pytest.raises(AlroFastError, match=r"r\.parquet cannot be read"):
        read_interactions("parquet", ratings_file=tmp_path / "r.parquet")


def test_duplicates_dropped_keep_the_last_row(tmp_path):
    found, notes = read(tmp_path, HEADER + "1,7,1,5\n1,8,1,5\n1,7,2,5\n", duplicates="drop")
    assert found.rating.tolist() == [1.0, 2.0]
    assert found.counts["duplicates_dropped"] == 1
    assert notes[0] == "1 duplicate rows dropped"


def test_a_later_rating_of_the_same_item_is_dropped(tmp_path):
    found, notes = read(tmp_path, HEADER + "1,7,1,9\n2,7,2,9\n1,7,3,4\n1,8,4,5\n")
    assert found.rating.tolist() == [2.0, 3.0, 4.0]
    assert found.counts["later_ratings_dropped"] == 1
    assert "1 later ratings" in notes[0]


def test_ids_are_ordered_by_number_only_if_all_are_plain_integers():
    assert sorted_ids(pl.Series(["10", "9", "-1"])).to_list() == ["-1", "9", "10"]
    assert sorted_ids(pl.Series(["10", "9", "09"])).to_list() == ["09", "10", "9"]
    assert sorted_ids(pl.Series(["b", "10", "a"])).to_list() == ["10", "a", "b"]


ARGUMENTS = [
    (("netflix",), {}, "unknown dataset 'netflix'; expected one of ml-100k"),
    (("csv",), {}, "needs --ratings_file"),
    (("csv",), {"ratings_file": "nowhere.csv"}, "--ratings_file nowhere.csv is not a file"),
    (("ml-1m",), {}, "needs --raw_dir"),
    (("ml-1m", "nowhere"), {}, "--raw_dir nowhere is not a folder"),
    (("csv",), {"duplicates": "sum"}, "duplicates='sum'"),
    (("csv",), {"untitled": "guess"}, "untitled='guess'"),
    (("csv",), {"separator": "::"}, "not one ASCII character"),
]


@pytest.mark.parametrize("positional, named, message", ARGUMENTS)
def test_bad_arguments(positional, named, message):
    with pytest.raises(AlroFastError) as error:
        read_interactions(*positional, **named)
    assert message in str(error.value)


def test_format_and_suffix_must_agree(tmp_path):
    for dataset, name in (("csv", "r.parquet"), ("parquet", "r.csv")):
        (tmp_path / name).write_text(HEADER)
        with pytest.raises(AlroFastError, match="does not look like"):
            read_interactions(dataset, ratings_file=tmp_path / name)


def test_missing_files_name_what_is_there(tmp_path):
    (tmp_path / "ratings.csv").write_text("userId\n")
    with pytest.raises(AlroFastError, match=r"lacks movies\.csv of ml-25m \(it holds: ratings\.csv\)"):
        read_interactions("ml-25m", tmp_path)


def small_copy(tmp_path) -> Path:
    source = SHARED / "ml-latest-small"
    if not source.is_dir():
        pytest.skip("no ml-latest-small beside the checkout (ALRO_FAST_SHARED_DATA)")
    for name in ("ratings.csv", "movies.csv"):
        (tmp_path / name).write_bytes((source / name).read_bytes())
    return tmp_path


def test_ml_latest_small_as_published(tmp_path):
    folder = small_copy(tmp_path)
    found = read_interactions("ml-latest-small", folder)
    assert (found.counts["ratings"], found.counts["users"], found.counts["items"]) == (100_836, 610, 9_742)
    assert len(found.user) == 100_836
    assert found.items.height == 9_742
    assert found.items["title"][0] == "Toy Story (1995)"
    published = pl.read_csv(folder / "ratings.csv")
    assert found.items["item_id"].gather(found.item).cast(pl.Int64).equals(published["movieId"].alias("item_id"))
    assert found.rating.sum() == published["rating"].sum()
    for source in found.sources:
        assert hashlib.sha256((folder / source["name"]).read_bytes()).hexdigest() == source["sha256"]


def test_altered_movielens_is_refused_and_read_on_request(tmp_path):
    folder = small_copy(tmp_path)
    with (folder / "ratings.csv").open("a") as file:
        file.write("610,1,5.0,1493850000\n")
    with pytest.raises(AlroFastError, match=r"not the files of ml-latest-small as published: 100,837 ratings"):
        read_interactions("ml-latest-small", folder)
    notes = []
    found = read_interactions("ml-latest-small", folder, allow_altered=True, notice=notes.append)
    assert "100,837 ratings" in notes[0]
    assert found.counts["later_ratings_dropped"] == 1  # the appended line rates a film once more


def test_renamed_movielens_column(tmp_path):
    folder = small_copy(tmp_path)
    text = (folder / "ratings.csv").read_text().replace("rating,", "score,", 1)
    (folder / "ratings.csv").write_text(text)
    with pytest.raises(
        AlroFastError, match=r"no column 'rating' \(it has: userId, movieId, score, timestamp\).*--rating"
    ):
        read_interactions("ml-latest-small", folder)
    found = read_interactions("ml-latest-small", folder, columns=Columns(rating="score"))
    assert len(found.rating) == 100_836
