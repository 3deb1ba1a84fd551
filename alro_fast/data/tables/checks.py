"""Values that no prepared folder holds: refused when one is written, and when one is opened."""

from __future__ import annotations

from typing import cast

import polars as pl

from ...errors import AlroFastError
from ..records import LARGEST_RATING
from .schemas import SIGNAL_COLUMNS


def check_scale(lists: pl.DataFrame) -> None:
    """AlroFastError for ratings of candidates beyond LARGEST_RATING, which says what to do about them."""
    highest = cast(float, lists["ratings"].explode().max() or 0.0)
    if highest > LARGEST_RATING:
        raise AlroFastError(
            f"ratings reach {highest:g}, and gains are 2^rating - 1: bring them to a scale that ends at "
            f"{LARGEST_RATING:g} or below, such as 1 to 5"
        )


def check_list_values(lists: pl.LazyFrame, items: int, place: str) -> None:
    """AlroFastError, naming the first list, for values that no list of a catalogue of so many items can have."""
    column = pl.col
    beside = [name for name in lists.collect_schema().names() if name in SIGNAL_COLUMNS]
    aligned = ("history_ratings", "ratings", *beside)
    of = {name: "history" if name.startswith("history_") else "candidates" for name in aligned}
    size = {name: column(name).list.len() for name in ("history", "candidates", *of)}
    faults = {
        "has no name, no user or no all_equal": pl.any_horizontal(column("list_id", "user_id", "all_equal").is_null()),
        "has no history (an empty one is a list)": size["history"].is_null(),
        "has no candidates": size["candidates"].fill_null(0) == 0,
        "names a candidate twice": column("candidates").list.n_unique() != size["candidates"],
    }
    for name, part in of.items():  # a list may do without a signal
        missing = pl.lit(False) if name in beside else size[name].is_null()
        faults[f"has {name} of another length than its {part}"] = missing | (size[name] != size[part])
    for name in ("history", "candidates"):
        unknown = (column(name).list.max() >= items) | (column(name).list.drop_nulls().list.len() != size[name])
        faults[f"has an item in its {name} that is none of the {items:,} of items.parquet"] = unknown
    for name in ("history_ratings", "ratings"):
        faults[f"has a negative rating among its {name}"] = column(name).list.min() < 0
        beyond = column(name).list.max() > LARGEST_RATING
        faults[f"has a rating among its {name} that is infinite or above {LARGEST_RATING:g}"] = beyond
    found = lists.select(expression.fill_null(False).any().alias(name) for name, expression in faults.items()).collect()
    for fault, expression in faults.items():
        if found[fault].item():
            first = lists.filter(expression.fill_null(False)).select("list_id").head(1).collect().item()
            raise AlroFastError(f"{place}: list {first!r} {fault}; prepare the data again")


def check_items(frame: pl.DataFrame, place: str) -> None:
    """AlroFastError for items without an id, a title or a category (empty ones are texts), or impossible counts."""
    texts, count = frame.select("item_id", "title", "category"), frame["train_count"]
    mean = frame["train_mean"].drop_nulls()
    faults = {
        "an item without an id, a title or a category": any(texts.null_count().row(0)),
        "an item_id twice": frame["item_id"].n_unique() < frame.height,
        "a train_count that is missing or negative": count.null_count() or (count < 0).any(),
        "a train_mean that is negative or no number": (mean < 0).any() or not mean.is_finite().all(),
    }
    for fault, found in faults.items():
        if found:
            raise AlroFastError(f"{place} has {fault}; prepare the data again")


def check_known(frame: pl.LazyFrame, column: str, items: int, place: str) -> None:
    highest = (
        frame.select(pl.col(column).explode().max() if column == "items" else pl.col(column).max()).collect().item()
    )
    if highest is not None and highest >= items:
        raise AlroFastError(
            f"{place} names item {highest}, none of the {items:,} of items.parquet; prepare the data again"
        )
