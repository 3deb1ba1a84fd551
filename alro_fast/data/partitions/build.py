"""Ratings -> a prepared folder whose lists stand in partitions: `prepare_partitions`.

    ids        every cell checked, users and items numbered                  all ratings, streamed
    split      the ratings of one input file as numbers, sorted by user      one input file, streamed
    clean      a partition's ratings, each item of a user once               one partition
    (k-core    who stays                                                     one partition after the other, repeatedly)
    sorted     by user and time; counts and sums of ratings by item          one partition
    lists      cut, checked, written                                         one partition

Each is a step in the folder `unfinished` of the output folder: whole, or not there. A run that ended goes on with the
steps that are missing, if its options and the bytes of its files are the same.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from ... import __version__
from ...errors import AlroFastError
from ...run_folder import held
from ...texts import read_json
from ..lists import clear, manifest_text, mean_of, write_table
from ..prepared import FileOptions, Stages, check_output, manifest_of, raw_files
from ..seeds import hash_ids
from ..sources.columns import RawData
from ..sources.interactions import Interactions, dropped_lines, opened, sources_of
from ..tables.schemas import FILES, IN_PARTS, SPLITS, UNDER_WAY, UNFINISHED, part_name
from ..windows import ORDER_RULE, TIE_RULE, ListOptions, say_empty, say_skipped
from .core import Core, streamed_core
from .cut import cut_lists, item_sums, sort, sorted_counts, values_of
from .split import PARTITION_RULE, Ids, clean, cleaned, count_cleaned, find_ids, split
from .work import Work, write_json

MOST_PARTITIONS = 10_000


Each = Callable[[Callable[[int], None], Sequence[int]], None]


def in_turn(step: Callable[[int], None], parts: Sequence[int]) -> None:
    """One part after the other."""
    for part in parts:
        step(part)


def prepare_partitions(files: FileOptions, options: ListOptions, partitions: int, each: Each = in_turn) -> None:
    """As `prepare_lists`, one part of the users at a time: the same lists, in the order of PARTITION_RULE, in parts.

    partitions: at least 1. each: calls a step with every partition, in any order or at once; `on_ray.on_ray` on a
    cluster. Raises AlroFastError as `prepare_lists` does.
    """
    if not 1 <= partitions <= MOST_PARTITIONS:
        raise AlroFastError(f"--partitions {partitions}: expected 1 to {MOST_PARTITIONS:,}")
    recorded = options.recorded | files.recorded | {"partitions": partitions}
    check_output(files, recorded)
    with held(files.output_dir):
        stage = Stages()
        with opened(files.dataset, **raw_files(files, stage)) as (raw, path):
            sources = sources_of(raw)
            plan = {"version": __version__, "dataset": files.dataset, "options": recorded, "sources": list(sources)}
            work = Work(files.output_dir / UNFINISHED, plan)
            if work.resumed:
                stage.notice(f"going on with what {work.folder} has of an earlier run")
            ids = find_ids(
                work,
                raw,
                path,
                partitions,
                dataset=files.dataset,
                untitled=files.untitled,
                allow_altered=files.allow_altered,
                notice=stage.notice,
            )
            size = "{ratings:,} ratings, {users:,} users, {items:,} items".format(**ids.counts)
            stage.done(f"read {size} of {len(raw.parts) or 1} files")
            counts, time_unit = _deal(work, ids, files, path, raw, stage, each), raw.time_unit
        for line in dropped_lines(counts):
            stage.notice(line)
        core, head = _head(work, ids, files, sources, time_unit, counts, stage)
        _cut(work, head, core, partitions, options, files, recorded, stage, each)
        stage.done(f"wrote {files.output_dir}")


def _deal(
    work: Work, ids: Ids, files: FileOptions, path: Path, raw: RawData, stage: Stages, each: Each
) -> dict[str, Any]:
    """The steps `split` and `clean`; what reading found and dropped."""
    parts = range(len(ids.bounds) - 1)
    if not work.has("cleaned"):
        split(work, raw, path, ids)
        stage.done(f"dealt them out to {len(parts)} partitions")
        each(lambda part: clean(work, part, ids, path, files.duplicates), parts)
        with work.step("cleaned") as folder:
            write_json(folder / "counts.json", count_cleaned(work, ids, files.untitled, path))
        stage.done("made a table of each")
    work.forget("split")
    return read_json(work.at("cleaned") / "counts.json")


def _head(
    work: Work,
    ids: Ids,
    files: FileOptions,
    sources: tuple[dict, ...],
    time_unit: str,
    counts: dict[str, Any],
    stage: Stages,
) -> tuple[Core | None, Interactions]:
    """The k-core where asked for; all users, the catalogue, and no ratings."""
    parts, catalogue, core = len(ids.bounds) - 1, ids.catalogue, None
    if files.k_core is not None:
        at = work.at("core")
        if not work.has("core"):
            found, sizes = streamed_core(lambda: cleaned(work, parts), len(ids.users), catalogue.height, files.k_core)
            with work.step("core") as folder:
                np.savez(folder / "core.npz", users=found.users, items=found.items)
                write_json(folder / "sizes.json", sizes)
        with np.load(at / "core.npz") as saved:
            core = Core(saved["users"], saved["items"])
        counts = counts | {"k_core": read_json(at / "sizes.json")}
        catalogue = catalogue.filter(core.items)
        left = ", ".join(f"{count:,} {name}" for name, count in counts["k_core"]["after"].items())
        stage.done(f"took the {files.k_core}-core: {left}")
    none = {name: np.empty(0, kind) for name, kind in (("rating", np.float32), ("time", np.int64))}
    none |= dict.fromkeys(("user", "item"), np.empty(0, np.uint32))
    head = Interactions(
        **none, user_ids=ids.users, items=catalogue, sources=sources, time_unit=time_unit, counts=counts
    )
    return core, head


def _cut(
    work: Work,
    head: Interactions,
    core: Core | None,
    partitions: int,
    options: ListOptions,
    files: FileOptions,
    recorded: dict[str, Any],
    stage: Stages,
    each: Each,
) -> None:
    """The steps `sorted` and `lists`; then the folder."""
    item_hash = hash_ids(head.items["item_id"])
    if not all(work.has(f"sorted/{part:05}") for part in range(partitions)):
        each(lambda part: sort(work, part, head, item_hash, core, options), range(partitions))
        stage.done("brought each in the order of time")
    work.forget("clean")
    found = sorted_counts(work, partitions)
    counts = {name: sum(one[name] for one in found) for name in ("users", "users_skipped", "users_not_in_time_order")}
    if counts["users_not_in_time_order"]:
        stage.notice(f"ratings of {counts['users_not_in_time_order']:,} users were not in time order: sorted")
    users, most = counts.pop("users"), max(one["most"] for one in found)
    say_skipped(counts["users_skipped"], users, most, options, stage.notice)
    count, mean = mean_of(*item_sums(work, partitions, head.items.height))
    items = head.items.with_columns(train_count=count, train_mean=mean)
    each(lambda part: cut_lists(work, part, items, item_hash, options), range(partitions))
    records = ((part, work.at(f"lists/{part:05}") / "counts.json") for part in range(partitions))
    made = [(part, read_json(file)) for part, file in records if file.exists()]
    of_lists = _sums([one["counts"] for _, one in made])
    say_empty(of_lists["lists"], options, stage.notice)
    cut = ", ".join(f"{split} {of_lists['lists'][split]:,}" for split in SPLITS)
    stage.done(f"cut lists: {cut}; users skipped: {counts['users_skipped']:,}")
    rules = {
        "tie_rule": TIE_RULE,
        "split_rule": options.split_rule,
        "order_rule": ORDER_RULE,
        "partition_rule": PARTITION_RULE,
    }
    manifest = manifest_of(files, head, recorded, options.seed, rules, counts | of_lists)
    manifest["rating_values"] = values_of(found)
    _put(work, files.output_dir, items, made, manifest)


def _sums(counts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Numbers, or mappings of numbers, added up by name."""
    return {
        name: _sums([one[name] for one in counts]) if isinstance(value, dict) else sum(one[name] for one in counts)
        for name, value in counts[0].items()
    }


def _put(work: Work, path: Path, items: pl.DataFrame, made: list[tuple[int, dict]], manifest: dict[str, Any]) -> None:
    """The folder as it is read: files under their names, manifest.json last; then `unfinished` goes."""
    table = FILES[0]
    written = {table: write_table(work.folder / table, items)}
    clear(path)
    _place(work.folder / table, path / table)
    for name in IN_PARTS:
        for part, one in made:
            written[part_name(name, part)] = one["files"][name]
            _place(work.at(f"lists/{part:05}") / name, path / part_name(name, part))
    new = work.folder / "manifest.json"
    new.write_text(manifest_text(written, manifest), encoding="utf-8")
    new.replace(path / new.name)
    (path / UNDER_WAY).unlink(missing_ok=True)  # of lists at once that were killed here before
    shutil.rmtree(work.folder)


def _place(source: Path, target: Path) -> None:
    """A second name for a file, so that a run that ends between two of them can be gone on with; a copy where the file
    system has no second names."""
    target.parent.mkdir(exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
