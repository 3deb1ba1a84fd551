"""Tables of a report as CSV: files in tables/, and the same as links within the page, which travels alone."""

from __future__ import annotations

import base64
import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple


class Table(NamedTuple):
    """Numbers under names; None: there is none."""

    name: str
    head: Sequence[str]
    rows: Sequence[Sequence[Any]]

    @property
    def csv(self) -> str:
        """As text, numbers in full."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(self.head)
        writer.writerows(self.rows)
        return text.getvalue()

    @property
    def link(self) -> str:
        """The same as a data: URL."""
        return f"data:text/csv;base64,{base64.b64encode(self.csv.encode()).decode()}"


def write_tables(folder: Path, tables: Iterable[Table | None]) -> None:
    """tables/<name>.csv of those that have rows; those of an earlier report that are no longer made are removed."""
    made = {f"{table.name}.csv": table for table in tables if table is not None and table.rows}
    place = folder / "tables"
    place.mkdir(exist_ok=True)
    for name, table in made.items():
        (place / name).write_text(table.csv, encoding="utf-8")
    for path in place.glob("*.csv"):
        if path.name not in made:
            path.unlink()
