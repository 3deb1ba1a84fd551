"""Book-Crossing (Ziegler et al. 2005): books graded 1 to 10, without times, in either of the forms it is found in.

The original dump has semicolons, quotes around every cell, a backslash before a quote inside one, and Latin-1; copies
under newer names are plain CSV in UTF-8. In both, some books have lost the quotes between title and author, and the two
stand in one cell, `title\\";author`: the author is then taken from there. A grade of 0 says that a user has a book, not
what they think of it: left out, and counted. Formats as secondary sources describe them; the files were not at hand.
"""

from __future__ import annotations

import html
import re
from pathlib import Path

import polars as pl

from ...errors import AlroFastError
from .columns import NO_TIME, Columns, LeftOut, RawData, item_columns, item_table, pick, rating_columns
from .files import polars_errors, scan_csv, text_lines

BOOK_COLUMNS = Columns("User-ID", "ISBN", "Book-Rating", NO_TIME, "Book-Title", "Book-Author")
CELL = re.compile(r'"((?:\\.|[^\\])*?)"(?=;|$)|([^";]*)(?=;|$)')  # quoted: up to a quote before a semicolon or the end
LOST = '\\";'  # between a title and its author


def read_book_crossing(ratings: Path, items: Path, columns: Columns) -> RawData:
    """The ratings (user, ISBN, grade) and the books (ISBN, title, author); the author is the category."""
    names = columns.over(BOOK_COLUMNS)
    wanted = rating_columns(names)
    del wanted["time"]
    table, bad_ratings = _table(ratings)
    table = pick(table, ratings, wanted).with_columns(time=pl.lit(0, pl.Int64))
    implicit = (pl.col("rating").cast(pl.Float64, strict=False) == 0).fill_null(False)
    with polars_errors(ratings):
        zeros = table.select(implicit.sum()).collect(engine="streaming").item()
    described, bad_books = _table(items)
    with polars_errors(items):
        books = pick(described, items, item_columns(names, BOOK_COLUMNS)).collect()
    left_out = (
        LeftOut("implicit_ratings_left_out", zeros, "ratings of 0 left out: they are implicit, no grades"),
        LeftOut("broken_lines_left_out", bad_ratings, f"lines of {ratings.name} cannot be split into cells: left out"),
        LeftOut("broken_books_left_out", bad_books, f"lines of {items.name} cannot be split into cells: left out"),
    )
    rows = (_book(*row) for row in books.iter_rows())
    return RawData(table.filter(~implicit), item_table(rows), (ratings, items), NO_TIME, True, left_out)


def _table(path: Path) -> tuple[pl.LazyFrame, int]:
    """Text cells by the names of the header, and the number of lines that could not be split."""
    with path.open("rb") as file:
        header = file.readline(1 << 16)
    if b";" not in header:
        return scan_csv(path), 0
    lines = text_lines(path)
    names = _cells(next(lines))
    if names is None or len(set(names)) < len(names):
        raise AlroFastError(f"{path.name} does not begin with the names of its columns; is it a file of Book-Crossing?")
    rows = [_mended(_cells(line), len(names)) for line in lines if line]
    whole = [row for row in rows if row is not None]
    return pl.LazyFrame(whole, schema=dict.fromkeys(names, pl.String), orient="row"), len(rows) - len(whole)


def _cells(line: str) -> list[str] | None:
    """The cells of a line, backslashes kept; None where quotes do not close."""
    cells, at = [], 0
    while True:
        found = CELL.match(line, at)
        if found is None:
            return None
        cells.append(found[1] if found[1] is not None else found[2])
        if found.end() == len(line):
            return cells
        at = found.end() + 1


def _mended(cells: list[str] | None, width: int) -> list[str] | None:
    """A line of `width` cells; one too few where a title took its author along; None for others."""
    if cells is not None and len(cells) == width - 1 > 1 and LOST in cells[1]:
        cells.insert(2, "")
    return cells if cells is not None and len(cells) == width else None


def _book(isbn: str, title: str | None, author: str | None) -> tuple[str, str | None, list[str]]:
    title, lost, joined = (title or "").partition(LOST)
    return isbn, _plain(title) or None, [_plain(joined.strip('"') if lost else author or "")]


def _plain(cell: str) -> str:
    r"""One line of text without escapes: \" of the dump, &amp; of the pages it was taken from."""
    return " ".join(html.unescape(re.sub(r"\\(.)", r"\1", cell)).split())
