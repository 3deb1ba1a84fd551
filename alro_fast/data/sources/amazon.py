"""Amazon Reviews of 2014, 2018 and 2023: reviews as JSON lines or ratings as CSV, and products as JSON lines.

Formats as the publisher's pages and the files' readers elsewhere describe them; none is shipped or fetched.
"""

from __future__ import annotations

import ast
import html
import io
import json
from dataclasses import asdict
from pathlib import Path

import polars as pl

from ...errors import AlroFastError
from .columns import Columns, RawData, Wanted, item_table, need_columns, pick, rating_columns
from .files import blocks, polars_errors, scan_table

AMAZON_COLUMNS = {
    "amazon-2014": Columns("reviewerID", "asin", "overall", "unixReviewTime"),
    "amazon-2018": Columns("reviewerID", "asin", "overall", "unixReviewTime"),
    "amazon-2023": Columns("user_id", "parent_asin", "rating", "timestamp"),
}
WITHOUT_HEADER = {  # the order of the columns of the files of ratings alone
    "amazon-2014": ["user", "item", "rating", "time"],
    "amazon-2018": ["item", "user", "rating", "time"],
}


def read_amazon(edition: str, ratings: Path, metadata: Path, columns: Columns, workdir: Path) -> RawData:
    """A category: reviews (JSON lines; all editions) or ratings alone (.csv; with a header in 2023), and its products.

    Each gzipped or not. The 2014 metadata are Python literals rather than JSON; both are read. Products nobody reviewed
    are left out later.
    """
    scan = (_ratings if ".csv" in ratings.suffixes else _reviews)(edition, ratings, columns, workdir)
    with polars_errors(ratings):
        rated = set(scan.select(pl.col("item").unique()).collect(engine="streaming")["item"])
    items = _products(metadata, "parent_asin" if edition == "amazon-2023" else "asin", rated)
    return RawData(scan, items, (ratings, metadata), "ms" if edition == "amazon-2023" else "s", rated_items_only=True)


def _ratings(edition: str, path: Path, columns: Columns, workdir: Path) -> pl.LazyFrame:
    if edition not in WITHOUT_HEADER:
        names = columns.over(AMAZON_COLUMNS[edition])
        return pick(scan_table(path, None, workdir), path, rating_columns(names))
    given = [name for name, column in asdict(columns).items() if column]
    if given:
        raise AlroFastError(
            f"{path.name} of {edition} has no header: --{given[0]}_column names nothing there; leave it out"
        )
    return scan_table(path, None, workdir, WITHOUT_HEADER[edition]).select("user", "item", "rating", "time")


def _reviews(edition: str, path: Path, columns: Columns, workdir: Path) -> pl.LazyFrame:
    """The four fields of every review, kept in `workdir` a block at a time."""
    wanted = rating_columns(columns.over(AMAZON_COLUMNS[edition]))
    parts: list[Path] = []
    for block in blocks(path):
        if not parts:
            need_columns(list(_record(block.split(b"\n", 1)[0], path)), path, wanted)
        part = workdir / f"reviews-{len(parts):05d}.parquet"
        _review_block(block, path, wanted).write_parquet(part, compression="lz4")
        parts.append(part)
    if not parts:
        raise AlroFastError(f"{path.name} is empty; one JSON review per line is expected")
    return pl.concat([pl.scan_parquet(part, glob=False) for part in parts])


def _record(line: bytes, path: Path) -> dict:
    """One JSON object, or one dictionary of Python literals: nothing in a line is run."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        try:
            record = ast.literal_eval(line.decode())
        except (
            ValueError,
            SyntaxError,
            RecursionError,
            MemoryError,
        ):  # the last two: thousands of brackets in brackets
            record = None
    if not isinstance(record, dict):
        raise AlroFastError(f"{path.name} holds a line that is no JSON object: {line[:60]!r}")
    return record


def _review_block(block: bytes, path: Path, wanted: Wanted) -> pl.DataFrame:
    """The four wanted fields of a block of reviews, as text."""
    names = {target: column for target, (column, _) in wanted.items()}
    try:
        table = pl.read_ndjson(io.BytesIO(block), schema=dict.fromkeys(names.values(), pl.String))
    except pl.exceptions.PolarsError:
        records = [_record(line, path) for line in block.splitlines() if line.strip()]
        cells = {c: [None if r.get(c) is None else str(r[c]) for r in records] for c in names.values()}
        table = pl.DataFrame(cells, schema=dict.fromkeys(names.values(), pl.String))
    return table.select(pl.col(column).alias(target) for target, column in names.items())


def _products(path: Path, key: str, rated: set[str]) -> pl.DataFrame:
    rows: dict[str, tuple[str, str | None, list[str]]] = {}
    for block in blocks(path):
        for line in block.splitlines():
            if not line.strip():
                continue
            record = _record(line, path)
            item_id = record.get(key)
            if isinstance(item_id, str) and item_id in rated and item_id not in rows:
                rows[item_id] = (item_id, _title(record.get("title")), _category(record))
    if not rows:
        raise AlroFastError(f"{path.name} describes none of the reviewed products by {key!r}; is it their metadata?")
    return item_table(rows.values())


def _title(title: object) -> str | None:
    """One line of text; the 2018 edition has page source for some titles, recognisable by "getTime": none then."""
    text = " ".join(html.unescape(title).split()) if isinstance(title, str) else ""
    return None if not text or "getTime" in text else text


def _category(record: dict) -> list[str]:
    """The path below the department, three levels at most (deeper ones are feature lists), else the department."""
    path = record.get("categories") or record.get("category") or []
    path = path if isinstance(path, list) else [path]
    if path and isinstance(path[0], list):
        path = path[0]
    names = [" ".join(html.unescape(name).split()) for name in path if isinstance(name, str)]
    main = record.get("main_category") or record.get("main_cat")
    if names:
        return names[1:4] or names
    return [main] if isinstance(main, str) and "<" not in main else []
