"""File formats of rating data: each reader gives a lazy table of raw ratings and a table of items.

Raw ratings have the columns user, item, rating, time, still of the types found in the file; `interactions.py` checks
and encodes them. Items have the columns item_id, title, category (strings; title null where the file has none).
"""

from __future__ import annotations

import ast
import gzip
import html
import io
import json
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl

from ...errors import AlroFastError

ITEM_SCHEMA = {"item_id": pl.String, "title": pl.String, "category": pl.String}
ML100K_GENRES = (
    *("unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama"),
    *("Fantasy", "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western"),
)
NO_TIME = "none"  # as the name of a table's time column: the data have no times, and all are taken as equal
NO_GENRE = {"(no genres listed)", "unknown", ""}
BLOCK_BYTES = 1 << 25
Wanted = dict[str, tuple[Any, str]]  # target name -> (column in the file, flag that renames it)


@dataclass(frozen=True, slots=True)
class Columns:
    """Names of the columns to read; None: the data set's own name for it."""

    user: str | None = None
    item: str | None = None
    rating: str | None = None
    time: str | None = None
    title: str | None = None
    category: str | None = None

    def over(self, default: Columns) -> Columns:
        """These names where given, else those of `default`."""
        pairs = {f.name: getattr(self, f.name) or getattr(default, f.name) for f in fields(self)}
        return Columns(**pairs)


class RawData(NamedTuple):
    """What a reader gives: lazy `ratings` (user, item, rating, time), `items` (item_id, title, category), files."""

    ratings: pl.LazyFrame
    items: pl.DataFrame
    files: tuple[Path, ...]
    time_unit: str = "s"
    rated_items_only: bool = False  # the item file describes far more items than the ratings speak of


MOVIELENS_COLUMNS = Columns("userId", "movieId", "rating", "timestamp", "title", "genres")
TABLE_COLUMNS = Columns("user_id", "item_id", "rating", "timestamp", "title", "category")
AMAZON_COLUMNS = {
    "amazon-2014": Columns("reviewerID", "asin", "overall", "unixReviewTime"),
    "amazon-2018": Columns("reviewerID", "asin", "overall", "unixReviewTime"),
    "amazon-2023": Columns("user_id", "parent_asin", "rating", "timestamp"),
}


def read_ml_100k(ratings: Path, items: Path, _: Columns) -> RawData:
    """u.data (tab-separated user, item, rating, time) and u.item ("|"-separated, latin-1, 19 genre flags)."""
    scan = _scan_csv(ratings, separator="\t", names=["user", "item", "rating", "time"])
    rows = []
    for number, line in enumerate(_text_lines(items), start=1):
        cells = line.split("|")
        if len(cells) != 5 + len(ML100K_GENRES):
            raise AlroFastError(f"{items.name} line {number} has {len(cells)} fields; 24 separated by '|' are expected")
        rows.append((cells[0], cells[1], [g for g, flag in zip(ML100K_GENRES, cells[5:]) if flag == "1"]))
    return RawData(scan, _items(rows), (ratings, items))


def read_ml_1m(ratings: Path, items: Path, _: Columns) -> RawData:
    """ratings.dat and movies.dat: fields separated by "::", latin-1; genres separated by "|"."""
    scan = _scan_csv(ratings, separator=":", names=["user", "_1", "item", "_2", "rating", "_3", "time"])
    rows = []
    for number, line in enumerate(_text_lines(items), start=1):
        cells = line.split("::")
        if len(cells) != 3:
            raise AlroFastError(f"{items.name} line {number} has {len(cells)} fields; 3 separated by '::' are expected")
        rows.append((cells[0], cells[1], cells[2].split("|")))
    return RawData(scan.select("user", "item", "rating", "time"), _items(rows), (ratings, items))


def read_movielens_csv(ratings: Path, items: Path, columns: Columns) -> RawData:
    """ratings.csv and movies.csv of the later editions: comma-separated with a header, UTF-8."""
    names = columns.over(MOVIELENS_COLUMNS)
    scan = _pick(_scan_csv(ratings), ratings, _rating_columns(names))
    rows = _pick(_scan_csv(items), items, _item_columns(names, TABLE_COLUMNS))
    with polars_errors(items):
        movies = rows.collect()
    genres = [(genres or "").split("|") for genres in movies["category"]]
    return RawData(scan, _items(zip(movies["item_id"], movies["title"], genres)), (ratings, items))


class Folder(NamedTuple):
    """A data set whose files have names of their own, so that the folder they are in says which to read."""

    ratings: str
    items: str
    read: Callable[[Path, Path, Columns], RawData]


FOLDERS = {  # --dataset -> its files, and their reader
    "ml-100k": Folder("u.data", "u.item", read_ml_100k),
    "ml-1m": Folder("ratings.dat", "movies.dat", read_ml_1m),
    "ml-latest-small": Folder("ratings.csv", "movies.csv", read_movielens_csv),
    "ml-20m": Folder("ratings.csv", "movies.csv", read_movielens_csv),
    "ml-25m": Folder("ratings.csv", "movies.csv", read_movielens_csv),
    "ml-32m": Folder("ratings.csv", "movies.csv", read_movielens_csv),
}


