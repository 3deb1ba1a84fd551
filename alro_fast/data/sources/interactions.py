"""Raw ratings of any supported data set as checked, encoded columns: `read_interactions`."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import polars as pl

from ...errors import AlroFastError
from ...texts import is_file
from .amazon import AMAZON_COLUMNS, read_amazon
from .columns import Columns, RawData
from .files import polars_errors, regular, sha256_of
from .parts import is_several, parts_of
from .readers import FOLDERS, read_table

MOVIELENS = {  # official counts of ratings, users and movies
    "ml-100k": (100_000, 943, 1_682),
    "ml-1m": (1_000_209, 6_040, 3_883),
    "ml-latest-small": (100_836, 610, 9_742),
    "ml-20m": (20_000_263, 138_493, 27_278),
    "ml-25m": (25_000_095, 162_541, 62_423),
    "ml-32m": (32_000_204, 200_948, 87_585),
}
TABLES = ("csv", "parquet")
AMAZON_FILES = (".json", ".jsonl", ".csv")  # and each with .gz
DATASETS = (*FOLDERS, *AMAZON_COLUMNS, *TABLES)


@dataclass(frozen=True, slots=True)
class Interactions:
    """Ratings in file order, one row per (user, item).

    user, item: uint32 codes; rating: float32, finite, >= 0; time: int64 >= 0 in `time_unit`.
    user_ids: string per user code; items: item_id, title, category per item code (title and category never null).
    """

    user: np.ndarray
    item: np.ndarray
    rating: np.ndarray
    time: np.ndarray
    user_ids: pl.Series
    items: pl.DataFrame
    sources: tuple[dict, ...]  # name, bytes, sha256 of every file read
    time_unit: str
    counts: dict[str, Any]  # what reading found and dropped; k_core.py puts its own beside them


def read_interactions(
    dataset: str,
    raw_dir: str | Path | None = None,
    *,
    ratings_file: str | Path | None = None,
    items_file: str | Path | None = None,
    columns: Columns | None = None,
    separator: str | None = None,
    duplicates: str = "error",
    untitled: str = "keep",
    allow_altered: bool = False,
    notice: Callable[[str], None] = print,
) -> Interactions:
    """Read, check and encode a data set.

    dataset: one of DATASETS. raw_dir: folder of its files (those of FOLDERS, Amazon); ratings_file, items_file: single
    files (csv, parquet; they override the names looked for in raw_dir elsewhere).
    duplicates: "error" or "drop" for rows equal in (user, item, time); dropping keeps the last row of the file.
    A user's later ratings of an item already rated are always dropped and counted: a list that showed an item the
    history has rated would give its label away.
    untitled: "keep" items without a title under their id, or "drop" them with their ratings.
    allow_altered: accept a MovieLens folder whose counts differ from the published ones.
    Raises AlroFastError with one line for whatever is missing, malformed or not of this data set.
    """
    _need(duplicates in {"error", "drop"}, f"duplicates={duplicates!r}; expected 'error' or 'drop'")
    _need(untitled in {"keep", "drop"}, f"untitled={untitled!r}; expected 'keep' or 'drop'")
    files = {"ratings_file": ratings_file, "items_file": items_file}
    with opened(dataset, raw_dir, **files, columns=columns, separator=separator) as (raw, ratings):
        user_ids, item_ids, counts = checked_ids(raw, ratings)
        with polars_errors(ratings):
            table = encoded(raw.ratings, user_ids, item_ids).collect(engine="streaming")
        sources = sources_of(raw)
    check_counts(dataset, raw, counts, allow_altered, notice)
    table = one_rating_per_item(table, ratings.name, user_ids, item_ids, duplicates, counts)
    for line in dropped_lines(counts):
        notice(line)
    catalogue, recode = catalogue_of(raw, item_ids, untitled)
    table = table.with_columns(item=recode[table["item"].to_numpy()])
    if untitled == "drop":
        table, user_ids = _drop_untitled(table, user_ids, counts)
        _need(table.height, f"no item of {ratings.name} has a title; pass --untitled keep, or a file that has titles")
    count_items(catalogue, counts, notice)
    return Interactions(
        user=table["user"].to_numpy(),
        item=table["item"].cast(pl.UInt32).to_numpy(),
        rating=table["rating"].to_numpy(),
        time=table["time"].to_numpy(),
        user_ids=user_ids,
        items=shown(catalogue),
        sources=sources,
        time_unit=raw.time_unit,
        counts=counts,
    )


@contextmanager
def opened(
    dataset: str,
    raw_dir: str | Path | None = None,
    *,
    ratings_file: str | Path | None = None,
    items_file: str | Path | None = None,
    columns: Columns | None = None,
    separator: str | None = None,
) -> Iterator[tuple[RawData, Path]]:
    """What a data set's reader gives, and where its ratings were found, with the arguments of `read_interactions`.

    Temporary copies are there until the context ends.
    """
    _need(dataset in DATASETS, f"unknown dataset {dataset!r}; expected one of {', '.join(DATASETS)}")
    _need(separator is None or len(separator.encode()) == 1, f"separator {separator!r} is not one ASCII character")
    ratings, items = locate(dataset, raw_dir, ratings_file, items_file)
    with tempfile.TemporaryDirectory(prefix="alro_fast-") as work:
        (into := Path(work) / "pipes").mkdir()
        parts = parts_of(ratings, dataset) if dataset in TABLES else (ratings,)
        parts, items = tuple(regular(part, into) for part in parts), items and regular(items, into)
        yield _read(dataset, parts, items, columns or Columns(), separator, Path(work)), ratings


def sources_of(raw: RawData) -> tuple[dict, ...]:
    """Name, bytes and SHA-256 of every file that was read."""
    return tuple({"name": f.name, "bytes": f.stat().st_size, "sha256": sha256_of(f)} for f in raw.files)


def shown(catalogue: pl.DataFrame) -> pl.DataFrame:
    """Items as lists show them: by their id where they have no title; no item is without a category."""
    title, category = pl.col("title").fill_null(pl.col("item_id")), pl.col("category").str.strip_chars().fill_null("")
    return catalogue.with_columns(title, category)


def locate(
    dataset: str,
    raw_dir: str | Path | None,
    ratings_file: str | Path | None = None,
    items_file: str | Path | None = None,
) -> tuple[Path, Path | None]:
    """Paths of the ratings and the item file; AlroFastError if one is missing or several could be meant.

    The ratings of TABLES may be a folder or a pattern, of which `parts_of` has the files.
    """
    ratings, items = given = [Path(f) if f else None for f in (ratings_file, items_file)]
    several = dataset in TABLES and ratings is not None and is_several(ratings)
    for flag, path in zip(("--ratings_file", "--items_file"), given):
        _need(path is None or is_file(path) or (several and path is ratings), f"{flag} {path} is not a file")
    if dataset in TABLES:
        if ratings is None:
            raise AlroFastError(f"dataset {dataset!r} needs --ratings_file PATH")
        _need(
            several or (dataset == "parquet") == (ratings.suffix == ".parquet"),
            f"--ratings_file {ratings.name} does not look like {dataset}; pass --dataset csv or parquet to match it",
        )
        return ratings, items
    if ratings and items:
        return ratings, items
    if raw_dir is None:
        raise AlroFastError(f"dataset {dataset!r} needs --raw_dir, the folder of its files")
    folder = Path(raw_dir)
    _need(folder.is_dir(), f"--raw_dir {folder} is not a folder")
    if dataset in AMAZON_COLUMNS:
        names = sorted(p.name for p in folder.iterdir() if p.name.removesuffix(".gz").endswith(AMAZON_FILES))
        found = [[n for n in names if n.startswith("meta_") == is_meta] for is_meta in (False, True)]
        whats = ("review files of JSON lines or CSV", "metadata (meta_*) files of JSON lines")
        for what, flag, some, path in zip(whats, ("ratings", "items"), found, given):
            _need(
                path or len(some) == 1,
                f"--raw_dir {folder} holds {len(some)} {what} "
                f"({', '.join([*some[:5], *(['...'] * (len(some) > 5))]) or 'none'}); "
                f"one is expected: choose with --{flag}_file PATH",
            )
        return ratings or folder / found[0][0], items or folder / found[1][0]
    known = FOLDERS[dataset]
    wanted = known.ratings, known.items
    if not (folder / wanted[0]).is_file() and (folder / dataset / wanted[0]).is_file():
        folder = folder / dataset
    if known.renamed and not any((folder / name).is_file() for name in wanted):
        wanted = known.renamed if any((folder / name).is_file() for name in known.renamed) else wanted
    missing = [n for n, path in zip(wanted, given) if not path and not (folder / n).is_file()]
    held = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
    _need(not missing, f"--raw_dir {folder} lacks {' and '.join(missing)} of {dataset} (it holds: {held})")
    return ratings or folder / wanted[0], items or folder / wanted[1]


def _need(condition: object, message: str) -> None:
    if not condition:
        raise AlroFastError(message)


def _read(
    dataset: str, parts: Sequence[Path], items: Path | None, columns: Columns, separator: str | None, workdir: Path
) -> RawData:
    if dataset in TABLES:
        return read_table(parts, items, columns, separator, workdir)
    (ratings,), described = parts, cast(Path, items)  # `locate` finds both
    if dataset in AMAZON_COLUMNS:
        return read_amazon(dataset, ratings, described, columns, workdir)
    return FOLDERS[dataset].read(ratings, described, columns)


def checked_ids(raw: RawData, path: Path) -> tuple[pl.Series, pl.Series, dict[str, int]]:
    """Check every cell: the sorted ids of users and of rated items, and how many ratings and of them there are."""
    user, item, rating, time = _cells(raw.ratings)
    faults = {
        "has no user": _blank(user),
        "has no item": _blank(item),
        "has a rating that is not a number": rating.is_null(),
        "has a rating that is NaN or infinite": ~rating.is_finite(),
        "has a negative rating": rating < 0,
        "has a timestamp that is not a whole number": time.is_null(),
        "has a negative timestamp": time < 0,
    }
    with polars_errors(path):
        summary, users, items = pl.collect_all(
            [
                raw.ratings.select(pl.len(), *(f.fill_null(False).sum().alias(k) for k, f in faults.items())),
                raw.ratings.select(user.unique()),
                raw.ratings.select(item.unique()),
            ],
            engine="streaming",
        )
        count = summary["len"].item()
        _need(count, f"{path.name} holds no ratings")
        for fault, expression in faults.items():
            if bad := summary[fault].item():
                _raise_fault(raw, path, fault, expression, bad)
        user_ids, item_ids = (sorted_ids(found.to_series()).alias(f"{found.columns[0]}_id") for found in (users, items))
    return user_ids, item_ids, {"ratings": count, "users": len(user_ids), "rated_items": len(item_ids)}


def encoded(ratings: pl.LazyFrame, user_ids: pl.Series, item_ids: pl.Series) -> pl.LazyFrame:
    """Ratings whose cells are checked: user, item as uint32 codes (rows of the ids), rating float32, time int64."""
    user, item, rating, time = _cells(ratings)
    return ratings.select(
        user.cast(pl.Enum(user_ids)).to_physical().cast(pl.UInt32),
        item.cast(pl.Enum(item_ids)).to_physical().cast(pl.UInt32),
        rating.cast(pl.Float32),
        time,
    )


def _cells(ratings: pl.LazyFrame) -> tuple[pl.Expr, pl.Expr, pl.Expr, pl.Expr]:
    """User and item as text, rating and time as numbers (null: they are none), of whatever types the file has."""
    schema = ratings.collect_schema()
    user, item = (pl.col(name).cast(pl.String) for name in ("user", "item"))
    return user, item, _as_number(pl.col("rating"), schema["rating"]), _as_time(pl.col("time"), schema["time"])


def _raise_fault(raw: RawData, path: Path, fault: str, expression: pl.Expr, bad: int) -> None:
    searched = (
        (file, ratings.with_row_index("row").filter(expression.fill_null(False)).head(1).collect())
        for file, ratings in raw.parts or ((path, raw.ratings),)
    )
    file, first = next((file, found.row(0, named=True)) for file, found in searched if found.height)
    cells = ", ".join(f"{name} {first[name]!r}" for name in ("user", "item", "rating", "time"))
    more = f" ({bad:,} such rows)" if bad > 1 else ""
    raise AlroFastError(f"{file.name} row {first['row'] + 1} {fault}: {cells}{more}; mend or remove it")


def _blank(column: pl.Expr) -> pl.Expr:
    return column.is_null() | (column.str.strip_chars() == "")


def _as_number(column: pl.Expr, dtype: pl.DataType) -> pl.Expr:
    if dtype == pl.Boolean:
        return pl.lit(None, pl.Float64)
    return (column.str.strip_chars() if dtype == pl.String else column).cast(pl.Float64, strict=False)


def _as_time(column: pl.Expr, dtype: pl.DataType) -> pl.Expr:
    if dtype in (pl.Date, pl.Datetime):
        return column.dt.epoch("us")
    if dtype.is_integer():
        return column.cast(pl.Int64, strict=False)
    number = _as_number(column, dtype)
    whole = pl.when(number == number.floor()).then(number).cast(pl.Int64, strict=False)
    if dtype != pl.String:
        return whole
    return pl.coalesce(column.str.strip_chars().cast(pl.Int64, strict=False), whole)


def sorted_ids(ids: pl.Series) -> pl.Series:
    """By number where all ids are plain integers, else as text: an order that depends on nothing else."""
    numbers = ids.cast(pl.Int64, strict=False)
    plain = numbers.null_count() == 0 and (numbers.cast(pl.String) == ids).all()
    return ids.gather(numbers.arg_sort()) if plain else ids.sort()


def check_counts(
    dataset: str, raw: RawData, counts: dict[str, Any], allow_altered: bool, notice: Callable[[str], None]
) -> None:
    """Put what the reader left out into `counts`; AlroFastError where MovieLens has other counts than published."""
    counts["items"] = raw.items.height
    for name, number, why in raw.left_out:
        counts[name] = number
        if number:
            notice(f"{number:,} {why}")
    found = counts["ratings"], counts["users"], counts["items"]
    official = MOVIELENS.get(dataset, found)
    if found == official:
        return
    words = "{:,} ratings, {:,} users, {:,} movies"
    message = f"these are not the files of {dataset} as published: {words.format(*found)} instead of " + words.format(
        *official
    )
    _need(allow_altered, f"{message}; fetch them again, or pass --allow_altered")
    notice(message)


def count_items(catalogue: pl.DataFrame, counts: dict[str, Any], notice: Callable[[str], None]) -> None:
    """Put the numbers of items, and of those without a title, into `counts`."""
    counts["items"] = catalogue.height
    counts["untitled_items"] = int(catalogue["title"].is_null().sum())
    if counts["untitled_items"]:
        notice(f"{counts['untitled_items']:,} items have no title: shown by their id (--untitled drop leaves them out)")


def one_rating_per_item(
    table: pl.DataFrame,
    name: str,
    user_ids: pl.Series,
    item_ids: pl.Series,
    duplicates: str,
    counts: dict[str, int],
) -> pl.DataFrame:
    """The table without rows that repeat one, and without later ratings of an item; `counts` gains how many went.

    table: user, item (codes: rows of the ids), time, in file order. duplicates: as in `read_interactions`.
    name: of the file, for what is said of rows that repeat one.
    """
    counts["duplicates_dropped"] = counts["later_ratings_dropped"] = 0
    pairs = table["user"].to_numpy().astype(np.uint64)
    pairs *= np.uint64(len(item_ids))
    pairs += table["item"].to_numpy()
    pairs.sort()
    if not (pairs[1:] == pairs[:-1]).any():
        return table
    same = ["user", "item", "time"]
    doubled = table.filter(pl.struct(same).is_duplicated())
    if doubled.height:
        first = doubled.row(0, named=True)
        who = f"user {user_ids[first['user']]!r}, item {item_ids[first['item']]!r}, time {first['time']}"
        _need(
            duplicates == "drop",
            f"{name}: {doubled.height:,} rows repeat (user, item, time), the first for {who}; remove "
            "them, or pass --duplicates drop to keep the last of each",
        )
        rows = table.height
        table = table.unique(subset=same, keep="last", maintain_order=True)
        counts["duplicates_dropped"] = rows - table.height
    rows = table.height
    table = table.with_row_index("row").sort("time", maintain_order=True)
    table = table.unique(subset=["user", "item"], keep="first", maintain_order=True).sort("row").drop("row")
    counts["later_ratings_dropped"] = rows - table.height
    return table


def dropped_lines(counts: dict[str, int]) -> list[str]:
    """What is said of the rows that `one_rating_per_item` left out."""
    first, later = counts["duplicates_dropped"], counts["later_ratings_dropped"]
    lines = [f"{first:,} duplicate rows dropped"] if first else []
    return lines + (
        [f"{later:,} later ratings of an item already rated dropped (the first one counts)"] if later else []
    )


def catalogue_of(raw: RawData, item_ids: pl.Series, untitled: str) -> tuple[pl.DataFrame, np.ndarray]:
    """Items in sorted order of their ids, and for each code of `item_ids` its row there (-1: left out)."""
    described = raw.items.with_columns(pl.when(pl.col("title").str.strip_chars() != "").then(pl.col("title")))
    described = described.unique(subset="item_id", keep="first", maintain_order=True)
    rated = item_ids.to_frame()
    if raw.rated_items_only:
        described = described.join(rated, on="item_id", how="semi")
    ids = sorted_ids(pl.concat([described["item_id"], item_ids]).unique())
    catalogue = ids.to_frame().join(described, on="item_id", how="left", maintain_order="left")
    if untitled == "drop":
        catalogue = catalogue.filter(pl.col("title").is_not_null())
    rows = rated.join(catalogue.with_row_index("row"), on="item_id", how="left", maintain_order="left")["row"]
    return catalogue, rows.cast(pl.Int64).fill_null(-1).to_numpy()


def _drop_untitled(table: pl.DataFrame, user_ids: pl.Series, counts: dict[str, int]) -> tuple[pl.DataFrame, pl.Series]:
    """Rows whose item code is -1 go, and users who had no other."""
    kept = table.filter(pl.col("item") >= 0)
    counts["ratings_of_untitled_items_dropped"] = table.height - kept.height
    remaining = kept["user"].unique().sort()
    code = np.zeros(len(user_ids), dtype=np.uint32)
    code[remaining.to_numpy()] = np.arange(len(remaining), dtype=np.uint32)
    counts["users_without_titled_items_dropped"] = len(user_ids) - len(remaining)
    return kept.with_columns(user=code[kept["user"].to_numpy()]), user_ids.gather(remaining)
