"""Every file format, on small files written here."""

from __future__ import annotations

import gzip
import json
from datetime import UTC, datetime

import numpy as np
import polars as pl
import pytest

from alro_fast.data.sources import files
from alro_fast.data.sources.columns import Columns
from alro_fast.data.sources.interactions import locate, read_interactions
from alro_fast.data.sources.readers import ML100K_GENRES
from alro_fast.errors import AlroFastError


def rows(interactions) -> list[tuple[str, str, float, int]]:
    ids, items = interactions.user_ids, interactions.items["item_id"]
    columns = (interactions.user, interactions.item, interactions.rating, interactions.time)
    return [(ids[u], items[i], r, t) for u, i, r, t in zip(*(c.tolist() for c in columns))]


def described(interactions) -> list[tuple[str, str, str]]:
    return interactions.items.rows()


def silent(_: str) -> None:
    pass


def test_ml_100k(tmp_path):
    (tmp_path / "u.data").write_text("196\t242\t3\t881250949\n22\t10\t1\t878887116\n")
    flags = ["1" if g in {"Comedy", "Sci-Fi"} else "0" for g in ML100K_GENRES]
    lines = [
        "|".join(["242", "Misérables,\x85Les (1995)", "01-Jan-1995", "", "http://x", *flags]),
        "|".join(["10", 'The "Real" One (1990)', "", "", "", "1", *["0"] * 18]),
    ]
    (tmp_path / "u.item").write_bytes("\n".join(lines).encode("latin-1"))
    found = read_interactions("ml-100k", tmp_path, allow_altered=True, notice=silent)
    assert rows(found) == [("196", "242", 3.0, 881250949), ("22", "10", 1.0, 878887116)]
    assert described(found) == [
        ("10", 'The "Real" One (1990)', ""),
        ("242", "Misérables,\x85Les (1995)", "Comedy, Sci-Fi"),
    ]
    assert found.user_ids.to_list() == ["22", "196"]
    assert found.time_unit == "s"


def test_ml_1m(tmp_path):
    (tmp_path / "ratings.dat").write_text("1::1193::5::978300760\n2::661::3::978302109\n")
    titles = "661::Star Wars: Episode IV (1977)::Action|Sci-Fi\n1193::Cité,\x85La (1975)::Drama\n"
    (tmp_path / "movies.dat").write_bytes(titles.encode("latin-1"))
    found = read_interactions("ml-1m", tmp_path, allow_altered=True, notice=silent)
    assert rows(found) == [("1", "1193", 5.0, 978300760), ("2", "661", 3.0, 978302109)]
    assert described(found) == [
        ("661", "Star Wars: Episode IV (1977)", "Action, Sci-Fi"),
        ("1193", "Cité,\x85La (1975)", "Drama"),
    ]


@pytest.mark.parametrize("name", ["ml-latest-small", "ml-20m", "ml-25m", "ml-32m"])
def test_movielens_csv_in_a_subfolder_with_crlf(tmp_path, name):
    folder = tmp_path / name
    folder.mkdir()
    (folder / "ratings.csv").write_bytes(b"userId,movieId,rating,timestamp\r\n7,2,4.5,10\r\n7,11,0.5,9\r\n")
    movies = 'movieId,title,genres\r\n2,"American President, The (1995)",Comedy|Drama\r\n11,Up,(no genres listed)\r\n'
    (folder / "movies.csv").write_bytes(movies.encode())
    found = read_interactions(name, tmp_path, allow_altered=True, notice=silent)
    assert rows(found) == [("7", "2", 4.5, 10), ("7", "11", 0.5, 9)]
    assert described(found) == [("2", "American President, The (1995)", "Comedy, Drama"), ("11", "Up", "")]
    assert [s["name"] for s in found.sources] == ["ratings.csv", "movies.csv"]


BAD_MOVIES = {
    "ragged": (b"movieId,title,genres\n2,Two,Drama,more\n", r"movies\.csv cannot be read"),
    "open quote": (b'movieId,title,genres\n2,"Two,Drama\n3,Three,Drama\n', r"movies\.csv cannot be read"),
    "latin-1": (b"movieId,title,genres\n2,Caf\xe9,Drama\n", r"movies\.csv cannot be read .*UTF-8"),
    "empty": (b"", r"movies\.csv is empty; a table is expected"),
}