def read_table(ratings: Path, items: Path | None, columns: Columns, separator: str | None, workdir: Path) -> RawData:
    """Any CSV (also .tsv, .gz) or Parquet file through named columns.

    Titles and categories come from `items`, or from the ratings file where that has a title column, or are missing.
    Times may be missing (columns.time = NO_TIME): all are 0 then.
    """
    names = columns.over(TABLE_COLUMNS)
    table = _scan_table(ratings, separator, workdir)
    wanted = _rating_columns(names)
    if names.time == NO_TIME:
        del wanted["time"]
        scan, time_unit = _pick(table, ratings, wanted).with_columns(time=pl.lit(0, pl.Int64)), NO_TIME
    else:
        scan = _pick(table, ratings, wanted)
        time_unit = _time_unit(scan)
    if items is not None:
        wanted = _item_columns(names, columns)
        rows = _pick(_scan_table(items, separator, workdir), items, wanted)
    elif columns.title or columns.category or names.title in table.collect_schema():
        optional = _item_columns(names, columns) if columns.title or columns.category else {}
        wanted = optional or {"item_id": (names.item, "item"), "title": (names.title, "title")}
        rows = _pick(table, ratings, wanted)
    else:
        return RawData(scan, pl.DataFrame(schema=ITEM_SCHEMA), (ratings,), time_unit)
    rows = rows.select(pl.all().cast(pl.String)).with_columns(
        **{name: pl.lit(None, pl.String) for name in ITEM_SCHEMA if name not in wanted}
    )
    with polars_errors(items or ratings):
        found = rows.unique(subset="item_id", keep="first", maintain_order=True).collect(engine="streaming")
    files = (ratings,) if items is None else (ratings, items)
    return RawData(scan, found.select(list(ITEM_SCHEMA)), files, time_unit)


def read_amazon(edition: str, reviews: Path, metadata: Path, columns: Columns, workdir: Path) -> RawData:
    """Amazon Reviews 2014 / 2018 / 2023: one review per line and one product per line, JSON, gzipped or not.

    The 2014 metadata are Python literals rather than JSON; both are read. Products nobody reviewed are left out later.
    """
    names = columns.over(AMAZON_COLUMNS[edition])
    parts: list[Path] = []
    wanted = _rating_columns(names)
    for block in _blocks(reviews):
        if not parts:
            _need_columns(list(_record(block.split(b"\n", 1)[0], reviews)), reviews, wanted)
        part = workdir / f"reviews-{len(parts):05d}.parquet"
        _review_block(block, reviews, wanted).write_parquet(part, compression="lz4")
        parts.append(part)
    if not parts:
        raise AlroFastError(f"{reviews.name} is empty; one JSON review per line is expected")
    scan = pl.concat([pl.scan_parquet(part) for part in parts])
    rated = set(scan.select(pl.col("item").unique()).collect(engine="streaming")["item"])
    key = "parent_asin" if edition == "amazon-2023" else "asin"
    items = _amazon_items(metadata, key, rated)
    return RawData(scan, items, (reviews, metadata), "ms" if edition == "amazon-2023" else "s", rated_items_only=True)


def _text_lines(path: Path) -> Iterator[str]:
    """Lines of a latin-1 file, where a title may hold characters that str.splitlines takes for line ends."""
    with path.open(encoding="latin-1") as file:
        yield from (line.rstrip("\n") for line in file)


def _rating_columns(names: Columns) -> Wanted:
    """Those of ratings."""
    return {part: (getattr(names, part), part) for part in ("user", "item", "rating", "time")}


def _item_columns(names: Columns, asked: Columns) -> Wanted:
    """As `_rating_columns` for items; the category is read where asked for by name."""
    wanted = {"item_id": (names.item, "item"), "title": (names.title, "title")}
    if asked.category:
        wanted["category"] = (names.category, "category")
    return wanted


def _pick(table: pl.LazyFrame, path: Path, wanted: Wanted) -> pl.LazyFrame:
    _need_columns(table.collect_schema().names(), path, wanted)
    return table.select(pl.col(column).alias(target) for target, (column, _) in wanted.items())


def _need_columns(found: Sequence[str], path: Path, wanted: Wanted) -> None:
    for column, flag in wanted.values():
        if column not in found:
            raise AlroFastError(
                f"{path.name} has no column {column!r} (it has: {', '.join(found)}); "
                f"name the right one with --{flag}_column"
            )


def _scan_csv(path: Path, separator: str = ",", names: list[str] | None = None) -> pl.LazyFrame:
    """Every cell as text, so that a bad number is reported with its row instead of guessed around."""
    if path.stat().st_size == 0:
        raise AlroFastError(f"{path.name} is empty; a table is expected in it")
    how: dict[str, Any] = {
        "separator": separator,
        "has_header": names is None,
        "infer_schema": False,
        "quote_char": '"' if names is None else None,
    }
    with polars_errors(path):
        scan = pl.scan_csv(path, **how)
        found = scan.collect_schema().names()
        if names is None:
            return scan
        if len(found) != len(names):
            raise AlroFastError(
                f"{path.name} has {len(found)} fields per line when split at {separator!r}; "
                f"{len(names)} are expected: is it the file of another data set?"
            )
        return scan.rename(dict(zip(found, names)))


