"""What a study found: a mean per variant, and paired differences to one of them, with intervals.

A difference is taken within (user, seed): two variants trained with one seed rank the same lists of the same user. What
is drawn for the interval, and flipped for p, are users; where all seeds share a catalogue, a user with all of their
seeds, since those are no new users. The spread over seeds stands beside it: what another seed may do.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np

from ..errors import AlroFastError
from ..evaluation import metrics
from ..evaluation.results import plain
from .figures import AGREEMENT, Figures, by_user, figures, intact
from .plan import Study
from .runs import finished


class Row(NamedTuple):
    """A variant in one measure. difference: to the baseline; None for the baseline itself, and with nothing in common.

    by_seed: seed -> mean; differences: seed -> mean difference; pairs: how many differences were taken; users: how many
    were drawn.
    """

    variant: str
    mean: float
    by_seed: dict[int, float]
    difference: metrics.Comparison | None = None
    differences: dict[int, float] = {}  # noqa: RUF012
    pairs: int = 0
    users: int = 0

    @property
    def spread(self) -> float:
        """Standard deviation of the means over seeds; NaN for one seed."""
        return _deviation(self.by_seed)

    @property
    def difference_spread(self) -> float:
        """The same of the differences."""
        return _deviation(self.differences)


def untuned(study: Study) -> dict[str, float]:
    """Measure -> mean over seeds of the baseline's runs before tuning, where they tell."""
    means: dict[str, list[float]] = {}
    for run in study.runs:
        if run.variant != study.baseline or not study.ranks_lists:
            continue
        for measure, file, key in (
            (study.metric, run.measured / "results.json", study.metric),
            (AGREEMENT, study.evaluation(run) / "results.json", "order_kendall_tau"),
        ):
            if file.is_file():
                with suppress(AlroFastError), intact(file):  # `table` has complained of it
                    value = json.loads(file.read_text(encoding="utf-8")).get("untuned", {}).get(key)
                    means.setdefault(measure, []).extend([] if value is None else [float(value)])
    return {measure: float(np.mean(values)) for measure, values in means.items() if values}


def table(study: Study) -> tuple[dict[str, list[Row]], dict[str, str]]:
    """Measure -> a row per variant with a finished run, the baseline's first; and, of runs whose files cannot be read
    and which are left out, title -> why."""
    found: dict[str, dict[str, dict[int, Figures]]] = {}
    unread: dict[str, str] = {}
    for run in study.runs:
        if not finished(study, run):
            continue
        try:
            for measure, each in figures(study, run).items():
                found.setdefault(measure, {}).setdefault(run.variant, {})[run.seed] = each
        except AlroFastError as error:
            unread[run.title] = str(error)
    order = sorted(study.variants, key=lambda variant: variant != study.baseline)
    rows = {
        measure: [
            row(name, seeds[name], seeds.get(study.baseline, {}), study.baseline) for name in order if name in seeds
        ]
        for measure, seeds in found.items()
    }
    return rows, unread


def row(variant: str, mine: Mapping[int, Figures], base: Mapping[int, Figures], baseline: str) -> Row:
    """One variant beside the baseline, over the seeds that both have."""
    by_seed = {seed: each.mean for seed, each in mine.items()}
    mean = float(np.mean(list(by_seed.values())))
    both = {seed: pairs(mine[seed], base[seed]) for seed in mine if seed in base and variant != baseline}
    both = {seed: pair for seed, pair in both.items() if len(pair[0])}
    if not both:
        return Row(variant, mean, by_seed)
    differences = np.concatenate([pair[0] for pair in both.values()])
    users = np.concatenate([pair[1] for pair in both.values()])
    compared = metrics.compare(differences, np.zeros_like(differences), users)
    each = {seed: float(pair[0].mean()) for seed, pair in both.items()}
    return Row(variant, mean, by_seed, compared, each, len(differences), len(np.unique(users)))


def pairs(mine: Figures, base: Figures) -> tuple[np.ndarray, np.ndarray]:
    """Differences mine - base [P] and whose they are [P]: by list where both ranked the same ones; else by the users
    that both have, each by the mean of their lists."""
    if mine.values.keys() != base.values.keys():
        mine, base = by_user(mine), by_user(base)
    names = [name for name in mine.values if name in base.values]
    differences = np.array([mine.values[name] - base.values[name] for name in names])
    return differences, np.array([f"{base.catalogue}/{base.users[name]}" for name in names])


