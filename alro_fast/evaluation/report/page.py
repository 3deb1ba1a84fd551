"""report.html of a run or an evaluation: what the page shows is gathered here, pages/ shows it.

One self-contained page: no script, no outside request, titles escaped, and no library to draw with. A section without
its data is left out, and so is what cannot vary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ..results import LABELS, judged
from .examples import examples
from .figures import COLOURS, Chart, Span, loss_chart, order_chart, position_chart, side, span_of, validation_chart
from .files import read_history, read_predictions, read_results, read_yaml
from .numbers import (
    best_without_a_model,
    gain_of,
    headline,
    only_validation,
    placed_rankers,
    rankers,
    speed_rows,
    told_by,
    varying,
)
from .tables import Table, write_tables


def write_report(folder: str | Path, run_folder: str | Path | None = None) -> Path:
    """Write report.html and tables/*.csv into `folder`, from the files there; returns the page's path.

    run_folder: where training left trainer_state.json and config.yaml, when that is another folder.
    Raises AlroFastError without results.json, or where a file is damaged.
    """
    folder = Path(folder)
    run_folder = Path(run_folder or folder)
    results, predictions = read_results(folder), read_predictions(folder)
    history, config = read_history(run_folder), read_yaml(run_folder / "config.yaml")

    about, metric, mine = results["about"], headline(results), judged(results)
    placed, note = placed_rankers(results)
    best = best_without_a_model(results)
    charts = {
        "position": position_chart(predictions, placed),
        "order": order_chart(predictions),
        "loss": loss_chart(history),
        "validation": validation_chart(history),
    }
    first = next(iter(results.values()))
    measured, same = varying(results, [key for key in first if f"{key}_interval" in first])
    within, _ = varying(results, [key for key in first if key.startswith("within_")])
    comparisons = about.get("comparisons", [])
    contest = {one["second"]: one for one in comparisons if (one["first"], one["metric"]) == (mine, metric)}
    tables = tables_of(results, charts, history)
    page = (
        pages()
        .get_template("report.html.jinja")
        .render(
            title=f"Ranking report: {title_of(folder)}",
            results=results,
            about=about,
            mine=mine,
            metric=metric,
            options=shown_options(config),
            rankers=rankers(results),
            tiles=[name for name in dict.fromkeys((mine, "fused", "untuned", best, "random")) if name in results],
            colours=COLOURS,
            span=metric_span(results, metric),
            contest=contest,
            differences=span_of([one[end] for one in contest.values() for end in ("low", "high")], 0.0),
            metrics=measured,
            same=same,
            within=within,
            verdict=contest.get("untuned"),
            best=best,
            cuts=cuts_of(about),
            note=note,
            order=told_by(results, "order_kendall_tau"),
            repeated=told_by(results, "shown_kendall_tau"),
            validated=only_validation(history),
            speed=speed_rows(results, history),
            examples=examples(predictions, "ceiling" in about, metric, gain_of(results)),
            charts=charts,
            tables=tables,
        )
    )
    path = folder / "report.html"
    path.unlink(missing_ok=True)  # last, so that it is of the tables beside it
    write_tables(folder, tables.values())
    path.write_text(page, encoding="utf-8")
    return path


def report_line(folder: str | Path, run_folder: str | Path | None = None) -> str:
    """Write the report and say where it is, or why there is none: what was measured does not fail with its page."""
    try:
        return f"report: {write_report(folder, run_folder)}"
    except Exception as error:
        return f"no report.html: {str(error).strip().partition(chr(10))[0] or type(error).__name__}"


def title_of(folder: Path) -> str:
    """The name of a run; an evaluation within a run is called by both names."""
    name, parent = folder.resolve().name, folder.resolve().parent
    return f"{parent.name}/{name}" if name == "evaluation" else name


def shown_options(config: Mapping[str, Any]) -> dict[str, str]:
    """The options that the run read and that say something, lists as words."""
    return {
        name: ", ".join(map(str, value)) if isinstance(value, list) else str(value).lower() if value is True else value
        for name, value in config.items()
        if value is not None and value is not False
    }


def metric_span(results: Mapping[str, Any], metric: str) -> Span:
    """From the lowest to the highest end of the rankers' intervals."""
    values = []
    for name in rankers(results):
        ends = results[name].get(f"{metric}_interval", [])
        values += [value for value in (results[name].get(metric), *ends) if value is not None]
    return span_of(values)


def cuts_of(about: Mapping[str, Any]) -> dict[str, tuple[Sequence[str], list[dict[str, Any]], Span]]:
    """What lists are cut by -> rankers, segments, and the numbers they span; a single segment says nothing."""
    found: dict[str, tuple[Sequence[str], list[dict[str, Any]], Span]] = {}
    for cut, segments in about.get("breakdown", {}).items():
        names = [name for name in segments[0] if name not in ("range", "lists", "users")]
        values = [value for one in segments for name in names for value in one[name] if value is not None]
        if len(segments) > 1:
            found[cut] = names, segments, span_of(values)
    return found


def tables_of(
    results: Mapping[str, Any], charts: Mapping[str, Chart | None], history: Sequence[Mapping[str, Any]]
) -> dict[str, Table]:
    """Every table of the page and the numbers of every figure, in full and with what the page leaves out."""
    about, first = results["about"], next(iter(results.values()))
    names = [key for key in first if f"{key}_interval" in first or key.startswith("within_")]
    head, rows = ["ranker"], []
    for name in names:
        head += [name, f"{name} low", f"{name} high"] if f"{name}_interval" in first else [name]
    for ranker in rankers(results):
        row = [ranker]
        for name in names:
            row += [results[ranker].get(name), *results[ranker].get(f"{name}_interval", [])]
        rows.append(row)
    found = {"quality": Table("quality", head, rows)}
    columns = ("first", "second", "metric", "difference", "low", "high", "p_value")
    comparisons = [[one[column] for column in columns] for one in about.get("comparisons", [])]
    found["differences"] = Table("differences", columns, comparisons)
    segments = [
        (cut, one["range"], one["lists"], one["users"], name, *one[name])
        for cut, each in about.get("breakdown", {}).items()
        for one in each
        for name in one
        if name not in ("range", "lists", "users")
    ]
    cells = ("cut", "segment", "lists", "users", "ranker", headline(results), "low", "high")
    found["segments"] = Table("segments", cells, segments)
    found["speed"] = Table("speed", ("what", "value", "unit"), speed_rows(results, history))
    return found | {name: chart.table for name, chart in charts.items() if chart is not None}


def _p(value: float | None) -> str:
    return "–" if value is None else "< .001" if value < 0.001 else f"{value:.3f}".removeprefix("0")


def pages() -> Environment:
    """The templates of pages/, and the filters they use."""
    pages = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "pages"), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=StrictUndefined,
    )  # fmt: skip
    pages.filters["label"] = lambda ranker: LABELS.get(ranker, ranker)
    pages.filters["number"] = lambda value, digits=4: "–" if value is None else f"{value:.{digits}f}"
    pages.filters["signed"] = lambda value, digits=4: "–" if value is None else f"{value:+.{digits}f}"
    pages.filters["p"] = lambda value: (
        "–" if value is None else "< .001" if value < 0.001 else f"{value:.3f}".removeprefix("0")
    )
    pages.filters["side"] = side
    pages.filters["whole"] = lambda value: f"{value:,}"
    pages.filters["metric"] = lambda name: name.removeprefix("within_").upper()
    return pages