def _scan_table(path: Path, separator: str | None, workdir: Path) -> pl.LazyFrame:
    suffixes = path.suffixes
    if suffixes[-1:] == [".parquet"]:
        with polars_errors(path):
            scan = pl.scan_parquet(path)
            scan.collect_schema()
        return scan
    separator = separator or ("\t" if ".tsv" in suffixes else ",")
    if suffixes[-1:] != [".gz"]:
        return _scan_csv(path, separator)
    plain = workdir / path.stem
    with plain.open("wb") as out, _open(path) as packed:
        shutil.copyfileobj(packed, out, BLOCK_BYTES)
    return _scan_csv(plain, separator)


def _time_unit(scan: pl.LazyFrame) -> str:
    return "us" if scan.collect_schema()["time"].is_temporal() else "as in the file"


@contextmanager
def polars_errors(path: Path) -> Iterator[None]:
    """A file polars cannot read becomes one line that names it."""
    try:
        yield
    except (pl.exceptions.PolarsError, OSError) as error:
        first = str(error).strip().splitlines()[0]
        raise AlroFastError(f"{path.name} cannot be read ({first}); is it whole and of the format asked for?") from None


@contextmanager
def _open(path: Path) -> Iterator[io.BufferedIOBase]:
    """Bytes of a file, unpacked if it ends in .gz; a cut or altered archive is a one-line error."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            yield file
    except EOFError:
        raise AlroFastError(f"{path.name} is a truncated gzip file; fetch it again") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise AlroFastError(f"{path.name} is not an intact gzip file ({error}); fetch it again") from None


def _blocks(path: Path) -> Iterator[bytes]:
    """The file in pieces of whole lines, about BLOCK_BYTES each."""
    rest = b""
    with _open(path) as file:
        while chunk := file.read(BLOCK_BYTES):
            head, newline, tail = chunk.rpartition(b"\n")
            if not newline:
                rest += chunk
                continue
            yield rest + head + b"\n"
            rest = tail
    if rest.strip():
        yield rest


def _record(line: bytes, path: Path) -> dict:
    try:
        record = json.loads(line)
    except ValueError:
        try:
            record = ast.literal_eval(line.decode())
        except (ValueError, SyntaxError):
            record = None
    if not isinstance(record, dict):
        raise AlroFastError(f"{path.name} holds a line that is no JSON object: {line[:60]!r}")
    return record


def _review_block(block: bytes, path: Path, wanted: Wanted) -> pl.DataFrame:
    """The four wanted fields of a block of reviews, as text."""
    names = {target: column for target, (column, _) in wanted.items()}
    try:
        table = pl.read_ndjson(io.BytesIO(block), schema=dict.fromkeys(names.values(), pl.String))
    except pl.exceptions.PolarsError:
        records = [_record(line, path) for line in block.splitlines() if line.strip()]
        cells = {c: [None if r.get(c) is None else str(r[c]) for r in records] for c in names.values()}
        table = pl.DataFrame(cells, schema=dict.fromkeys(names.values(), pl.String))
    return table.select(pl.col(column).alias(target) for target, column in names.items())


def _amazon_items(path: Path, key: str, rated: set[str]) -> pl.DataFrame:
    rows: dict[str, tuple[str, str | None, list[str]]] = {}
    for block in _blocks(path):
        for line in block.splitlines():
            if not line.strip():
                continue
            record = _record(line, path)
            item_id = record.get(key)
            if item_id in rated and item_id not in rows:
                rows[item_id] = (item_id, _amazon_title(record.get("title")), _amazon_category(record))
    if not rows:
        raise AlroFastError(f"{path.name} describes none of the reviewed products by {key!r}; is it their metadata?")
    return _items(rows.values())


def _amazon_title(title: object) -> str | None:
    """One line of text; the 2018 edition has page source for some titles, recognisable by "getTime": none then."""
    text = " ".join(html.unescape(title).split()) if isinstance(title, str) else ""
    return None if not text or "getTime" in text else text


def _amazon_category(record: dict) -> list[str]:
    """The path below the department, three levels at most (deeper ones are feature lists), else the department."""
    path = record.get("categories") or record.get("category") or []
    if path and isinstance(path[0], list):
        path = path[0]
    names = [" ".join(html.unescape(name).split()) for name in path if isinstance(name, str)]
    main = record.get("main_category") or record.get("main_cat")
    if names:
        return names[1:4] or names
    return [main] if isinstance(main, str) and "<" not in main else []


def _items(rows: Iterable[tuple[str, str | None, Sequence[str]]]) -> pl.DataFrame:
    """(item_id, title, category names) -> the item table; names joined by ", ", placeholders for none left out."""
    cells = [(i, title, ", ".join(n for n in names if n not in NO_GENRE)) for i, title, names in rows]
    return pl.DataFrame(cells, schema=ITEM_SCHEMA, orient="row")