def to_json(study: Study, measured: Mapping[str, Sequence[Row]]) -> dict[str, Any]:
    """The study as it was run and, per measure, everything of every row."""
    rows = {
        measure: [
            {
                "variant": one.variant,
                "mean": plain(one.mean),
                "seed_sd": plain(one.spread),
                "by_seed": {str(seed): plain(value) for seed, value in one.by_seed.items()},
                **({name: plain(value) for name, value in one.difference._asdict().items()} if one.difference else {}),
                **(
                    {
                        "difference_seed_sd": plain(one.difference_spread),
                        "difference_by_seed": {str(seed): plain(value) for seed, value in one.differences.items()},
                        "pairs": one.pairs,
                        "users": one.users,
                    }
                    if one.difference
                    else {}
                ),
            }
            for one in each
        ]
        for measure, each in measured.items()
    }
    return {"study": study.described(), "untuned": untuned(study), "measures": rows}


def to_markdown(study: Study, measured: Mapping[str, Sequence[Row]]) -> str:
    """A table per measure, as the command prints it."""
    before, parts = untuned(study), [f"# {study.name}"]
    for measure, rows in measured.items():
        parts += [
            f"\n{measure} of `{study.ranker}`, mean over seeds; differences to {study.baseline}\n",
            "| variant | seeds | mean | sd over seeds | difference | 95 % interval | p | seeds above | sd over seeds |",
            "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        ]
        for one in rows:
            cells = [one.variant, str(len(one.by_seed)), f"{one.mean:.4f}", _number(one.spread)]
            if one.difference:
                change, above = one.difference, sum(value > 0 for value in one.differences.values())
                cells += [
                    f"{change.difference:+.4f}", f"[{change.low:+.4f}, {change.high:+.4f}]", f"{change.p_value:.2g}",
                    f"{above} of {len(one.differences)}", _number(one.difference_spread),
                ]  # fmt: skip
            parts.append("| " + " | ".join(cells + [""] * (9 - len(cells))) + " |")
        if measure in before:
            parts.append(f"\nUntuned: {before[measure]:.4f}.")
        counted = next((one for one in rows if one.difference), None)
        if counted:
            parts.append(
                f"\nPaired over {counted.pairs:,} differences. {counted.users:,} users are drawn for the interval "
                "(percentile bootstrap) and flipped for p (two-sided, not corrected for the number of comparisons)."
            )
    return "\n".join(parts) + "\n"


def write(study: Study, measured: Mapping[str, Sequence[Row]]) -> list[Path]:
    """table.md, table.json and table.csv, and differences.png where matplotlib is installed; the paths written."""
    document = to_json(study, measured)
    paths = [study.folder / f"table.{suffix}" for suffix in ("md", "json", "csv")]
    paths[0].write_text(to_markdown(study, measured), encoding="utf-8")
    paths[1].write_text(json.dumps(document, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    columns = ("mean", "seed_sd", "difference", "low", "high", "p_value", "difference_seed_sd", "pairs", "users")
    with paths[2].open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("measure", "variant", "seeds", *columns))
        for measure, rows in document["measures"].items():
            for one in rows:
                cells = (one.get(column) for column in columns)
                writer.writerow((measure, one["variant"], len(one["by_seed"]), *cells))
    picture = draw(study.folder / "differences.png", study, measured)
    return [*paths, picture] if picture else paths


def draw(path: Path, study: Study, measured: Mapping[str, Sequence[Row]]) -> Path | None:
    """A dot with its interval for every difference, a faint one per seed; None without matplotlib or differences."""
    panels = {measure: [one for one in rows if one.difference] for measure, rows in measured.items()}
    panels = {measure: rows for measure, rows in panels.items() if rows}
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    if not panels:
        return None
    height = 1.2 + 0.45 * max(map(len, panels.values()))
    figure = Figure(figsize=(5.5 * len(panels), height), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (measure, rows) in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels.items()):
        axes.axvline(0.0, color="#9aa0a6", linewidth=1)
        for at, one in enumerate(reversed(rows)):
            change = cast(metrics.Comparison, one.difference)
            axes.plot(list(one.differences.values()), [at] * len(one.differences), ".", color="#5b8fd0", alpha=0.5)
            axes.plot([change.low, change.high], [at, at], color="#333333", linewidth=1.5)
            axes.plot([change.difference], [at], "o", color="#1a9850")
        axes.set_yticks(range(len(rows)), [one.variant for one in reversed(rows)])
        axes.set_ylim(-0.6, len(rows) - 0.4)
        axes.set_title(f"{measure}: difference to {study.baseline}", loc="left", fontsize=11)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Software": None})
    return path


def _deviation(by_seed: Mapping[int, float]) -> float:
    return float(np.std(list(by_seed.values()), ddof=1)) if len(by_seed) > 1 else float("nan")


def _number(value: float) -> str:
    return f"{value:.4f}" if np.isfinite(value) else ""