@pytest.mark.parametrize("movies, message", BAD_MOVIES.values(), ids=BAD_MOVIES)
def test_unreadable_movies_are_one_line_that_names_the_file(tmp_path, movies, message):
    (tmp_path / "ratings.csv").write_text("userId,movieId,rating,timestamp\n7,2,4.5,10\n")
    (tmp_path / "movies.csv").write_bytes(movies)
    with pytest.raises(AlroFastError, match=message) as caught:
        read_interactions("ml-latest-small", tmp_path, allow_altered=True, notice=silent)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("titles_beside", [True, False])
def test_latin_1_titles_of_a_table_name_the_file_they_are_in(tmp_path, titles_beside):
    (tmp_path / "r.csv").write_text("user_id,item_id,rating,timestamp\n1,2,3,4\n")
    titled = tmp_path / "t.csv"
    titled.write_bytes(b"user_id,item_id,rating,timestamp,title\n1,2,3,4,Caf\xe9\n")
    files = {"ratings_file": titled} if titles_beside else {"ratings_file": tmp_path / "r.csv", "items_file": titled}
    with pytest.raises(AlroFastError, match=r"^t\.csv cannot be read .*UTF-8"):
        read_interactions("csv", **files, notice=silent)


REVIEWS = {
    "amazon-2014": {"reviewerID": "A1", "asin": "B1", "overall": 5.0, "unixReviewTime": 1_400_000_000},
    "amazon-2018": {"reviewerID": "A1", "asin": "B1", "overall": 5.0, "unixReviewTime": 1_500_000_000},
    "amazon-2023": {"user_id": "A1", "parent_asin": "B1", "asin": "x", "rating": 5.0, "timestamp": 1_600_000_000_123},
}


def amazon_folder(tmp_path, edition: str, reviews: list[dict], metadata: list[str]) -> None:
    lines = "".join(json.dumps(r | {"reviewText": 'so "good"\n{fine}'}) + "\n" for r in reviews)
    with gzip.open(tmp_path / "Music.json.gz", "wt") as file:
        file.write(lines)
    with gzip.open(tmp_path / "meta_Music.json.gz", "wt") as file:
        file.write("\n".join(metadata))


@pytest.mark.parametrize("edition", REVIEWS)
def test_amazon(tmp_path, edition, monkeypatch):
    monkeypatch.setattr(files, "BLOCK_BYTES", 50)  # lines and blocks do not end together
    user, item, rating, time = {
        "amazon-2023": ("user_id", "parent_asin", "rating", "timestamp"),
    }.get(edition, ("reviewerID", "asin", "overall", "unixReviewTime"))
    first = REVIEWS[edition]
    reviews = [first, first | {user: "A2", item: "B2", rating: 2.0}, first | {user: "A3", item: "B3", rating: 1}]
    products = {
        "amazon-2014": [
            "{'asin': 'B1', 'title': 'Strings &amp; \"Things\"', 'categories': [['Music', 'Guitars', 'Strings']]}",
            "{'asin': 'B2', 'categories': [['Music']]}",
            "{'asin': 'never', 'title': 'reviewed'}",
        ],
        "amazon-2018": [
            json.dumps(
                {"asin": "B1", "title": 'Strings &amp;\n "Things"', "category": ["Music", "Guitars", "Strings"]}
            ),
            json.dumps({"asin": "B2", "title": "<script>var t = new Date().getTime()", "category": ["Music"]}),
            json.dumps({"asin": "never", "title": "reviewed"}),
        ],
        "amazon-2023": [
            json.dumps(
                {"parent_asin": "B1", "title": 'Strings & "Things"', "categories": ["Music", "Guitars", "Strings"]}
            ),
            json.dumps({"parent_asin": "B2", "title": None, "categories": [], "main_category": "Music"}),
            json.dumps({"parent_asin": "never", "title": "reviewed"}),
        ],
    }[edition]
    amazon_folder(tmp_path, edition, reviews, products)
    notes = []
    found = read_interactions(edition, tmp_path, notice=notes.append)
    assert rows(found) == [
        ("A1", "B1", 5.0, first[time]),
        ("A2", "B2", 2.0, first[time]),
        ("A3", "B3", 1.0, first[time]),
    ]
    assert described(found) == [
        ("B1", 'Strings & "Things"', "Guitars, Strings"),
        ("B2", "B2", "Music"),
        ("B3", "B3", ""),
    ]
    assert found.time_unit == ("ms" if edition == "amazon-2023" else "s")
    assert found.counts["untitled_items"] == 2
    assert "2 items have no title" in notes[0]
    titled = read_interactions(edition, tmp_path, untitled="drop", notice=silent)
    assert rows(titled) == [("A1", "B1", 5.0, first[time])]
    assert titled.user_ids.to_list() == ["A1"]
    assert (
        titled.counts["ratings_of_untitled_items_dropped"] == titled.counts["users_without_titled_items_dropped"] == 2
    )


