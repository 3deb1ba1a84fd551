"""The prepared folder: items, ranking lists and a manifest, written once and read by everything after.

    items.parquet            row i is Item.index i: item_id, title, category, train_count, train_mean (null: unrated)
    lists-<split>.parquet    one row per list, see LIST_SCHEMA; SIGNAL_COLUMNS where lists carry hints or other signals
    targets.parquet          of a first stage: one row per held-out like, see TARGET_SCHEMA (optional)
    seen.parquet             every item each user has rated, in a list or not, see SEEN_SCHEMA (optional)
    sampling.png             of a first stage: a plot of the users it sampled (optional)
    manifest.json            where the lists come from, how they were made, SHA-256 of the files beside it

`prepare --partitions` writes folders lists-<split>/ and seen/ of 00000.parquet, 00001.parquet, ... in place of files: a
table is its parts one after the other.

train_count and train_mean are taken over the ratings that are in no validation or test candidate set.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, overload

import numpy as np
import polars as pl

from .. import __version__
from ..errors import AlroFastError
from ..run_folder import check_writable, contents
from ..texts import read_json
from .records import Item, RankingList, Signal
from .signal_table import SIGNALS
from .sources.files import POLARS_ERRORS, sha256_of
from .tables.checks import check_items, check_known, check_list_values, check_scale
from .tables.schemas import (
    BEGUN,
    FILES,
    FORMAT,
    FORMAT_VERSION,
    IN_PARTS,
    ITEM_SCHEMA,
    LIST_SCHEMA,
    MAKING,
    OPTIONAL_FILES,
    SEEN_SCHEMA,
    SIGNAL_COLUMNS,
    SPLITS,
    TARGET_SCHEMA,
    UNDER_WAY,
    UNFINISHED,
    fits,
    stored_as,
)

ROW_GROUP = 1 << 16


class Lists(Sequence[RankingList]):
    """The lists of one split, in columns; a `RankingList` is made when it is asked for. A slice is again a `Lists`.

    user_ids: the user of every list; all_equal: bool [number of lists], True where there is nothing to rank.
    """

    def __init__(self, items: Sequence[Item], frame: pl.DataFrame):
        self._items = items
        self._frame = frame
        self._history, self._history_offsets = _flat(frame["history"], np.uint32)
        self._history_ratings, _ = _flat(frame["history_ratings"], np.float32)
        self._candidates, self._offsets = _flat(frame["candidates"], np.uint32)
        self._ratings, _ = _flat(frame["ratings"], np.float32)
        self._beside = {name: _flat(frame[name], np.float32) for name in SIGNAL_COLUMNS if name in frame.columns}
        self._names = [name for name in SIGNALS if f"candidate_{name}" in self._beside]

    def __len__(self) -> int:
        return self._frame.height

    @overload
    def __getitem__(self, index: int) -> RankingList: ...

    @overload
    def __getitem__(self, index: slice) -> Lists: ...

    def __getitem__(self, index: int | slice) -> RankingList | Lists:
        if isinstance(index, slice):
            return Lists(self._items, self._frame[index])
        row = range(len(self))[index]
        past = slice(*self._history_offsets[row : row + 2])
        here = slice(*self._offsets[row : row + 2])
        return RankingList(
            list_id=self._frame["list_id"][row],
            user_id=self._frame["user_id"][row],
            history=tuple(self._items[i] for i in self._history[past].tolist()),
            history_ratings=tuple(self._history_ratings[past].tolist()),
            candidates=tuple(self._items[i] for i in self._candidates[here].tolist()),
            ratings=tuple(self._ratings[here].tolist()),
            hints=self._values("hints", row),
            signals=tuple(
                Signal(name, self._values(f"history_{name}", row), self._values(f"candidate_{name}", row))
                for name in self._names
            ),
        )

    def _values(self, column: str, row: int) -> tuple[float, ...]:
        if column not in self._beside:
            return ()
        values, offsets = self._beside[column]
        return tuple(values[offsets[row] : offsets[row + 1]].tolist())

    @property
    def signals(self) -> list[str]:
        """Names of the signals that these lists carry, "hint" for their hints."""
        return [name for name in SIGNALS if name in self._names or (name == "hint" and "hints" in self._beside)]

    @property
    def frame(self) -> pl.DataFrame:
        """The lists as stored, of LIST_SCHEMA."""
        return self._frame

    @property
    def rated(self) -> np.ndarray:
        """bool [number of lists]: a candidate at least carries a rating."""
        known = np.concatenate([[0], np.cumsum(~np.isnan(self._ratings))])
        return known[self._offsets[1:]] > known[self._offsets[:-1]]

    @property
    def user_ids(self) -> list[str]:
        return self._frame["user_id"].to_list()

    @property
    def all_equal(self) -> np.ndarray:
        return self._frame["all_equal"].to_numpy()


def with_ratings(lists: Sequence[RankingList]) -> Sequence[RankingList]:
    """The lists that have a rated candidate: `lists` themselves where all do."""
    if isinstance(lists, Lists):
        return lists if lists.rated.all() else [lists[i] for i in np.flatnonzero(lists.rated).tolist()]
    return [one for one in lists if not all(map(math.isnan, one.ratings))]


class PreparedData:
    """An opened folder.

    path; manifest: dict; items: list[Item], items[i].index == i; train_count: int64 [items];
    train_mean: float64 [items], NaN = never rated; targets: frame of TARGET_SCHEMA, None where no first stage was run.
    """

    def __init__(self, path: Path, manifest: dict):
        self.path = path
        self.manifest = manifest
        files = manifest.get("files")
        if not isinstance(files, dict):
            raise AlroFastError(f"{path / 'manifest.json'} is damaged: it names no files; prepare the data again")
        frame = self._read("items.parquet", ITEM_SCHEMA)
        check_items(frame, str(path / "items.parquet"))
        columns = (frame[name].to_list() for name in ("item_id", "title", "category"))
        self.items: list[Item] = [Item(index, *cells) for index, cells in enumerate(zip(*columns))]
        self.train_count: np.ndarray = frame["train_count"].to_numpy()
        self.train_mean: np.ndarray = frame["train_mean"].fill_null(math.nan).to_numpy()
        has_targets = "targets.parquet" in manifest["files"]
        self.targets: pl.DataFrame | None = self._read("targets.parquet", TARGET_SCHEMA) if has_targets else None
        for split in SPLITS:  # now, not when work is done; the lists are read again when they are asked for
            for file in self._checked(f"lists-{split}.parquet", LIST_SCHEMA, SIGNAL_COLUMNS):
                with _whole(file):
                    check_list_values(pl.scan_parquet(file, glob=False), len(self.items), str(file))
        for name, schema, column in (
            ("targets.parquet", TARGET_SCHEMA, "item"),
            ("seen.parquet", SEEN_SCHEMA, "items"),
        ):
            for file in self._checked(name, schema) if stored_as(files, name) else ():
                with _whole(file):
                    check_known(pl.scan_parquet(file, glob=False), column, len(self.items), str(file))
        self._lists: dict[str, Lists] = {}

    def lists(self, split: str) -> Lists:
        """The ranking lists of "train", "valid" or "test"; read, and checked against the manifest, on first use."""
        if split not in SPLITS:
            raise AlroFastError(f"unknown split {split!r}; expected one of {', '.join(SPLITS)}")
        if split not in self._lists:
            frame = self._read(f"lists-{split}.parquet", LIST_SCHEMA, SIGNAL_COLUMNS)
            self._lists[split] = Lists(self.items, frame)
        return self._lists[split]

    def rating_values(self) -> tuple[list[float], list[float]]:
        """The different ratings in histories and those of candidates, ascending, over all splits."""
        frames = [self.lists(split).frame for split in SPLITS]
        columns = ([frame[name].explode() for frame in frames] for name in ("history_ratings", "ratings"))
        shown, graded = (pl.concat(parts).drop_nulls().drop_nans().unique().sort().to_list() for parts in columns)
        return shown, graded

    def known_ratings(self, split: str) -> pl.DataFrame:
        """user_id, item, rating: what the lists say of ratings before the candidates of "valid" or "test": those of
        histories and of the candidates of earlier splits; a (user, item) that is a held-out candidate is left out."""
        frames = {name: self.lists(name).frame for name in SPLITS}
        earlier = SPLITS[: SPLITS.index(split)]
        return _distinct_ratings(frames, earlier, [name for name in SPLITS if name not in earlier])

    def seen(self) -> dict[str, np.ndarray] | None:
        """User -> uint32 indices of every item the user has rated; None: the folder does not say."""
        if not stored_as(self.manifest["files"], "seen.parquet"):
            return None
        frame = self._read("seen.parquet", SEEN_SCHEMA)
        items, offsets = _flat(frame["items"], np.uint32)
        return dict(zip(frame["user_id"].to_list(), np.split(items, offsets[1:-1])))

    def _read(self, name: str, schema: Mapping, optional: Mapping = MappingProxyType({})) -> pl.DataFrame:
        files = self._checked(name, schema, optional)
        with _whole(self.path / name):
            return pl.concat([pl.read_parquet(file, glob=False) for file in files])

    def _checked(self, name: str, schema: Mapping, optional: Mapping = MappingProxyType({})) -> list[Path]:
        """The paths of a table's files, which are those its manifest speaks of, with the columns it should have."""
        parts = stored_as(self.manifest["files"], name) or [name]
        files = [self._intact(part, schema, optional) for part in parts]
        for file in files[1:]:
            if pl.read_parquet_schema(file) != pl.read_parquet_schema(files[0]):
                raise AlroFastError(f"{file} has other columns than {files[0].name}; prepare the data again")
        return files

    def _intact(self, name: str, schema: Mapping, optional: Mapping) -> Path:
        file = self.path / name
        if not file.is_file():
            raise AlroFastError(f"{self.path} lacks {name}; prepare the data again")
        known = self.manifest["files"].get(name)
        if not isinstance(known, dict) or sha256_of(file) != known.get("sha256"):
            raise AlroFastError(f"{file} is not the file its manifest.json speaks of; prepare the data again")
        with _whole(file):
            columns = pl.read_parquet_schema(file)
        if not fits(columns, schema, optional):
            raise AlroFastError(f"{file} has columns {list(columns)}; expected {list(schema)}: prepare the data again")
        return file


