"""report.html of a study: its tables and figures, what its variants are, and links to the pages of its runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import TemplateError

from ..errors import AlroFastError
from ..evaluation.report.figures import Span, span_of
from ..evaluation.report.page import pages

TABLE = "table.json"


def is_study(folder: str | Path) -> bool:
    """Whether a folder is one of `alro_fast.study` that has a table."""
    return (Path(folder) / TABLE).is_file()


def write_study_report(folder: str | Path) -> Path:
    """Write report.html into a study's folder, from table.json there; returns its path.

    AlroFastError for a damaged table.
    """
    folder = Path(folder)
    try:
        page = _page(folder, json.loads((folder / TABLE).read_text(encoding="utf-8")))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, TemplateError):
        raise AlroFastError(f"{folder / TABLE} is damaged; run alro_fast.study again, which writes it anew") from None
    path = folder / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def _page(folder: Path, told: dict[str, Any]) -> str:
    study = told["study"]
    runs = [path.relative_to(folder) for path in sorted((folder / "runs").glob("*/seed-*/**/report.html"))]
    runs = [path for path in runs if "evaluation" not in path.parts]
    return (
        pages()
        .get_template("study.html.jinja")
        .render(
            title=f"Study: {study['name']}",
            **{key: study[key] for key in ("metric", "ranker", "baseline", "seeds", "base")},
            variants={name: _options(options) for name, options in study["variants"].items()},
            measures=told["measures"],
            untuned=told["untuned"],
            spans={measure: span for measure, rows in told["measures"].items() if (span := _span(rows))},
            runs={"/".join(path.parts[1:-1]): quote(path.as_posix()) for path in runs},
        )
    )


def _span(rows: list[dict[str, Any]]) -> Span | None:
    """The numbers that the differences of a measure reach, of single seeds too; None without any."""
    compared = [one for one in rows if "difference" in one]
    reach = [value for one in compared for value in (one["low"], one["high"], *one["difference_by_seed"].values())]
    return span_of(reach, 0.0) if reach else None


def _options(options: dict | None) -> str:
    told = (f"without {key}" if value is None else f"{key} {value}" for key, value in (options or {}).items())
    return ", ".join(told) or "as the base"