def test_amazon_lines_as_python_literals_are_read_and_broken_ones_named(tmp_path):
    review = REVIEWS["amazon-2014"]
    amazon_folder(tmp_path, "amazon-2014", [], ["{'asin': 'B1', 'title': 'One'}"])
    with gzip.open(tmp_path / "Music.json.gz", "wt") as file:
        file.write(f"{review}\n{review | {'asin': 'B2'}}\n")
    assert [r[1] for r in rows(read_interactions("amazon-2014", tmp_path, notice=silent))] == ["B1", "B2"]
    with gzip.open(tmp_path / "Music.json.gz", "at") as file:
        file.write('{"reviewerID": "A1", "as')
    with pytest.raises(AlroFastError, match=r"Music\.json\.gz holds a line that is no JSON object.*reviewerID"):
        read_interactions("amazon-2014", tmp_path)


def test_amazon_needs_one_review_and_one_metadata_file(tmp_path):
    with pytest.raises(AlroFastError, match=r"holds 0 review files.*--ratings_file"):
        locate("amazon-2018", tmp_path)
    for name in ("Music.json.gz", "Books.json.gz", "meta_Music.json.gz"):
        (tmp_path / name).touch()
    with pytest.raises(
        AlroFastError, match=r"holds 2 review files of JSON lines or CSV \(Books.json.gz, Music.json.gz\)"
    ):
        locate("amazon-2018", tmp_path)
    found = locate("amazon-2018", tmp_path, ratings_file=tmp_path / "Books.json.gz")
    assert [path.name for path in found] == ["Books.json.gz", "meta_Music.json.gz"]


def test_amazon_missing_field_and_foreign_metadata(tmp_path):
    amazon_folder(tmp_path, "amazon-2023", [REVIEWS["amazon-2018"]], ['{"parent_asin": "B1", "title": "One"}'])
    with pytest.raises(AlroFastError, match=r"no column 'user_id' \(it has: reviewerID, asin.*--user_column"):
        read_interactions("amazon-2023", tmp_path)
    with pytest.raises(AlroFastError, match=r"describes none of the reviewed products by 'asin'"):
        read_interactions("amazon-2018", tmp_path)


def test_amazon_without_reviews_or_without_titles(tmp_path):
    amazon_folder(tmp_path, "amazon-2018", [], ['{"asin": "B1"}', "", '{"asin": "B1", "title": "second"}'])
    with pytest.raises(AlroFastError, match=r"Music\.json\.gz is empty; one JSON review per line is expected"):
        read_interactions("amazon-2018", tmp_path)
    amazon_folder(tmp_path, "amazon-2018", [REVIEWS["amazon-2018"]], ['{"asin": "B1"}', "", '{"asin": "B1"}'])
    with pytest.raises(AlroFastError, match=r"no item of Music\.json\.gz has a title; pass --untitled keep"):
        read_interactions("amazon-2018", tmp_path, untitled="drop")


