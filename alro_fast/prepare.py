"""Raw ratings -> ranking lists: `python -m alro_fast.prepare --dataset ml-latest-small --output_dir lists`."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np

from .cli import OneLineParser, run
from .data.sources.download import LICENCES, cache_folder, download
from .data.sources.interactions import DATASETS, TABLES, Interactions, read_interactions
from .data.lists import check_output_folder, read_manifest, seen_frame, write_prepared
from .data.sources.readers import NO_TIME, Columns
from .data.windows import ORDER_RULE, SPLIT_RULE, TIE_RULE, ListOptions, build_lists
from .errors import AlroFastError


def main(argv: Sequence[str]) -> None:
    """Download if need be, read, cut into lists, write; one line per stage."""
    arguments = parse(argv)
    options = ListOptions(**{f.name: getattr(arguments, f.name) for f in fields(ListOptions)})
    recorded = asdict(options) | recorded_file_options(arguments)
    check_output(arguments.output_dir, {"dataset": arguments.dataset, "options": recorded}, arguments)

    stage = Stages()
    interactions = read_files(arguments, stage)

    built = build_lists(interactions, options, notice=stage.notice)
    lists = ", ".join(f"{split} {count:,}" for split, count in built.counts["lists"].items())
    stage.done(f"cut lists: {lists}; users skipped: {built.counts['users_skipped']:,}")

    manifest = {
        **origin(arguments.dataset, interactions),
        "options": recorded,
        "seed": options.seed,
        "tie_rule": TIE_RULE,
        "split_rule": SPLIT_RULE,
        "order_rule": ORDER_RULE,
        "time_unit": interactions.time_unit,
        "rating_values": rating_values(interactions.rating),
        "counts": interactions.counts | built.counts,
    }
    seen = seen_frame(interactions.user, interactions.item, interactions.user_ids)
    write_prepared(arguments.output_dir, built.items, built.lists, manifest, seen=seen)
    stage.done(f"wrote {arguments.output_dir}")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Command line -> namespace."""
    defaults = ListOptions()
    parser = OneLineParser("python -m alro_fast.prepare", description=__doc__.splitlines()[0])
    add_file_options(parser)
    cut = parser.add_argument_group("lists")
    cut.add_argument("--history_length", type=int, default=defaults.history_length, help="rated items before a list")
    cut.add_argument("--list_size", type=int, default=defaults.list_size, help="rated candidates of a list")
    cut.add_argument("--min_history", type=int, default=defaults.min_history, help="no list with fewer before it")
    cut.add_argument("--train_stride", type=int, help="ratings from one training list to the next (default: list_size)")
    cut.add_argument("--max_train_lists_per_user", type=int, help="keep the latest ones (default: all)")
    cut.add_argument("--negatives", type=int, default=defaults.negatives, help="unrated candidates added to a list")
    cut.add_argument("--negatives_by", choices=("uniform", "popularity"), default=defaults.negatives_by)
    cut.add_argument("--seed", type=int, default=defaults.seed, help="of ties, presented order and negatives")
    return parser.parse_args(argv)


def add_file_options(parser: argparse.ArgumentParser) -> None:
    """What data to read and where to write: shared by the commands that turn ratings into lists."""
    parser.add_argument("--dataset", required=True, choices=DATASETS)
    parser.add_argument("--output_dir", required=True, type=Path, help="folder for the lists")
    parser.add_argument(
        "--overwrite_output_dir", action="store_true", help="replace lists made with other options (nothing else)"
    )
    files = parser.add_argument_group("files")
    files.add_argument("--raw_dir", type=Path, help="folder of the files; without it MovieLens ones are fetched")
    files.add_argument("--accept_licence", action="store_true", help="you have read the terms of a downloaded data set")
    files.add_argument("--allow_altered", action="store_true", help="accept MovieLens files that are not as published")
    files.add_argument("--ratings_file", type=Path, help="the ratings (csv, parquet), or the reviews to choose")
    files.add_argument("--items_file", type=Path, help="titles and categories by item (optional for csv, parquet)")
    files.add_argument("--separator", help="of a CSV file; default ',' (.tsv: tab)")
    for name, what in (
        ("user", "user ids"),
        ("item", "item ids, in the ratings and the item file"),
        ("rating", "ratings, numbers"),
        (
            "time",
            f"timestamps: whole numbers, or dates in Parquet; {NO_TIME}: a table without times, ordered at random",
        ),
        ("title", "titles"),
        ("category", "categories, shown beside the title"),
    ):
        files.add_argument(f"--{name}_column", metavar="NAME", help=f"column of {what}")
    files.add_argument(
        "--duplicates", choices=("error", "drop"), default="error", help="rows equal in user, item and time"
    )
    files.add_argument("--untitled", choices=("keep", "drop"), default="keep", help="items without a title")


