"""report.html of a study: its tables, its plot, what its variants are, and links to the pages of its runs."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import TemplateError

from ..errors import AlroFastError
from ..evaluation.plots import Picture
from ..evaluation.report import pages

TABLE, PICTURE = "table.json", "differences.png"


def is_study(folder: str | Path) -> bool:
    """Whether a folder is one of `alro_fast.study` that has a table."""
    return (Path(folder) / TABLE).is_file()


def write_study_report(folder: str | Path) -> Path:
    """Write report.html into a study's folder, from table.json and differences.png there; returns its path.

    AlroFastError for a damaged table.
    """
    folder = Path(folder)
    try:
        page = _page(folder, json.loads((folder / TABLE).read_text(encoding="utf-8")))
    except (ValueError, LookupError, TypeError, AttributeError, TemplateError):
        raise AlroFastError(f"{folder / TABLE} is damaged; run alro_fast.study again, which writes it anew") from None
    path = folder / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def _page(folder: Path, told: dict[str, Any]) -> str:
    study, picture = told["study"], None
    if (folder / PICTURE).is_file():
        code = base64.b64encode((folder / PICTURE).read_bytes()).decode()
        picture = Picture(f"Differences to {study['baseline']}", f"data:image/png;base64,{code}")
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
            picture=picture,
            runs={"/".join(path.parts[1:-1]): quote(path.as_posix()) for path in runs},
        )
    )


def _options(options: dict | None) -> str:
    told = (f"without {key}" if value is None else f"{key} {value}" for key, value in (options or {}).items())
    return ", ".join(told) or "as the base"
