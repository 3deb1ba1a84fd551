"""Two runs (or evaluations) of the same lists, list by list: a table in 80 columns, and a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ...data.records import RankingList
from ...errors import AlroFastError
from .. import metrics
from ..results import Results, evaluate_lists, judged
from ..targets import evaluate_targets
from .examples import Example, compared
from .figures import span_of
from .files import list_of, read_predictions, read_results, read_yaml
from .numbers import gain_of
from .page import pages, shown_options
from .tables import Table, write_tables


class Side(NamedTuple):
    """One of the two: how it is called, and what was read of it."""

    name: str
    results: dict[str, Any]
    lines: dict[str, dict[str, Any]]  # predictions by list
    config: dict[str, Any]


class Comparison(NamedTuple):
    """What a page and a table show of two sides."""

    sides: tuple[Side, Side]
    measured: Results  # of both, by their names, on the lists they share
    metrics: list[str]
    changes: dict[str, metrics.Comparison]  # metric -> second minus first
    options: dict[str, tuple[Any, Any]]  # in which their runs differ
    examples: dict[str, list[Example]]


def write_comparison(first: str | Path, second: str | Path, folder: str | Path | None = None) -> tuple[Path, str]:
    """Write report.html and tables/*.csv of two folders with results.json and predictions.jsonl into `folder` (default:
    `comparison` in the second); the page's path, and the table as text.

    Pairs are formed by list id. AlroFastError where the two share no list, or where a list they share has other
    candidates or ratings in each, or where one measured targets or another gain and the other did not.
    """
    made = compare(Path(first), Path(second))
    folder = Path(second) / "comparison" if folder is None else Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tables = tables_of(made)
    reach = [end for change in made.changes.values() for end in (change.low, change.high)]
    page = (
        pages()
        .get_template("comparison.html.jinja")
        .render(
            title=f"{made.sides[1].name} beside {made.sides[0].name}",
            first=made.sides[0].name,
            second=made.sides[1].name,
            metric=made.measured.headline,
            lists=len(made.measured.users),
            users=len(np.unique(made.measured.users)),
            left_out=[len(side.lines) - made.measured.lists for side in made.sides],
            means={name: [made.measured.mean(side.name, name) for side in made.sides] for name in made.metrics},
            changes=made.changes,
            span=span_of(reach, 0.0),
            options=made.options,
            examples=made.examples,
            tables=tables,
        )
    )
    write_tables(folder, tables.values())
    path = folder / "report.html"
    path.write_text(page, encoding="utf-8")
    return path, text_of(made)


def compare(first: Path, second: Path) -> Comparison:
    """Read both, and measure them on the lists they share."""
    if first.resolve() == second.resolve():
        raise AlroFastError(f"{first} and {second} are twice the same folder; give two")
    sides = read(first), read(second)
    ours, theirs = sides
    kinds = [("ceiling" in side.results["about"], gain_of(side.results)) for side in sides]
    if kinds[0] != kinds[1]:
        raise AlroFastError(
            f"{first} and {second} were not measured alike (targets or graded lists, --gain); evaluate one again"
        )
    shared = [name for name in ours.lines if name in theirs.lines]
    if not shared:
        raise AlroFastError(f"{first} and {second} share no list; evaluate both on the same lists and split")
    pairs = [(ours.lines[name], theirs.lines[name]) for name in shared]
    other = next((one["list_id"] for one, two in pairs if one["candidates"] != two["candidates"]), None)
    if other is not None:
        raise AlroFastError(
            f"list {other} has other candidates or ratings in {first} than in {second}; evaluate both on the same lists"
        )
    lists = [list_of(one) for one, _ in pairs]
    scores = {
        side.name: [side.lines[name]["rankings"][judged(side.lines[name]["rankings"])]["scores"] for name in shared]
        for side in sides
    }
    measured = _measure(lists, scores, *kinds[0])
    if not len(measured.users):
        raise AlroFastError(f"{first} and {second} share no list with something to rank; evaluate both on more lists")
    longest = max(len(one.candidates) for one in lists)
    full = {f"hr@{k}" for k in measured.cutoffs if k >= longest}  # the same whatever the order
    names = [name for name in measured.per_list[ours.name] if name not in full]
    changes = {name: measured.compare(theirs.name, ours.name, name) for name in names}
    before, after = (shown_options(side.config) for side in sides)
    options = {
        name: (before.get(name, "–"), after.get(name, "–"))
        for name in sorted({*before, *after} - {"output_dir"})
        if before.get(name) != after.get(name)
    }
    found = compared(pairs, (ours.name, theirs.name), kinds[0][0], measured.headline, kinds[0][1])
    return Comparison(sides, measured, names, changes, options, found)


def read(folder: Path) -> Side:
    """AlroFastError for a folder without results, or without predictions."""
    results, lines = read_results(folder), read_predictions(folder)
    if not lines:
        raise AlroFastError(f"{folder} holds no predictions.jsonl; evaluate it again")
    place = folder.parent if folder.resolve().name == "evaluation" else folder
    config = read_yaml(folder / "config.yaml") or read_yaml(place / "config.yaml")
    return Side(str(folder), results, {one["list_id"]: one for one in lines}, config)


def _measure(
    lists: Sequence[RankingList], scores: Mapping[str, list[list[float]]], targets: bool, gain: str
) -> Results:
    return evaluate_targets(lists, scores) if targets else evaluate_lists(lists, scores, gain=gain)


def text_of(made: Comparison) -> str:
    """A row per metric, and in a sentence what the headline says."""
    first, second = (side.name for side in made.sides)
    lines = [
        f"A  {first}",
        f"B  {second}",
        f"{len(made.measured.users)} lists with something to rank, of {len(np.unique(made.measured.users))} users",
        "",
        f"{'':<10}{'A':>9}{'B':>9}{'B - A':>10}{'95 % interval':>22}{'p':>8}",
    ]
    for name, change in made.changes.items():
        interval = f"[{change.low:+.4f}, {change.high:+.4f}]"
        p = "<.001" if change.p_value < 0.001 else f"{change.p_value:.3f}".removeprefix("0")
        means = "".join(f"{made.measured.mean(side.name, name):>9.4f}" for side in made.sides)
        lines.append(f"{name.upper():<10}{means}{change.difference:>+10.4f}{interval:>22}{p:>8}")
    if told := made.changes.get(made.measured.headline):
        said = "not told apart from" if told.p_value >= 0.05 else "above" if told.difference > 0 else "below"
        lines += ["", f"{made.measured.headline.upper()}, paired over users: B is {said} A (p < .05)"]
    return "\n".join(lines)


def tables_of(made: Comparison) -> dict[str, Table]:
    """The differences, and the metrics of every list."""
    first, second = (side.name for side in made.sides)
    rows = [
        (name, made.measured.mean(first, name), made.measured.mean(second, name), *change)
        for name, change in made.changes.items()
    ]
    columns = ("metric", first, second, "difference", "low", "high", "p_value")
    names = [name for name, line in made.sides[0].lines.items() if name in made.sides[1].lines]
    kept = [name for name in names if "ceiling" in made.sides[0].results["about"] or _ranked(made, name)]
    metric = made.measured.headline
    values = zip(kept, made.measured.users, *(made.measured.per_list[name][metric] for name in (first, second)))
    return {
        "differences": Table("differences", columns, rows),
        "lists": Table("lists", ("list", "user", f"{metric} {first}", f"{metric} {second}"), list(values)),
    }


def _ranked(made: Comparison, name: str) -> bool:
    return not list_of(made.sides[0].lines[name]).all_equal
