"""report.html and its plots, from the files of a run: what the page shows is gathered here, pages/ shows it.

One self-contained page: no script, no outside request, titles escaped. Reads results.json and predictions.jsonl and,
where they are, trainer_state.json and config.yaml; a section without its data is left out.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ..errors import AlroFastError
from ..ranking.hybrid import constants_of
from ..run_folder import as_now_called
from . import metrics
from .plots import Plots, loss_plot, ndcg_plot, order_plot, position_plot, rankers, validation_plot  # fmt: skip
from .results import BASELINES, LABELS

EXAMPLES = 20


def write_report(folder: str | Path, run_folder: str | Path | None = None) -> Path:
    """Write report.html and plots/*.png into `folder`, from the files there; returns the page's path.

    run_folder: where training left trainer_state.json and config.yaml, when that is another folder.
    Raises AlroFastError without results.json, or without matplotlib (the `plots` extra).
    """
    folder = Path(folder)
    run_folder = Path(run_folder or folder)
    results = _json(folder / "results.json")
    if results is None and (folder / "preference_results.json").is_file():
        raise AlroFastError(f"{folder} is a preference run: its figures are in preference_results.json, without a page")
    if not isinstance(results, dict) or "about" not in results:
        raise AlroFastError(f"{folder} holds no results.json of alro_fast; run alro_fast.evaluate or alro_fast.train")
    predictions = _lines(folder / "predictions.jsonl")
    state = _json(run_folder / "trainer_state.json") or {}
    history = state.get("log_history", [])
    config = _yaml(run_folder / "config.yaml")

    plots, about = Plots(folder / "plots"), results["about"]
    placed, note = placed_rankers(results)
    first = next(iter(results.values()))
    page = (
        pages()
        .get_template("report.html.jinja")
        .render(
            title=f"Ranking report: {folder.resolve().name}",
            results=results,
            about=about,
            config=config,
            rankers=rankers(results),
            metrics=[key for key in first if f"{key}_interval" in first],
            within=[key for key in first if key.startswith("within_")],
            verdict=next(
                (c for c in about["comparisons"] if (c["second"], c["metric"]) == ("untuned", "ndcg@3")), None
            ),
            best=best_without_a_model(results),
            comparisons=[c for c in about.get("comparisons", []) if c["metric"] in ("ndcg@3", "ndcg@10")],
            note=note,
            order=told_by(results, "order_kendall_tau"),
            repeated=told_by(results, "shown_kendall_tau"),
            validated=only_validation(history),
            speed=speed_rows(results, history),
            examples=examples(predictions, targets="ceiling" in about),
            plots={
                "ndcg": plots.draw("ndcg", "NDCG with 95 % intervals", ndcg_plot, results),
                "position": plots.draw(
                    "position", "Mean score by presented position", position_plot, (predictions, placed)
                ),
                "order": plots.draw("order", "Kendall tau between presentations of one list", order_plot, predictions),
                "loss": plots.draw("loss", "Training loss and its parts", loss_plot, history),
                "validation": plots.draw("validation", "NDCG on the validation lists", validation_plot, history),
            },
        )
    )
    path = folder / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def report_line(folder: str | Path, run_folder: str | Path | None = None) -> str:
    """Write the report and say where it is, or why there is none: what was measured does not fail with its page."""
    try:
        return f"report: {write_report(folder, run_folder)}"
    except Exception as error:
        return f"no report.html: {str(error).strip().partition(chr(10))[0] or type(error).__name__}"


# ---- what the page shows


def best_without_a_model(results: dict) -> str | None:
    """The ranker that needs no model and has the highest NDCG@3, beside a tuned model; None: there is none."""
    plain = [name for name in BASELINES if name in results]
    measured = [name for name in plain if results[name].get("ndcg@3") is not None and "tuned" in results]
    return max(measured, key=lambda name: results[name]["ndcg@3"], default=None)


def placed_rankers(results: dict) -> tuple[tuple[str, ...], str]:
    """Whose scores are shown by place, and what to know of them.

    A hybrid whose constants have a weight for the place in the list as given (those of the code: 0.05) counts it by
    definition: its listwise task alone tells whether the model itself looks at the place.
    """
    made = re.match(r"method hybrid \((.+?) constants", results["about"].get("conventions", {}).get("rankings", ""))
    constants = as_now_called({"hybrid": made[1]})["hybrid"] if made else "figure"
    if not constants_of(constants).order:
        return ("untuned", "tuned"), ""
    note = (
        "The hybrid's own scores are not shown: they count the place in the list as given by definition. Unless "
        "presentations were shuffled that is the first stage's order, so that a slope of the listwise task may be "
        "merit as well."
    )
    return ("listwise",), note


def told_by(results: dict, key: str) -> dict[str, float]:
    """A figure per ranker, of those that have it."""
    found = {name: results[name].get(key) for name in rankers(results)}
    return {name: tau for name, tau in found.items() if tau is not None}


def only_validation(history: list[dict]) -> dict | None:
    """The validation's figures where there was one alone, too few for a curve."""
    measured = [entry for entry in history if any(key.startswith("eval_ndcg@") for key in entry)]
    return measured[0] if len(measured) == 1 else None


def speed_rows(results: dict, history: list[dict]) -> list[tuple[str, str]]:
    """Lists per second when ranking and training, and the peak memory: what, how much."""
    rows = [
        (f"ranking, {LABELS.get(name, name)}", f"{results[name]['lists_per_second']:,.1f} lists/s")
        for name in rankers(results)
        if results[name].get("lists_per_second") is not None
    ]
    if results["about"].get("peak_memory_gib") is not None:
        rows.append(("ranking, peak memory", f"{results['about']['peak_memory_gib']:.2f} GiB"))
    for key, label, unit in (
        ("lists_per_second", "training", "lists/s"),
        ("unique_tokens_per_second", "training", "distinct tokens/s"),
        ("sharing_ratio", "training, tokens without sharing / with it", "x"),
    ):
        values = [entry[key] for entry in history if key in entry]
        if values:
            rows.append((label, f"{np.median(values):,.1f} {unit} (median)"))
    return rows


def examples(predictions: list[dict], targets: bool) -> list[dict]:
    """A seeded draw of lists: what each ranker put first, with its NDCG@3.

    targets: lists are for one target each, the one rated candidate, and those that hold it are shown.
    """
    grades = [_grades(document, targets) for document in predictions]
    able = [pair for pair in zip(predictions, grades, strict=True) if len(np.unique(pair[1][~np.isnan(pair[1])])) > 1]
    drawn = np.random.default_rng(0).permutation(len(able))[:EXAMPLES]
    return [_example(*able[at]) for at in sorted(drawn)]


def _grades(document: dict, targets: bool) -> np.ndarray:
    """float64 [candidates] that NDCG is taken over; NaN: none. targets: 1 for the rated candidate, 0 for the others."""
    ratings = np.array([np.nan if c["rating"] is None else c["rating"] for c in document["candidates"]])
    return np.where(np.isnan(ratings), 0.0, 1.0) if targets else ratings


def _example(document: dict, grades: np.ndarray) -> dict:
    candidates = document["candidates"]
    columns = [
        (
            name,
            metrics.ndcg(np.array([prediction["scores"]]), grades[None], 3)[0],
            [candidates[i] for i in prediction["order"]],
        )
        for name, prediction in document["rankings"].items()
    ]
    return {"list_id": document["list_id"], "columns": columns}


def pages() -> Environment:
    """The templates of pages/, and the filters they use."""
    pages = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "pages"), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=StrictUndefined,
    )  # fmt: skip
    pages.filters["label"] = lambda ranker: LABELS.get(ranker, ranker)
    pages.filters["number"] = lambda value, digits=4: "–" if value is None else f"{value:.{digits}f}"
    pages.filters["whole"] = lambda value: f"{value:,}"
    return pages


# ---- files


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        raise AlroFastError(f"{path} is damaged: it is not JSON") from None


def _lines(path: Path) -> list[dict]:
    if not path.is_file():
        return []
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    except ValueError:
        raise AlroFastError(f"{path} is damaged: it is not JSON lines") from None


def _yaml(path: Path) -> dict:
    return yaml.safe_load(path.read_text(encoding="utf-8")) or {} if path.is_file() else {}
