"""Files of ratings -> a folder of prepared lists: what `prepare` and `first_stage` share, and `prepare` itself."""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Self

import numpy as np

from ..cli import Reader, refuse_unread
from ..errors import AlroFastError
from ..run_folder import held
from .lists import check_output_folder, read_manifest, seen_frame, write_prepared
from .signals import SignalOptions, add_signals, signal_rules
from .sources.amazon import AMAZON_COLUMNS
from .sources.columns import NO_TIME, Columns
from .sources.download import LICENCES, cache_folder, download
from .sources.interactions import DATASETS, MOVIELENS, TABLES, Interactions, read_interactions
from .sources.k_core import CORE_RULE, k_core
from .windows import ORDER_RULE, TIE_RULE, ListOptions, build_lists


@dataclass(frozen=True)
class FileOptions:
    """What to read and where to write; meanings as `add_file_options` gives them."""

    dataset: str
    output_dir: Path
    overwrite_output_dir: bool = False
    raw_dir: Path | None = None
    accept_licence: bool = False
    allow_altered: bool = False
    ratings_file: Path | None = None
    items_file: Path | None = None
    separator: str | None = None
    columns: Columns = field(default_factory=Columns)
    duplicates: str = "error"
    untitled: str = "keep"
    k_core: int | None = None

    def __post_init__(self) -> None:
        if self.k_core is not None and self.k_core < 2:
            raise AlroFastError(f"--k_core {self.k_core} is too small; at least 2 is needed")

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> Self:
        """Those of a command line parsed with `add_file_options`; AlroFastError for one that its data do not read."""
        refuse_unread(arguments.given, READERS, arguments)
        columns = Columns(**{f.name: getattr(arguments, f"{f.name}_column") for f in fields(Columns)})
        return cls(**{f.name: getattr(arguments, f.name) for f in fields(cls) if f.name != "columns"}, columns=columns)

    @property
    def recorded(self) -> dict[str, Any]:
        """Those that decide what is read, for the manifest; `k_core` where it is given: older ones do not have it."""
        known: dict[str, Any] = {
            "columns": {name: column for name, column in asdict(self.columns).items() if column},
            "separator": self.separator,
            "duplicates": self.duplicates,
            "untitled": self.untitled,
        }
        return known if self.k_core is None else known | {"k_core": self.k_core}


def prepare_lists(files: FileOptions, options: ListOptions, signals: SignalOptions | None = None) -> None:
    """Download if need be, read, cut into lists, put signals beside their items, write; a line for every stage.

    Raises AlroFastError for files that cannot be read, or an output folder that holds something else.
    """
    recorded = options.recorded | files.recorded | (signals.recorded if signals else {})
    check_output(files, recorded)
    with held(files.output_dir):
        _prepare(files, options, signals, recorded)


def _prepare(
    files: FileOptions, options: ListOptions, signals: SignalOptions | None, recorded: Mapping[str, Any]
) -> None:
    stage = Stages()
    interactions = read_files(files, stage)

    built = build_lists(interactions, options, notice=stage.notice)
    cut = ", ".join(f"{split} {frame.height:,}" for split, frame in built.lists.items())
    stage.done(f"cut lists: {cut}; users skipped: {built.counts['users_skipped']:,}")

    rules = {"tie_rule": TIE_RULE, "split_rule": options.split_rule, "order_rule": ORDER_RULE}
    manifest = manifest_of(files, interactions, recorded, options.seed, rules, built.counts)
    lists = built.lists
    if signals:
        lists = add_signals(built, interactions, signals, options)
        manifest["signals"] = signal_rules(signals, options.seed)
        stage.done(f"computed signals: {', '.join(signals.names)}")
    seen = seen_frame(interactions.user, interactions.item, interactions.user_ids)
    write_prepared(files.output_dir, built.items, lists, manifest, seen=seen)
    stage.done(f"wrote {files.output_dir}")


def downloads(options: Any) -> bool:
    """Whether nothing names files, so that they are fetched."""
    return options.raw_dir is None and options.ratings_file is None and options.dataset not in TABLES


NAMED_COLUMNS = Reader(
    "for csv, parquet, Amazon data, Book-Crossing and MovieLens from ml-latest-small on",
    "dataset {0.dataset}, whose columns have no names",
    lambda options: options.dataset not in ("ml-100k", "ml-1m"),
)
TIME_COLUMN = Reader(
    "for csv, parquet, Amazon data and MovieLens from ml-latest-small on",
    "dataset {0.dataset}, which has no column of times with a name",
    lambda options: options.dataset not in ("ml-100k", "ml-1m", "book-crossing"),
)
ITEM_COLUMNS = Reader(
    "for csv, parquet, Book-Crossing and MovieLens from ml-latest-small on",
    "dataset {0.dataset}",
    lambda options: options.dataset not in AMAZON_COLUMNS and NAMED_COLUMNS.reads(options),
)
READERS = {  # options that not every data set reads; settings are namespaces of `add_file_options`
    "raw_dir": Reader(
        "for MovieLens, Amazon and Book-Crossing data",
        "dataset {0.dataset} with files of its own",
        lambda options: options.dataset not in TABLES and not (options.ratings_file and options.items_file),
    ),
    "accept_licence": Reader("where MovieLens is fetched, without --raw_dir", "data that are here", downloads),
    "allow_altered": Reader("for MovieLens data", "dataset {0.dataset}", lambda options: options.dataset in MOVIELENS),
    "separator": Reader("for csv", "dataset {0.dataset}", lambda options: options.dataset == "csv"),
    **dict.fromkeys(("user_column", "item_column", "rating_column"), NAMED_COLUMNS),
    "time_column": TIME_COLUMN,
    **dict.fromkeys(("title_column", "category_column"), ITEM_COLUMNS),
}