@contextmanager
def _whole(file: Path) -> Iterator[None]:
    """A table that cannot be read is one line, whatever its manifest says of it."""
    try:
        yield
    except POLARS_ERRORS:
        raise AlroFastError(f"{file} is no Parquet file, or a damaged one; prepare the data again") from None


def open_prepared(path: str | Path) -> PreparedData:
    """Open a folder written by `write_prepared` (`python -m alro_fast.prepare`); AlroFastError if it is none."""
    manifest = read_manifest(Path(path))
    if manifest is None:
        raise AlroFastError(f"{path} is not a prepared data folder; make one with: python -m alro_fast.prepare")
    if manifest.get("format_version") != FORMAT_VERSION:
        raise AlroFastError(
            f"{path} has format version {manifest.get('format_version')}; this package reads {FORMAT_VERSION}: "
            "prepare the data again"
        )
    return PreparedData(Path(path), manifest)


def read_manifest(path: Path) -> dict | None:
    """manifest.json of a prepared folder; None where there is none of ours."""
    try:
        manifest = read_json(path / "manifest.json")
    except (OSError, AlroFastError):
        return None
    return manifest if isinstance(manifest, dict) and manifest.get("format") == FORMAT else None


def write_prepared(
    path: str | Path,
    items: Sequence[Item] | pl.DataFrame,
    lists_by_split: Mapping[str, Sequence[RankingList] | pl.DataFrame],
    manifest_extra: Mapping | None = None,
    targets: pl.DataFrame | None = None,
    seen: pl.DataFrame | None = None,
) -> None:
    """Write a prepared folder, whole or not at all; the same arguments give the same bytes.

    items: records, their train statistics then counted over the lists; or a frame of ITEM_SCHEMA.
    lists_by_split: records or a frame of LIST_SCHEMA, with SIGNAL_COLUMNS or not, for each split; one not given is
        empty.
    manifest_extra: what the manifest says beyond format, versions and file hashes.
    targets, seen: frames of TARGET_SCHEMA and SEEN_SCHEMA, written as targets.parquet and seen.parquet.
    An earlier prepared folder at `path` is replaced; any other content is refused.
    """
    path = Path(path)
    check_output_folder(path)
    unknown = sorted(set(lists_by_split) - set(SPLITS))
    if unknown:
        raise AlroFastError(f"unknown splits {unknown}; expected {', '.join(SPLITS)}")
    frames = {split: _list_frame(lists_by_split.get(split, ())) for split in SPLITS}
    for frame in frames.values():
        check_scale(frame)
    for index, item in enumerate(() if isinstance(items, pl.DataFrame) else items):
        if item.index != index:
            raise AlroFastError(f"item {item.item_id!r} has index {item.index} at position {index}; they must agree")
    for split, frame in frames.items():
        check_list_values(frame.lazy(), len(items), f"lists of split {split}")
    if not isinstance(items, pl.DataFrame):
        items = _item_frame(items, frames)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as work:
        written = {}
        optional = {"targets.parquet": targets, "seen.parquet": seen}
        tables = dict(zip(FILES, [items, *frames.values()]))
        tables |= {name: frame for name, frame in optional.items() if frame is not None}
        for name, frame in tables.items():
            written[name] = write_table(Path(work) / name, frame)
        (Path(work) / "manifest.json").write_text(manifest_text(written, manifest_extra or {}), encoding="utf-8")
        path.mkdir(exist_ok=True)
        (path / UNDER_WAY).touch()
        clear(path)
        for name in (UNFINISHED, MAKING):
            shutil.rmtree(path / name, ignore_errors=True)
        for name in (*tables, "manifest.json"):
            shutil.move(Path(work) / name, path / name)
        (path / UNDER_WAY).unlink()


