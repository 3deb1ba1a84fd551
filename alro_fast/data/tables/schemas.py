"""Which tables a prepared folder has, and their columns."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import polars as pl

from ..signal_table import SIGNALS

SPLITS = ("train", "valid", "test")
FORMAT, FORMAT_VERSION = "alro_fast ranking lists", 1
ITEM_SCHEMA = {
    "item_id": pl.String,
    "title": pl.String,
    "category": pl.String,
    "train_count": pl.Int64,
    "train_mean": pl.Float64,
}
LIST_SCHEMA: dict[str, Any] = {
    "list_id": pl.String,
    "user_id": pl.String,
    "history": pl.List(pl.UInt32),  # item indices, oldest first
    "history_ratings": pl.List(pl.Float32),
    "candidates": pl.List(pl.UInt32),  # item indices in presented order
    "ratings": pl.List(pl.Float32),  # null: an unrated candidate
    "all_equal": pl.Boolean,
    "first_time": pl.Int64,  # of the earliest and the latest rated candidate, in the manifest's time_unit
    "last_time": pl.Int64,
}
SIGNAL_COLUMNS = dict.fromkeys(  # optional, aligned with history or candidates; null: a list without; within: unknown
    ("hints", *(f"{part}_{name}" for name in SIGNALS if name != "hint" for part in ("history", "candidate"))),
    pl.List(pl.Float32),
)
TARGET_SCHEMA: dict[str, Any] = {
    "split": pl.String,
    "user_id": pl.String,
    "item": pl.UInt32,
    "place": pl.UInt32,  # among all items new to the user, in the retriever's order, 1 = first; null: not retrievable
}
SEEN_SCHEMA = {"user_id": pl.String, "items": pl.List(pl.UInt32)}  # one row per user
FILES = ("items.parquet", *(f"lists-{split}.parquet" for split in SPLITS), "manifest.json")
OPTIONAL_FILES = ("targets.parquet", "seen.parquet", "sampling.png")
IN_PARTS = (*(f"lists-{split}.parquet" for split in SPLITS), "seen.parquet")  # may be folders of numbered files
UNDER_WAY = ".replacing"  # in a folder whose lists are being replaced: ours, though without a manifest
UNFINISHED = "unfinished"  # a folder: what `prepare --partitions` has done so far
MAKING = f".{UNFINISHED}-making"  # the same before its first file is whole
BEGUN = (UNDER_WAY, UNFINISHED, MAKING)


def part_name(table: str, part: int) -> str:
    """Where a part of a table of IN_PARTS stands: lists-train/00003.parquet."""
    return f"{table.removesuffix('.parquet')}/{part:05}.parquet"


def stored_as(files: Mapping[str, Any], table: str) -> list[str]:
    """Names of the files that a table stands in, in their order, by the manifest's `files`; [] where it has none."""
    if table in files:
        return [table]
    pattern = re.compile(re.escape(table.removesuffix(".parquet")) + r"/\d{5}\.parquet")
    return sorted(name for name in files if table in IN_PARTS and pattern.fullmatch(name))


def fits(columns: Mapping, schema: Mapping, optional: Mapping) -> bool:
    """Whether the columns are those of `schema` and, beyond them, some of `optional`."""
    beyond = {name: kind for name, kind in columns.items() if name not in schema}
    return all(optional.get(name) == kind for name, kind in beyond.items()) and all(
        columns.get(name) == kind for name, kind in schema.items()
    )