def recorded_file_options(arguments: argparse.Namespace) -> dict:
    """The file options that decide what is read, for the manifest."""
    return {
        "columns": {name: column for name, column in asdict(_columns(arguments)).items() if column},
        "separator": arguments.separator,
        "duplicates": arguments.duplicates,
        "untitled": arguments.untitled,
    }


def read_files(arguments: argparse.Namespace, stage: Stages) -> Interactions:
    """Download if need be, read and check what `add_file_options` asked for."""
    raw_dir = arguments.raw_dir
    if raw_dir is None and arguments.ratings_file is None and arguments.dataset not in TABLES:
        folder = cache_folder(arguments.dataset)
        raw_dir = download(arguments.dataset, folder, accept_licence=arguments.accept_licence)
        stage.done(f"files of {arguments.dataset} at {raw_dir}")
    interactions = read_interactions(
        arguments.dataset,
        raw_dir,
        ratings_file=arguments.ratings_file,
        items_file=arguments.items_file,
        columns=_columns(arguments),
        separator=arguments.separator,
        duplicates=arguments.duplicates,
        untitled=arguments.untitled,
        allow_altered=arguments.allow_altered,
        notice=stage.notice,
    )
    counts = interactions.counts
    stage.done(f"read {counts['ratings']:,} ratings, {counts['users']:,} users, {counts['items']:,} items")
    return interactions


def origin(dataset: str, interactions: Interactions) -> dict:
    """Where lists come from, for the manifest."""
    licence = LICENCES.get(dataset)
    return {
        "dataset": dataset,
        "licence": {"name": licence.name, "url": licence.url, "terms": licence.terms} if licence else None,
        "sources": list(interactions.sources),
    }


class Stages:
    """Prints a numbered line, with its time, for every stage done, and the notices in between."""

    def __init__(self) -> None:
        self.number, self.started = 0, time.perf_counter()

    def done(self, what: str) -> None:
        now = time.perf_counter()
        self.number += 1
        print(f"[{self.number}] {what} ({now - self.started:.1f} s)", flush=True)
        self.started = now

    def notice(self, what: str) -> None:
        print(f"    note: {what}", flush=True)


def check_output(path: Path, wanted: dict, arguments: argparse.Namespace) -> None:
    """AlroFastError when `path` cannot be written, or holds lists whose manifest differs in one of `wanted`."""
    check_output_folder(path)
    manifest = read_manifest(path)
    if manifest is None or arguments.overwrite_output_dir:
        return
    if any(manifest.get(key) != value for key, value in wanted.items()):
        raise AlroFastError(
            f"output folder {path} holds lists made from {manifest.get('dataset')} with other options; "
            "choose another, or pass --overwrite_output_dir"
        )


def rating_values(ratings: np.ndarray) -> list[float] | dict[str, float]:
    """The rating scale: its values, or its range where there are many."""
    values = np.unique(ratings)
    if len(values) <= 100:
        return values.tolist()
    return {"min": float(values[0]), "max": float(values[-1])}


def _columns(arguments: argparse.Namespace) -> Columns:
    return Columns(**{f.name: getattr(arguments, f"{f.name}_column") for f in fields(Columns)})


if __name__ == "__main__":
    run(main)