def write_table(file: Path, frame: pl.DataFrame) -> dict[str, Any]:
    """Write a table of a prepared folder; what its manifest says of it: rows and sha256."""
    frame.write_parquet(file, compression="zstd", row_group_size=ROW_GROUP)
    return {"rows": frame.height, "sha256": sha256_of(file)}


def manifest_text(files: Mapping[str, Any], extra: Mapping[str, Any]) -> str:
    """manifest.json of a folder with these files, which are told by name as `write_table` tells them."""
    head = {"format": FORMAT, "format_version": FORMAT_VERSION, "package_version": __version__}
    return json.dumps({**head, **extra, "files": dict(files)}, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def clear(path: Path) -> None:
    """Remove the files of a prepared folder, manifest.json first: what is left of it is none."""
    for name in ("manifest.json", *FILES, *OPTIONAL_FILES):
        (path / name).unlink(missing_ok=True)
    for name in IN_PARTS:
        shutil.rmtree(path / name.removesuffix(".parquet"), ignore_errors=True)


def seen_frame(user: np.ndarray, item: np.ndarray, user_ids: pl.Series) -> pl.DataFrame:
    """Frame of SEEN_SCHEMA from the (user, item) codes of all ratings, in any order; users without any are left out."""
    items = np.uint64(1 << 32)
    pairs = np.sort(user.astype(np.uint64) * items + item.astype(np.uint64))
    frame = pl.DataFrame({"user": (pairs // items).astype(np.uint32), "items": (pairs % items).astype(np.uint32)})
    frame = frame.group_by("user", maintain_order=True).agg("items")
    return frame.select(user_ids.gather(frame["user"]).alias("user_id"), "items")


def check_output_folder(path: Path) -> None:
    """AlroFastError unless `path` can be written and is new, empty, or a prepared folder and nothing else."""
    for folder in (path, path.absolute().parent):  # new lists are written beside the old, then take their place
        check_writable(folder)
    found = contents(path)
    parts = {name.removesuffix(".parquet") for name in IN_PARTS if (path / name.removesuffix(".parquet")).is_dir()}
    foreign = sorted(found - {*FILES, *OPTIONAL_FILES, *parts, *BEGUN})
    if not foreign and found and found.isdisjoint(BEGUN) and read_manifest(path) is None:
        foreign = sorted(found)
    if foreign:
        names = ", ".join(foreign[:3]) + (", …" if len(foreign) > 3 else "")
        raise AlroFastError(f"output folder {path} holds something else ({names}); choose an empty or new one")


def _flat(column: pl.Series, dtype: type) -> tuple[np.ndarray, np.ndarray]:
    """Values of a list column end to end (null: NaN) and int64 offsets [rows + 1]."""
    lengths = column.list.len().fill_null(0).to_numpy()
    values = column.filter(column.list.len() > 0).explode()
    if values.dtype.is_float():
        values = values.fill_null(math.nan)
    return values.to_numpy().astype(dtype, copy=False), np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])


def _list_frame(lists: Sequence[RankingList] | pl.DataFrame) -> pl.DataFrame:
    if isinstance(lists, pl.DataFrame):
        if not fits(lists.schema, LIST_SCHEMA, SIGNAL_COLUMNS):
            raise AlroFastError(f"list frame has columns {dict(lists.schema)}; expected {LIST_SCHEMA}")
        return lists
    rows = [
        (
            one.list_id,
            one.user_id,
            [item.index for item in one.history],
            list(one.history_ratings),
            [item.index for item in one.candidates],
            _nan_to_none(one.ratings),
            one.all_equal,
            None,
            None,
        )
        for one in lists
    ]
    beside = {}
    for name in SIGNALS:
        found = [one.signal(name) for one in lists]
        if any(signal.candidates or signal.history for signal in found):
            columns = {"hints": "candidates"} if name == "hint" else {
                f"history_{name}": "history", f"candidate_{name}": "candidates"
            }  # fmt: skip
            for column, part in columns.items():
                values = [_nan_to_none(getattr(signal, part)) or None for signal in found]
                if any(values):
                    beside[column] = pl.Series(values, dtype=SIGNAL_COLUMNS[column])
    return pl.DataFrame(rows, schema=LIST_SCHEMA, orient="row").with_columns(**beside)


def _nan_to_none(values: Sequence[float]) -> list[float | None]:
    return [None if math.isnan(value) else value for value in values]


def _item_frame(items: Sequence[Item], frames: Mapping[str, pl.DataFrame]) -> pl.DataFrame:
    """Items with statistics over the distinct (user, item) ratings in the lists, held-out candidates left out."""
    ratings = _distinct_ratings(frames, ("train",), ("valid", "test"))
    count, mean = train_statistics(ratings["item"].to_numpy(), ratings["rating"].to_numpy(), len(items))
    columns = {name: [getattr(item, name) for item in items] for name in ("item_id", "title", "category")}
    frame = pl.DataFrame(columns, schema=dict.fromkeys(columns, pl.String))
    return frame.with_columns(train_count=count, train_mean=mean)


def _distinct_ratings(
    frames: Mapping[str, pl.DataFrame], shown: Sequence[str], held_out: Sequence[str]
) -> pl.DataFrame:
    """user_id, item, rating: distinct (user, item) ratings in the candidates of splits `shown` and in all histories,
    without those of any candidate of splits `held_out`."""
    seen = [frames[split].select("user_id", item="candidates", rating="ratings") for split in shown]
    seen += [frame.select("user_id", item="history", rating="history_ratings") for frame in frames.values()]
    hidden = pl.concat([frames[split].select("user_id", item="candidates") for split in held_out])
    ratings = pl.concat([f.filter(pl.col("item").list.len() > 0).explode("item", "rating") for f in seen])
    ratings = ratings.drop_nulls("rating").unique(subset=["user_id", "item"], keep="first", maintain_order=True)
    return ratings.join(hidden.explode("item"), on=["user_id", "item"], how="anti", maintain_order="left")


def train_statistics(item: np.ndarray, rating: np.ndarray, items: int) -> tuple[pl.Series, pl.Series]:
    """Number and mean of the ratings of each item; mean null where there is none."""
    return mean_of(np.bincount(item, minlength=items), np.bincount(item, weights=rating, minlength=items))


def mean_of(count: np.ndarray, total: np.ndarray) -> tuple[pl.Series, pl.Series]:
    """Columns train_count and train_mean of items with so many ratings of this sum."""
    mean = np.divide(total, count, out=np.full(len(count), np.nan), where=count > 0)
    return pl.Series(count.astype(np.int64)), pl.Series(mean).fill_nan(None)
