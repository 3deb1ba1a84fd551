"""README.md of a run's folder: a model card as the Hugging Face hub reads it, written whether it is pushed or not."""

from __future__ import annotations

import math
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ... import __version__
from ...evaluation.results import LABELS

if TYPE_CHECKING:
    from ...data.lists import PreparedData
    from ..config import Config

PACKAGES = ("torch", "transformers", "peft", "accelerate")
SHOWN = ("ndcg@1", "ndcg@3", "ndcg@5", "ndcg@10", "pair_accuracy", "user_auc")


def model_card(config: Config, prepared: PreparedData, answers: str, results: Mapping[str, Any] | None = None) -> str:
    """The card: base model, method, data and its licence, results, how to use it and how it was made.

    answers: what the model answers, in words. results: what results.json holds, or preference_results.json (by data
    sets); None while there are none: cards of checkpoints.
    """
    base, data = config.model.model_name_or_path, str(prepared.manifest.get("dataset", "unnamed"))
    measured = _by_data(results or {}, data)
    front = ModelCardData(
        library_name="peft" if config.model.use_peft else "transformers",
        tags=["recommendation", "ranking", "alro_fast"],
        base_model=base if _on_the_hub(base) else None, model_name="tuned" if measured else None,
        eval_results=[one for name, rows in measured.items() for one in _evaluated(name, rows)] or None,
    )  # fmt: skip
    prompt = "signal_tokens.json" if config.data.identifiers == "signals" else "prompt_template.yaml"
    use = "rank --adapter FOLDER lists.json" if prepared.items else "evaluate --adapter FOLDER --preferences FILE"
    lines = [
        f"---\n{front.to_yaml()}\n---\n",
        f"# A ranker tuned with alro_fast {__version__}\n",
        f"- base model: {base}",
        f"- objective: {config.description.title}, answers as {answers}, candidates named by {config.data.identifiers}",
        f"- data: {data}; {'invented' if data == 'demo' else _licence(prepared.manifest.get('licence'))}",
        "- terms: those of the base model and of the data hold for what was made of them\n",
        *(f"## Results\n\nTest lists of {name}, means.\n\n{_table(rows)}\n" for name, rows in measured.items()),
        f"## Use\n\n```bash\npython -m alro_fast.{use}\n```\n",
        "## How it was made\n",
        "```bash\npython -m alro_fast.train --config FOLDER/config.yaml --output_dir again\n```\n",
        "All options are in config.yaml, where the data come from in data_manifest.json, the prompt in "
        f"{prompt}, every figure with its interval in results.json. Versions: "
        f"alro_fast {__version__}, {', '.join(f'{name} {version(name)}' for name in PACKAGES)}.",
    ]
    return "\n".join(lines) + "\n"


def _on_the_hub(base: str) -> bool:
    """Whether a name can be that of a repository of the hub; folders, `demo` and `scratch` are none."""
    try:
        validate_repo_id(base)
    except HFValidationError:
        return False
    return "/" in base and not Path(base).exists()


def _licence(licence: Any) -> str:
    if not licence:
        return "its licence is not recorded"
    return f"licence: {licence['name']} ({licence['url']}): {licence['terms']}"


def _by_data(results: Mapping[str, Any], data: str) -> dict[str, dict[str, dict[str, float]]]:
    """Data set -> ranker -> metric -> mean, of those that a card shows."""
    sets = {data: results} if "about" in results else results
    found = {}
    for name, rows in sets.items():
        kept = {ranker: _shown(row) for ranker, row in rows.items() if ranker != "about"}
        found[name] = {ranker: row for ranker, row in kept.items() if row}
    return {name: rows for name, rows in found.items() if rows}


def _shown(row: Mapping[str, Any]) -> dict[str, float]:
    given = {name: row[name] for name in SHOWN if isinstance(row.get(name), int | float)}
    return {name: float(value) for name, value in given.items() if math.isfinite(value)}


def _table(rows: Mapping[str, Mapping[str, float]]) -> str:
    metrics = [name for name in SHOWN if any(name in row for row in rows.values())]
    lines = [["ranker", *metrics], ["---"] * (1 + len(metrics))]
    for ranker, row in rows.items():
        name = f"**{ranker}**" if ranker == "tuned" else LABELS.get(ranker, ranker)
        lines.append([name, *(f"{row[each]:.4f}" if each in row else "" for each in metrics)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _evaluated(data: str, rows: Mapping[str, Mapping[str, float]]) -> list[EvalResult]:
    """The hub's `model-index`: what the tuned model was measured at."""
    return [
        EvalResult(
            task_type="text-ranking", task_name="Ranking", dataset_type=data, dataset_name=data, dataset_split="test",
            metric_type=name, metric_name=name.replace("_", " "), metric_value=round(value, 4),
        )
        for name, value in rows.get("tuned", {}).items()
    ]  # fmt: skip
