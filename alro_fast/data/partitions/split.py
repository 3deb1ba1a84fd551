"""First pass: ids, and the ratings of every input file in the order of users; then each partition's, made one table."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl

from ...errors import AlroFastError
from ...texts import read_json
from ..seeds import hash_ids
from ..sources.columns import RawData
from ..sources.files import polars_errors
from ..sources.interactions import (
    catalogue_of,
    check_counts,
    checked_ids,
    count_items,
    encoded,
    one_rating_per_item,
    shown,
)
from .work import Work, write_json

SLICE = 1 << 22  # rows that are sorted at once
ROW_GROUP = 1 << 16  # rows of which a partition reads all or none
PARTITION_RULE = (
    "users are in the order of blake2b64(user id), equal ones by their id; partition p of N holds those with "
    "floor(blake2b64 / 2^32) x N / 2^32 rounded down = p; so the lists of all partitions, one after the other, are the "
    "same for every N"
)


class Ids(NamedTuple):
    """Who rated what: all users in the order of PARTITION_RULE, rated items, the catalogue, counts for the manifest.

    recode: int64, the catalogue's row of each of `rated`, -1: left out. bounds: int64 [N + 1], partition p has the
    users bounds[p] to bounds[p + 1].
    """

    users: pl.Series
    rated: pl.Series
    catalogue: pl.DataFrame
    recode: np.ndarray
    counts: dict[str, Any]
    bounds: np.ndarray


def find_ids(
    work: Work,
    raw: RawData,
    path: Path,
    partitions: int,
    *,
    dataset: str,
    untitled: str,
    allow_altered: bool,
    notice: Callable[[str], None],
) -> Ids:
    """Check every cell and number users and items, in a step; AlroFastError for what `read_interactions` refuses."""
    if not work.has("ids"):
        users, rated, counts = checked_ids(raw, path)
        check_counts(dataset, raw, counts, allow_altered, notice)
        catalogue, recode = catalogue_of(raw, rated, untitled)
        count_items(catalogue, counts, notice)
        by_hash = pl.DataFrame([users, pl.Series("hash", hash_ids(users))]).sort("hash", "user_id")
        with work.step("ids") as folder:
            by_hash.write_parquet(folder / "users.parquet")
            pl.DataFrame([rated, pl.Series("row", recode)]).write_parquet(folder / "rated.parquet")
            shown(catalogue).write_parquet(folder / "items.parquet")
            write_json(folder / "counts.json", counts)
    at = work.at("ids")
    by_hash, rows = pl.read_parquet(at / "users.parquet"), pl.read_parquet(at / "rated.parquet")
    part = ((by_hash["hash"].to_numpy() >> np.uint64(32)) * np.uint64(partitions)) >> np.uint64(32)
    return Ids(
        users=by_hash["user_id"],
        rated=rows["item_id"],
        catalogue=pl.read_parquet(at / "items.parquet"),
        recode=rows["row"].to_numpy(),
        counts=read_json(at / "counts.json"),
        bounds=np.searchsorted(part, np.arange(partitions + 1, dtype=np.uint64)),
    )


def split(work: Work, raw: RawData, path: Path, ids: Ids) -> None:
    """A step for each input file: its ratings as codes, in slices that are sorted by user and keep the file's order."""
    for number, (file, ratings) in enumerate(raw.parts or ((path, raw.ratings),)):
        if work.has(name := f"split/{number:05}"):
            continue
        with work.step(name) as folder, polars_errors(file):
            coded = folder / "coded.parquet"
            encoded(ratings, ids.users, ids.rated).sink_parquet(coded, compression="lz4")
            rows = pl.scan_parquet(coded, glob=False).select(pl.len()).collect().item()
            for count, first in enumerate(range(0, rows, SLICE)):
                piece = pl.scan_parquet(coded, glob=False).slice(first, SLICE).collect()
                piece.sort("user", maintain_order=True).write_parquet(
                    folder / f"{count:05}.parquet", compression="lz4", row_group_size=ROW_GROUP
                )
            coded.unlink()


def clean(work: Work, part: int, ids: Ids, path: Path, duplicates: str) -> None:
    """A step: the ratings of a partition as one table (user of Ids.users, item of the catalogue, rating, time), each
    item rated once and in the catalogue. AlroFastError for rows that repeat one, unless they are to be dropped."""
    if work.has(name := f"clean/{part:05}"):
        return
    first, until = ids.bounds[part : part + 2].tolist()
    mine = pl.col("user").is_between(first, until, closed="left")
    files = sorted(work.at("split").glob("*/*.parquet"))
    table = pl.concat([pl.scan_parquet(file, glob=False).filter(mine) for file in files]).collect()
    counts: dict[str, int] = {}
    place = path.name if len(ids.bounds) == 2 else f"{path.name}, partition {part} of {len(ids.bounds) - 1}"
    table = one_rating_per_item(table, place, ids.users, ids.rated, duplicates, counts)
    rows, users = table.height, table["user"].n_unique()
    table = table.with_columns(item=ids.recode[table["item"].to_numpy()]).filter(pl.col("item") >= 0)
    counts["ratings_of_untitled_items_dropped"] = rows - table.height
    counts["users_without_titled_items_dropped"] = users - table["user"].n_unique()
    counts["rows"] = table.height
    with work.step(name) as folder:
        table.with_columns(pl.col("item").cast(pl.UInt32)).write_parquet(folder / "ratings.parquet", compression="lz4")
        write_json(folder / "counts.json", counts)


def cleaned(work: Work, parts: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """User and item codes of every partition's ratings."""
    for part in range(parts):
        table = pl.read_parquet(work.at(f"clean/{part:05}") / "ratings.parquet", columns=["user", "item"])
        yield table["user"].to_numpy(), table["item"].to_numpy()


def count_cleaned(work: Work, ids: Ids, untitled: str, path: Path) -> dict[str, Any]:
    """What reading found and dropped, over all partitions; AlroFastError where nothing is left."""
    found = [read_json(work.at(f"clean/{part:05}") / "counts.json") for part in range(len(ids.bounds) - 1)]
    if not sum(one["rows"] for one in found):
        raise AlroFastError(f"no item of {path.name} has a title; pass --untitled keep, or a file that has titles")
    names = ["duplicates_dropped", "later_ratings_dropped"]
    if untitled == "drop":
        names += ["ratings_of_untitled_items_dropped", "users_without_titled_items_dropped"]
    return ids.counts | {name: sum(one[name] for one in found) for name in names}