def add_file_options(parser: argparse.ArgumentParser) -> None:
    """What data to read and where to write: shared by the commands that turn ratings into lists."""
    parser.add_argument("--dataset", required=True, choices=DATASETS, metavar="NAME", help=", ".join(DATASETS))
    parser.add_argument("--output_dir", required=True, type=Path, metavar="DIR", help="folder for the lists")
    parser.add_argument(
        "--overwrite_output_dir", action="store_true", help="replace lists made with other options (nothing else)"
    )
    parser.add_argument(
        "--duplicates", choices=("error", "drop"), default="error", help="rows equal in user, item and time"
    )
    parser.add_argument("--untitled", choices=("keep", "drop"), default="keep", help="items without a title")
    parser.add_argument(
        "--k_core",
        type=int,
        metavar="K",
        help="only users and items that have K ratings of each other (default: all)",
    )
    files = parser.add_argument_group("files")
    files.add_argument("--ratings_file", type=Path, metavar="FILE", help="the ratings (csv, parquet), or the reviews")
    files.add_argument("--items_file", type=Path, metavar="FILE", help="titles and categories; csv, parquet: optional")
    folders = parser.add_argument_group("MovieLens, Amazon and Book-Crossing data")
    folders.add_argument(
        "--raw_dir", type=Path, metavar="DIR", help="folder of the files (default: MovieLens is fetched)"
    )
    folders.add_argument("--accept_licence", action="store_true", help="you have read the terms of what is fetched")
    folders.add_argument("--allow_altered", action="store_true", help="MovieLens: accept files not as published")
    columns = parser.add_argument_group("columns (not of ml-100k and ml-1m)")
    columns.add_argument("--separator", metavar="C", help="csv: between columns (default: ','; of a .tsv file: tab)")
    for name, what in (
        ("user", "user ids"),
        ("item", "item ids, in the ratings and the item file"),
        ("rating", "ratings, numbers"),
        ("time", f"whole numbers, or dates in Parquet; {NO_TIME}: a table without times, ordered at random"),
        ("title", "titles (not of Amazon data)"),
        ("category", "categories, shown beside the title (not of Amazon data)"),
    ):
        columns.add_argument(f"--{name}_column", metavar="NAME", help=what)


def read_files(files: FileOptions, stage: Stages) -> Interactions:
    """Download if need be, read and check; the k-core where asked for."""
    interactions = read_interactions(
        files.dataset,
        **raw_files(files, stage),
        duplicates=files.duplicates,
        untitled=files.untitled,
        allow_altered=files.allow_altered,
        notice=stage.notice,
    )
    counts = interactions.counts
    stage.done(f"read {counts['ratings']:,} ratings, {counts['users']:,} users, {counts['items']:,} items")
    if files.k_core is None:
        return interactions
    core = k_core(interactions, files.k_core)
    left = [f"{count:,} {name}" for name, count in core.counts["k_core"]["after"].items()]
    stage.done(f"took the {files.k_core}-core: {', '.join(left)}")
    return core


def raw_files(files: FileOptions, stage: Stages) -> dict[str, Any]:
    """What says where the ratings are, to `read_interactions` and to `opened`; downloaded if need be."""
    raw_dir = files.raw_dir
    if downloads(files):
        folder = cache_folder(files.dataset)
        raw_dir = download(files.dataset, folder, accept_licence=files.accept_licence)
        stage.done(f"files of {files.dataset} at {raw_dir}")
    named = {name: getattr(files, name) for name in ("ratings_file", "items_file", "columns", "separator")}
    return {"raw_dir": raw_dir, **named}


def check_output(files: FileOptions, recorded: Mapping[str, Any]) -> None:
    """AlroFastError when the output folder cannot be written, or holds lists made with other options."""
    check_output_folder(files.output_dir)
    manifest = read_manifest(files.output_dir)
    if manifest is None or files.overwrite_output_dir:
        return
    if manifest.get("dataset") != files.dataset or manifest.get("options") != recorded:
        raise AlroFastError(
            f"output folder {files.output_dir} holds lists made from {manifest.get('dataset')} with other options; "
            "choose another, or pass --overwrite_output_dir"
        )


def manifest_of(
    files: FileOptions,
    interactions: Interactions,
    recorded: Mapping[str, Any],
    seed: int,
    rules: Mapping[str, str],
    counts: Mapping[str, Any],
) -> dict[str, Any]:
    """Where lists come from and how they were made."""
    licence = LICENCES.get(files.dataset)
    return {
        "dataset": files.dataset,
        "licence": {"name": licence.name, "url": licence.url, "terms": licence.terms} if licence else None,
        "sources": list(interactions.sources),
        "options": dict(recorded),
        "seed": seed,
        **rules,
        **({} if files.k_core is None else {"core_rule": CORE_RULE}),
        "time_unit": interactions.time_unit,
        "rating_values": rating_values(interactions.rating),
        "counts": interactions.counts | dict(counts),
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


def rating_values(ratings: np.ndarray) -> list[float] | dict[str, float]:
    """The rating scale: its values, or its range where there are many."""
    values = np.unique(ratings)
    if len(values) <= 100:
        return values.tolist()
    return {"min": float(values[0]), "max": float(values[-1])}
