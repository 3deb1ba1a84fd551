"""Second pass: a partition's ratings in the order of time and what they say of the items; then its lists."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import polars as pl

from ...texts import read_json
from ..lists import seen_frame, write_table
from ..seeds import hash_ids
from ..sources.interactions import Interactions
from ..tables.checks import check_list_values, check_scale
from ..tables.schemas import SPLITS
from ..windows import Cutter, ListOptions, Negatives, Timeline, chronological, count_lists, held_out, plan_windows
from .core import Core
from .work import Work, write_json

MOST_VALUES = 100  # of a rating scale, that are told one by one


def sort(work: Work, part: int, head: Interactions, item_hash: np.ndarray, core: Core | None, cut: ListOptions) -> None:
    """A step: the partition's ratings by user and time; how many ratings of each item are held out of no list, and
    their sum. head: all users and the catalogue, no ratings; core: of users and of the catalogue before it."""
    if work.has(name := f"sorted/{part:05}"):
        return
    table = pl.read_parquet(work.at(f"clean/{part:05}") / "ratings.parquet")
    user, item = table["user"].to_numpy(), table["item"].to_numpy()
    if core is not None:
        rows = core.users[user] & core.items[item]
        table, user, item = table.filter(rows), user[rows], (np.cumsum(core.items) - 1)[item[rows]]
    known, code = np.unique(user, return_inverse=True)
    mine = replace(
        head,
        user=code.astype(np.uint32),
        item=item.astype(np.uint32),
        rating=table["rating"].to_numpy(),
        time=table["time"].to_numpy(),
        user_ids=head.user_ids.gather(known),
    )
    if not table.height:
        with work.step(name):
            return
    timeline, unsorted = chronological(mine, hash_ids(mine.user_ids), item_hash, cut.seed)
    many = np.diff(timeline.offsets)
    seen = ~held_out(timeline, plan_windows(many, cut), ("valid", "test"), cut.list_size)
    values = np.unique(timeline.rating)
    with work.step(name) as folder:
        columns = dict(zip(("item", "rating", "time"), timeline[1:]))
        pl.DataFrame({"user": np.repeat(np.arange(len(many), dtype=np.uint32), many), **columns}).write_parquet(
            folder / "ratings.parquet", compression="lz4"
        )
        mine.user_ids.to_frame().write_parquet(folder / "users.parquet")
        items = head.items.height
        np.savez(
            folder / "items.npz",
            count=np.bincount(timeline.item[seen], minlength=items),
            total=np.bincount(timeline.item[seen], weights=timeline.rating[seen], minlength=items),
        )
        counts = {
            "users": len(many),
            "users_skipped": int((many < cut.least_ratings).sum()),
            "users_not_in_time_order": unsorted,
            "most": int(many.max()),
            "values": (values if len(values) <= MOST_VALUES else values[[0, -1]]).tolist(),
            "more_values": len(values) > MOST_VALUES,
        }
        write_json(folder / "counts.json", counts)


def sorted_counts(work: Work, parts: int) -> list[dict[str, Any]]:
    """What `sort` counted of each partition that has ratings."""
    files = (work.at(f"sorted/{part:05}") / "counts.json" for part in range(parts))
    return [read_json(file) for file in files if file.exists()]


def item_sums(work: Work, parts: int, items: int) -> tuple[np.ndarray, np.ndarray]:
    """Number and sum of the ratings of each item that stand in no validation or test list."""
    count, total = np.zeros(items, np.int64), np.zeros(items)
    for part in range(parts):
        file = work.at(f"sorted/{part:05}") / "items.npz"
        if file.exists():
            with np.load(file) as one:
                count += one["count"]
                total += one["total"]
    return count, total


def values_of(counts: Iterable[Mapping[str, Any]]) -> list[float] | dict[str, float]:
    """The rating scale: its values, or its range where there are many."""
    values = sorted({value for one in counts for value in one["values"]})
    if len(values) <= MOST_VALUES and not any(one["more_values"] for one in counts):
        return values
    return {"min": values[0], "max": values[-1]}


def cut_lists(work: Work, part: int, items: pl.DataFrame, item_hash: np.ndarray, cut: ListOptions) -> None:
    """A step: the partition's tables of lists and of what its users have seen, checked; rows and hashes of each.

    items: the catalogue with its statistics over all partitions.
    """
    if work.has(name := f"lists/{part:05}"):
        return
    at = work.at(f"sorted/{part:05}")
    if not (at / "ratings.parquet").exists():
        with work.step(name):
            return
    table, user_ids = pl.read_parquet(at / "ratings.parquet"), pl.read_parquet(at / "users.parquet")["user_id"]
    many = np.bincount(table["user"].to_numpy(), minlength=len(user_ids))
    columns = (table[column].to_numpy() for column in ("item", "rating", "time"))
    timeline = Timeline(np.concatenate([[0], np.cumsum(many)]), *columns)
    windows = plan_windows(many, cut)
    negatives = Negatives(timeline, items["train_count"].to_numpy(), item_hash, cut) if cut.negatives else None
    cutter = Cutter(timeline, user_ids, hash_ids(user_ids), item_hash, cut, negatives)
    lists = {split: cutter.frame(*windows[split]) for split in SPLITS}
    for split, frame in lists.items():
        check_scale(frame)
        check_list_values(frame.lazy(), items.height, f"lists of split {split}")
    tables = {f"lists-{split}.parquet": frame for split, frame in lists.items()}
    tables["seen.parquet"] = seen_frame(table["user"].to_numpy(), timeline.item, user_ids)
    with work.step(name) as folder:
        written = {table: write_table(folder / table, frame) for table, frame in tables.items()}
        write_json(folder / "counts.json", {"files": written, "counts": count_lists(timeline, windows, lists)})