TABLE = {"who": ["b", "a", "b"], "what": ["x", "y", "y"], "stars": [1.0, 2.5, 5.0], "when": [3, 2, 1]}
NAMES = Columns(user="who", item="what", rating="stars", time="when")


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".csv.gz", ".parquet"])
def test_tables(tmp_path, suffix):
    path = tmp_path / f"r{suffix}"
    frame = pl.DataFrame(TABLE)
    if suffix == ".parquet":
        frame.write_parquet(path)
    else:
        text = frame.write_csv(separator="\t" if suffix == ".tsv" else ",").encode()
        path.write_bytes(gzip.compress(text) if suffix.endswith(".gz") else text)
    dataset = "parquet" if suffix == ".parquet" else "csv"
    found = read_interactions(dataset, ratings_file=path, columns=NAMES, notice=silent)
    assert rows(found) == [("b", "x", 1.0, 3), ("a", "y", 2.5, 2), ("b", "y", 5.0, 1)]
    assert described(found) == [("x", "x", ""), ("y", "y", "")]
    assert (found.user.dtype, found.item.dtype) == (np.uint32, np.uint32)
    assert (found.rating.dtype, found.time.dtype) == (np.float32, np.int64)


def test_table_with_an_item_file_and_a_separator(tmp_path):
    (tmp_path / "r.txt").write_text("who;what;stars;when\na;1;3;5\na;2;4;6.0\n")
    (tmp_path / "i.txt").write_text("what;name;kind\n2;Two; \n1;One;odd\n3;Three;odd\n1;again;odd\n")
    names = Columns("who", "what", "stars", "when", title="name", category="kind")
    files = {"ratings_file": tmp_path / "r.txt", "items_file": tmp_path / "i.txt"}
    found = read_interactions("csv", **files, columns=names, separator=";", notice=silent)
    assert rows(found) == [("a", "1", 3.0, 5), ("a", "2", 4.0, 6)]
    assert described(found) == [("1", "One", "odd"), ("2", "Two", ""), ("3", "Three", "odd")]


def test_table_with_titles_beside_the_ratings(tmp_path):
    frame = pl.DataFrame({"user_id": [1, 2], "item_id": [5, 5], "rating": [1, 2], "timestamp": [1, 2], "title": "Five"})
    frame.write_parquet(tmp_path / "r.parquet")
    found = read_interactions("parquet", ratings_file=tmp_path / "r.parquet", notice=silent)
    assert described(found) == [("5", "Five", "")]


def test_parquet_dates_become_microseconds(tmp_path):
    when = [datetime(2020, 1, 1, tzinfo=UTC), datetime(2020, 1, 1, 0, 0, 1, tzinfo=UTC)]
    frame = pl.DataFrame({"user_id": ["a", "a"], "item_id": ["x", "y"], "rating": [1, 2], "timestamp": when})
    frame.write_parquet(tmp_path / "r.parquet")
    found = read_interactions("parquet", ratings_file=tmp_path / "r.parquet", notice=silent)
    assert np.diff(found.time).tolist() == [1_000_000]
    assert found.time_unit == "us"


def test_files_of_another_data_set_are_named(tmp_path):
    (tmp_path / "u.data").write_text("1::1193::5::978300760\n")
    (tmp_path / "u.item").write_text("1|x\n")
    with pytest.raises(AlroFastError, match=r"u\.data has 1 fields per line.*4 are expected"):
        read_interactions("ml-100k", tmp_path)
    (tmp_path / "u.data").write_text("1\t2\t3\t4\n")
    with pytest.raises(AlroFastError, match=r"u\.item line 1 has 2 fields"):
        read_interactions("ml-100k", tmp_path)
    (tmp_path / "ratings.dat").write_text("1::2::3::4\n")
    (tmp_path / "movies.dat").write_text("1,One,Drama\n")
    with pytest.raises(AlroFastError, match=r"movies\.dat line 1 has 1 fields"):
        read_interactions("ml-1m", tmp_path)


def test_a_table_without_times(tmp_path):
    (tmp_path / "r.csv").write_text("user_id,item_id,rating\n1,2,3\n1,5,4\n")
    found = read_interactions("csv", ratings_file=tmp_path / "r.csv", columns=Columns(time="none"), notice=list)
    assert found.time.tolist() == [0, 0]
    assert found.time_unit == "none"
    with pytest.raises(AlroFastError, match="no column 'timestamp'"):
        read_interactions("csv", ratings_file=tmp_path / "r.csv", notice=list)
