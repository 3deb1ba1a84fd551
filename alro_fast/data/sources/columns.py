"""What a reader gives, and which columns of a file it takes it from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl

from ...errors import AlroFastError

ITEM_SCHEMA = {"item_id": pl.String, "title": pl.String, "category": pl.String}
NO_TIME = "none"  # as the name of a table's time column: the data have no times, and all are taken as equal
NO_GENRE = {"(no genres listed)", "unknown", ""}
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


class LeftOut(NamedTuple):
    """What a reader left out of its files: the count's name in the manifest, how many, and the words that follow it."""

    name: str
    number: int
    why: str


class RawData(NamedTuple):
    """What a reader gives: lazy `ratings` (user, item, rating, time), `items` (item_id, title, category), files.

    parts: of ratings that stand in several files, each file with its own; `ratings` are these one after the other.
    """

    ratings: pl.LazyFrame
    items: pl.DataFrame
    files: tuple[Path, ...]
    time_unit: str = "s"
    rated_items_only: bool = False  # the item file describes far more items than the ratings speak of
    left_out: tuple[LeftOut, ...] = ()
    parts: tuple[tuple[Path, pl.LazyFrame], ...] = ()


def rating_columns(names: Columns) -> Wanted:
    """Those of ratings."""
    return {part: (getattr(names, part), part) for part in ("user", "item", "rating", "time")}


def item_columns(names: Columns, asked: Columns) -> Wanted:
    """As `rating_columns` for items; the category is read where asked for by name."""
    wanted = {"item_id": (names.item, "item"), "title": (names.title, "title")}
    if asked.category:
        wanted["category"] = (names.category, "category")
    return wanted


def pick(table: pl.LazyFrame, path: Path, wanted: Wanted) -> pl.LazyFrame:
    """The wanted columns under their target names; AlroFastError for one that the file does not have."""
    need_columns(table.collect_schema().names(), path, wanted)
    return table.select(pl.col(column).alias(target) for target, (column, _) in wanted.items())


def need_columns(found: Sequence[str], path: Path, wanted: Wanted) -> None:
    """AlroFastError unless every wanted column is among those found."""
    for column, flag in wanted.values():
        if column not in found:
            raise AlroFastError(
                f"{path.name} has no column {column!r} (it has: {', '.join(found)}); "
                f"name the right one with --{flag}_column"
            )


def item_table(rows: Iterable[tuple[str, str | None, Sequence[str]]]) -> pl.DataFrame:
    """(item_id, title, category names) -> the item table; names joined by ", ", placeholders for none left out."""
    cells = [(i, title, ", ".join(n for n in names if n not in NO_GENRE)) for i, title, names in rows]
    return pl.DataFrame(cells, schema=ITEM_SCHEMA, orient="row")
