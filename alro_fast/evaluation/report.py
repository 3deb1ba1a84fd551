"""report.html and its plots, from the files of a run.

One self-contained page: no script, no outside request, titles escaped. Reads results.json and predictions.jsonl and,
where they are, trainer_state.json and config.yaml; a section without its data is left out.
"""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from ..errors import AlroFastError
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

    plots = Plots(folder / "plots")
    placed, note = placed_rankers(results)
    sections = [
        headline(results),
        section(
            "Ranking quality",
            plots.draw("ndcg", "NDCG with 95 % intervals", ndcg_plot, results),
            quality_table(results),
            generated_text(results["about"]),
        ),
        section("Within the lists that hold their target", within_table(results)),
        section("Is the difference real?", comparison_table(results)),
        section(
            "Does the place on the page matter?",
            plots.draw("position", "Mean score by presented position", position_plot, (predictions, placed)),
            note,
            order_text(results),
            plots.draw("order", "Kendall tau between presentations of one list", order_plot, predictions),
        ),
        section(
            "Training",
            plots.draw("loss", "Training loss and its parts", loss_plot, history),
            plots.draw("validation", "NDCG on the validation lists", validation_plot, history),
            validation_text(history),
        ),
        section("Speed and memory", speed_table(results, history)),
        section("Twenty lists", examples(predictions, targets="ceiling" in results["about"])),
        section("How it was measured", definitions(results["about"]["conventions"])),
        section("Options of the run", definitions(config)),
    ]
    page = PAGE.format(
        title=html.escape(f"Ranking report: {folder.resolve().name}"), body="\n".join(filter(None, sections))
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


# ---- text


def section(title: str, *parts: str) -> str:
    """A headed section; nothing when all of its parts are empty."""
    body = "\n".join(part for part in parts if part)
    return f"<section><h2>{html.escape(title)}</h2>\n{body}\n</section>" if body else ""


def headline(results: dict) -> str:
    """What the page says in two sentences."""
    about = results["about"]
    text = (
        f"{about['lists_ranked']:,} {about['split']} lists of {about['users_ranked']:,} users, every ranker on the "
        f"same lists ({about['lists_all_equal']:,} more have all ratings equal and are set apart)."
    )
    if "ceiling" in about:
        text = (
            f"{about['lists']:,} {about['split']} lists, one for each user; {about['lists_with_their_target']:,} hold "
            f"their target, so that no ranker can exceed {about['ceiling']:.4f}. Every other user counts 0."
        )
    change = next((c for c in about["comparisons"] if c["second"] == "untuned" and c["metric"] == "ndcg@3"), None)
    verdict = ""
    if change:
        direction = "better" if change["difference"] > 0 else "worse"
        sure = "" if change["p_value"] < 0.05 else ", which chance alone could explain"
        verdict = (
            f"<p class=verdict>Tuning made NDCG@3 <b>{abs(change['difference']):.3f} {direction}</b>: "
            f"{_cell(results['untuned']['ndcg@3'])} to {_cell(results['tuned']['ndcg@3'])}{sure}.</p>"
        )
    plain = [name for name in BASELINES if name in results and "tuned" in results]
    best = max(plain, key=lambda name: results[name].get("ndcg@3") or 0.0, default=None)
    if best and results[best].get("ndcg@3") is not None:
        name, value = LABELS.get(best, best), _cell(results[best]["ndcg@3"])
        text += f" The best of them that needs no model, {name}, has NDCG@3 {value}."
    return f"{verdict}<p>{html.escape(text)}</p>"


def quality_table(results: dict) -> str:
    """Every metric of every ranker."""
    first = next(iter(results.values()))
    names = [key for key in first if f"{key}_interval" in first]
    rows = []
    for ranker in rankers(results):
        cells = []
        for name in names:
            low, high = results[ranker][f"{name}_interval"]
            span = f"<small>{_cell(low, 3)} to {_cell(high, 3)}</small>" if low is not None else ""
            cells.append(f"{_cell(results[ranker][name])}{span}")
        rows.append([html.escape(LABELS.get(ranker, ranker)), *cells])
    return table(["", *(name.upper() for name in names)], rows, highlight="tuned")


def within_table(results: dict) -> str:
    """Every metric of every ranker where a list has one target and holds it."""
    if "ceiling" not in results["about"]:
        return ""
    names = [key for key in next(iter(results.values())) if key.startswith("within_")]
    rows = [
        [html.escape(LABELS.get(ranker, ranker)), *(_cell(results[ranker][name]) for name in names)]
        for ranker in rankers(results)
    ]
    return table(["", *(name.removeprefix("within_").upper() for name in names)], rows, highlight="tuned")


def comparison_table(results: dict) -> str:
    """Tuned against the others, paired."""
    chosen = [c for c in results["about"].get("comparisons", []) if c["metric"] in ("ndcg@3", "ndcg@10")]
    rows = [
        [
            html.escape(f"tuned - {LABELS.get(c['second'], c['second'])}"),
            c["metric"].upper(),
            f"{c['difference']:+.4f}",
            f"{_cell(c['low'])} to {_cell(c['high'])}",
            "&lt; 0.001" if c["p_value"] < 0.001 else f"{c['p_value']:.3f}",
        ]
        for c in chosen
    ]
    note = "<p>Paired on the same lists; intervals by bootstrap, p by flipping signs, both over users.</p>"
    return table(["", "metric", "difference", "95 % interval", "p"], rows) + note if rows else ""


def generated_text(about: dict) -> str:
    """How many generated answers were of no use, where there are some."""
    rate = about.get("generate_invalid_rate")
    label = html.escape(LABELS["generate"])
    return "" if rate is None else f"<p>{label}: of {rate:.1%} of the lists an answer could not be read in full.</p>"


def placed_rankers(results: dict) -> tuple[tuple[str, ...], str]:
    """Whose scores are shown by place, and what to know of them.

    A hybrid with the constants of the code adds 0.05 for every place in the list as given: its listwise task alone
    tells whether the model itself looks at the place.
    """
    if "method hybrid (code" not in results["about"].get("conventions", {}).get("rankings", ""):
        return ("untuned", "tuned"), ""
    note = (
        "The hybrid's own scores are not shown: they count the place in the list as given by definition. Unless "
        "presentations were shuffled that is the first stage's order, so that a slope of the listwise task may be "
        "merit as well."
    )
    return ("listwise",), f"<p>{html.escape(note)}</p>"


def validation_text(history: list[dict]) -> str:
    """The validation's figures where there was one alone, too few for a curve."""
    measured = [entry for entry in history if any(key.startswith("eval_ndcg@") for key in entry)]
    if len(measured) != 1:
        return ""
    (entry,) = measured
    figures = ", ".join(
        f"{key.removeprefix('eval_').upper()} {_cell(entry[key])}" for key in entry if key.startswith("eval_ndcg@")
    )
    return f"<p>Validation lists, measured once, after step {entry.get('step', '–')}: {html.escape(figures)}.</p>"


def order_text(results: dict) -> str:
    """Order sensitivity in words."""
    said = [
        f"{name}: mean Kendall tau {entry['order_kendall_tau']:.3f} between presentations of the same list"
        for name, entry in results.items()
        if name != "about" and entry.get("order_kendall_tau") is not None
    ]
    return f"<p>{html.escape('; '.join(said))}.</p>" if said else ""


def speed_table(results: dict, history: list[dict]) -> str:
    """Lists per second when ranking and training, and the peak memory of both."""
    rows = [
        [f"ranking, {html.escape(LABELS.get(name, name))}", f"{results[name]['lists_per_second']:,.1f} lists/s"]
        for name in rankers(results)
        if results[name].get("lists_per_second") is not None
    ]
    if results["about"].get("peak_memory_gib") is not None:
        rows.append(["ranking, peak memory", f"{results['about']['peak_memory_gib']:.2f} GiB"])
    for key, label, unit in (
        ("lists_per_second", "training", "lists/s"),
        ("unique_tokens_per_second", "training", "distinct tokens/s"),
        ("sharing_ratio", "training, tokens without sharing / with it", "x"),
    ):
        values = [entry[key] for entry in history if key in entry]
        if values:
            rows.append([label, f"{np.median(values):,.1f} {unit} (median)"])
    return table(["", ""], rows) if rows else ""


def examples(predictions: list[dict], targets: bool) -> str:
    """A seeded draw of lists: what was ranked first before and after tuning, with the user's ratings.

    targets: lists are for one target each, the one rated candidate, and those that hold it are shown.
    """
    grades = [_grades(document, targets) for document in predictions]
    able = [pair for pair in zip(predictions, grades, strict=True) if len(np.unique(pair[1][~np.isnan(pair[1])])) > 1]
    if not able:
        return ""
    drawn = np.random.default_rng(0).permutation(len(able))[:EXAMPLES]
    cards = f"<div class=cards>{''.join(_card(*able[at]) for at in sorted(drawn))}</div>"
    whose = "of the target, the item liked next" if targets else "the user's own rating"
    return f"<p>Drawn at random, seed 0. The number is {whose}, which no model saw.</p>{cards}"


def _grades(document: dict, targets: bool) -> np.ndarray:
    """float64 [candidates] that NDCG is taken over; NaN: none. targets: 1 for the rated candidate, 0 for the others."""
    ratings = np.array([np.nan if c["rating"] is None else c["rating"] for c in document["candidates"]])
    return np.where(np.isnan(ratings), 0.0, 1.0) if targets else ratings


def _card(document: dict, grades: np.ndarray) -> str:
    candidates = document["candidates"]
    columns = []
    for name, prediction in document["rankings"].items():
        value = metrics.ndcg(np.array([prediction["scores"]]), grades[None], 3)[0]
        items = "".join(
            f"<li><b>{_rating(candidates[i]['rating'])}</b> {html.escape(candidates[i]['title'])}</li>"
            for i in prediction["order"]
        )
        columns.append(f"<div><h4>{html.escape(name)} <small>NDCG@3 {value:.3f}</small></h4><ol>{items}</ol></div>")
    return (
        f"<article><h3>List {html.escape(document['list_id'])}</h3><div class=sides>{''.join(columns)}</div></article>"
    )


def definitions(entries: dict) -> str:
    """Names and what they stand for."""
    rows = "".join(
        f"<dt>{html.escape(str(key))}</dt><dd>{html.escape(str(value))}</dd>" for key, value in entries.items()
    )
    return f"<dl>{rows}</dl>" if rows else ""


def table(head: Sequence[str], rows: Sequence[Sequence[str]], highlight: str | None = None) -> str:
    """Cells are HTML already."""
    top = "".join(f"<th>{cell}</th>" for cell in head)
    body = ""
    for first, *rest in rows:
        mark = " class=best" if first == highlight else ""
        body += f"<tr{mark}><th>{first}</th>{''.join(f'<td>{cell}</td>' for cell in rest)}</tr>"
    return f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"


def _rating(rating: float | None) -> str:
    return "–" if rating is None else f"{rating:g}"


def _cell(value: float | None, digits: int = 4) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


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


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>
:root {{ color-scheme: light; }}
body {{ font: 15px/1.5 system-ui, sans-serif; color: #1f2328; background: #fff; max-width: 1080px; margin: 2rem auto;
  padding: 0 1.25rem; }}
h1 {{ font-size: 1.7rem; margin: 0 0 .5rem; }}
h2 {{ font-size: 1.2rem; margin: 2.4rem 0 .6rem; padding-bottom: .25rem; border-bottom: 1px solid #d8dee4; }}
h3 {{ font-size: .95rem; margin: 0 0 .3rem; overflow-wrap: anywhere; }}
h4 {{ font-size: .85rem; margin: 0 0 .2rem; }}
.verdict {{ font-size: 1.15rem; }}
img {{ max-width: 100%; height: auto; display: block; margin: .6rem 0; }}
table {{ border-collapse: collapse; width: 100%; margin: .6rem 0; font-size: .88rem;
  font-variant-numeric: tabular-nums; }}
th, td {{ padding: .3rem .5rem; text-align: right; border-bottom: 1px solid #eaeef2; white-space: nowrap; }}
tbody th, thead th:first-child {{ text-align: left; font-weight: 500; }}
thead th {{ color: #57606a; font-weight: 500; }}
td small {{ display: block; color: #57606a; font-size: .75rem; }}
.best {{ background: #eaf6ee; }}
.cards {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(480px, 1fr)); gap: 1rem; }}
article {{ border: 1px solid #d8dee4; border-radius: 6px; padding: .7rem .9rem; min-width: 0; }}
.sides {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(0, 1fr)); grid-auto-flow: column; gap: .8rem; }}
ol {{ margin: 0; padding-left: 1.5rem; font-size: .82rem; }}
li::marker {{ color: #8c959f; }}
li b {{ display: inline-block; min-width: 1.8em; }}
li {{ overflow-wrap: anywhere; }}
small {{ color: #57606a; font-weight: 400; }}
dl {{ display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; font-size: .88rem; }}
dt {{ color: #57606a; }}
dd {{ margin: 0; overflow-wrap: anywhere; }}
</style>
</head>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
"""
