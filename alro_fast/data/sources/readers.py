"""File formats of rating data: each reader gives a lazy table of raw ratings and a table of items.

Raw ratings have the columns user, item, rating, time, still of the types found in the file; `interactions.py` checks
and encodes them. Items have the columns item_id, title, category (strings; title null where the file has none).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import polars as pl

from ...errors import AlroFastError
from .book_crossing import read_book_crossing
from .columns import ITEM_SCHEMA, NO_TIME, Columns, RawData, item_columns, item_table, pick, rating_columns
from .files import polars_errors, scan_csv, scan_table, text_lines

ML100K_GENRES = (
    *("unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama"),
    *("Fantasy", "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western"),
)
MOVIELENS_COLUMNS = Columns("userId", "movieId", "rating", "timestamp", "title", "genres")
TABLE_COLUMNS = Columns("user_id", "item_id", "rating", "timestamp", "title", "category")


def read_ml_100k(ratings: Path, items: Path, _: Columns) -> RawData:
    """u.data (tab-separated user, item, rating, time) and u.item ("|"-separated, latin-1, 19 genre flags)."""
    scan = scan_csv(ratings, separator="\t", names=["user", "item", "rating", "time"])
    rows = []
    for number, line in enumerate(text_lines(items), start=1):
        cells = line.split("|")
        if len(cells) != 5 + len(ML100K_GENRES):
            raise AlroFastError(f"{items.name} line {number} has {len(cells)} fields; 24 separated by '|' are expected")
        rows.append((cells[0], cells[1], [g for g, flag in zip(ML100K_GENRES, cells[5:]) if flag == "1"]))
    return RawData(scan, item_table(rows), (ratings, items))


def read_ml_1m(ratings: Path, items: Path, _: Columns) -> RawData:
    """ratings.dat and movies.dat: fields separated by "::", latin-1; genres separated by "|"."""
    scan = scan_csv(ratings, separator=":", names=["user", "_1", "item", "_2", "rating", "_3", "time"])
    rows = []
    for number, line in enumerate(text_lines(items), start=1):
        cells = line.split("::")
        if len(cells) != 3:
            raise AlroFastError(f"{items.name} line {number} has {len(cells)} fields; 3 separated by '::' are expected")
        rows.append((cells[0], cells[1], cells[2].split("|")))
    return RawData(scan.select("user", "item", "rating", "time"), item_table(rows), (ratings, items))


def read_movielens_csv(ratings: Path, items: Path, columns: Columns) -> RawData:
    """ratings.csv and movies.csv of the later editions: comma-separated with a header, UTF-8."""
    names = columns.over(MOVIELENS_COLUMNS)
    scan = pick(scan_csv(ratings), ratings, rating_columns(names))
    rows = pick(scan_csv(items), items, item_columns(names, TABLE_COLUMNS))
    with polars_errors(items):
        movies = rows.collect()
    genres = [(genres or "").split("|") for genres in movies["category"]]
    return RawData(scan, item_table(zip(movies["item_id"], movies["title"], genres)), (ratings, items))


class Folder(NamedTuple):
    """A data set whose files have names of their own, so that the folder they are in says which to read."""

    ratings: str
    items: str
    read: Callable[[Path, Path, Columns], RawData]
    renamed: tuple[str, str] | None = None  # the two files' names where it is handed on under others


FOLDERS = {  # --dataset -> its files, and their reader
    "ml-100k": Folder("u.data", "u.item", read_ml_100k),
    "ml-1m": Folder("ratings.dat", "movies.dat", read_ml_1m),
    "ml-latest-small": Folder("ratings.csv", "movies.csv", read_movielens_csv),
    "ml-20m": Folder("ratings.csv", "movies.csv", read_movielens_csv),
    "ml-25m": Folder("ratings.csv", "movies.csv", read_movielens_csv),
    "ml-32m": Folder("ratings.csv", "movies.csv", read_movielens_csv),
    "book-crossing": Folder("BX-Book-Ratings.csv", "BX-Books.csv", read_book_crossing, ("Ratings.csv", "Books.csv")),
}


def read_table(
    parts: Sequence[Path], items: Path | None, columns: Columns, separator: str | None, workdir: Path
) -> RawData:
    """Any CSV (also .tsv, .gz) or Parquet table, of one file or several, through named columns.

    Titles and categories come from `items`, or from the ratings where those have a title column, or are missing.
    Times may be missing (columns.time = NO_TIME): all are 0 then.
    """
    names = columns.over(TABLE_COLUMNS)
    tables = [scan_table(part, separator, workdir) for part in parts]
    wanted = rating_columns(names)
    if names.time == NO_TIME:
        del wanted["time"]
    scans = [pick(table, part, wanted) for table, part in zip(tables, parts)]
    if names.time == NO_TIME:
        scans, time_unit = [scan.with_columns(time=pl.lit(0, pl.Int64)) for scan in scans], NO_TIME
    else:
        time_unit = _time_unit(scans[0])
    raw = RawData(_together(scans, parts), pl.DataFrame(schema=ITEM_SCHEMA), tuple(parts), time_unit)
    if len(parts) > 1:
        raw = raw._replace(parts=tuple(zip(parts, scans)))
    if items is not None:
        wanted = item_columns(names, columns)
        rows = pick(scan_table(items, separator, workdir), items, wanted)
    elif columns.title or columns.category or all(names.title in table.collect_schema() for table in tables):
        optional = item_columns(names, columns) if columns.title or columns.category else {}
        wanted = optional or {"item_id": (names.item, "item"), "title": (names.title, "title")}
        rows = pl.concat([_as_text(pick(table, part, wanted)) for table, part in zip(tables, parts)])
    else:
        return raw
    rows = _as_text(rows).with_columns(**{name: pl.lit(None, pl.String) for name in ITEM_SCHEMA if name not in wanted})
    with polars_errors(items or parts[0]):
        found = rows.unique(subset="item_id", keep="first", maintain_order=True).collect(engine="streaming")
    return raw._replace(items=found.select(list(ITEM_SCHEMA)), files=(*parts, *((items,) if items else ())))


def _as_text(rows: pl.LazyFrame) -> pl.LazyFrame:
    return rows.select(pl.all().cast(pl.String))


def _together(scans: Sequence[pl.LazyFrame], parts: Sequence[Path]) -> pl.LazyFrame:
    """One table of all; AlroFastError for a part whose columns are of other types than the first one's."""
    first = scans[0].collect_schema()
    for scan, part in zip(scans, parts):
        for name, kind in scan.collect_schema().items():
            if kind != first[name]:
                raise AlroFastError(
                    f"{part.name} has {kind} as its {name}, and {parts[0].name} has {first[name]}; "
                    "the parts of a table have columns of the same types"
                )
    return scans[0] if len(scans) == 1 else pl.concat(scans)


def _time_unit(scan: pl.LazyFrame) -> str:
    return "us" if scan.collect_schema()["time"].is_temporal() else "as in the file"
